"""Attention in torch: many single tokens at once against one sequence after the other, and what nobody may see."""

import pytest
import torch

from quantkit_kernels import paged_attention
from quantkit_kernels.paged_attention import attend, attend_together, paged_decode
from quantkit_kernels.paged_kv import KVPool, Masking, Pages, create_pool

LENGTHS = (1, 16, 17, 40, 5)
STORED = {
    "float32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8 per head": (torch.int8, "head"),
    "fp8 per token": (torch.float8_e4m3fn, "token"),
}


def pages_of(lengths):
    """Queries, a pool, and pages of sequences of these lengths, one behind the other."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // 16) for length in lengths]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        first = 1 + sum(counts[:row])
        table[row, :count] = torch.arange(first, first + count)
    pool = create_pool(1 + sum(counts), 2, 32, torch.float32)
    for codes in (pool.k_PHSD, pool.v_PHSD):
        codes.copy_(torch.randn(codes.shape, generator=generator))
    q = torch.randn(len(lengths), 6, 32, generator=generator)
    bounds = torch.arange(len(lengths) + 1, dtype=torch.int32)
    return q, pool, Pages(table, torch.tensor(lengths, dtype=torch.int32), bounds, 1, max(lengths))


@pytest.mark.parametrize(
    ("lengths", "is_together"),
    [
        ([32] * 32, True),
        ([96, 40, 60], True),
        ([97] * 4, False),
        ([300] * 8, False),
        ([96] + [8] * 15, False),
        ([1500] + [32] * 31, False),
        ([32], False),
    ],
)
def test_short_contexts_of_like_lengths_go_together_with_the_same_result(lengths, is_together, monkeypatch):
    ways = []
    for name in ("attend", "attend_together"):
        way = getattr(paged_attention, name)
        monkeypatch.setattr(
            paged_attention, name, lambda *given, way=way: ways.append(way.__name__) or way(*given)
        )
    q, pool, pages = pages_of(lengths)
    out = paged_decode(q, pool, pages, Masking(0.2))
    assert ways == ["attend_together" if is_together else "attend"]
    torch.testing.assert_close(out, attend(q, pool, pages, Masking(0.2)))


def build(stored, poison=0.0):
    """Queries, a pool, and pages of sequences that do not begin at block 0; what is not theirs holds `poison`."""
    dtype, scales = STORED[stored]
    generator = torch.Generator().manual_seed(0)
    shape = {None: None, "head": (2,), "token": (20, 2, 16)}[scales]
    pool = create_pool(20, 2, 32, dtype, scale_shape=shape)
    q = torch.randn(len(LENGTHS), 6, 32, generator=generator)
    table = torch.randperm(19, generator=generator)[:15].view(5, 3).int() + 1
    tensors = []
    for codes in (pool.k_PHSD, pool.v_PHSD):
        values = torch.randn(codes.shape, generator=generator) * (1 if scales is None else 30)
        own = torch.zeros(codes.shape[0], codes.shape[2], dtype=torch.bool)
        for blocks, length in zip(table, LENGTHS, strict=True):
            for position in range(length):
                own[blocks[position // 16], position % 16] = True
        if scales is None:
            values[~own[:, None].expand(20, 2, 16)] = poison
        tensors.append(values.to(dtype))
    scale = None if shape is None else torch.rand(shape, generator=generator) / 30
    pool = KVPool(*tensors, scale, scale)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    pages = Pages(table, lengths, torch.arange(6, dtype=torch.int32), 1, 48)
    return (q.bfloat16() if dtype == torch.bfloat16 else q), pool, pages


@pytest.mark.parametrize("window", [0, 7, 30])
@pytest.mark.parametrize("stored", STORED)
def test_together_equals_one_by_one(stored, window):
    q, pool, pages = build(stored)
    masking = Masking(0.2, window)
    tolerance = 2**-7 if q.dtype == torch.bfloat16 else 2**-20
    together, one_by_one = (way(q, pool, pages, masking).float() for way in (attend_together, attend))
    assert (together - one_by_one).abs().max() <= tolerance * one_by_one.abs().max()


@pytest.mark.parametrize("stored", ["float32", "bf16"])
def test_what_lies_behind_a_sequence_is_never_seen(stored):
    expected = attend_together(*build(stored), Masking(0.2))
    assert torch.equal(attend_together(*build(stored, poison=torch.nan), Masking(0.2)), expected)


def test_a_mode_that_no_batch_changes_goes_one_by_one():
    q, pool, pages = build("float32")
    assert torch.equal(
        paged_decode(q, pool, pages, Masking(0.2), split_tokens=64), attend(q, pool, pages, Masking(0.2))
    )
