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


@pytest.fixture(scope="module")
def reference(demo):
    return AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval().cuda()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("dtype", "tie"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_greedy_tokens_equal_transformers(dtype, tie, eager, demo, reference):
    """64 prompts, 128 tokens each. A tie: transformers puts the token no further below its own."""
    llm = LLM(demo, dtype=dtype, device="cuda", eager=eager, kv_cache_bytes=1 << 30)
    prompts = [
        llm.tokenizer.encode_prompt(question.format(topic), raw=False)
        for topic in TOPICS
        for question in QUESTIONS
    ]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=128, ignore_eos=True))
    gaps = []
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = torch.tensor(output.outputs[0].token_ids, device="cuda")
        ids = torch.cat((torch.tensor(prompt, device="cuda"), answer))
        with torch.inference_mode():
            logits = reference(ids[None, :-1]).logits[0, len(prompt) - 1 :]
        gaps.append(float((logits.amax(1) - logits.gather(1, answer[:, None])[:, 0]).max()))
    parted = sum(gap > 0 for gap in gaps)
    print(f"{dtype}, eager {eager}: {parted} of {len(gaps)} answers part ways, gaps up to {max(gaps):.1e}")
    assert max(gaps) < tie
