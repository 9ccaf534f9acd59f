"""The states of the server: loading ─► ready ─► draining ─► the end; ready ◄─► hung; from any of them, dead."""

from enum import StrEnum
from typing import NamedTuple

from typing_extensions import TypedDict

from quantkit.runtime.tokenizer import Tokenizer
from quantkit.server.defaults import Defaults
from quantkit.server.errors import unavailable
from quantkit.server.facts import Facts
from quantkit.server.messages import Ready
from quantkit.server.tools import ToolSupport


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    HUNG = "hung"
    DRAINING = "draining"
    DEAD = "dead"


class Health(TypedDict):
    """What `/health` says; its status is 200 while it is ready."""

    status: State


class ServedModel(NamedTuple):
    """What requests need to know of the model. tools: None: it has none. created: Unix time. facts: for the page."""

    name: str
    tokenizer: Tokenizer
    defaults: Defaults
    tools: ToolSupport | None
    engine: Ready
    created: int
    facts: Facts | None


class Lifecycle:
    """Which state it is, and the model, from when there is one."""

    def __init__(self) -> None:
        self.state = State.LOADING
        self._model: ServedModel | None = None

    def become_ready(self, model: ServedModel) -> None:
        self._model = model
        self.state = State.READY

    def become_hung(self) -> None:
        self.state = State.HUNG

    def go_on(self) -> None:
        """From having hung."""
        self.state = State.READY

    def become_draining(self) -> None:
        self.state = State.DRAINING

    def become_dead(self) -> None:
        self.state = State.DEAD

    def serving(self) -> ServedModel:
        """The model, for a new request. Raises ApiError, a 503, if none is taken now."""
        if self._model is None or self.state is not State.READY:
            is_last = self.state in (State.DRAINING, State.DEAD)
            raise unavailable(f"the server is {self.state}", self.state, closes=is_last)
        return self._model
