"""Attention over pages against float64, with poison everywhere that no query may look."""

import dataclasses
import functools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import (
    attention_decode,
    attention_few,
    attention_prefill,
    attention_widen,
    paged_operators,
)
from quantkit_kernels.paged_kv import KVPool, Masking, Pages
from tests.gpu.attention_cases import Case, build, exact_and_bound
from tests.gpu.triton_device import DEVICE, IS_INTERPRETED, needs_gpu, needs_kernels, poisoned, side_by_side  # noqa: F401

pytestmark = [
    *needs_kernels,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings(
        "ignore:divide by zero"
    ),  # in the interpreter: log2(0) where nothing was seen,
    pytest.mark.filterwarnings("ignore:overflow"),  # and tanh of much
]

if (
    IS_INTERPRETED
):  # it takes loop bounds for Python integers, which numpy since 2.4 does not allow of its arrays
    import triton.runtime.interpreter as interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_bounds_too(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_bounds_too

E4M3 = torch.float8_e4m3fn
STORED = {
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "e4m3": {"dtype": E4M3},
    "int8": {"dtype": torch.int8},
    "e4m3 per token": {"dtype": E4M3, "per_token": True},
    "int8 per token": {"dtype": torch.int8, "per_token": True},
}
if IS_INTERPRETED:  # knows fp16 and integers
    STORED = {name: stored | {"q_dtype": torch.float16} for name, stored in STORED.items() if name != "bf16"}
every_storage = pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
LAUNCHES = (
    attention_decode.launch,
    functools.partial(attention_decode.launch, one_launch=False),
    attention_prefill.launch,
)
DECODE = Case(lengths=(1, 17, 200, 1333), q_lens=(1, 1, 1, 1))


def assert_close(run, case: Case, **options) -> None:
    q_TQD, pool, pages = build(case, DEVICE)
    got_TQD = run(q_TQD, pool, pages, case.masking(), **options)
    exact_TQD, bound_TQD = exact_and_bound(case, q_TQD, pool, pages)
    error_TQD = (got_TQD.double() - exact_TQD).abs()
    assert got_TQD.dtype == q_TQD.dtype
    assert (error_TQD <= bound_TQD).all(), f"{(error_TQD / bound_TQD).max().item():.2f} times the bound"


def q_dtype_of(case: Case) -> torch.dtype:
    """One that the kernel of one launch takes: 16-bit keys are like the queries."""
    return torch.float16 if case.dtype == torch.float16 else case.q_dtype


def assert_decode_close(case: Case) -> None:
    """By both kernels, if both take it."""
    assert_close(attention_decode.launch, case, one_launch=False)
    q_TQD, pool, _ = build(case, DEVICE)
    if attention_few.takes(q_TQD, pool, max(case.q_lens) * case.num_queries // case.num_heads):
        assert_close(attention_decode.launch, case, one_launch=True)


@every_storage
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_decode(stored, splits):
    assert_close(
        attention_decode.launch, dataclasses.replace(DECODE, **stored), splits=splits, one_launch=False
    )


@needs_gpu
@every_storage
@pytest.mark.parametrize(
    ("group", "q_len"),
    [(1, 1), (1, 9), (3, 1), (3, 5), (4, 1), (4, 4), (5, 3), (7, 2), (8, 1), (8, 2), (16, 1)],
)
def test_decode_in_one_launch(stored, group, q_len):
    q_lens = (q_len, 1, q_len, 0, q_len)
    case = Case(lengths=(5000, 1, 16, 40, 1030), q_lens=q_lens, num_queries=3 * group, num_heads=3, **stored)
    case = dataclasses.replace(case, q_dtype=q_dtype_of(case))
    assert_close(attention_decode.launch, case, one_launch=True)


@needs_gpu
@every_storage
@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 64, "window": 100, "block_size": 32},
        {"head_dim": 80, "window": 1, "soft_cap": 5.0, "q_size": 4.0},
        {"head_dim": 96, "block_size": 128},
        {"head_dim": 112, "soft_cap": 20.0},
        {"head_dim": 16},
    ],
)
def test_shapes_of_one_launch(stored, shape):
    case = Case(lengths=(1, 333, 2600, 129), q_lens=(1, 4, 2, 3), **shape, **stored)
    case = dataclasses.replace(case, q_dtype=q_dtype_of(case))
    assert_close(attention_decode.launch, case, one_launch=True)


@needs_gpu
@pytest.mark.parametrize("name", ["bf16", "int8 per token"])
@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (2, 8), (1, 8), (1, 4)])
def test_clusters_of_one_launch(name, shape):
    case = Case(lengths=(1500, 31, 700), q_lens=(4, 2, 1), **STORED[name])
    assert_close(attention_few.launch, case, shape=shape)


@every_storage
@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
def test_decode_of_few_new_tokens(stored, group):
    case = Case(
        lengths=(16, 77, 450, 31, 9), q_lens=(16, 1, 5, 0, 9), num_queries=2 * group, num_heads=2, **stored
    )
    assert_decode_close(case)


