"""Logs as JSON, a line each on stderr. Control characters are escaped, whoever wrote them; prompts are not logged."""

import json
import logging
import sys
import threading
import time
import traceback
from types import TracebackType

logger = logging.getLogger("quantkit.server")


class JsonFormatter(logging.Formatter):
    """A record as one object; `extra={"fields": {…}}` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= record.__dict__.get("fields", {})
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)  # ASCII alone: no byte of a client can move a terminal's cursor


def log_as_json() -> None:
    """Have this process write all its logs so, and what kills it, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda found: _log_uncaught(
        found.exc_type, found.exc_value or found.exc_type(), found.exc_traceback
    )


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logger.critical("uncaught %s", kind.__name__, exc_info=(kind, error, traceback))
