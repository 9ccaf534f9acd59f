"""The story of a server: bind, load, serve until told to stop or until the engine dies, and the exit code."""

import asyncio
import errno
import signal
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvicorn

from quantkit.errors import ServerError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.source import resolve_source
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.tokenizer import load_tokenizer
from quantkit.server.admission import Admission
from quantkit.server.app import create_app
from quantkit.server.context import Context
from quantkit.server.defaults import read_defaults
from quantkit.server.engine_client import EngineClient
from quantkit.server.errors import unavailable
from quantkit.server.facts import read_facts
from quantkit.server.grammar_client import GrammarClient
from quantkit.server.lifecycle import Lifecycle, ServedModel
from quantkit.server.limits import MAX_HEADER_BYTES, SEND_SECONDS
from quantkit.server.logs import log_as_json, logger
from quantkit.server.metrics import Metrics
from quantkit.server.prompts import Prompts
from quantkit.server.settings import ServerSettings
from quantkit.server.tool_calls import NONE
from quantkit.server.tools import find_support

LINGER_SECONDS = 2.0  # in which a dead server says that it is, before it is gone
CLOSE_SECONDS = 5  # for clients to take the last bytes
BACKLOG = 2048
DIED = 1  # exit code
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: str, engine: EngineSettings, settings: ServerSettings, *, revision: str | None = None
) -> int:
    """Serve a model until SIGTERM or SIGINT; the exit code: 0 if told to stop, 1 if the engine died.

    model: a folder, hub id, .gguf file or "demo". Raises QuantkitError for what cannot be served.
    """
    log_as_json()
    with _listener(settings) as listener:
        if not settings.api_keys and settings.host not in LOOPBACK:
            logger.warning("no API key: whoever reaches this port may use the model")
        folder = resolve_source(model, revision=revision, announce=logger.info)
        read_spec(open_checkpoint(folder))  # a model that cannot run is refused now
        return asyncio.run(_Server(model, folder, engine, settings).run(listener))


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


class _Server:
    """One run."""

    def __init__(self, model: str, folder: Path, engine: EngineSettings, settings: ServerSettings) -> None:
        self._name = settings.served_model_name or model
        self._folder = folder
        self._engine_settings = engine
        self._settings = settings
        self._lifecycle = Lifecycle()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def run(self, listener: socket.socket) -> int:
        """HTTP around the engine's life; the exit code."""
        metrics = Metrics(self._name)
        admission = Admission(
            max_sequences=self._engine_settings.max_num_seqs + self._settings.max_waiting,
            max_waiting_tokens=self._settings.max_waiting_tokens,
        )
        engine = EngineClient(admission, metrics)
        prompts = Prompts()
        grammars = GrammarClient()
        context = Context(
            settings=self._settings,
            lifecycle=self._lifecycle,
            engine=engine,
            prompts=prompts,
            grammars=grammars,
            metrics=metrics,
        )
        http = uvicorn.Server(
            uvicorn.Config(
                create_app(context),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        while not http.started:
            await asyncio.sleep(0.01)
        self._take_signals()
        host, port = listener.getsockname()[:2]
        logger.info("listening", extra={"fields": {"host": host, "port": port}})
        try:
            return await self._live(context)
        finally:
            prompts.close()
            await grammars.close()
            http.should_exit = True
            await serving
            code = await engine.stop()
            logger.info("stopped", extra={"fields": {"engine_exit_code": code}})

    def _take_signals(self) -> None:
        """Once: stop when running requests have ended. Twice: now."""

        def on_signal() -> None:
            (self._stop_now if self._stop.is_set() else self._stop).set()

        for number in (
            signal.SIGTERM,
            signal.SIGINT,
        ):  # uvicorn's own handlers would close the socket at once
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    async def _live(self, context: Context) -> int:
        """From loading to the end; the exit code."""
        engine, lifecycle = context.engine, self._lifecycle
        loading = asyncio.create_task(self._load(engine))
        if not await _first(loading, self._stop.wait()):
            return 0
        lifecycle.become_ready(loading.result())
        context.metrics.ready(lifecycle.serving().engine)
        await _first(engine.died.wait(), self._stop.wait())
        if not engine.died.is_set():
            lifecycle.become_draining()
            logger.info("draining", extra={"fields": {"seconds": self._settings.drain_seconds}})
            await _first(
                engine.idle.wait(),
                engine.died.wait(),
                self._stop_now.wait(),
                asyncio.sleep(self._settings.drain_seconds),
            )
            engine.fail_all(unavailable("the server was stopped", "draining"))
        if engine.died.is_set():
            lifecycle.become_dead()
            logger.critical("the engine process died")
            await asyncio.sleep(LINGER_SECONDS)
            return DIED
        return 0

    async def _load(self, engine: EngineClient) -> ServedModel:
        """Tokenizer here, weights there, at the same time."""
        ready, tokenizer = await asyncio.gather(
            engine.start(self._folder, self._engine_settings),
            asyncio.to_thread(load_tokenizer, self._folder),
        )
        defaults = read_defaults(self._folder)
        tools = await asyncio.to_thread(find_support, tokenizer, self._settings.tool_call_parser)
        template = "the checkpoint's" if tokenizer.has_chat_template else "none: no chat, completions only"
        fields = {
            "model": self._name,
            "chat_template": template,
            "sampling_defaults": str(defaults),
            "tool_calls": str(tools or NONE),
            **ready._asdict(),
        }
        logger.info("ready", extra={"fields": fields})
        facts = read_facts(self._folder)
        return ServedModel(self._name, tokenizer, defaults, tools, ready, int(time.time()), facts)


async def _first(*awaitables: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> bool:
    """Wait for the first to be done, cancel the others; whether the very first one is done. Raises what it raised."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
    return tasks[0] in done
