"""JSON and calls of tools over HTTP: the real `openai` client, a model that would never write either by itself."""

import json

import httpx2
import openai
import pytest

from tests.byte_tokenizer import byte_tokenizer
from tests.serving import serving
from tests.tiny_chat import save_tiny_chat

HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
NO_PARAMETERS = {"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}
NO_OBJECT = {"id": "1", "function": {"name": "f", "arguments": "1"}}
IDS = byte_tokenizer()
BRIEF = {
    **dict.fromkeys(map(str, IDS(" \t\n\r").input_ids), -100),
    **dict.fromkeys(map(str, IDS('"}').input_ids), 5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat(tmp_path_factory.mktemp("tiny") / "model")


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(folder):
    options = ("--served-model-name", "tiny", "--tool-call-parser", "hermes")
    with serving(folder, *options) as running, client_of(running) as made:
        yield made


def ask(client, **body):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HI, "seed": 1, "max_tokens": 300, "logit_bias": BRIEF} | body
    )


def json_schema(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


def test_json_schema(client):
    answer = ask(client, response_format=json_schema(SCHEMA, strict=True), n=3)
    for choice in answer.choices:
        found = json.loads(choice.message.content)
        assert found["city"] in ("Köln", "Rome") and 1 <= found["days"] <= 9
        assert choice.finish_reason == "stop"


def test_json_object(client):
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=1000)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def forced(client, **body):
    """The calls of every choice, streamed and not: the same."""
    whole = ask(client, tools=TOOLS, n=2, **body)
    chunks = list(ask(client, tools=TOOLS, n=2, stream=True, **body))
    calls = []
    for choice in whole.choices:
        pieces = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        streamed = [call for piece in pieces for call in piece.delta.tool_calls or []]
        found = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert [(call.function.name, call.function.arguments) for call in streamed] == found
        assert [call.index for call in streamed] == list(range(len(found)))
        assert "".join(piece.delta.content or "" for piece in pieces) == (choice.message.content or "")
        assert pieces[-1].finish_reason == choice.finish_reason
        calls += found
    return whole, calls


def test_a_named_tool_is_called_once(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    answer, calls = forced(client, tool_choice=choice)
    assert [name for name, _ in calls] == ["weather"] * 2
    assert all(json.loads(arguments)["city"] in ("Köln", "Rome") for _, arguments in calls)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.choices[0].message.content is None


def test_a_call_is_required(client):
    answer, calls = forced(client, tool_choice="required", parallel_tool_calls=False)
    assert len(calls) == 2 and {name for name, _ in calls} <= {"weather", "now"}
    assert {choice.finish_reason for choice in answer.choices} == {"tool_calls"}


def test_calls_in_another_style(folder):
    with serving(folder, "--served-model-name", "tiny", "--tool-call-parser", "llama3_json") as running:
        assert running.logged[-1]["tool_calls"] == "llama3_json, described by the server"
        with client_of(running) as client:
            answer, calls = forced(client, tool_choice="required", parallel_tool_calls=False)
    assert len(calls) == 2 and {choice.finish_reason for choice in answer.choices} == {"tool_calls"}


def test_a_conversation_with_calls_goes_on(client):
    message = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    history = [*HI, message.model_dump(), result]  # with all that answers of others may have
    more = ask(client, messages=history, tools=TOOLS, max_tokens=5)
    assert more.usage.prompt_tokens > ask(client, tools=TOOLS, max_tokens=5).usage.prompt_tokens
    assert ask(client, messages=history, max_tokens=5).choices[0].finish_reason == "length"


def test_a_strict_tool_is_called_as_it_says_or_not_at_all(client):
    strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]
    for seed in range(3):
        choice = ask(client, tools=strict, seed=seed, max_tokens=60).choices[0]
        for call in choice.message.tool_calls or []:
            assert json.loads(call.function.arguments)["city"] in ("Köln", "Rome")


def test_no_tools_are_called_where_none_may_be(client):
    with_none = ask(client, tools=TOOLS, tool_choice="none", max_tokens=9, temperature=0)
    without = ask(client, max_tokens=9, temperature=0)
    assert with_none.choices[0].message.content == without.choices[0].message.content
    assert with_none.usage.prompt_tokens == without.usage.prompt_tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": json_schema({"not": {}}, strict=True)}, "response_format"),
        ({"response_format": json_schema({"$ref": "http://example.com"})}, "response_format"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"min_tokens": 2}}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [*TOOLS, NO_PARAMETERS], "tool_choice": "required"}, f"tools[{len(TOOLS)}].function.parameters"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [NO_OBJECT]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(client, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **body)
    assert caught.value.param == param


def test_a_schema_that_takes_forever_is_refused_and_others_are_answered(client):
    """Whose patterns meet in as many states as there are sets of them."""
    endless = {"type": "string", "allOf": [{"pattern": f"^.*a{number}.*$"} for number in range(30)]}
    with pytest.raises(openai.BadRequestError, match="too long"):
        ask(client, response_format=json_schema(endless))
    assert ask(client, response_format=json_schema(SCHEMA)).choices[0].finish_reason == "stop"


def test_tools_need_a_style(folder):
    """A template that does not know them, and an operator who has not chosen one."""
    with serving(folder, "--served-model-name", "tiny") as running:
        assert running.logged[-1]["tool_calls"] == "none"
        body = {"model": "tiny", "messages": HI, "tools": TOOLS}
        answer = httpx2.post(f"{running.url}/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
