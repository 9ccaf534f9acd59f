"""What pydantic finds wrong, as OpenAI's clients expect it: the field by its path."""

import pytest
from pydantic import ValidationError

from quantkit.server.chat_schema import ChatBody
from quantkit.server.completion_schema import CompletionBody
from quantkit.server.errors import of_validation
from quantkit.server.tokens import DetokenizeBody

HI = [{"role": "user", "content": "Hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def found(kind, body):
    try:
        kind.model_validate(body)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        return of_validation(problems, body)
    raise AssertionError("nothing is wrong")


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"top_p": float("nan")}, "top_p", "invalid_value"),
        ({"stop": 1}, "stop", "invalid_type"),
        ({"stop": ["a", 1]}, "stop[1]", "invalid_type"),
        ({"stop": "\ud800"}, "stop", "invalid_value"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "invalid_value"),
        ({"tool_choice": "never"}, "tool_choice", "invalid_value"),
        ({"messages": [*HI, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{**HI[0], "audio": {}}]}, "messages[0].audio", "unknown_parameter"),
        ({"chat_template_kwargs": {"add": True}}, "chat_template_kwargs.add", "unknown_parameter"),
        ({"user": "x" * 300}, "user", "invalid_value"),
    ],
)
def test_the_field_is_named(change, param, code):
    error = found(ChatBody, {"model": "m", "messages": HI, **change})
    assert (error.status, error.param, error.code) == (400, param, code)
    assert param in error.message


MANY = 300_000


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (CompletionBody, {"prompt": [""] * MANY + [1]}),
        (CompletionBody, {"prompt": [True] * MANY}),
        (CompletionBody, {"prompt": [[""] * MANY]}),
        (CompletionBody, {"stop": [1] * MANY}),
        (CompletionBody, {"stop_token_ids": [""] * MANY}),
        (CompletionBody, {"logit_bias": dict.fromkeys(map(str, range(MANY)), "")}),
        (CompletionBody, dict.fromkeys(map(str, range(MANY)))),
        (ChatBody, {"messages": [{}] * MANY}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (ChatBody, {"messages": [{"role": "user", "content": "", **dict.fromkeys(map(str, range(MANY)))}]}),
        (ChatBody, {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]}),
        (ChatBody, {"tools": [{}] * MANY}),
        (ChatBody, {"response_format": {"type": "text", **dict.fromkeys(map(str, range(MANY)))}}),
        (DetokenizeBody, {"tokens": [""] * MANY}),
    ],
)
def test_a_body_that_is_wrong_a_million_times_makes_few_errors(kind, change):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "m", **change})
    assert caught.value.error_count() < 10


def test_what_is_missing_is_named():
    assert found(CompletionBody, {"model": "m"}).param == "prompt"


def test_values_of_clients_are_not_repeated():
    error = found(ChatBody, {"model": "m", "messages": HI, "seed": "a secret"})
    assert "secret" not in error.message
