"""Codes of the KV cache: nearest on their grid, saturating, the same in the runtime's cache and in calibration's."""

import pytest
import torch

from quantkit.formats.kv_cache import StoredKV
from quantkit.numerics.kv_codes import LARGEST, decode_kv, encode_kv, round_trip_kv
from quantkit.observers.kv import RoundTripCache
from quantkit.runtime.kv_pool import choose_format
from quantkit.schemes import KVScheme
from quantkit_kernels.paged_attention import gather
from quantkit_kernels.rope_append import append


def grid(dtype):
    """Every value that a code stands for, at scale 1."""
    codes = torch.arange(-128, 128, dtype=torch.int8)
    if dtype == "int8":
        return codes.double()
    values = codes.view(torch.float8_e4m3fn).double()
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", LARGEST)
def test_a_value_goes_to_the_nearest_of_the_grid(dtype):
    x = torch.linspace(-2 * LARGEST[dtype], 2 * LARGEST[dtype], 4001)
    distance = (x.double()[:, None] - grid(dtype)).abs()
    error = (round_trip_kv(x, dtype, torch.ones(1)).double() - x.double()).abs()
    assert torch.equal(error, distance.amin(dim=1))


@pytest.mark.parametrize("dtype", LARGEST)
def test_what_a_code_stands_for_comes_back_exactly(dtype):
    scale = torch.tensor([0.25])
    values = (grid(dtype) * 0.25).float()
    assert torch.equal(decode_kv(encode_kv(values, dtype, scale), scale), values)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", LARGEST)
def test_calibration_sees_what_the_runtime_serves(dtype, model_dtype):
    generator = torch.Generator().manual_seed(0)
    k_HTD, v_HTD = (torch.randn(3, 20, 8, generator=generator).to(model_dtype) * 3 for _ in "kv")
    scales = tuple(torch.rand(3, 1, 1, generator=generator).bfloat16().float() * 0.1 + 0.01 for _ in "kv")
    stored = StoredKV(KVScheme(dtype=dtype, granularity="head"), {0: scales})
    kv = choose_format(stored, "auto", num_layers=1, num_heads=3, head_dim=8, dtype=model_dtype)
    (pool,) = kv.create_pools(3, torch.device("cpu"))
    seen = RoundTripCache(dtype, *scales).update(k_HTD[None], v_HTD[None], 0)
    pages = (k_HTD, pool.k_PHSD, pool.k_scale), (v_HTD, pool.v_PHSD, pool.v_scale)
    for (x_HTD, page, scale), ours in zip(pages, seen, strict=True):
        append(x_HTD.transpose(0, 1), torch.arange(16, 36), page, scale)
        served = gather(page, scale, torch.tensor([1, 2], dtype=torch.int32), 0, 20, model_dtype)
        assert torch.equal(ours[0], served)
        assert not torch.equal(ours[0], x_HTD)
