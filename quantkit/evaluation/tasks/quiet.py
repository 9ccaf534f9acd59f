"""lm-eval and datasets talk a lot: what they say is kept from the terminal, their warnings passed on."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator


class _PassedOn(logging.Handler):
    """Says each warning once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        if line not in self._said:
            self._said.add(line)
            self._say(f"lm-eval: {line}")


@contextlib.contextmanager
def quiet(say: Callable[[str], None] | None = None, *, hides_stderr: bool = True) -> Iterator[None]:
    """No Python warnings, no log lines. say: told lm-eval's warnings; None: nobody is.

    hides_stderr: no progress bars either; for stretches in which nobody else writes there.
    """
    hidden = contextlib.redirect_stderr(io.StringIO()) if hides_stderr else contextlib.nullcontext()
    logger = logging.getLogger("lm_eval")
    handler = logging.NullHandler() if say is None else _PassedOn(say)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(), hidden:
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
