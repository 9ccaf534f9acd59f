"""KV scales: what is written is read back, in the shards (FP8) and in the sidecar (INT8)."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.kv_cache import (
    SIDECAR_NAME,
    StoredKV,
    kv_layout,
    kv_tensors,
    read_kv_cache,
    write_kv_sidecar,
)
from quantkit.formats.quantization_config import write_quantization
from quantkit.schemes import KVScheme

MODULES = {0: "model.layers.0.self_attn", 1: "model.layers.1.self_attn"}
HEADS = 2


def scales(shape):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(shape, generator=generator) + 0.01  # noqa: E731
    return {layer: (draw(), draw()) for layer in MODULES}


def folder(path, tensors=None, kv=None):
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": HEADS}
    if kv is not None:
        config["quantization_config"] = write_quantization({}, kv)
    (path / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1), **(tensors or {})}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("granularity, shape", [("tensor", (1,)), ("head", (HEADS, 1, 1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_scales_round_trip_through_the_shards(tmp_path, granularity, shape, dtype):
    scheme = KVScheme(dtype="fp8", granularity=granularity)
    stored = StoredKV(scheme, scales(shape))
    layout = kv_layout(scheme, MODULES, HEADS, dtype)
    tensors = {name: tensor.to(layout[name][0]) for name, tensor in kv_tensors(stored, MODULES).items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        n: s for n, (_, s) in layout.items()
    }
    read = read_kv_cache(open_checkpoint(folder(tmp_path, tensors, scheme)))
    assert read is not None and read.scheme == scheme and list(read.scales) == [0, 1]
    for layer, pair in stored.scales.items():
        for ours, theirs in zip(pair, read.scales[layer], strict=True):
            assert theirs.dtype == torch.float32
            assert torch.equal(theirs, ours.to(dtype).float())


def test_layout_of_fp8_scales_is_in_order_of_layers():
    scheme = KVScheme(dtype="fp8", granularity="tensor")
    modules = {layer: f"model.layers.{layer}.self_attn" for layer in (10, 2)}
    names = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in (2, 10) for part in "kv"]
    assert list(kv_layout(scheme, modules, HEADS, torch.bfloat16)) == names


def test_int8_scales_round_trip_through_the_sidecar(tmp_path):
    stored = StoredKV(KVScheme(dtype="int8", granularity="head"), scales((HEADS, 1, 1)))
    assert kv_layout(stored.scheme, MODULES, HEADS, torch.bfloat16) == {}
    path = write_kv_sidecar(folder(tmp_path), stored, MODULES)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        SIDECAR_NAME,
    ]
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"dtype": "int8", "granularity": "head"}
        assert torch.equal(file.get_tensor("model.layers.1.self_attn.v_scale"), stored.scales[1][1])
    read = read_kv_cache(open_checkpoint(tmp_path))
    assert read is not None and read.scheme == stored.scheme
    for layer, pair in stored.scales.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, read.scales[layer], strict=True))


def test_int8_per_token_has_no_tensors(tmp_path):
    stored = StoredKV(KVScheme(dtype="int8", granularity="token"), {})
    path = write_kv_sidecar(folder(tmp_path), stored, MODULES)
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == []
    assert read_kv_cache(open_checkpoint(tmp_path)) == stored


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_layers_that_stay_in_16_bits_are_in_the_sidecar(tmp_path, granularity):
    values = scales((HEADS, 1, 1)) if granularity == "head" else {}
    stored = StoredKV(KVScheme(dtype="int8", granularity=granularity), values, frozenset({1}))
    write_kv_sidecar(folder(tmp_path), stored, MODULES)
    read = read_kv_cache(open_checkpoint(tmp_path))
    assert read is not None and read.kept_layers == {1} and read.scales.keys() == values.keys()


@pytest.mark.parametrize("granularity, shape", [("tensor", (1,)), ("head", (HEADS, 1, 1))])
def test_an_fp8_plan_that_differs_per_layer_leaves_its_scales_in_the_shards(tmp_path, granularity, shape):
    scheme = KVScheme(dtype="fp8", granularity=granularity)
    stored = StoredKV(scheme, scales(shape), frozenset({0}))
    folder(tmp_path, kv_tensors(stored, MODULES))
    path = write_kv_sidecar(tmp_path, stored, MODULES)
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == []
    read = read_kv_cache(open_checkpoint(tmp_path))
    assert read is not None and read.scheme == scheme and read.kept_layers == {0}
    assert torch.equal(read.scales[1][1], stored.scales[1][1])


@pytest.mark.parametrize(
    "metadata",
    [
        {"dtype": "int4", "granularity": "head"},
        {"dtype": "int8", "granularity": "tensor"},
        {"dtype": "fp8", "granularity": "token", "kept_layers": "[0]"},
        {"dtype": "fp8", "granularity": "head"},  # config.json could say it
        {"dtype": "int8", "granularity": "token", "kept_layers": "[2]"},  # of two layers
        {"dtype": "int8", "granularity": "token", "kept_layers": "0"},
        {"dtype": "int8", "granularity": "token", "kept_layers": "[true]"},
        {"dtype": "int8", "granularity": "token", "kept_layers": "[0"},
        {"dtype": "int8", "granularity": "token", "offset": "1"},
        {},
    ],
)
def test_a_sidecar_that_says_what_we_do_not_implement_is_refused(tmp_path, metadata):
    save_file({"a": torch.zeros(1)}, folder(tmp_path) / SIDECAR_NAME, metadata=metadata)
    with pytest.raises(SourceError, match="is no KV scheme"):
        read_kv_cache(open_checkpoint(tmp_path))


def test_the_sidecar_is_the_same_bytes_in_any_order_of_layers(tmp_path):
    scheme, values = KVScheme(dtype="int8", granularity="head"), scales((HEADS, 1, 1))
    written = [
        write_kv_sidecar(tmp_path, StoredKV(scheme, ordered), MODULES).read_bytes()
        for ordered in (values, dict(reversed(values.items())))
    ]
    assert written[0] == written[1]


def test_no_scheme_means_a_16_bit_cache(tmp_path):
    assert read_kv_cache(open_checkpoint(folder(tmp_path))) is None


def test_heads_default_to_attention_heads(tmp_path):
    stored = StoredKV(KVScheme(dtype="int8", granularity="head"), scales((4, 1, 1)))
    write_kv_sidecar(folder(tmp_path), stored, MODULES)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "num_attention_heads": 4}))
    read = read_kv_cache(open_checkpoint(tmp_path))
    assert read is not None and read.scales[1][0].shape == (4, 1, 1)


def test_a_stored_scalar_is_a_tensor_scale(tmp_path):
    scheme = KVScheme(dtype="fp8", granularity="tensor")
    tensors = {f"{module}.{part}_scale": torch.tensor(0.5) for module in MODULES.values() for part in "kv"}
    read = read_kv_cache(open_checkpoint(folder(tmp_path, tensors, scheme)))
    assert read is not None and read.scales[0][0].shape == (1,)


def broken(change):
    scheme = KVScheme(dtype="fp8", granularity="tensor")
    tensors = kv_tensors(StoredKV(scheme, scales((1,))), MODULES)
    change(tensors)
    return tensors, scheme


@pytest.mark.parametrize(
    "change, finding",
    [
        (lambda t: t.pop("model.layers.1.self_attn.v_scale"), "layer 1 has no v_scale"),
        (lambda t: t.pop("model.layers.0.self_attn.k_scale"), "layer 0 has no k_scale"),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(2)}),
            "k_scale is torch.float32 [2]",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(1).int()}), "is torch.int32 [1]"),
        (lambda t: t["model.layers.0.self_attn.k_scale"].fill_(float("nan")), "not a finite positive number"),
        (lambda t: t["model.layers.0.self_attn.k_scale"].fill_(0), "not a finite positive number"),
    ],
)
def test_damaged_scales_are_refused_by_name(tmp_path, change, finding):
    checkpoint = open_checkpoint(folder(tmp_path, *broken(change)))
    with pytest.raises(SourceError) as error:
        read_kv_cache(checkpoint)
    assert finding in error.value.problem


def test_two_schemes_are_refused(tmp_path):
    checkpoint = open_checkpoint(folder(tmp_path, *broken(lambda tensors: None)))
    write_kv_sidecar(tmp_path, StoredKV(KVScheme(dtype="int8", granularity="token"), {}), MODULES)
    with pytest.raises(SourceError, match="kv_cache_scheme too"):
        read_kv_cache(checkpoint)


def test_a_sidecar_of_another_kind_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, folder(tmp_path) / SIDECAR_NAME, metadata={"dtype": "int4"})
    with pytest.raises(SourceError, match="is no KV scheme"):
        read_kv_cache(open_checkpoint(tmp_path))


def test_a_config_without_layers_is_refused(tmp_path):
    write_kv_sidecar(
        folder(tmp_path), StoredKV(KVScheme(dtype="int8", granularity="head"), scales((2, 1, 1))), MODULES
    )
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    with pytest.raises(SourceError, match="num_hidden_layers: None"):
        read_kv_cache(open_checkpoint(tmp_path))
