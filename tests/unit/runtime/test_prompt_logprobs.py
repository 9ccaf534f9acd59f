"""Scores of prompts: those of the model's own logits, however the engine gets to them."""

import itertools

import pytest
import torch

from quantkit import LLM, SamplingParams
from quantkit.errors import GenerationError
from quantkit.runtime import start as starting
from quantkit.runtime.load import load_model
from quantkit.runtime.structured_outputs import StructuredOutputsParams
from quantkit_kernels.paged_kv import BLOCK_SIZE
from tests.tiny_models import CONFIGS, save_tiny, tokens
from tests.unit.runtime.test_engine import blocks_bytes, capturing

LENGTHS = (2, 5, 16, 17, 18, 33, 40, 64)


@pytest.fixture
def saved(tmp_path, byte_tokenizer, monkeypatch):
    """A tiny Llama over bytes, of at most 64 tokens, with its tokenizer."""
    config = CONFIGS["llama"].to_dict() | {"vocab_size": 260, "max_position_embeddings": 64}
    monkeypatch.setitem(CONFIGS, "bytes", type(CONFIGS["llama"])(**config))
    folder = save_tiny("bytes", tmp_path / "model")
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def expected(saved):
    """Of a prompt: what `Model.logits` says of each token after the first."""
    model = load_model(saved, dtype=torch.float32)

    def of(prompt):
        logprobs_TV = model.logits(torch.tensor(prompt))[:-1].log_softmax(dim=-1)
        return logprobs_TV.gather(1, torch.tensor(prompt)[1:, None])[:, 0], logprobs_TV.argmax(dim=-1)

    return of


@pytest.fixture(params=["eager", "graphs"])
def captured(request, monkeypatch):
    if request.param == "graphs":
        monkeypatch.setattr(starting, "capture_on", lambda target: capturing())


def load(folder, **settings):
    return LLM(folder, **({"dtype": "float32", "device": "cpu", "max_num_seqs": 4} | settings))


def scored(start=0, **params):
    return SamplingParams(
        **({"max_tokens": 0, "prompt_logprobs": 0, "prompt_logprobs_start": start} | params)
    )


def prompts(lengths=LENGTHS, shared=0):
    common = tokens(shared, seed=99).tolist()
    return [[*common, *tokens(length, seed=length).tolist()][:length] for length in lengths]


def values(output):
    """Of the prompt's own tokens."""
    tokens_and_logprobs = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))
    return torch.tensor([of[token].logprob for token, of in tokens_and_logprobs if of is not None])


def check(output, expected, start=0):
    """Every number, to float error."""
    prompt = output.prompt_token_ids
    logprobs_T, likeliest_T = expected(prompt)
    first = max(1, start)
    assert output.finished and output.outputs[0].token_ids == [] and output.outputs[0].text == ""
    assert output.outputs[0].finish_reason == "length"
    assert output.prompt_logprobs[:first] == [None] * first and len(output.prompt_logprobs) == len(prompt)
    torch.testing.assert_close(values(output), logprobs_T[first - 1 :])
    is_greedy = [int(likeliest_T[at - 1]) == prompt[at] for at in range(first, len(prompt))]
    assert [output.prompt_logprobs[at][prompt[at]].rank == 1 for at in range(first, len(prompt))] == is_greedy


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_seqs": 1}, {"max_num_seqs": 2, "max_num_batched_tokens": 2 + BLOCK_SIZE}],
    ids=["together", "alone", "chunked"],
)
def test_scores_are_the_models(settings, saved, expected, captured):
    outputs = load(saved, **settings).generate(prompts(), scored())
    for output in outputs:
        check(output, expected)


