"""Drawing tokens: the kernels against the definition in plain torch, and that a row depends on nothing but itself."""

import contextlib
import warnings

import pytest
import torch

from quantkit.runtime.sampler import NewRow, Sampler
from quantkit.runtime.sampling_params import SamplingParams
from quantkit_kernels import draw as definition
from quantkit_kernels import draw_kernel, filter_kernel, sampling_kernel
from tests.gpu.triton_device import DEVICE, IS_INTERPRETED, generator, needs_gpu, needs_kernels, poisoned  # noqa: F401

pytestmark = [
    *needs_kernels,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's: infinite numbers are meant
]

MODEL_DTYPE = (
    torch.float16 if IS_INTERPRETED else torch.bfloat16
)  # the interpreter's bfloat16 is not to be trusted
CASES = [(5, torch.float32), (4097, torch.float16)]
CASES += (
    [] if IS_INTERPRETED else [(128256, torch.bfloat16), (128256, torch.float32), (262208, torch.bfloat16)]
)
FILTERS = [
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 3, "top_p": 0.7},
    {"top_k": 300, "top_p": 0.95},
    {"top_k": 10**6, "top_p": 0.4},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"top_p": 0.95, "min_p": 0.02},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {},
]


def settings_of(filters, temperature=0.8, seed=0):
    """A row of settings for each."""
    rows = [
        definition.pack_settings(
            **{"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed + number}
            | each
        )
        for number, each in enumerate(filters)
    ]
    return torch.tensor(rows, dtype=torch.int32)


def logits_of(kind, num_rows, num_logits, dtype):
    """Rows in a wider tensor whose other columns are NaN."""
    logits = torch.randn(num_rows, num_logits, generator=generator(num_logits))
    if kind == "peaked":
        logits = logits * 4
    elif kind == "equal":
        logits = torch.ones(num_rows, num_logits)
    elif kind == "few values":
        logits = (logits * 2).round()
    elif kind == "masked":
        logits[:, 1::2] = -torch.inf
    elif kind == "two allowed":  # by a grammar
        logits[:, 2:] = -torch.inf
    elif kind == "infinite":
        logits[:, 2:4] = torch.inf
    whole = torch.full((num_rows, num_logits + 8), torch.nan, dtype=dtype, device=DEVICE)
    whole[:, :num_logits] = logits.to(dtype).to(DEVICE)
    return whole[:, :num_logits]


def near_the_edge(logits, settings, *, by=1e-5):
    """Tokens that top p keeps or not by the rounding of sums."""
    kept = []
    for factor in (1 - by, 1 + by):
        top_p = torch.where(settings.top_p < 1, settings.top_p * factor, 1.0)
        kept.append(definition.kept_tokens(logits, settings._replace(top_p=top_p)))
    return kept[0] != kept[1]


def kept_by_kernel(logits, settings, rows):
    """What the cuts and counts of the kernels keep, and min p."""
    shift = filter_kernel.MISSING_BITS[logits.dtype]
    known = filter_kernel.Rows(
        logits, settings.to(DEVICE), rows.to(DEVICE), sampling_kernel.best_of_parts(logits)
    )
    cuts, ties = (result.cpu() for result in filter_kernel.launch_filters(known))
    bits = (logits.cpu().float() + 0.0).view(torch.int32)
    short = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> shift
    chosen = definition.unpack_settings(settings, rows)
    is_tie = short == cuts[:, :1]
    num_logits = logits.shape[1]
    for row in range(len(rows)):
        if cuts[row, 0] != -(2**31) >> shift:
            parts = is_tie[row].nonzero()[:, 0] // filter_kernel.PART
            assert torch.equal(
                ties[row].long(), parts.bincount(minlength=-(-num_logits // filter_kernel.PART))
            )
    kept = (short > cuts[:, :1]) | (is_tie & (is_tie.cumsum(1) <= cuts[:, 1:]))
    return kept & (definition.scaled_logits(logits.cpu(), chosen) >= chosen.log_min_p[:, None])


@pytest.mark.parametrize(("num_logits", "dtype"), CASES)
@pytest.mark.parametrize(
    "kind", ["flat", "peaked", "equal", "few values", "masked", "two allowed", "infinite"]
)
def test_filters_keep_what_the_definition_says(kind, num_logits, dtype):
    logits, settings = logits_of(kind, len(FILTERS), num_logits, dtype), settings_of(FILTERS)
    rows = torch.randperm(len(FILTERS), generator=generator(1))
    chosen = definition.unpack_settings(settings, rows)
    expected = definition.kept_tokens(logits.cpu(), chosen)
    differs = kept_by_kernel(logits, settings, rows) != expected
    is_near = near_the_edge(logits.cpu(), chosen)
    if kind in ("equal", "few values"):  # sums of equal weights, one product here
        assert (differs.sum(1) <= 2 + is_near.sum(1)).all()
    else:
        assert not (differs & ~is_near).any()


@pytest.mark.parametrize(("num_logits", "dtype"), CASES)
@pytest.mark.parametrize("is_filtered", [False, True])
def test_draws_are_those_of_the_definition(is_filtered, num_logits, dtype):
    filters = FILTERS if is_filtered else [{"min_p": 0.05}, {}, {"temperature": 0.0}, {"temperature": 1e-30}]
    repeats = 2 if IS_INTERPRETED else 20
    logits = logits_of("peaked", repeats * len(filters), num_logits, dtype)
    settings = settings_of(repeats * filters, seed=2**63 - 5)
    rows = torch.randperm(len(settings), generator=generator(1))
    positions = torch.arange(len(rows)) * 1000
    operands = (settings, rows, positions)
    got, is_nan = draw_kernel.launch(logits, *(each.to(DEVICE) for each in operands), is_filtered)
    expected, _ = definition._draw(logits.cpu(), *operands, is_filtered)
    chosen = definition.unpack_settings(settings, rows)
    noise = definition.noise(chosen, positions, num_logits)
    scores = noise.log() - definition.scaled_logits(logits.cpu(), chosen)
    both = scores.gather(1, torch.stack([got.cpu(), expected], dim=1))
    is_same = got.cpu() == expected
    assert (is_same | ((both[:, 0] - both[:, 1]).abs() < 1e-5)).all()
    assert is_same.float().mean() > 0.97
    assert not is_nan.any()


def test_rows_that_hold_nan_are_said_to():
    logits = logits_of("flat", 4, 4097, MODEL_DTYPE).clone()
    logits[1, 4000], logits[1, 70], logits[2, :] = torch.nan, torch.nan, torch.nan
    settings = settings_of([{"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}, {}])
    order = torch.arange(4, device=DEVICE)
    for is_filtered in (False, True):
        tokens, is_nan = draw_kernel.launch(logits, settings.to(DEVICE), order, order, is_filtered)
        assert is_nan.tolist() == [False, True, True, False]
        assert tokens[1:3].tolist() == [70, 0]
        assert (tokens < 4097).all()


@pytest.mark.parametrize("is_filtered", [False, True])
def test_a_row_alone_is_as_in_a_batch(is_filtered):
    num_rows, num_logits = (8, 4097) if IS_INTERPRETED else (300, 128256)
    logits = logits_of("flat", num_rows, num_logits, MODEL_DTYPE)
    settings = settings_of([FILTERS[number % len(FILTERS)] for number in range(num_rows)]).to(DEVICE)
    rows = torch.arange(num_rows, device=DEVICE)
    together, _ = draw_kernel.launch(logits, settings, rows, rows + 7, is_filtered)
    for row in range(0, num_rows, 3 if IS_INTERPRETED else 37):
        one = slice(row, row + 1)
        alone, _ = draw_kernel.launch(logits[one], settings, rows[one], rows[one] + 7, is_filtered)
        assert alone[0] == together[row]


@needs_gpu
@pytest.mark.parametrize("is_filtered", [False, True])
def test_a_captured_draw_is_the_same(is_filtered):
    logits = logits_of("flat", len(FILTERS), 128256, torch.bfloat16)
    settings, rows = settings_of(FILTERS).to(DEVICE), torch.arange(len(FILTERS), device=DEVICE)
    positions = rows.clone()
    draw_kernel.launch(logits, settings, rows, positions, is_filtered)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = definition.draw(logits, settings, rows, positions, is_filtered)
    for position in range(3):
        positions.fill_(position)
        settings[:, 4] += 1
        graph.replay()
        eager, _ = definition.draw(logits, settings, rows, positions, is_filtered)
        assert torch.equal(captured, eager)


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.8, seed=2, top_k=40, top_p=0.9),
    SamplingParams(
        temperature=1.2, seed=3, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2
    ),
    SamplingParams(logit_bias={7: 100.0, 8: 99.5}, logprobs=3),
    SamplingParams(min_tokens=2, logit_bias={11: 100.0}),
]


@contextlib.contextmanager
def waiting_is_an_error():
    """The host may not wait for the device. torch warns that it does not notice all that would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_sampler_on_the_device_never_waits_and_samples_as_on_the_cpu():
    num_logits, rows = 5000, list(range(len(PARAMS)))
    new_rows = [NewRow(row, params, [3, 4, 5], [], frozenset({11})) for row, params in enumerate(PARAMS)]
    found = []
    for device in ("cpu", "cuda"):
        sampler = Sampler(len(PARAMS), num_logits, torch.device(device))
        steps = [
            (
                logits.to(device),
                torch.tensor(rows, device=device),
                torch.full((len(rows),), position, device=device),
            )
            for position, logits in enumerate(
                torch.randn(8, len(rows), num_logits, generator=generator(0)), start=3
            )
        ]
        with waiting_is_an_error():
            sampler.assign(new_rows)
            sampled = [
                sampler.sample(*operands, sampler.work(rows, [position] * len(rows)))
                for position, operands in enumerate(steps, start=3)
            ]
        found.append(sampled)
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert torch.equal(on_cpu.token_ids_B, on_gpu.token_ids_B.cpu())
        for expected, got in zip(on_cpu.logprobs, on_gpu.logprobs, strict=True):
            torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=0)
    assert [int(each.token_ids_B[5]) == 11 for each in found[1]] == [False, False] + [True] * 6
