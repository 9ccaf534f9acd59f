"""A quantized linear on disk: the tensors it has, and reading it back from a folder."""

import json

import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.compressed_tensors import (
    StoredLinear,
    decode_linear,
    encode_linear,
    format_name,
    linear_layout,
    read_linear,
)
from quantkit.schemes import QParams
from quantkit.schemes.tiles import minmax_qparams, quantize_weight
from tests.product_schemes import SCHEMES

MODULE = "model.layers.0.mlp.down_proj"


def stored(scheme, num_rows=37, num_cols=256, dtype=torch.bfloat16):
    """A random linear, quantized min-max; 37 rows are ragged for zero points and blocks alike."""
    w_NK = torch.randn(num_rows, num_cols, generator=torch.Generator().manual_seed(0)) + 0.3
    qparams = minmax_qparams(w_NK, scheme.weight, dtype)
    input_qparams = None
    if scheme.is_static:
        zero_point = None if scheme.activation.symmetric else torch.tensor([-7], dtype=torch.int8)
        input_qparams = QParams(torch.tensor([0.02], dtype=dtype), zero_point)
    return StoredLinear(quantize_weight(w_NK, scheme.weight, qparams), qparams, input_qparams)


def same(ours, theirs):
    if ours is None or theirs is None:
        return ours is theirs
    if isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    as_bits = [tensor.contiguous().view(torch.uint8) for tensor in (ours, theirs)]
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(*as_bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_encoding_follows_the_layout_and_decodes_to_the_same_bits(name, dtype):
    scheme = SCHEMES[name]
    linear = stored(scheme, dtype=dtype)
    tensors = encode_linear(linear, scheme)
    described = {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}
    layout = linear_layout(scheme, 37, 256, dtype)
    assert described == dict(layout) and list(described) == list(layout)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert same(decode_linear(tensors, scheme), linear)


@pytest.mark.parametrize("num_rows, num_cols", [(1, 1), (3, 5), (8, 33), (130, 7)])
@pytest.mark.parametrize("name", [name for name in SCHEMES if "channel" in name or "tensor" in name])
def test_odd_shapes_round_trip(name, num_rows, num_cols):
    linear = stored(SCHEMES[name], num_rows, num_cols)
    assert same(decode_linear(encode_linear(linear, SCHEMES[name]), SCHEMES[name]), linear)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("int4-g128-sym", "pack-quantized"),
        ("int2-g32-asym", "pack-quantized"),
        ("int8-w8a8-dynamic", "int-quantized"),
        ("w4a8-int8-g32", "int-quantized"),
        ("w4a8-fp8-g32", "pack-quantized"),
        ("fp8-block", "float-quantized"),
        ("fp8-channel-weight", "naive-quantized"),
    ],
)
def test_format_of_a_scheme(name, expected):
    assert format_name(SCHEMES[name]) == expected


def test_layout_of_four_bits_in_groups():
    assert dict(linear_layout(SCHEMES["int4-g64-asym"], 100, 192, torch.bfloat16)) == {
        "weight_packed": (torch.int32, (100, 24)),
        "weight_scale": (torch.bfloat16, (100, 3)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (13, 3)),
    }


def folder(path, tensors):
    (path / "config.json").write_text(json.dumps({}))
    save_file(
        {f"{MODULE}.{suffix}": tensor for suffix, tensor in tensors.items()}, path / "model.safetensors"
    )
    return open_checkpoint(path)


@pytest.mark.parametrize("name", ["int4-g64-asym", "int8-w8a8-static-asym", "fp8-block", "fp8-tensor-static"])
def test_a_linear_is_read_as_it_was_stored(tmp_path, name):
    linear = stored(SCHEMES[name])
    checkpoint = folder(tmp_path, encode_linear(linear, SCHEMES[name]))
    assert same(read_linear(checkpoint, MODULE, SCHEMES[name]), linear)


def test_scalar_scales_are_read_as_one_scale(tmp_path):
    linear = stored(SCHEMES["fp8-tensor-static"])
    tensors = encode_linear(linear, SCHEMES["fp8-tensor-static"])
    scalars = {
        suffix: tensor.reshape(()) if tensor.numel() == 1 else tensor for suffix, tensor in tensors.items()
    }
    assert same(read_linear(folder(tmp_path, scalars), MODULE, SCHEMES["fp8-tensor-static"]), linear)


@pytest.mark.parametrize(
    "name, change, finding",
    [
        ("int4-g64-asym", lambda t: t.pop("weight_zero_point"), "weight_zero_point is missing"),
        ("int4-g64-asym", lambda t: t.pop("weight_shape"), "weight_shape is missing"),
        ("int4-g64-asym", lambda t: t.update(weight_shape=torch.tensor(5)), "has the stored shape []"),
        (
            "int4-g64-asym",
            lambda t: t.update(weight_shape=torch.tensor([37, 100])),
            "the stored shape [37, 100]",
        ),
        (
            "int4-g64-asym",
            lambda t: t.update(weight_shape=torch.tensor([-1, 256])),
            "the stored shape [-1, 256]",
        ),
        (
            "int4-g64-asym",
            lambda t: t.update(weight_shape=torch.tensor([37, 512])),
            "weight_packed is torch.int32",
        ),
        (
            "int4-g64-asym",
            lambda t: t.update(weight_scale=t["weight_scale"][:, :2].clone()),
            "weight_scale is",
        ),
        ("int8-w8a8-dynamic", lambda t: t.update(weight=t["weight"].float()), "weight is torch.float32"),
        (
            "int8-w8a8-dynamic",
            lambda t: t.update(weight_scale=t["weight_scale"].int()),
            "weight_scale is torch.int32",
        ),
        (
            "int8-w8a8-dynamic",
            lambda t: t.update(weight=t["weight"][0].clone()),
            "has the stored shape [256]",
        ),
        ("fp8-tensor-static", lambda t: t.pop("input_scale"), "input_scale is missing"),
    ],
)
def test_what_does_not_fit_the_scheme_is_refused_by_name(tmp_path, name, change, finding):
    tensors = encode_linear(stored(SCHEMES[name]), SCHEMES[name])
    change(tensors)
    checkpoint = folder(tmp_path, tensors)
    with pytest.raises(SourceError) as error:
        read_linear(checkpoint, MODULE, SCHEMES[name])
    assert f"{MODULE}" in error.value.problem and finding in error.value.problem
