"""Bodies that go wrong in every way that bodies do; the same ones for the same seed."""

import copy
import json
import random
from typing import Any, NamedTuple

# token 1 ends an answer: short ones, whatever becomes of max_tokens
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Köln"]}, "n": {"type": "integer"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA},
}
SAMPLING = {
    "model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["ab", "c"], "n": 1,
    "logit_bias": {"1": 6}, "presence_penalty": 0.5, "min_p": 0.1, "top_k": 5, "user": "u", "stream": False,
}  # fmt: skip
ANSWER_FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
VALID = (
    ("/v1/completions", {**SAMPLING, "prompt": "Hi", "logprobs": 2}),
    ("/v1/completions", {**SAMPLING, "prompt": [[9, 8], [7]], "stream": True}),
    ("/v1/chat/completions", {**SAMPLING, "messages": HI, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**SAMPLING, "messages": HI, "tools": [TOOL], "tool_choice": "auto"}),
    ("/v1/chat/completions", {**SAMPLING, "messages": HI, "response_format": ANSWER_FORMAT}),
    ("/tokenize", {"messages": HI, "chat_template_kwargs": {"enable_thinking": True}}),
    ("/detokenize", {"model": "tiny", "tokens": [9, 8, 7]}),
)
NUMBERS = (-1, 0, 17, 1 << 31, 1 << 63, 10**400, -(10**400), 0.5, 1e308, float("nan"), float("-inf"))
TEXTS = ("", "x", "\0", "\x1b[31m", "\ud800", "ÿ" * 300, "x" * 100_000, "9" * 5000, "$ref", "<|tool|>")
TYPES = ("application/json",) * 12 + (
    "", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "application/json; charset=utf-16"
)  # fmt: skip


class Malformed(NamedTuple):
    path: str
    content_type: str
    body: bytes


def malformed(numbers: random.Random) -> Malformed:
    """One more; a few are valid after all."""
    path, valid = numbers.choice(VALID)
    body = copy.deepcopy(valid)
    for _ in range(numbers.choice((1, 1, 2, 4))):
        _change(body, numbers)
    written = json.dumps(body, ensure_ascii=numbers.random() < 0.7).encode(errors="surrogatepass")
    if numbers.random() < 0.3:
        written = _damaged(written, numbers)
    return Malformed(path, numbers.choice(TYPES), written)


def _change(body: dict[str, Any], numbers: random.Random) -> None:
    """One value, one name, or one more, at a random depth."""
    node: Any = body
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = numbers.choice(keys)
        if not isinstance(node[key], dict | list) or numbers.random() < 0.3:
            break
        node = node[key]
    if numbers.random() < 0.7:
        node[key] = _value(numbers)
    elif isinstance(node, dict) and numbers.random() < 0.5:
        node[numbers.choice(("frobnicate", "$defs", "", "type", "n", "\ud800", "x" * 3000))] = _value(numbers)
    else:
        del node[key]


def _value(numbers: random.Random) -> Any:
    match numbers.randrange(6):
        case 0:
            return numbers.choice(NUMBERS)
        case 1:
            return numbers.choice(TEXTS)
        case 2:
            return numbers.choice((None, True, False, [], {}, [[]], {"type": []}))
        case 3:
            return [_value(numbers) for _ in range(numbers.randrange(4))]
        case 4:
            return {numbers.choice(TEXTS[:5]): _value(numbers) for _ in range(numbers.randrange(3))}
        case _:
            return _nested(numbers.choice((20, 500)), numbers)


def _nested(depth: int, numbers: random.Random) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if numbers.random() < 0.5 else {"properties": value}
    return value


def _damaged(written: bytes, numbers: random.Random) -> bytes:
    """As bytes: cut off, with others in it, or something else altogether."""
    place = numbers.randrange(len(written) + 1)
    match numbers.randrange(5):
        case 0:
            return written[:place]
        case 1:
            return written[:place] + numbers.randbytes(3) + written[place:]
        case 2:
            return written[:place] + written[place + 1 :]
        case 3:
            return numbers.choice((b"[", b'{"a":', b'"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"nul")) * (
                1 << place % 17
            )
        case _:
            return written.decode(errors="surrogatepass").encode("utf-16", errors="surrogatepass")
