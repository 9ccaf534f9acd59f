"""Checkpoints of AutoGPTQ, GPTQModel and AutoAWQ: what is read is what a packer of our own has packed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import SourceError
from quantkit.formats.awq import open_awq
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.gptq import open_gptq
from quantkit.runtime.load import load_model
from tests.packers import Grid, gptq_tensors, write_packed_llama
from tests.tiny_llama import tiny_tensors, write_tiny_llama

OPEN = {"gptq": open_gptq, "awq": open_awq}


def opened(folder):
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    return OPEN[method](open_checkpoint(folder))


def check_weights(folder):
    """Every packed weight, whole and in parts, and every tensor that was left as it was."""
    checkpoint = opened(folder.path)
    for module, weight in folder.weights.items():
        name = f"{module}.weight"
        assert checkpoint.info(name).shape == tuple(weight.shape)
        assert torch.equal(checkpoint.read(name).double(), weight), name
        assert torch.equal(checkpoint.read_rows(name, 3, 13).double(), weight[3:13]), name
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(checkpoint.read(down), tiny_tensors()[down].half())
    assert torch.equal(checkpoint.read_rows(down, 3, 13), tiny_tensors()[down].half()[3:13])
    assert checkpoint.tensors.keys() == tiny_tensors().keys()
    assert "quantization_config" not in checkpoint.config


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_of_any_bits_with_and_without_zero_points(tmp_path, bits, symmetric, version):
    section = {"desc_act": False, "sym": symmetric, "checkpoint_format": version}
    check_weights(write_packed_llama(tmp_path, "gptq", section, bits=bits, symmetric=symmetric))


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_with_its_inputs_in_another_order(tmp_path, bits):
    folder = write_packed_llama(tmp_path, "gptq", {"desc_act": True}, bits=bits, order_seed=1)
    check_weights(folder)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="g_idx is missing"):
        opened(tmp_path)


def test_gptq_with_one_group_and_no_g_idx(tmp_path):
    folder = write_packed_llama(tmp_path, "gptq", {}, group_size=-1)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    save_file(tensors, tmp_path / "model.safetensors")
    check_weights(folder)


def test_gptq_with_other_bits_in_one_linear(tmp_path):
    """As GPTQModel's `dynamic` has it."""
    folder = write_packed_llama(tmp_path, "gptq", {"dynamic": {"+:.*0.*up_proj": {"bits": 8}}})
    file, module = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj"
    codes = torch.randint(256, (64, 32), generator=torch.Generator().manual_seed(0))
    zero_points = torch.full((2, 64), 128)
    grid = Grid(codes, zero_points, torch.full((2, 64), 0.01).half(), torch.arange(32) // 16)
    parts = {f"{module}.{suffix}": part for suffix, part in gptq_tensors(grid, 8).items()}
    save_file(load_file(file) | parts, file)
    folder.weights[module] = grid.weight()
    check_weights(folder)


@pytest.mark.parametrize("group_size", [16, -1])
def test_awq(tmp_path, group_size):
    section = {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    check_weights(write_packed_llama(tmp_path, "awq", section, group_size=group_size))


def test_zero_points_reach_both_ends(tmp_path):
    """Or else the tests above would not see a borrow, or a code that wraps."""
    grid_codes = torch.arange(16).repeat(16, 2)
    zero_points = torch.tensor([list(range(16)), list(range(16))[::-1]])
    grid = Grid(grid_codes, zero_points, torch.full((2, 16), 0.5).half(), torch.arange(32) // 16)
    folder = write_packed_llama(tmp_path, "gptq", {})
    name, file = "model.layers.0.self_attn.k_proj", tmp_path / "model.safetensors"
    parts = {f"{name}.{suffix}": part for suffix, part in gptq_tensors(grid, 4).items()}
    save_file(load_file(file) | parts, file)
    folder.weights[name] = grid.weight()
    check_weights(folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("chunk", [1, 1000])
def test_the_runtime_computes_with_these_weights(tmp_path, method, chunk, monkeypatch):
    monkeypatch.setattr("quantkit.formats.dequantized.CHUNK_WEIGHTS", chunk)
    folder = write_packed_llama(tmp_path / "packed", method, {})
    plain = {name: tensor.half().float() for name, tensor in tiny_tensors().items()}
    plain |= {f"{module}.weight": weight.float() for module, weight in folder.weights.items()}
    write_tiny_llama(tmp_path / "plain", plain)
    tokens = torch.arange(40)
    packed, expected = (
        load_model(source, dtype=torch.float32).logits(tokens)
        for source in (opened(folder.path), tmp_path / "plain")
    )
    assert torch.equal(packed, expected)


def test_size_and_hash_are_those_of_what_is_stored(tmp_path):
    path = write_packed_llama(tmp_path, "gptq", {}).path
    checkpoint, stored = opened(path), open_checkpoint(path)
    assert checkpoint.num_bytes == stored.num_bytes
    assert checkpoint.content_hash() == stored.content_hash()


@pytest.mark.parametrize(
    ("method", "section", "finding"),
    [
        ("gptq", {"bits": 5}, "bits 5 is not supported"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"pack_dtype": "int8"}, "pack_dtype 'int8'"),
        ("gptq", {"group_size": 0}, "group_size 0"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"bits": 3}, "bits 3"),
        ("awq", {"zero_point": False}, "zero_point False"),
        ("awq", {"group_size": 24}, "groups of 24 do not divide"),
        ("awq", {"group_size": 32}, r"down_proj.qzeros is torch.int32 \[4, 4\], not \[2, 4\]"),
    ],
)
def test_other_variants_are_refused_by_name(tmp_path, method, section, finding):
    path = write_packed_llama(tmp_path, method, section).path
    with pytest.raises(SourceError, match=finding):
        opened(path)


def with_tensor(path, name, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("suffix", "change", "finding"),
    [
        ("scales", lambda scales: scales[:, :-1], "scales is .*, not"),
        ("qzeros", lambda zeros: zeros[:-1], "qzeros is .*, not"),
        ("g_idx", lambda groups: groups[:-2], "4 words for 30 inputs"),
        ("qweight", lambda weight: weight.float(), "not int32 words"),
        ("g_idx", lambda groups: groups.float(), "g_idx is torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, suffix, change, finding):
    path = write_packed_llama(tmp_path, "gptq", {}).path
    with_tensor(path, f"model.layers.0.mlp.up_proj.{suffix}", change)
    with pytest.raises(SourceError, match=finding):
        opened(path)


def test_an_input_of_a_group_without_scale_is_refused(tmp_path):
    path = write_packed_llama(tmp_path, "gptq", {}).path
    name = "model.layers.0.mlp.up_proj"
    with_tensor(path, f"{name}.g_idx", lambda groups: groups + 1)
    with pytest.raises(SourceError, match="has 2 groups, and inputs of others"):
        opened(path).read(f"{name}.weight")


def test_a_config_without_such_tensors_is_refused(tmp_path):
    write_tiny_llama(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    with pytest.raises(SourceError, match=r"no tensor is called \.qweight"):
        opened(tmp_path)
