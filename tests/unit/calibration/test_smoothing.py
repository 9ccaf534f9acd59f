"""Smoothing scales a layer's weights without changing what the layer computes, and helps what it is for."""

import pytest
import torch

from quantkit.arch.pairs import Heads, Link, Pair
from quantkit.calibration.smoothing import smoothed
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.observers import InputStats
from quantkit.recipe import load_recipe, make_plan
from quantkit.schemes.activation import fake_quantize_input
from quantkit.schemes.tiles import dequantize_weight, minmax_qparams, quantize_weight
from tests.tiny_llama import write_tiny_llama

PAIRS = [
    Pair(prev="post_attention_layernorm", to=("mlp.gate_proj", "mlp.up_proj"), link=Link.NORM),
    Pair(prev="mlp.up_proj", to=("mlp.down_proj",), link=Link.PRODUCT),
]
HEADS = Heads(2, 2, 16)


@pytest.fixture
def plan(tmp_path):
    def of(recipe: str, algorithm: str):
        checkpoint = open_checkpoint(write_tiny_llama(tmp_path / algorithm))
        settings = (f"algorithm={algorithm}", "attention=same")
        return make_plan(checkpoint, load_recipe(recipe, settings), has_data=True)

    return of


def layer(plan, seed: int = 0):
    """Weights of layer 0's MLP as the plan has them, and inputs with two large channels."""
    generator = torch.Generator().manual_seed(seed)
    linears = {
        linear.name.removeprefix("model.layers.0."): linear
        for linear in plan.linears
        if linear.name.startswith("model.layers.0.mlp")
    }
    tensors = {f"{name}.weight": torch.randn(one.shape, generator=generator) for name, one in linears.items()}
    num_inputs = linears["mlp.gate_proj"].shape[1]
    tensors["post_attention_layernorm.weight"] = torch.rand(num_inputs, generator=generator) + 0.5
    x_TK = torch.randn(64, num_inputs, generator=generator)
    x_TK[:, [1, 5]] *= 30
    return linears, tensors, x_TK


def outputs(tensors, x_TK):
    """What norm weight and MLP compute, and the inputs of its linears."""
    inputs = x_TK * tensors["post_attention_layernorm.weight"]
    gate = inputs @ tensors["mlp.gate_proj.weight"].T
    product = torch.nn.functional.silu(gate) * (inputs @ tensors["mlp.up_proj.weight"].T)
    return inputs, product, product @ tensors["mlp.down_proj.weight"].T


def statistics(linears, tensors, x_TK):
    inputs, product, _ = outputs(tensors, x_TK)
    stats = {}
    for name, x in (("mlp.gate_proj", inputs), ("mlp.down_proj", product)):
        found = InputStats(x.shape[1], device=torch.device("cpu"), with_hessian=True)
        found.add(x)
        stats[linears[name].group] = found
    return stats


@pytest.mark.parametrize(("recipe", "algorithm"), [("int8-all", "smoothquant"), ("int4-all", "awq")])
def test_outputs_stay_and_weights_change(plan, recipe, algorithm):
    made = plan(recipe, algorithm)
    linears, tensors, x_TK = layer(made)
    changed = smoothed(made, PAIRS, HEADS, tensors, linears, statistics(linears, tensors, x_TK))
    assert not torch.equal(changed["mlp.gate_proj.weight"], tensors["mlp.gate_proj.weight"])
    expected, got = outputs(tensors, x_TK)[2], outputs(tensors | changed, x_TK)[2]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_smoothquant_lowers_the_error_of_quantized_inputs(plan):
    made = plan("int8-all", "smoothquant")
    linears, tensors, x_TK = layer(made)
    changed = smoothed(made, PAIRS, HEADS, tensors, linears, statistics(linears, tensors, x_TK))
    scheme = linears["mlp.gate_proj"].scheme

    def error(of):
        inputs = outputs(of, x_TK)[0]
        w_NK = of["mlp.gate_proj.weight"]
        qparams = minmax_qparams(w_NK, scheme.weight, torch.float32)
        w_hat_NK = dequantize_weight(
            quantize_weight(w_NK, scheme.weight, qparams), scheme.weight.granularity, qparams
        )
        got = fake_quantize_input(inputs, scheme.activation, None) @ w_hat_NK.T
        return (got - inputs @ w_NK.T).square().mean().item()

    assert error(tensors | changed) < 0.5 * error(tensors)


def test_a_pair_behind_which_nothing_is_rounded_is_left_alone(plan):
    made = plan("int4-all", "awq")
    linears, tensors, x_TK = layer(made)
    rounded = {name: linear for name, linear in linears.items() if name != "mlp.down_proj"}
    changed = smoothed(made, PAIRS, HEADS, tensors, rounded, statistics(linears, tensors, x_TK))
    assert "mlp.down_proj.weight" not in changed
    assert "mlp.gate_proj.weight" in changed
