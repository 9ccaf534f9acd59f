"""Every scheme of the product through a whole folder: written, verified, and read alike by compressed_tensors."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import quantkit
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.kv_cache import read_kv_cache
from quantkit.formats.quantization_config import read_quantization
from quantkit.schemes import FloatSpec, IntSpec, PerBlock, PerChannel, PerGroup, Scheme
from quantkit.verify import verify_checkpoint
from tests.product_schemes import KV_SCHEMES, SCHEMES
from tests.quantized_folders import LINEARS, write_quantized

RECIPE_SCHEMES = [name for name, scheme in SCHEMES.items() if not scheme.is_static]
CALIBRATED = [name for name, scheme in SCHEMES.items() if scheme.is_static]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def settings(scheme: Scheme) -> list[str]:
    """The recipe's keys that say this scheme."""
    weight, inputs = scheme.weight, scheme.activation
    name = f"int{weight.bits}" if isinstance(weight, IntSpec) else "fp8"
    found = [f"weights={name}", "attention=same", "group_size=auto"]
    if inputs is not None:
        found.append(f"activations={'fp8' if isinstance(inputs, FloatSpec) else 'int8'}")
    if isinstance(weight, IntSpec) and not weight.symmetric:
        found.append("symmetric=false")
    match weight.granularity:
        case PerGroup(size):
            return [*found, f"group_size={size}"]
        case PerChannel():
            return [*found, "granularity=channel"]
        case PerBlock():
            # k and v of this model have 64 rows, which 128x128 blocks do not divide
            return [*found[:1], "attention=bf16", *found[2:], "granularity=block"]
    return [*found, "granularity=tensor"]


@pytest.mark.parametrize("name", RECIPE_SCHEMES)
def test_a_scheme_that_a_recipe_says(source, tmp_path, name):
    folder = tmp_path / "quantized"
    quantkit.quantize(source, "int4", folder, settings=("algorithm=rtn", *settings(SCHEMES[name])))
    report = verify_checkpoint(folder)
    assert report.findings == ()
    assert report.num_compared == report.num_quantized == (3 if name == "fp8-block" else 7)
    stored = read_quantization(open_checkpoint(folder).config)
    assert stored.scheme_of("model.layers.0.mlp.down_proj") == SCHEMES[name]


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_scheme_with_measured_scales(tmp_path, name):
    report = verify_checkpoint(write_quantized(tmp_path, SCHEMES[name]).path)
    assert report.findings == ()
    assert report.num_compared == report.num_quantized == len(LINEARS)


def write_index(folder):
    """As quantize does, so that loaders do not take the sidecar for a shard."""
    checkpoint = open_checkpoint(folder)
    weight_map = {name: info.file.name for name, info in checkpoint.tensors.items()}
    content = {"metadata": {"total_size": checkpoint.num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", KV_SCHEMES)
def test_a_cache(source, tmp_path, name):
    kv = KV_SCHEMES[name]
    if name == "kv-int8-head":  # its scales are measured, so no recipe without text says it
        folder = write_quantized(tmp_path, SCHEMES["int4-g64-sym"], kv=kv).path
        write_index(folder)
    else:
        folder = tmp_path / "quantized"
        given = [f"kv_cache={kv.dtype}", f"kv_granularity={kv.granularity}"]
        quantkit.quantize(source, "int4-all", folder, settings=("algorithm=rtn", *given))
    report = verify_checkpoint(folder)
    assert report.findings == ()
    assert report.num_compared == report.num_quantized > 0
    stored = read_kv_cache(open_checkpoint(folder))
    assert stored is not None and stored.scheme == kv
