"""What goes wrong with a request, as OpenAI's clients know it: a status and an error object."""

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

CLIENT_GONE = 499  # nobody reads this status but the log
MAX_SHOWN_CHARS = 200  # of what a client wrote, in what it is answered


class ErrorFields(TypedDict):
    """What is wrong, of which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is not 200."""

    error: ErrorFields


class ApiError(Exception):
    """An answer other than the one that was asked for. kind: OpenAI's `type`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> ErrorBody:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """400: the request itself."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, *, retry_after: int) -> ApiError:
    """429: too much waits already."""
    headers = {"Retry-After": str(retry_after)}
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def unavailable(message: str, code: str, *, closes: bool = False) -> ApiError:
    """503: not now. closes: this connection, too."""
    headers = {"Retry-After": "5"} | ({"Connection": "close"} if closes else {})
    return ApiError(503, message, kind="service_unavailable", code=code, headers=headers)


def failed(message: str, code: str | None = None) -> ApiError:
    """500: not the client's fault."""
    return ApiError(500, message, kind="server_error", code=code)


def engine_died() -> ApiError:
    """500: and this process will follow."""
    return failed("the engine died", "engine_dead")


def timed_out(seconds: float) -> ApiError:
    """504: the request had its time."""
    return ApiError(504, f"the request took longer than {seconds:g} s", kind="server_error", code="timeout")


def client_gone() -> ApiError:
    """The connection was closed before the answer was complete."""
    return ApiError(CLIENT_GONE, "the client closed the connection", code="client_gone")


def of_validation(problems: Sequence[Mapping[str, Any]], body: object) -> ApiError:
    """400 for the first thing that pydantic found wrong with a body."""
    problem = _innermost(problems, body)
    kind = str(problem["type"])
    if kind == "json_invalid":
        return invalid(f"the body is no JSON: {problem['msg']}", code="invalid_json")
    location = tuple(problem["loc"])[1:]
    if kind.startswith("union_tag"):  # variants are told apart by a field
        location = (*location, problem["ctx"]["discriminator"].strip("'"))
        kind = "missing" if kind == "union_tag_not_found" else kind
    param = _path(location, body, keeps_last=kind in ("missing", "extra_forbidden"))
    param = param[:MAX_SHOWN_CHARS]
    if not param:
        return invalid("the body is no JSON object, or has another Content-Type than application/json")
    if kind == "extra_forbidden":
        return invalid(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if kind == "missing":
        return invalid(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return invalid(f"Invalid value for '{param}': {problem['msg']}.", param=param, code=code)


def _innermost(problems: Sequence[Mapping[str, Any]], body: object) -> Mapping[str, Any]:
    """The first problem; of a value that fits none of its types, the one furthest inside it."""
    paths = [_path(tuple(problem["loc"])[1:], body, keeps_last=False) for problem in problems]
    within = (f"{paths[0]}.", f"{paths[0]}[")
    inside = [problem for problem, path in zip(problems, paths, strict=True) if path.startswith(within)]
    return max(inside, key=lambda problem: len(problem["loc"]), default=problems[0])


def _path(location: tuple[str | int, ...], body: object, *, keeps_last: bool) -> str:
    """Where in the body, as `messages[0].content`; pydantic's names of variants are left out."""
    path, node = "", body
    for number, part in enumerate(location, start=1):
        if isinstance(node, dict) and part in node:
            path, node = f"{path}.{part}" if path else str(part), node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            path, node = f"{path}[{part}]", node[part]
        elif keeps_last and number == len(location):
            path = f"{path}.{part}" if path else str(part)
    return path
