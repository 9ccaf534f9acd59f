"""Our folders in transformers: they load, with the weights we meant, and compute what those weights compute."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from quantkit.formats.loaders import LinearFacts, loader_verdicts
from quantkit.numerics import affine
from quantkit.runtime.load import load_model
from quantkit.schemes import FloatSpec, KVScheme, PerGroup, PerTensor, Scheme
from tests.product_schemes import KV_SCHEMES, SCHEMES
from tests.quantized_folders import CONFIG, LINEARS, write_quantized

SYMMETRIC = [name for name, scheme in SCHEMES.items() if scheme.weight.symmetric]
ASYMMETRIC = [name for name, scheme in SCHEMES.items() if not scheme.weight.symmetric]
TOKENS = torch.arange(24).view(2, 12)
W4, FP8 = SCHEMES["int4-g64-sym"], SCHEMES["fp8-channel-token"]

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32, **kwargs).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def runtime_logits(folder):
    model = load_model(folder.path, dtype=torch.float32)
    return torch.stack([model.logits(sequence) for sequence in TOKENS])


def reference(folder, scheme_of=lambda name: None):
    """The unquantized model with our dequantized weights, and our own quantization of the inputs."""
    config = LlamaConfig(
        **{key: value for key, value in CONFIG.items() if key not in ("dtype", "architectures")}
    )
    model = LlamaForCausalLM(config).float().eval()
    state = folder.dense | {f"{name}.weight": weight for name, weight in folder.weights.items()}
    model.load_state_dict(state)
    for name in folder.weights:
        spec = scheme_of(name).activation if scheme_of(name) else None
        if spec is not None:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda _, inputs, spec=spec: (quantize_inputs(inputs[0], spec),))
    return model


def quantize_inputs(x, spec):
    """Inputs as the kernels see them: through the grid and back, one scale per token, group or tensor."""
    is_fp8 = isinstance(spec, FloatSpec)
    tiles = x.unflatten(-1, (-1, spec.granularity.size)) if isinstance(spec.granularity, PerGroup) else x
    zero_point = None
    if isinstance(spec.granularity, PerTensor):
        scale = torch.tensor([STATIC_SCALE])
        zero_point = None if spec.symmetric else torch.tensor([-9], dtype=torch.int8)
    else:
        half_range = affine.E4M3_MAX if is_fp8 else (spec.qmax - spec.qmin) / 2
        scale = affine.choose_symmetric(tiles, half_range)
    if is_fp8:
        codes = affine.quantize_e4m3(tiles, scale)
    else:
        codes = affine.quantize_int(tiles, scale, zero_point, spec.qmin, spec.qmax)
    return affine.dequantize(codes, scale, zero_point).reshape(x.shape)


STATIC_SCALE = 0.05


def assert_weights_are_ours(model, folder):
    """After the first forward transformers has decompressed: the weights are those we dequantize, to the bit."""
    for name, weight in folder.weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name


@pytest.mark.parametrize("name", SYMMETRIC)
def test_every_symmetric_scheme_loads_with_our_weights_and_logits(tmp_path, name):
    scheme = SCHEMES[name]
    folder = write_quantized(tmp_path, scheme, input_scale=STATIC_SCALE)
    model = load(folder)
    theirs = logits(model)
    assert_weights_are_ours(model, folder)
    expected = logits(reference(folder, lambda _: scheme))
    torch.testing.assert_close(theirs, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(runtime_logits(folder), theirs, atol=2e-4, rtol=2e-4)
    if scheme.activation is not None:  # or else the comparison would not see that inputs are quantized
        assert (theirs - logits(reference(folder))).abs().max() > 1e-3


@pytest.mark.parametrize("name", SYMMETRIC)
def test_dequantized_loads_give_our_weights_and_drop_the_inputs(tmp_path, name):
    folder = write_quantized(tmp_path, SCHEMES[name], input_scale=STATIC_SCALE)
    model = load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert_weights_are_ours(model, folder)
    torch.testing.assert_close(logits(model), logits(reference(folder)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [ASYMMETRIC[0], ASYMMETRIC[-1]])
def test_zero_points_load_dequantized_only(tmp_path, name):
    folder = write_quantized(tmp_path, SCHEMES[name])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)
    model = load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert_weights_are_ours(model, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int4-g32-sym", "fp8-channel-token", "int8-w8a8-static-asym"])
def test_scales_of_sixteen_bits_are_the_same_numbers(tmp_path, name, dtype):
    folder = write_quantized(tmp_path, SCHEMES[name], scale_dtype=dtype)
    model = load(folder)
    logits(model)
    assert_weights_are_ours(model, folder)


@pytest.mark.parametrize("schemes", [(W4, None), (W4, SCHEMES["int8-channel-sym"]), (W4, FP8)], ids=str)
def test_one_scheme_for_the_mlp_and_another_for_attention(tmp_path, schemes):
    mlp, attention = schemes
    scheme_of = lambda name: mlp if "mlp" in name else attention  # noqa: E731
    folder = write_quantized(tmp_path, scheme_of)
    model = load(folder)
    theirs = logits(model)
    assert_weights_are_ours(model, folder)
    torch.testing.assert_close(theirs, logits(reference(folder, scheme_of)), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(runtime_logits(folder), theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["kv-fp8-tensor", "kv-fp8-head"])
def test_an_fp8_cache_loads_with_our_scales(tmp_path, name):
    folder = write_quantized(tmp_path, W4, kv=KV_SCHEMES[name])
    model = load(folder)
    theirs = logits(model)
    shape = (1,) if name == "kv-fp8-tensor" else (2, 1, 1)
    for layer in model.model.layers:
        assert layer.self_attn.k_scale.shape == layer.self_attn.v_scale.shape == shape
        assert 0.02 < layer.self_attn.k_scale.min() <= layer.self_attn.k_scale.max() < 0.03
    plain = logits(reference(folder))
    assert 1e-4 < (theirs - plain).abs().max() < 0.5  # quantized, but no garbage
    torch.testing.assert_close(runtime_logits(folder), theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["kv-int8-token", "kv-int8-head"])
def test_an_int8_cache_in_the_sidecar_is_not_read(tmp_path, name):
    folder = write_quantized(tmp_path, W4, kv=KV_SCHEMES[name])
    torch.testing.assert_close(logits(load(folder)), logits(reference(folder)), atol=1e-5, rtol=1e-5)


def facts(scheme: Scheme):
    return [LinearFacts(name, name, scheme, shape, False) for name, shape in LINEARS.items()]


@pytest.mark.parametrize("name", SCHEMES)
def test_verify_says_of_transformers_what_was_just_seen(name):
    verdict = loader_verdicts(facts(SCHEMES[name]), None)[0]
    assert verdict.loader == "transformers"
    assert verdict.loads == ("yes" if name in SYMMETRIC else "no")


def test_several_schemes_go_wrong_when_dequantized(tmp_path):
    """The reason why verify warns of it."""
    folder = write_quantized(tmp_path, lambda name: W4 if "mlp" in name else SCHEMES["int8-channel-sym"])
    try:
        model = load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    except (KeyError, RuntimeError):
        return
    found = {name: model.get_submodule(name).weight for name in folder.weights}
    assert not all(torch.equal(found[name], weight) for name, weight in folder.weights.items())


def test_an_incomplete_block_fails_to_run(tmp_path, monkeypatch):
    config = copy.deepcopy(dict(CONFIG)) | {"intermediate_size": 192}
    linears = {
        name: (192, 128) if "gate" in name or "up" in name else (128, 192) if "down" in name else shape
        for name, shape in LINEARS.items()
    }
    monkeypatch.setattr("tests.quantized_folders.CONFIG", config)
    monkeypatch.setattr("tests.quantized_folders.LINEARS", linears)
    folder = write_quantized(tmp_path, SCHEMES["fp8-block"])
    with pytest.raises(RuntimeError, match="unflatten"):
        logits(load(folder))


def test_the_cache_scales_have_the_names_and_shapes_of_the_package(tmp_path):
    """kv_layout against what the package itself registers on attention modules."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    from quantkit.formats.kv_cache import kv_layout
    from quantkit.formats.quantization_config import write_quantization
    from tests.quantized_folders import ATTENTION, NUM_KV_HEADS

    for granularity in ("tensor", "head"):
        kv = KVScheme(dtype="fp8", granularity=granularity)
        config = LlamaConfig(
            **{key: value for key, value in CONFIG.items() if key not in ("dtype", "architectures")}
        )
        model = LlamaForCausalLM(config)
        before = dict(model.named_parameters())
        apply_quantization_config(model, QuantizationConfig.model_validate(write_quantization({}, kv)))
        added = {name: tuple(one.shape) for name, one in model.named_parameters() if name not in before}
        layout = kv_layout(kv, ATTENTION, NUM_KV_HEADS, torch.float32)
        assert added == {name: shape for name, (_, shape) in layout.items()}