def test_a_context_comes_from_the_cache_and_what_is_scored_does_not(saved, expected, captured):
    llm = load(saved)
    wanted = prompts((33, 34, 40, 50, 51), shared=32)
    starts = (33 - 1, 33, 17, 16, 1)
    llm.generate(wanted[0], scored())
    for prompt, start in zip(wanted, starts, strict=True):
        (output,) = llm.generate(prompt, scored(start))
        check(output, expected, start)
        assert output.num_cached_tokens == min(2, (start - 1) // BLOCK_SIZE) * BLOCK_SIZE, start
    for output, start in zip(llm.generate(wanted, [scored(start) for start in starts]), starts, strict=True):
        check(output, expected, start)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_ones_are_scored_once(prefix_caching, saved, expected):
    llm = load(saved, max_num_batched_tokens=20, prefix_caching=prefix_caching)
    wanted = prompts((40, 64))
    for number, prompt in enumerate(wanted):
        llm.requests.add(str(number), None, prompt, scored(), is_streamed=False)
    outputs = []
    for number in itertools.count():
        if not llm.requests.has_work:
            break
        outputs += llm.requests.step().outputs
        if number % 2 == 0 and number < 8:
            llm.started.engine.scheduler.preempt_all()
    assert llm.requests.stats.num_preemptions >= 3
    for output in outputs:
        check(output, expected)


def test_a_full_cache_changes_no_score(saved):
    params = SamplingParams(max_tokens=20, ignore_eos=True, prompt_logprobs=0)
    wanted = prompts((30, 31, 29))
    roomy = load(saved).generate(wanted, params)
    num_preemptions = 0
    for num_blocks in range(4, 9):
        llm = load(saved, kv_cache_bytes=blocks_bytes(saved, num_blocks), max_model_len=64)
        for found, undisturbed in zip(llm.generate(wanted, params), roomy, strict=True):
            assert found.outputs[0].token_ids == undisturbed.outputs[0].token_ids
            torch.testing.assert_close(values(found), values(undisturbed))
        num_preemptions += llm.requests.stats.num_preemptions
    assert num_preemptions > 0


def test_generation_goes_on_beside_it_and_after_it(saved, expected, captured):
    llm = load(saved)
    wanted = prompts((9, 17, 30, 20))
    plain = SamplingParams(max_tokens=12, ignore_eos=True)
    alone = [output.outputs[0].token_ids for output in llm.generate(wanted, plain)]
    both = SamplingParams(max_tokens=12, ignore_eos=True, prompt_logprobs=3, logprobs=1)
    outputs = load(saved).generate(wanted, [plain, both, scored(), both])
    assert [outputs[at].outputs[0].token_ids for at in (0, 1, 3)] == [alone[at] for at in (0, 1, 3)]
    check(outputs[2], expected)
    for output in (outputs[1], outputs[3]):
        logprobs_T, likeliest_T = expected(output.prompt_token_ids)
        for at, of in enumerate(output.prompt_logprobs[1:]):
            token = output.prompt_token_ids[at + 1]
            assert of[token].logprob == pytest.approx(float(logprobs_T[at]), abs=1e-5)
            assert next(iter(of)) == int(likeliest_T[at]) and 3 <= len(of) <= 4
    deltas = list(load(saved).stream(wanted[1], both))
    assert len(deltas) == 12 and all(len(delta.prompt_logprobs) == 17 for delta in deltas)


def test_the_longest_prompt_has_one_token_more_than_the_model_takes(saved):
    llm = load(saved)
    (output,) = llm.generate([tokens(65).tolist()], scored())
    assert len(output.prompt_logprobs) == 65
    with pytest.raises(GenerationError, match="65 tokens, and the model takes 64"):
        llm.generate([tokens(66).tolist()], scored())
    with pytest.raises(GenerationError, match="64 tokens, and the model takes 64"):
        llm.generate([tokens(64).tolist()], scored(max_tokens=1))


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs -1"),
        ({"prompt_logprobs_start": 3}, "prompt_logprobs_start 3"),
        ({"prompt_logprobs": 0, "n": 2}, "n 2"),
        ({"prompt_logprobs": 0, "max_tokens": 0, "min_tokens": 1}, "min_tokens 1"),
        (
            {"prompt_logprobs": 0, "max_tokens": 0, "structured_outputs": StructuredOutputsParams(regex="a")},
            "max_tokens 0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(params, problem):
    with pytest.raises(GenerationError, match=problem):
        SamplingParams(**params)


def test_a_prompt_without_a_scored_token_is_refused(saved):
    llm = load(saved)
    for prompt, start in (([5], 0), ([5, 6, 7], 3)):
        with pytest.raises(GenerationError, match="there are none"):
            llm.generate([prompt], scored(start))
    assert not llm.requests.has_work


def test_the_blocks_of_a_scored_prompt_serve_others(saved):
    llm = load(saved)
    prompt = tokens(40).tolist()
    cold = load(saved).generate([prompt], SamplingParams(max_tokens=5))[0].outputs[0].token_ids
    llm.generate([prompt], scored())
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=5))
    assert output.num_cached_tokens == 2 * BLOCK_SIZE and output.outputs[0].token_ids == cold
