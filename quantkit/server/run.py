"""A server from loading until it is told to stop or its engine dies: HTTP around the engine's life."""

import asyncio
import signal
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvicorn

from quantkit.runtime.heap import keep_what_lives_on
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.tokenizer import load_tokenizer
from quantkit.server.admission import Admission
from quantkit.server.app import create_app
from quantkit.server.context import Context
from quantkit.server.defaults import read_defaults
from quantkit.server.engine_client import EngineClient
from quantkit.server.engine_launch import EngineProcess
from quantkit.server.errors import unavailable
from quantkit.server.facts import read_facts
from quantkit.server.grammar_client import GrammarClient
from quantkit.server.lifecycle import Lifecycle, ServedModel
from quantkit.server.limits import BACKLOG, KEEP_ALIVE_SECONDS, MAX_HEADER_BYTES
from quantkit.server.logs import logger
from quantkit.server.metrics import Metrics
from quantkit.server.prompts import Prompts
from quantkit.server.settings import ServerSettings
from quantkit.server.tool_calls import NONE
from quantkit.server.tools import find_support

LINGER_SECONDS = 2.0  # in which a dead server says that it is, before it is gone
CLOSE_SECONDS = 5  # for clients to take the last bytes
LOOK_SECONDS = 5.0  # between looks at whether the engine still moves
DIED = 1  # exit code


class Server:
    """One run. name: what clients call the model. process: of the engine, which has been launched."""

    def __init__(
        self,
        name: str,
        folder: Path,
        engine: EngineSettings,
        settings: ServerSettings,
        process: EngineProcess,
    ) -> None:
        self._name = name
        self._folder = folder
        self._engine_settings = engine
        self._settings = settings
        self._process = process
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
        engine = EngineClient(admission, metrics, self._process.end)
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
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        while not http.started:
            await asyncio.sleep(0.01)
        self._take_signals()
        host, port = listener.getsockname()[:2]
        fields = {"host": host, "port": port, "asks_for_key": bool(self._settings.api_keys)}
        logger.info("listening", extra={"fields": fields})
        try:
            return await self._live(context)
        finally:
            prompts.close()
            await grammars.close()
            http.should_exit = True
            await serving
            engine.close()
            code = await asyncio.to_thread(self._process.exit_code)
            logger.info("stopped", extra={"fields": {"engine_exit_code": code}})

    def _take_signals(self) -> None:
        """Once: stop when running requests have ended. Twice: now."""

        def on_signal() -> None:
            (self._stop_now if self._stop.is_set() else self._stop).set()

        # uvicorn's own handlers would close the socket at once
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    async def _live(self, context: Context) -> int:
        """From loading to the end; the exit code."""
        engine, lifecycle = context.engine, self._lifecycle
        loading = asyncio.create_task(self._load(engine))
        if not await _first(loading, self._stop.wait()):
            return 0
        lifecycle.become_ready(loading.result())
        context.metrics.ready(lifecycle.serving().engine)
        await _first(engine.died.wait(), self._stop.wait(), self._watch(engine))
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

    async def _watch(self, engine: EngineClient) -> None:
        """Say so while the engine gives no sign of life, be it that a step does not return."""
        while True:
            if not await engine.answers(self._settings.engine_timeout):
                self._lifecycle.become_hung()
                logger.critical("the engine hangs")
                await engine.answers(None)
                self._lifecycle.go_on()
                logger.warning("the engine goes on")
            await asyncio.sleep(LOOK_SECONDS)

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
        keep_what_lives_on()
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
