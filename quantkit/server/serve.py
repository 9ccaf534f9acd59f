"""The story of a server: bind, launch the engine's process, find the model, serve it; and the exit code.

What takes long to import is imported after the engine's process is launched: it imports at the same time.
"""

import asyncio
import errno
import socket
from pathlib import Path

from quantkit.errors import ServerError
from quantkit.formats.source import resolve_source
from quantkit.runtime.settings import EngineSettings
from quantkit.server.engine_launch import launched_engine
from quantkit.server.limits import BACKLOG, SEND_SECONDS
from quantkit.server.logs import log_as_json, logger
from quantkit.server.settings import ServerSettings

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: str, engine: EngineSettings, settings: ServerSettings, *, revision: str | None = None
) -> int:
    """Serve a model until SIGTERM or SIGINT; the exit code: 0 if told to stop, 1 if the engine died.

    model: a folder, hub id, .gguf file or "demo". Raises QuantkitError for what cannot be served.
    """
    log_as_json()
    with _listener(settings) as listener, launched_engine() as process:
        if not settings.api_keys and settings.host not in LOOPBACK:
            logger.warning("no API key: whoever reaches this port may use the model")
        folder = resolve_source(model, revision=revision, announce=logger.info)
        name = settings.served_model_name or _name_of(model)
        from quantkit.server.run import Server

        return asyncio.run(Server(name, folder, engine, settings, process).run(listener))


def _name_of(model: str) -> str:
    """What clients call it: a hub id as it is, a folder or file without the places above it."""
    return Path(model).resolve().name if Path(model).exists() else model


def _listener(settings: ServerSettings) -> socket.socket:
    """The socket that clients connect to. Raises ServerError if it is not to be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    place = f"{settings.host}:{settings.port}"
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise ServerError(
            f"{place}: {error.strerror}",
            fix="stop what listens there, or give another --port"
            if taken
            else "give another --host or --port",
        ) from error
    # of connections as well: a client that takes nothing of what is sent for so long is cut off by the kernel
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SEND_SECONDS * 1000))
    return listener
