"""How keys and values are stored: what the checkpoint says, what the user asks for, what a token takes."""

import pytest
import torch

from quantkit.errors import SchemeError
from quantkit.formats.kv_cache import StoredKV, write_kv_sidecar
from quantkit.runtime.kv_pool import choose_format
from quantkit.runtime.load import load_model
from quantkit.schemes import KVScheme
from quantkit_kernels.paged_attention import gather
from quantkit_kernels.rope_append import append
from tests.product_schemes import KV_SCHEMES
from tests.tiny_models import save_tiny, tokens

CPU = torch.device("cpu")
SHAPES = {"tensor": (1,), "head": (2, 1, 1)}
CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def stored_as(scheme, kept=frozenset(), scale=0.05):
    """Three layers whose scales are alike."""
    shape = SHAPES.get(scheme.granularity)
    scales = {} if shape is None else {layer: (torch.full(shape, scale),) * 2 for layer in range(3)}
    return StoredKV(scheme, scales, kept)


def format_of(stored, asked="auto", dtype=torch.float32):
    return choose_format(stored, asked, num_layers=3, num_heads=2, head_dim=8, dtype=dtype)


def through(pool, x_THD):
    """Keys as attention sees them after they have been stored."""
    append(x_THD, torch.arange(16, 16 + len(x_THD)), pool.k_PHSD, pool.k_scale)
    return gather(pool.k_PHSD, pool.k_scale, torch.tensor([1]), 0, len(x_THD), x_THD.dtype).transpose(0, 1)


@pytest.mark.parametrize("name", KV_SCHEMES)
def test_what_is_stored_comes_back_within_half_a_step(name):
    scheme = KV_SCHEMES[name]
    top = 448 if scheme.dtype == "fp8" else 127
    pool = format_of(stored_as(scheme, scale=4 / top)).create_pools(2, CPU)[0]
    x_THD = torch.randn(5, 2, 8).clamp(-3.9, 3.9)
    x_THD[1, 1] = 0  # a token of zeros has a scale too
    seen = through(pool, x_THD)
    step = x_THD.abs() * 2**-3 + 4 / 448 if scheme.dtype == "fp8" else 4 / 127  # e4m3: 3 bits after the first
    assert ((seen - x_THD).abs() <= step / 2 * 1.001).all()
    assert not torch.equal(seen, x_THD)
    assert (seen[1, 1] == 0).all()


@pytest.mark.parametrize("name", KV_SCHEMES)
def test_a_kept_layer_is_stored_as_it_is_and_the_others_are_not(name):
    pools = format_of(stored_as(KV_SCHEMES[name], frozenset({1}))).create_pools(2, CPU)
    x_THD = torch.randn(5, 2, 8)
    assert [torch.equal(through(pool, x_THD), x_THD) for pool in pools] == [False, True, False]


def test_a_value_beyond_the_stored_scale_saturates():
    for dtype, top, bottom in (("fp8", 448.0, -448), ("int8", 127.0, -128)):
        stored = stored_as(KVScheme(dtype=dtype, granularity="head"), scale=0.5)
        pool = format_of(stored).create_pools(2, CPU)[0]
        seen = through(pool, torch.tensor([[[1e6, -1e6, 0, 0, 0, 0, 0, 0]] * 2]))
        assert seen[0, 0, 0] == top / 2
        assert seen[0, 0, 1] == bottom / 2


def test_a_stored_scale_is_used_in_the_dtype_of_the_model():
    stored = stored_as(KVScheme(dtype="int8", granularity="head"), scale=0.0123456)
    pool = format_of(stored, dtype=torch.bfloat16).create_pools(2, CPU)[0]
    assert (pool.k_scale == torch.tensor(0.0123456).bfloat16().float()).all()
    assert pool.k_scale.dtype == torch.float32


