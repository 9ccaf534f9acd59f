"""A model that makes sense, served: what people see who try it first."""

import httpx2
import openai
import pytest

from tests.serving import serving

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture(scope="module")
def server():
    with serving("demo", "--max-num-seqs", "4", "--max-model-len", "1024") as running:
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


def test_curl_gets_the_same(server, client):
    body = {"model": "demo", "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    raw = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    answer = client.chat.completions.create(**body)
    assert raw["choices"] == [choice.model_dump(exclude_unset=True) for choice in answer.choices]
    assert set(raw) == {"id", "object", "created", "model", "choices", "usage"}
