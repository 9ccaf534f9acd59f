"""The engine on a real model: tokens are transformers', many at once, and what is cached is not computed again."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import LLM, SamplingParams
from quantkit.formats.source import resolve_source

TIE = 1e-3  # of logits in float32: the two likeliest are no further apart
TOPICS = ("rivers", "bread", "trains", "the moon", "chess", "rain", "bridges", "salt")
TOPICS += ("owls", "maps", "glass", "winter", "music", "clocks", "gold", "bees")
QUESTIONS = (
    "Tell me about {}.",
    "Why do people like {}?",
    "Write a short story with {} in it, and give it an end that nobody expects.",
    "List five facts about {}, then say which of them you are not sure of, and why.",
)


@pytest.fixture(scope="module")
def demo():
    return resolve_source("demo", announce=lambda line: None)


@pytest.fixture(scope="module")
def llm(demo):
    return LLM(demo, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("num_prompts", "num_tokens"),
    [(8, 24), pytest.param(64, 128, marks=[pytest.mark.long, pytest.mark.timeout(1800)])],
)
def test_greedy_tokens_equal_transformers(num_prompts, num_tokens, demo, llm):
    prompts = [
        llm.tokenizer.encode_prompt(question.format(topic), raw=False)
        for topic in TOPICS
        for question in QUESTIONS
    ][:num_prompts]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    reference = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0].token_ids
        assert len(answer) == num_tokens
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert float((logits.amax(1) - chosen).max()) < TIE


def test_a_shared_beginning_is_computed_once(llm):
    system = {"role": "system", "content": "You are a careful assistant. " * 40}
    conversations = [
        [system, {"role": "user", "content": QUESTIONS[0].format(topic)}] for topic in TOPICS[:6]
    ]
    params = SamplingParams(max_tokens=8)
    alone = [llm.chat(conversation, params)[0] for conversation in conversations]
    together = llm.chat(conversations, params)
    assert [output.outputs[0].text for output in together] == [output.outputs[0].text for output in alone]
    assert alone[0].num_cached_tokens == 0
    shared = len(llm.tokenizer.encode_chat([system, {"role": "user", "content": ""}])) - 32
    assert all(output.num_cached_tokens > shared for output in [*alone[1:], *together])
