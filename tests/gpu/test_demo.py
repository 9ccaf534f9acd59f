"""The demo model on a GPU: the engine's greedy tokens are those of transformers in float32, up to ties."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import LLM, SamplingParams
from quantkit.errors import SourceError
from quantkit.formats.source import resolve_source
from tests.e2e.test_engine import QUESTIONS, TOPICS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture(scope="module")
def demo():
    try:
        return resolve_source("demo", announce=lambda line: None)
    except SourceError as error:
        pytest.skip(f"no demo model: {error}")


def load(demo, dtype):
    return AutoModelForCausalLM.from_pretrained(demo, dtype=dtype).eval().cuda()


@pytest.fixture(scope="module")
def reference(demo):
    return load(demo, torch.float32)


@pytest.fixture(scope="module")
def rounded(demo):
    return load(demo, torch.bfloat16)


def answers(demo, **settings):
    """64 prompts, and 128 tokens after each."""
    llm = LLM(demo, device="cuda", kv_cache_bytes=1 << 30, **settings)
    prompts = [
        llm.tokenizer.encode_prompt(question.format(topic), raw=False)
        for topic in TOPICS
        for question in QUESTIONS
    ]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=128, ignore_eos=True))
    return [
        (prompt, torch.tensor(output.outputs[0].token_ids, device="cuda"))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def logits_of(model, prompt, answer):
    """What the model says of each token of an answer."""
    ids = torch.cat((torch.tensor(prompt, device="cuda"), answer))
    with torch.inference_mode():
        return model(ids[None, :-1]).logits[0, len(prompt) - 1 :].float()


def gaps(logits, token_ids):
    """How far below the likeliest token each is."""
    return logits.amax(1) - logits.gather(1, token_ids[:, None])[:, 0]


@pytest.mark.parametrize("eager", [False, True])
def test_tokens_in_float32_are_transformers(eager, demo, reference):
    for prompt, answer in answers(demo, dtype="float32", eager=eager):
        assert float(gaps(logits_of(reference, prompt, answer), answer).max()) < 1e-3


@pytest.mark.parametrize("eager", [False, True])
def test_tokens_in_bf16_are_as_good_as_transformers_in_bf16(eager, demo, reference, rounded):
    """What rounding does to transformers: of as many tokens as float32 would not choose, none is further from it."""
    ours, theirs = [], []
    for prompt, answer in answers(demo, dtype="bfloat16", eager=eager):
        exact = logits_of(reference, prompt, answer)
        ours.append(gaps(exact, answer))
        theirs.append(gaps(exact, logits_of(rounded, prompt, answer).argmax(1)))
    found, expected = torch.cat(ours), torch.cat(theirs)
    for name, each in (("engine", found), ("transformers", expected)):
        print(f"bf16, eager {eager}, {name}: {int((each > 0).sum())} tokens, up to {float(each.max()):.3f}")
    assert float(found.max()) < 1.25 * float(expected.max())
    assert int((found > 0).sum()) < 1.25 * int((expected > 0).sum())