@pytest.mark.parametrize("q_len", range(1, 17))
def test_decode_of_every_number_of_new_tokens(q_len):
    stored = STORED["int8 per token"]
    assert_decode_close(Case(lengths=(300, q_len), q_lens=(q_len, q_len), **stored))


@every_storage
def test_every_residue_of_the_last_block(stored):
    lengths = tuple(range(1, 36)) + tuple(range(62, 67)) + tuple(range(126, 131))
    assert_decode_close(Case(lengths=lengths, q_lens=(1,) * len(lengths), **stored))


@every_storage
@pytest.mark.parametrize("window", [1, 7, 16, 65, 500])
def test_windows(stored, window):
    case = Case(lengths=(1, 8, 64, 300, 1040), q_lens=(1, 4, 3, 2, 16), window=window, **stored)
    assert_decode_close(case)
    case = Case(lengths=(1, 8, 64, 300, 700), q_lens=(1, 4, 64, 131, 200), window=window, **stored)
    assert_close(attention_prefill.launch, case)


@every_storage
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 112, 128, 192, 256])
def test_head_dimensions(stored, head_dim):
    case = Case(lengths=(40, 333), q_lens=(1, 2), head_dim=head_dim, soft_cap=20.0, **stored)
    assert_decode_close(case)
    case = Case(lengths=(40, 333), q_lens=(40, 90), head_dim=head_dim, **stored)
    assert_close(attention_prefill.launch, case)


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_head_dimensions_may_be_odd(name):
    case = Case(lengths=(40, 333), q_lens=(1, 2), head_dim=67, **STORED[name])
    assert_decode_close(case)
    assert_close(attention_prefill.launch, case)


@every_storage
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_block_sizes(stored, block_size):
    case = Case(lengths=(63, 64, 65, 700), q_lens=(1, 2, 3, 4), block_size=block_size, **stored)
    assert_decode_close(case)
    case = Case(lengths=(63, 64, 65, 700), q_lens=(63, 2, 65, 120), block_size=block_size, **stored)
    assert_close(attention_prefill.launch, case)


@every_storage
@pytest.mark.parametrize("group", [1, 4, 7])
def test_prefill(stored, group):
    case = Case(
        lengths=(1, 33, 300, 513, 64), q_lens=(1, 33, 170, 1, 0), num_queries=2 * group, num_heads=2, **stored
    )
    assert_close(attention_prefill.launch, case)


@pytest.mark.parametrize("name", ["e4m3", "int8 per token"])
def test_prefill_of_more_sequences_than_there_is_room_for(name, monkeypatch):
    monkeypatch.setattr(attention_widen, "MOST_BYTES", 2 * 384 * 2 * 128 * 4)  # two of these at once
    case = Case(lengths=(300, 1, 33, 170, 64), q_lens=(100, 1, 33, 0, 64), **STORED[name])
    assert_close(attention_prefill.launch, case)


@every_storage
def test_soft_cap(stored):
    case = Case(lengths=(40, 333), q_lens=(3, 16), soft_cap=5.0, q_size=4.0, **stored)
    assert_decode_close(case)
    assert_close(attention_prefill.launch, case)


@needs_gpu
@pytest.mark.parametrize("size", [1e-30, 3e-6, 1e6, 1e30])
@pytest.mark.parametrize("name", ["e4m3", "int8 per token", "fp16"])
def test_queries_that_do_not_fit_fp16(size, name):
    case = Case(lengths=(40, 333), q_lens=(3, 16), q_size=size, **STORED[name])
    q_TQD, pool, pages = build(case, DEVICE)
    masking = case.masking()._replace(softmax_scale=case.masking().softmax_scale / size)
    unit = case.masking()
    exact_TQD, bound_TQD = exact_and_bound(
        dataclasses.replace(case, q_size=1.0), q_TQD.double() / size, pool, pages
    )
    for run in LAUNCHES:
        got_TQD = run(q_TQD, pool, pages, masking)
        assert ((got_TQD.double() - exact_TQD).abs() <= bound_TQD).all(), unit


@every_storage
def test_a_sequence_alone_and_in_company(stored):
    """The same bits, with parts of a fixed size."""
    case = Case(lengths=(700, 130, 64, 1), q_lens=(2, 2, 1, 1), **stored)
    q_TQD, pool, pages = build(case, DEVICE)
    together = attention_decode.launch(q_TQD, pool, pages, case.masking(), 128)
    bounds = pages.cu_seqlens_q.tolist()
    for sequence, length in enumerate(case.lengths):
        rows = slice(bounds[sequence], bounds[sequence + 1])
        offsets = torch.tensor([0, bounds[sequence + 1] - bounds[sequence]], dtype=torch.int32, device=DEVICE)
        one = slice(sequence, sequence + 1)
        alone = Pages(pages.block_table_BL[one], pages.lengths_B[one], offsets, 2, length)
        got = attention_decode.launch(q_TQD[rows], pool, alone, case.masking(), 128)
        assert torch.equal(got, together[rows])


