"""Families quantized by the product itself, against transformers with the dequantized weights and quantized inputs."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from quantkit import quantize
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.compressed_tensors import linear_layout, read_linear
from quantkit.formats.quantization_config import read_quantization
from quantkit.runtime.load import load_model
from quantkit.schemes.activation import fake_quantize_input
from quantkit.schemes.tiles import dequantize_weight
from tests.tiny_models import VOCAB, save_tiny, tokens

FAMILIES = (
    "gemma2",
    "phi3-partial",
    "phi3-long",
    "olmo2",
    "smollm3",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe-mixed",
    "olmoe",
)
RECIPES = {
    "int4": ("int4-rtn", ("attention=same", "group_size=32")),
    "fp8": ("fp8-all", ()),
    "int8": ("int8-all", ()),
}
ROUTERS = (6, 8, 1)  # rows of routers and of a shared expert's gate; no other linear has so few
LENGTH = 41  # above every window


def dequantized(folder, to):
    """The checkpoint with dequantized weights in float32, and the scheme of its quantized linears."""
    checkpoint = open_checkpoint(folder)
    quantized = read_quantization(checkpoint.config)
    tensors, schemes, used = {}, set(), set()
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight_scale")
        scheme = quantized.scheme_of(module)
        if module == name or scheme is None:
            continue
        stored = read_linear(checkpoint, module, scheme)
        tensors[f"{module}.weight"] = dequantize_weight(
            stored.codes_NK, scheme.weight.granularity, stored.qparams
        ).float()
        used |= {
            f"{module}.{suffix}" for suffix in linear_layout(scheme, *stored.codes_NK.shape, torch.float32)
        }
        schemes.add(scheme)
    tensors |= {name: checkpoint.read(name).float() for name in checkpoint.tensors if name not in used}
    to.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        to / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (to / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    (scheme,) = schemes
    return to, scheme


@contextmanager
def quantized_inputs(spec):
    """Every linear but router and head reads its input through `spec`, per expert too."""
    linear = torch.nn.functional.linear

    def quantizing(x, weight, bias=None):
        if len(weight) not in (VOCAB, *ROUTERS):
            x = fake_quantize_input(x.reshape(-1, x.shape[-1]), spec, None).view(x.shape)
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear if spec is None else quantizing)
        yield


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_dequantized_weights(name, recipe, tmp_path):
    source = save_tiny(name, tmp_path / "source", dtype=torch.bfloat16)
    shipped, settings = RECIPES[recipe]
    quantize(source, shipped, tmp_path / "quantized", settings=settings)
    plain, scheme = dequantized(tmp_path / "quantized", tmp_path / "plain")
    ids = tokens(LENGTH)
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    with torch.no_grad(), quantized_inputs(scheme.activation):
        expected = model(ids[None]).logits[0]
    ours = load_model(tmp_path / "quantized", dtype=torch.float32).logits(ids)
    assert relative(ours, expected) < 1e-5
    original = load_model(source, dtype=torch.float32).logits(ids)
    assert relative(ours, original) > 1e-3, "quantization shows"


def relative(a, b):
    return float((a - b).norm() / b.norm())