@pytest.mark.parametrize("asked", ["fp8", "int8"])
def test_asked_codes_take_calibrated_scales_or_make_their_own(asked):
    other = "int8" if asked == "fp8" else "fp8"
    calibrated = stored_as(KVScheme(dtype=asked, granularity="head"), frozenset({2}))
    assert format_of(calibrated, asked) == format_of(calibrated)
    for stored in (None, stored_as(KVScheme(dtype=other, granularity="head"))):
        found = format_of(stored, asked)
        assert {(layer.dtype, layer.scales, layer.is_dynamic) for layer in found.layers} == {
            (CODES[asked], None, True)
        }
        x_THD = (
            torch.randn(9, 2, 8) * torch.logspace(-3, 3, 9)[:, None, None]
        )  # no one scale holds all of these
        seen = through(found.create_pools(2, CPU)[0], x_THD)
        assert ((seen - x_THD).abs() <= x_THD.abs().amax(dim=2, keepdim=True) / 14).all()
    kept = stored_as(KVScheme(dtype=other, granularity="head"), frozenset({1}))
    assert [layer.dtype.itemsize for layer in format_of(kept, asked).layers] == [1, 4, 1]


def test_the_models_own_dtype_can_be_asked_for_and_no_other():
    stored = stored_as(KV_SCHEMES["kv-fp8-head"])
    found = format_of(stored, "bf16", torch.bfloat16)
    assert {layer.dtype for layer in found.layers} == {torch.bfloat16}
    with pytest.raises(SchemeError, match="bf16 for a model that computes in fp32") as caught:
        format_of(stored, "bf16")
    assert "fp32" in caught.value.fix


@pytest.mark.parametrize("asked", ["auto", "fp8", "int8"])
def test_what_nobody_has_written_is_zero(asked):
    """Kernels may read it, and multiply it by a probability of 0."""
    kv = choose_format(None, asked, num_layers=2, num_heads=2, head_dim=8, dtype=torch.bfloat16)
    junk = [torch.full((1 << 12,), torch.nan) for _ in range(64)]  # for memory that would be used again
    del junk
    for pool in kv.create_pools(9, torch.device("cpu")):
        assert not pool.k_PHSD.float().any() and not pool.v_PHSD.float().any()
        assert all(scale is None or scale.isfinite().all() for scale in (pool.k_scale, pool.v_scale))


def test_scales_of_one_are_said_loudly():
    stored = stored_as(KVScheme(dtype="fp8", granularity="tensor"), scale=1.0)
    with pytest.warns(UserWarning, match="nobody has calibrated it"):
        format_of(stored)


@pytest.mark.parametrize("name", [None, *KV_SCHEMES])
def test_a_token_takes_the_bytes_that_are_said(name):
    stored = None if name is None else stored_as(KV_SCHEMES[name], frozenset({1}))
    found = format_of(stored, dtype=torch.bfloat16)
    tensors = [
        part
        for pool, layer in zip(found.create_pools(7, CPU), found.layers, strict=True)
        for part in (pool[:2] if not layer.is_dynamic else pool)
    ]
    assert sum(tensor.nbytes for tensor in tensors) == 7 * 16 * found.token_bytes
    assert not any(tensor.float().any() for tensor in tensors if tensor.ndim == 4)


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_an_int8_cache_is_read_from_its_sidecar(granularity, tmp_path):
    folder = save_tiny("llama", tmp_path)
    ids = tokens(30)
    plain = load_model(folder).logits(ids)
    write_kv_sidecar(
        folder,
        stored_as(KVScheme(dtype="int8", granularity=granularity)),
        {layer: f"model.layers.{layer}.self_attn" for layer in range(3)},
    )
    model = load_model(folder)
    logits = model.logits(ids)
    assert 1e-5 < float((logits - plain).norm() / plain.norm()) < 0.5
    cache = model.new_cache(30)
    last = [model.forward(part, cache) for part in ids.split(7)][-1]
    assert float((last - logits[-1]).norm() / last.norm()) < 1e-4
