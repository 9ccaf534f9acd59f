"""How a server is set up: what an operator may choose, checked when made. Free of torch: a command line reads it."""

import math
from dataclasses import dataclass

from quantkit.errors import ServerError
from quantkit.server.tool_calls import AUTO, NONE, style_named

MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """host, port: where to listen; port 0 takes a free one. api_keys: one of them is required; none: nobody is asked.

    served_model_name: what clients call the model; None: as the operator does. tool_call_parser: how it writes calls of
    tools: hermes, llama3_json, auto: as its chat template does, none: it may not. max_waiting: sequences beyond those
    that are computed at once.
    max_waiting_tokens: of prompts that nothing was computed of yet; one prompt may always wait.
    request_timeout: seconds from a request's arrival to its last byte. drain_seconds: that running requests get when
    the server is told to stop. engine_timeout: seconds in which no step of the engine ends, after which it is said to
    hang.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_name: str | None = None
    tool_call_parser: str = AUTO
    max_waiting: int = 512
    max_waiting_tokens: int = 1 << 20
    request_timeout: float = 600.0
    drain_seconds: float = 30.0
    engine_timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.tool_call_parser not in (AUTO, NONE):
            style_named(self.tool_call_parser)
        _check("port", self.port, 0 <= self.port <= MAX_PORT, f"a number from 0 to {MAX_PORT}")
        _check("max_waiting", self.max_waiting, self.max_waiting >= 0, "a number from 0 on")
        _check(
            "max_waiting_tokens", self.max_waiting_tokens, self.max_waiting_tokens >= 0, "a number from 0 on"
        )
        for name in ("request_timeout", "drain_seconds", "engine_timeout"):
            seconds = getattr(self, name)
            _check(name, seconds, math.isfinite(seconds) and seconds > 0, "seconds above 0")
        are_sane = all(key.isascii() and key.isprintable() and key.strip() == key for key in self.api_keys)
        if not are_sane or "" in self.api_keys:
            raise ServerError(
                "an API key is empty, or not of printable ASCII characters",
                fix="give one that a client can send in a header",
            )


def _check(name: str, value: object, is_fine: bool, expected: str) -> None:
    if not is_fine:
        raise ServerError(f"{name} {value} makes no sense", fix=f"give {expected}")
