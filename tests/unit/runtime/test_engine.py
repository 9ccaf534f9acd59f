"""The engine on tiny models: the same tokens as transformers, and the same whatever else it computes."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from quantkit.errors import GenerationError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.runtime import graphs, start
from quantkit.runtime.load import load_model
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.sequence import FinishReason, Sequence
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.start import start_engine
from quantkit_kernels.paged_kv import BLOCK_SIZE
from tests.product_schemes import KV_SCHEMES, SCHEMES
from tests.tiny_models import CONFIGS, quantize_tiny, save_tiny, tokens

LENGTHS = (1, 5, 16, 17, 31, 33, 40, 9)


def engine_of(folder, **settings):
    """An engine in float32 on the CPU."""
    chosen = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8} | settings
    return start_engine(open_checkpoint(folder), EngineSettings(**chosen)).engine


def sequence(number, prompt, eos_ids=(), **params):
    chosen = SamplingParams(**({"max_tokens": 12} | params))
    return Sequence(
        sequence_id=number, prompt_ids=prompt, params=chosen, eos_ids=frozenset(eos_ids), arrival=number
    )


def answers(engine, prompts, **params):
    """The new tokens of each prompt, all submitted at once."""
    sequences = [sequence(number, prompt, **params) for number, prompt in enumerate(prompts)]
    for each in sequences:
        engine.add(each)
    run(engine)
    return [each.token_ids[len(each.prompt_ids) :] for each in sequences]


def run(engine):
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def prompts(lengths=LENGTHS):
    return [tokens(length, seed=length).tolist() for length in lengths]


@pytest.fixture
def llama(tmp_path):
    return save_tiny("llama", tmp_path)


def capturing():
    """What stands in for CUDA graphs on a CPU: the same calls on the same tensors, into the same output.

    Graphs share memory: what one has put out is gone when another runs.
    """
    outputs = []

    def capture(function):
        outputs.append(output := function())

        def replay():
            for each in outputs:
                each.fill_(math.nan)
            output.copy_(function())

        return replay, output

    return capture


@pytest.fixture(params=["eager", "graphs"])
def captured(request, monkeypatch):
    """With and without graphs, of sizes that a tiny model meets."""
    if request.param == "graphs":
        monkeypatch.setattr(start, "capture_on", lambda target: capturing())
        monkeypatch.setattr(graphs, "TOKENS", (4, 20, 40, 64))
        monkeypatch.setattr(graphs, "FEW_TOKENS", (4,))
        monkeypatch.setattr(graphs, "CONTEXTS", (20,))
        monkeypatch.setattr(graphs, "SEQUENCES", 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_transformers(name, tmp_path, captured):
    save_tiny(name, tmp_path)
    prompt = tokens(9).tolist()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 9, dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 9:].tolist()
    assert answers(engine_of(tmp_path), [prompt], max_tokens=30) == [expected]


def test_a_batch_of_mixed_lengths_equals_one_by_one(llama, captured):
    alone = [answers(engine_of(llama), [prompt])[0] for prompt in prompts()]
    assert answers(engine_of(llama), prompts()) == alone


def test_chunks_equal_whole_prompts(llama, captured):
    whole = answers(engine_of(llama), prompts())
    budget = 2 + BLOCK_SIZE
    assert answers(engine_of(llama, max_num_seqs=2, max_num_batched_tokens=budget), prompts()) == whole


def test_what_is_cached_equals_what_is_cold(llama, captured):
    prompt = tokens(40).tolist()
    engine = engine_of(llama)
    cold = answers(engine, [prompt])
    assert answers(engine, [prompt]) == cold
    assert engine.scheduler.stats.num_prefix_hits == 2 * BLOCK_SIZE
    assert answers(engine_of(llama, prefix_caching=False), [prompt]) == cold


def test_preempted_sequences_equal_undisturbed_ones(llama, captured):
    undisturbed = answers(engine_of(llama), prompts((30, 31, 30)), max_tokens=20)
    num_preemptions = 0
    for num_blocks in range(4, 11):  # one of these sequences needs four
        engine = engine_of(llama, kv_cache_bytes=blocks_bytes(llama, num_blocks), max_model_len=64)
        assert answers(engine, prompts((30, 31, 30)), max_tokens=20) == undisturbed
        num_preemptions += engine.scheduler.stats.num_preemptions
    assert num_preemptions > 3


def blocks_bytes(folder, num_blocks, **settings):
    """Of a cache of so many blocks."""
    chosen = EngineSettings(dtype="float32", device="cpu", **settings)
    return num_blocks * BLOCK_SIZE * start_engine(open_checkpoint(folder), chosen).model.kv.token_bytes


@pytest.mark.parametrize(("dtype", "kv"), [("fp8", "kv-fp8-head"), ("fp8", None), ("int8", None)])
def test_a_quantized_cache_is_right_in_a_full_pool_whatever_is_in_the_last_block(dtype, kv, llama, tmp_path):
    """Calibrated scales, and one per token and head where the checkpoint has none."""
    folder = llama if kv is None else quantize_tiny(llama, tmp_path / "calibrated", None, KV_SCHEMES[kv])
    quantized = {"kv_cache_dtype": dtype}
    roomy = engine_of(folder, prefix_caching=False, **quantized)
    full = engine_of(folder, kv_cache_bytes=blocks_bytes(folder, 5, **quantized), **quantized)
    for length in range(BLOCK_SIZE + 1, 2 * BLOCK_SIZE + 1):
        shared = tokens(length, seed=length).tolist()
        wanted = [shared, *(tokens(each, seed=length).tolist() for each in (13, 14)), shared]
        expected = answers(roomy, wanted, max_tokens=24)
        assert answers(full, wanted, max_tokens=24) == expected, length
        assert answers(full, [shared], max_tokens=24) == expected[:1], length
    stats = full.scheduler.stats
    assert stats.num_preemptions >= BLOCK_SIZE, "which is only where every block is in use"
    assert stats.num_prefix_hits >= BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_64_mixed_lengths_equal_one_by_one_to_the_bit_where_no_batch_changes_them(dtype, llama):
    settings = {"dtype": dtype, "batch_invariant": True, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
    wanted = [tokens(1 + number % 40, seed=number).tolist() for number in range(64)]
    params = {"max_tokens": 6, "logprobs": 4}
    together, one_by_one = (engine_of(llama, prefix_caching=False, **settings) for _ in range(2))
    found = logprobs_of(together, wanted, **params)
    alone = [logprobs_of(one_by_one, [prompt], **params)[0] for prompt in wanted]
    assert found == alone


def logprobs_of(engine, prompts, **params):
    """Of each prompt: every number that the engine says of each new token."""
    sequences = [sequence(number, prompt, **params) for number, prompt in enumerate(prompts)]
    engine.add(*sequences)
    found = {each: [] for each in sequences}
    for event in run(engine):
        found[event.sequence].append((event.token_id, event.logprobs))
    return list(found.values())


def test_a_step_that_ends_no_prompt_brings_nothing(llama, captured):
    engine = engine_of(llama, max_num_seqs=1, max_num_batched_tokens=1 + BLOCK_SIZE)
    engine.add(sequence(0, tokens(40).tolist(), max_tokens=2))
    assert [len(engine.step()) for _ in range(4)] == [0, 0, 1, 1]


def test_rotations_follow_the_context_that_was_asked_for_and_not_the_memory(tmp_path):
    original = {"original_max_position_embeddings": 2 * BLOCK_SIZE}
    config = CONFIGS["phi3-long"].to_dict()
    config |= {"rope_parameters": config["rope_parameters"] | original, **original}
    AutoModelForCausalLM.from_config(Phi3Config(**config)).save_pretrained(tmp_path)
    few = blocks_bytes(tmp_path, 2)
    checkpoint = open_checkpoint(tmp_path)
    ids = tokens(20)
    long, short = (
        load_model(tmp_path, dtype=torch.float32, max_model_len=most).logits(ids) for most in (None, 32)
    )
    assert not torch.equal(long, short)
    for most, expected in ((None, long), (32, short)):
        settings = EngineSettings(dtype="float32", device="cpu", kv_cache_bytes=few, max_model_len=most)
        started = start_engine(checkpoint, settings)
        assert started.max_model_len == 2 * BLOCK_SIZE
        assert torch.equal(started.model.logits(ids), expected)


def test_what_computes_otherwise_shares_no_cached_blocks(tmp_path, monkeypatch):
    salts = []
    manager = start.BlockManager
    monkeypatch.setattr(
        start,
        "BlockManager",
        lambda *sizes, salt, **how: salts.append(salt) or manager(*sizes, salt=salt, **how),
    )
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path))
    same = {"device": "cpu", "dtype": "float32"}
    for changed in ({}, {"dtype": "bfloat16"}, {"batch_invariant": True}, {"max_model_len": 32}):
        start_engine(checkpoint, EngineSettings(**same | changed))
    start_engine(checkpoint, EngineSettings(**same, kv_cache_dtype="int8"))
    assert len(set(salts)) == len(salts) == 5
    start_engine(checkpoint, EngineSettings(device="cpu"))  # the dtype that config.json names
    assert salts[-1] in salts[:2]


def test_rows_change_hands(llama, captured):
    """One engine, many sequences in few rows, longer ones after shorter ones and the other way round."""
    engine = engine_of(llama, max_num_seqs=2, prefix_caching=False)
    alone = [answers(engine_of(llama), [prompt])[0] for prompt in prompts()]
    assert [answers(engine, [prompt])[0] for prompt in prompts()] == alone
    assert answers(engine, prompts()) == alone
    assert answers(engine, prompts()[::-1]) == alone[::-1]


def test_a_seed_gives_the_same_tokens_in_any_company(llama, captured):
    params = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 7}
    alone = answers(engine_of(llama), prompts((9,)), **params)[0]
    assert answers(engine_of(llama), prompts(), **params)[-1] == alone
    assert answers(engine_of(llama), prompts((9,)), **(params | {"seed": 8}))[0] != alone


def test_it_ends_at_a_stop_token_at_max_tokens_and_where_the_context_ends(llama):
    free = answers(engine_of(llama), prompts((9,)))[0]
    engine = engine_of(llama)
    engine.add(sequence(0, prompts((9,))[0], eos_ids=[free[4]]))
    events = run(engine)
    assert [event.token_id for event in events] == free[: free.index(free[4]) + 1]
    assert events[-1].finish is FinishReason.STOP
    engine.add(sequence(1, tokens(60).tolist(), max_tokens=50))
    assert [event.finish for event in run(engine)] == [None, None, None, FinishReason.CONTEXT]


@pytest.mark.parametrize("num_steps", range(6))
def test_a_sequence_is_ended_in_any_state_and_the_others_do_not_notice(num_steps, llama, captured):
    undisturbed = answers(engine_of(llama), prompts((33, 9)))
    engine = engine_of(llama, max_num_seqs=2, max_num_batched_tokens=2 + BLOCK_SIZE)
    victim, other = sequence(0, prompts((33,))[0]), sequence(1, prompts((9,))[0])
    engine.add(victim)
    engine.add(other)
    for _ in range(num_steps):
        engine.step()
    engine.end(victim)
    engine.end(victim)
    assert all(event.sequence is other for event in run(engine))
    assert other.token_ids[9:] == undisturbed[1]
    assert engine.scheduler.stats.kv_usage == 0


@pytest.mark.parametrize("scheme", [None, "int8-w8a8-dynamic", "fp8-channel-token"])
def test_logits_that_are_no_numbers_end_their_sequence_alone(scheme, llama, tmp_path):
    """With quantized inputs too, whose scales are of one token each."""
    folder = llama if scheme is None else quantize_tiny(llama, tmp_path / "quantized", SCHEMES[scheme])
    undisturbed = answers(engine_of(folder), prompts((5, 9)))
    engine = engine_of(folder)
    embedding = engine._runner._decoder.embedding.weight
    poisoned = next(token for token in range(90) if token not in [*prompts((9,))[0], *undisturbed[1]])
    embedding[poisoned] = math.nan
    bad, good = sequence(0, [1, poisoned, 2]), sequence(1, prompts((9,))[0])
    engine.add(bad)
    engine.add(good)
    events = run(engine)
    assert [event.token_id for event in events if event.sequence is bad] == [None]
    assert bad.finish is FinishReason.ERROR
    assert good.token_ids[9:] == undisturbed[1]


def test_logprobs_are_those_of_the_model(llama):
    prompt = prompts((9,))[0]
    engine = engine_of(llama)
    engine.add(sequence(0, prompt, logprobs=3))
    events = run(engine)
    model = start_engine(open_checkpoint(llama), EngineSettings(dtype="float32", device="cpu")).model
    ids = prompt + [event.token_id for event in events]
    expected = model.logits(torch.tensor(ids[:-1])).log_softmax(-1)[len(prompt) - 1 :]
    for event, row in zip(events, expected, strict=True):
        assert event.logprobs.logprob == pytest.approx(float(row[event.token_id]), abs=1e-4)
        assert event.logprobs.top_ids == row.topk(3).indices.tolist()


def test_graphs_compute_what_no_graph_does(llama, captured, monkeypatch):
    """Steps that fit run in graphs, and only these; the tokens are the same whichever ran."""
    ran = []
    for kind in (graphs.DecodeGraphs, graphs.ChunkGraphs):
        plain = kind.run
        monkeypatch.setattr(
            kind, "run", lambda self, *a, plain=plain: (ran.append(type(self).__name__), plain(self, *a))[1]
        )
    engine = engine_of(llama)
    many, few = answers(engine, prompts()), answers(engine, prompts((5, 9)))
    assert few == [many[1], many[-1]]
    kinds = {"DecodeGraphs", "ChunkGraphs"} if engine._runner._chunk_graphs is not None else set()
    assert set(ran) == kinds


def test_what_can_never_be_computed_is_refused_when_it_comes(llama):
    engine = engine_of(llama)
    with pytest.raises(GenerationError, match="64 tokens, and the model takes 64"):
        engine.add(sequence(0, tokens(64).tolist()))
    assert not engine.has_work