@every_storage
def test_no_tokens_at_all_are_zeros(stored):
    q_TQD, pool, pages = build(Case(lengths=(20, 33), q_lens=(1, 1), **stored), DEVICE)
    pages = pages._replace(lengths_B=torch.tensor([0, 33], dtype=torch.int32, device=DEVICE))
    for run in LAUNCHES:
        got_TQD = run(q_TQD, pool, pages, Masking(0.1))
        assert (got_TQD[0] == 0).all() and torch.isfinite(got_TQD).all() and (got_TQD[1] != 0).any()


@needs_gpu
@every_storage
def test_repeated_runs_graphs_and_loose_limits(stored):
    case = Case(lengths=(2000, 130, 64, 1), q_lens=(2, 2, 1, 1), **stored)
    q_TQD, pool, pages = build(case, DEVICE)
    for operator, more in ((paged_operators.decode, (0,)), (paged_operators.prefill, ())):
        arguments = (q_TQD, *pool, *pages, *case.masking(), *more)
        if pool.k_PHSD.dtype != E4M3:  # its checks multiply by what they are given
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        first = operator(*arguments)
        for _ in range(10):
            assert torch.equal(first, operator(*arguments))
        graph = torch.cuda.CUDAGraph()
        with side_by_side(), torch.cuda.graph(graph):
            captured = operator(*arguments)
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(first, captured)
    exact_TQD, bound_TQD = exact_and_bound(case, q_TQD, pool, pages)
    loose = pages._replace(max_context=100_000, max_q_len=16)
    got_TQD = attention_decode.launch(q_TQD, pool, loose, case.masking())
    assert ((got_TQD.double() - exact_TQD).abs() <= bound_TQD).all()


STEPS = (  # of one captured graph: what varies from step to step is on the device; a length of 0 is padding
    Case(lengths=(2000, 130, 64, 1), q_lens=(1, 1, 1, 1)),
    Case(lengths=(17, 900, 0, 300), q_lens=(1, 1, 1, 1)),
    Case(lengths=(33, 1900, 16, 1), q_lens=(16, 1, 0, 1)),
)


@needs_gpu
@every_storage
@pytest.mark.parametrize("launch", LAUNCHES)
def test_one_graph_for_steps_of_other_lengths(stored, launch):
    steps = [dataclasses.replace(case, **stored) for case in STEPS]
    built = [build(case, DEVICE) for case in steps]
    largest_q = max((q_TQD for q_TQD, _, _ in built), key=len)
    largest_pool = max((pool for _, pool, _ in built), key=lambda pool: len(pool.k_PHSD))
    q_TQD, pool = largest_q.clone(), KVPool(*(None if x is None else x.clone() for x in largest_pool))
    widest = max(pages.block_table_BL.shape[1] for _, _, pages in built)
    table_BL = torch.zeros(4, widest, dtype=torch.int32, device=DEVICE)
    _, _, pages = built[0]
    pages = Pages(table_BL, pages.lengths_B.clone(), pages.cu_seqlens_q.clone(), 16, 4096)
    launch(q_TQD, pool, pages._replace(lengths_B=pages.lengths_B * 0), steps[0].masking())
    graph = torch.cuda.CUDAGraph()
    with side_by_side(), torch.cuda.graph(graph):
        out_TQD = launch(q_TQD, pool, pages, steps[0].masking())
    for case, (step_q_TQD, step_pool, step_pages) in zip(steps, built, strict=True):
        q_TQD[: len(step_q_TQD)] = step_q_TQD
        for whole, part in zip(pool, step_pool, strict=True):
            if whole is not None and whole.dim() > 1:
                whole[: len(part)] = part
            elif whole is not None:
                whole.copy_(part)
        table_BL[:, : step_pages.block_table_BL.shape[1]] = step_pages.block_table_BL
        pages.lengths_B.copy_(step_pages.lengths_B)
        pages.cu_seqlens_q.copy_(step_pages.cu_seqlens_q)
        out_TQD.fill_(torch.nan)
        graph.replay()
        exact_TQD, bound_TQD = exact_and_bound(case, step_q_TQD, step_pool, step_pages)
        error_TQD = (out_TQD[: len(step_q_TQD)].double() - exact_TQD).abs()
        assert (error_TQD <= bound_TQD).all(), case


@needs_gpu
@pytest.mark.parametrize("name", ["bf16", "int8 per token"])
def test_offsets_beyond_two_to_the_31(name):
    case = Case(lengths=(700, 130), q_lens=(2, 1), **STORED[name])
    q_TQD, pool, pages = build(case, DEVICE)
    num_blocks, far = pool.k_PHSD.shape[0], (1 << 31) // pool.k_PHSD[0].numel() + 5

    def moved(x):
        if x is None:
            return None
        whole = torch.empty(far + num_blocks, *x.shape[1:], dtype=x.dtype, device=DEVICE)
        whole[far:] = x
        return whole

    expected = [launch(q_TQD, pool, pages, case.masking()) for launch in LAUNCHES]
    pool = KVPool(*(moved(x) for x in pool))
    pages = pages._replace(block_table_BL=pages.block_table_BL + far)
    for launch, out_TQD in zip(LAUNCHES, expected, strict=True):
        assert torch.equal(launch(q_TQD, pool, pages, case.masking()), out_TQD)
