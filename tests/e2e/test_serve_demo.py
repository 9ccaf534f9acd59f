"""A model that makes sense, served: what people see who try it first."""

import json
import shutil
import subprocess

import openai
import pytest

from tests.serving import serving

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "is_capital": {"type": "boolean"}},
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    options = ("--max-num-seqs", "4", "--max-model-len", "1024", "--tool-call-parser", "hermes")
    with serving("demo", *options) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_it_answers_streams_and_continues(client):
    settings = {"model": "demo", "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    answer = client.chat.completions.create(**settings)
    text = answer.choices[0].message.content
    assert "Paris" in text
    chunks = client.chat.completions.create(**settings, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    conversation = [*QUESTION, answer.choices[0].message, {"role": "user", "content": "And of Italy?"}]
    again = client.chat.completions.create(**{**settings, "messages": conversation})
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    completion = client.completions.create(
        model="demo", prompt="One, two, three,", max_tokens=4, temperature=0
    )
    assert completion.choices[0].text.startswith(" four")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_the_same(server, client):
    body = {"model": "demo", "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(**body)
    raw = json.loads(curl(server, body))
    assert raw["choices"] == [choice.model_dump(exclude_unset=True) for choice in answer.choices]
    assert set(raw) == {"id", "object", "created", "model", "choices", "usage"}
    *events, done = curl(server, {**body, "stream": True}).split("\n\n")[:-1]
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == answer.choices[0].message.content


def curl(server, body):
    """What it prints, for a body."""
    command = ["curl", "-sSN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    result = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_answers_in_json(client):
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    settings = {"model": "demo", "messages": QUESTION, "max_tokens": 60, "temperature": 0}
    answer = client.chat.completions.create(**settings, response_format=schema)
    found = json.loads(answer.choices[0].message.content)
    assert (
        set(found) == {"city", "is_capital"}
        and "Paris" in found["city"]
        and found["is_capital"] in (True, False)
    )
    free = client.chat.completions.create(**settings)
    assert "Paris" in free.choices[0].message.content and "{" not in free.choices[0].message.content


def test_it_calls_a_tool(client):
    """Which its template knows nothing of: the server describes it."""
    tool = {"name": "weather", "description": "The weather of a city.", "parameters": CITY}
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    settings = {"model": "demo", "tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
    settings |= {"parallel_tool_calls": False, "max_tokens": 80, "temperature": 0}
    answer = client.chat.completions.create(**settings, messages=messages).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather" and "Paris" in json.loads(call.function.arguments)["city"]
    chunks = client.chat.completions.create(**settings, messages=messages, stream=True)
    deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    told = client.chat.completions.create(**settings | {"tool_choice": "none"}, messages=messages)
    assert told.choices[0].message.content
