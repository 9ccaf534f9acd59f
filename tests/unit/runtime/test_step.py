"""One step as tensors, and models over steps of several sequences: together as alone."""

import pytest
import torch

from quantkit.runtime.load import load_model
from quantkit.runtime.step import Row, build_step
from tests.tiny_models import save_tiny, tokens

CPU = torch.device("cpu")


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_tokens_go_where_the_blocks_say():
    rows = [Row([7], 17, [4, 2]), Row([1, 2, 3], 15, [5, 9])]
    step = build_step(rows, block_size=16, device=CPU, num_padding=2)
    assert step.token_ids_T.tolist() == [7, 0, 0, 1, 2, 3]
    assert step.positions_T.tolist() == [17, 0, 0, 15, 16, 17]
    assert step.slots_T.tolist() == [2 * 16 + 1, -1, -1, 5 * 16 + 15, 9 * 16, 9 * 16 + 1]
    assert step.num_decode_tokens == 3
    assert step.decode is not None and step.prefill is not None
    assert step.decode.block_table_BL.tolist() == [[4, 2], [0, 0], [0, 0]]
    assert step.decode.lengths_B.tolist() == [18, 1, 1]
    assert step.decode.cu_seqlens_q.tolist() == [0, 1, 2, 3]
    assert step.prefill.cu_seqlens_q.tolist() == [0, 3]
    assert (step.prefill.max_q_len, step.prefill.max_context) == (3, 18)


def test_guessed_tokens_are_decoded_with_the_last_one():
    rows = [Row([7, 8, 9], 17, [4, 2]), Row([1], 3, [5]), Row([1, 2, 3, 4], 0, [6])]
    step = build_step(rows, block_size=16, device=CPU, decode_tokens=3)
    assert step.num_decode_tokens == 4
    assert step.decode is not None and step.decode.max_q_len == 3
    alone = build_step(rows[:2], block_size=16, device=CPU, decode_tokens=3)
    assert alone.prefill is None


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_step_over_several_sequences_is_each_of_them(name, kv_cache_dtype, tmp_path):
    model = load_model(save_tiny(name, tmp_path), kv_cache_dtype=kv_cache_dtype)
    first, second, third = tokens(40, 1), tokens(20, 2), tokens(33, 3)
    expected = [model.logits(first)[-1:], model.logits(second)[-1:], model.logits(third)]
    with torch.inference_mode():
        pools = model.kv.create_pools(12, CPU)
        before = [Row(first[:39].tolist(), 0, [1, 5, 3]), Row(second[:19].tolist(), 0, [8, 2])]
        model.decoder(build_step(before, block_size=16, device=CPU), pools)
        rows = [Row(first[39:].tolist(), 39, [1, 5, 3]), Row(second[19:].tolist(), 19, [8, 2])]
        rows.append(Row(third.tolist(), 0, [4, 7, 6]))
        step = build_step(rows, block_size=16, device=CPU, num_padding=1)
        got = model.decoder.logits(model.decoder(step, pools))
    assert relative(torch.cat((got[:2], got[3:])), torch.cat(expected)) < 1e-5
    assert got[2].isfinite().all()


def test_what_nobody_has_written_is_never_read(tmp_path):
    model = load_model(save_tiny("gemma3", tmp_path))
    ids = tokens(30).tolist()
    with torch.inference_mode():
        results = []
        for poison in (0.0, torch.nan):
            pools = model.kv.create_pools(6, CPU)
            for pool in pools:
                pool.k_PHSD[1:], pool.v_PHSD[1:] = poison, poison
            model.decoder(build_step([Row(ids[:25], 0, [4, 2])], block_size=16, device=CPU), pools)
            step = build_step([Row(ids[25:26], 25, [4, 2])], block_size=16, device=CPU, num_padding=2)
            results.append(model.decoder(step, pools))
    assert torch.equal(*results)
    assert results[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_batch_changes_no_bit_where_it_must_not(name, dtype, tmp_path):
    model = load_model(save_tiny(name, tmp_path), dtype=dtype, batch_invariant=True)
    sequences = [tokens(length, length).tolist() for length in (3, 17, 33, 30, 5)]
    together = last_states(model, sequences)
    for number, sequence in enumerate(sequences):
        assert torch.equal(last_states(model, [sequence])[0], together[number])


def last_states(model, sequences):
    """Hidden states of the last token of each, which is computed by itself after all before it."""
    blocks = [[1 + 3 * number, 2 + 3 * number, 3 + 3 * number] for number in range(len(sequences))]
    pools = model.kv.create_pools(1 + 3 * len(sequences), CPU)
    prompts = [Row(ids[:-1], 0, of) for ids, of in zip(sequences, blocks, strict=True)]
    last = [Row(ids[-1:], len(ids) - 1, of) for ids, of in zip(sequences, blocks, strict=True)]
    with torch.inference_mode():
        model.decoder(build_step(prompts, block_size=16, device=CPU), pools)
        return model.decoder(build_step(last, block_size=16, device=CPU), pools)
