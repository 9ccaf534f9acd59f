"""The engine on a GPU: graphs, batches and chunks change nothing, and tokens are those of the model in float32."""

import pytest
import torch

from quantkit.formats.checkpoint import open_checkpoint
from quantkit.runtime import graphs
from quantkit.runtime.load import load_model
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.sequence import Sequence
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.start import start_engine
from quantkit_kernels.paged_kv import BLOCK_SIZE
from tests.gpu.test_decoder import folder  # noqa: F401
from tests.tiny_models import tokens
from tests.unit.runtime.test_engine import answers, run, sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
LENGTHS = (1, 5, 16, 17, 31, 33, 40, 9, 120, 64, 63, 65)
SCHEMES = ("bf16", "int4", "fp8")


def start(path, **settings):
    chosen = {"device": "cuda", "max_num_seqs": 16, "kv_cache_bytes": 1 << 24} | settings
    return start_engine(open_checkpoint(path), EngineSettings(**chosen))


def engine_of(path, **settings):
    return start(path, **settings).engine


def prompts(lengths=LENGTHS):
    return [tokens(length, seed=length).tolist() for length in lengths]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_are_those_of_float32_up_to_ties(scheme, eager, folder):  # noqa: F811
    """A tie: the CPU in bf16 is off by as much, for the same tokens."""
    path = folder("gpu-llama", scheme)
    exact, rounded = load_model(path, dtype=torch.float32), load_model(path, dtype=torch.bfloat16)
    found = answers(engine_of(path, eager=eager), prompts(), max_tokens=40)
    for prompt, answer in zip(prompts(), found, strict=True):
        ids = torch.tensor(prompt + answer[:-1])
        logits = exact.logits(ids)[len(prompt) - 1 :]
        noise = (rounded.logits(ids)[len(prompt) - 1 :] - logits).abs().max()
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert float((logits.amax(1) - chosen).max()) < 2 * float(noise)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_batch_equals_one_by_one_and_graphs_equal_eager(scheme, folder):  # noqa: F811
    path = folder("gpu-llama", scheme)
    engine = engine_of(path, batch_invariant=True, prefix_caching=False)
    alone = [answers(engine, [prompt], max_tokens=20)[0] for prompt in prompts()]
    assert answers(engine, prompts(), max_tokens=20) == alone
    eager = engine_of(path, batch_invariant=True, prefix_caching=False, eager=True)
    assert answers(eager, prompts(), max_tokens=20) == alone


def test_200_sequences_at_once_equal_each_alone(folder):  # noqa: F811
    """Every size of graphs that decodes, 256 rows included."""
    lengths = [1 + 7 * number % 61 for number in range(200)]
    many = [tokens(length, seed=number).tolist() for number, length in enumerate(lengths)]
    settings = {
        "batch_invariant": True,
        "prefix_caching": False,
        "max_num_seqs": 200,
        "kv_cache_bytes": 1 << 26,
    }
    engine = engine_of(folder("gpu-llama", "int4"), **settings)
    together = answers(engine, many, max_tokens=16)
    for some in (1, 20, 40, 70, 130):  # of other sizes, in other company
        assert answers(engine, many[:some], max_tokens=16) == together[:some]
    eager = engine_of(folder("gpu-llama", "int4"), **settings, eager=True)
    assert answers(eager, many, max_tokens=16) == together


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores_are_those_of_the_model_and_change_nothing_beside_them(scheme, folder):  # noqa: F811
    """To what bf16 does to a logit; what generates beside it goes on as it would alone."""
    started = start(folder("gpu-llama", scheme), batch_invariant=True)
    engine, many = started.engine, prompts()[1:]
    alone = answers(engine, many, max_tokens=20)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0).answer(0)
    scored = [
        Sequence(
            sequence_id=100 + at, arrival=100 + at, prompt_ids=prompt[:-1], targets=prompt[1:], params=params,
            eos_ids=frozenset(), num_scored=at % len(prompt[1:]),
        )
        for at, prompt in enumerate(many)
    ]  # fmt: skip
    generating = [sequence(at, prompt, max_tokens=20) for at, prompt in enumerate(many)]
    engine.add(*generating, *scored)
    run(engine)
    assert [each.token_ids[len(each.prompt_ids) :] for each in generating] == alone
    for at, (each, prompt) in enumerate(zip(scored, many, strict=True)):
        logprobs_TV = started.model.logits(torch.tensor(prompt))[:-1].log_softmax(dim=-1)
        expected_T = logprobs_TV.gather(1, torch.tensor(prompt)[1:, None])[:, 0]
        found_T = torch.tensor([one.logprob for one in each.prompt_logprobs])
        torch.testing.assert_close(found_T, expected_T[at % len(prompt[1:]) :], atol=0.05, rtol=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_second_gpu_computes_what_the_first_does(scheme, folder):  # noqa: F811
    path = folder("gpu-llama", scheme)
    found = []
    for device in ("cuda:0", "cuda:1"):
        engine = engine_of(path, device=device)
        params = {"max_tokens": 20, "temperature": 1.0, "seed": 3}
        found.append((answers(engine, prompts(), max_tokens=20), answers(engine, prompts(), **params)))
    assert found[0] == found[1]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int8"])
def test_cached_chunked_and_preempted_equal_whole(kv_cache_dtype, folder):  # noqa: F811
    path = folder("gpu-llama", "int4")
    settings = {"batch_invariant": True, "kv_cache_dtype": kv_cache_dtype}
    started = start(path, **settings)
    engine = started.engine
    whole = answers(engine, prompts(), max_tokens=20)
    assert answers(engine, prompts(), max_tokens=20) == whole  # cached
    assert engine.scheduler.stats.num_prefix_hits > 0
    chunked = engine_of(path, **settings, max_num_seqs=4, max_num_batched_tokens=4 + BLOCK_SIZE)
    assert answers(chunked, prompts(), max_tokens=20) == whole
    num_bytes = 12 * BLOCK_SIZE * started.model.kv.token_bytes
    full = engine_of(path, **settings, max_model_len=160, kv_cache_bytes=num_bytes)
    assert answers(full, prompts(), max_tokens=20) == whole
    assert full.scheduler.stats.num_preemptions > 0


def test_contexts_that_outgrow_a_graph_go_on_in_the_next(folder, monkeypatch):  # noqa: F811
    path = folder("gpu-llama", "fp8")
    whole = answers(engine_of(path, batch_invariant=True), prompts(), max_tokens=40)
    monkeypatch.setattr(graphs, "CONTEXTS", (24, 48, 80))
    assert answers(engine_of(path, batch_invariant=True), prompts(), max_tokens=40) == whole


def test_seeds_do_not_depend_on_the_batch(folder):  # noqa: F811
    engine = engine_of(folder("gpu-llama", "int4"), batch_invariant=True)
    params = {"max_tokens": 20, "temperature": 1.5, "top_p": 0.95, "seed": 5}
    alone = [answers(engine, [prompt], **params)[0] for prompt in prompts()]
    assert answers(engine, prompts(), **params) == alone
