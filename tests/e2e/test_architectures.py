"""Random models of eight architectures: quantize, verify, load in transformers, and compare the logits."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

import quantkit
from quantkit.arch import Role, complete_survey
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.compressed_tensors import read_linear
from quantkit.formats.quantization_config import read_quantization
from quantkit.runtime.layers.linear import QuantLinear
from quantkit.runtime.load import load_model
from quantkit.schemes import IntSpec
from quantkit.schemes.activation import fake_quantize_input
from quantkit.schemes.tiles import dequantize_weight
from quantkit.verify import verify_checkpoint

VOCAB, NUM_TOKENS = 128, 24
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SIZES, "head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 32}
GEMMA["layer_types"] = ["sliding_attention", "full_attention"]
RUNTIME = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**GEMMA),
    "phi3": Phi3Config(**SIZES),
}
OTHERS = {  # of experts transformers drops the grid of their inputs: tests/unit/runtime compares those
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None),
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128
    ),
}
RECIPES = {
    "int4-all": ("int4-all", ("algorithm=rtn",)),
    "int4": ("int4", ("algorithm=rtn",)),
    "int4-attn8": ("int4-attn8", ("algorithm=rtn",)),
    "int8-all": ("int8-all", ()),
    "fp8-all": ("fp8-all", ()),
    "fp8-block": ("fp8-block", ()),
    "w4a8-fp8": ("w4a8-fp8", ()),
    "int4-all-kv-fp8": ("int4-all", ("algorithm=rtn", "kv_cache=fp8")),
    "int8-weight": ("int8-weight", ()),
}
# transformers fails on these experts: it unpacks INT ones, and has no block scales for FP8 ones
UNLOADABLE_EXPERTS = ("int8-all", "fp8-block")
# In float32 both dequantize and call the same products, so the integer and packed kernels are not seen here:
# that is what the bfloat16 test is for. The tolerance is for other CPUs' order of summation.
TOLERANCE = 1e-5

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Every model in bfloat16, as transformers saves it."""
    root = tmp_path_factory.mktemp("architectures")
    for number, (name, config) in enumerate({**RUNTIME, **OTHERS}.items()):
        torch.manual_seed(number)
        save_random(AutoModelForCausalLM.from_config(config), root / name)
    return root


def save_random(model, folder):
    """Weights of the sizes that make every part matter."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


def tokens():
    return torch.randint(3, VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))


def load(folder, auto=AutoModelForCausalLM):
    """transformers' model; it may neither miss a tensor of the folder nor leave one over."""
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for problem, keys in info.items():
        assert not keys, f"{problem}: {keys}"
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(tokens()[None]).logits[0].float()


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def quantize(source, folder, recipe, loads="yes"):
    name, settings = RECIPES[recipe]
    quantkit.quantize(source, name, folder, settings=settings)
    report = verify_checkpoint(folder)
    assert report.findings == ()
    assert report.num_compared == report.num_quantized > 0
    assert next(one.loads for one in report.loaders if one.loader == "transformers") == loads
    return folder


def dequantized(source, folder, target):
    """The source with what the quantized linears stand for in their place."""
    original, quantized = open_checkpoint(source), open_checkpoint(folder)
    schemes = read_quantization(quantized.config)
    tensors = {name: original.read(name).float() for name in original.tensors}
    for linear in complete_survey(original).linears:
        scheme = schemes.scheme_of(linear.name)
        if scheme is not None:
            stored = read_linear(quantized, linear.name, scheme)
            weight = dequantize_weight(stored.codes_NK, scheme.weight.granularity, stored.qparams)
            # transformers dequantizes packed experts in the scales' dtype, everything else in float32
            is_rounded = linear.role is Role.EXPERT and isinstance(scheme.weight, IntSpec)
            tensors[f"{linear.name}.weight"] = weight.bfloat16().float() if is_rounded else weight
    target.mkdir()
    save_file(
        {name: one.contiguous() for name, one in tensors.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    (target / "config.json").write_text(json.dumps(original.config))
    return target


def quantize_inputs(model, source, folder):
    """The inputs of the linears outside of experts through their grid; of experts transformers drops it."""
    schemes = read_quantization(open_checkpoint(folder).config)
    for linear in complete_survey(open_checkpoint(source)).linears:
        scheme = schemes.scheme_of(linear.name)
        if scheme is None or scheme.activation is None or linear.role is Role.EXPERT:
            continue

        def hook(_, inputs, spec=scheme.activation):
            return (fake_quantize_input(inputs[0].flatten(0, -2), spec, None).view_as(inputs[0]),)

        model.get_submodule(linear.name).register_forward_pre_hook(hook)


# integer products are exact only with VNNI; without it the weights are dequantized
INT8_KERNEL = "int8_int8" if torch.cpu._is_vnni_supported() else "int8pack"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", RUNTIME)
def test_transformers_and_our_runtime_agree(sources, tmp_path, name, recipe):
    folder = quantize(sources / name, tmp_path / "quantized", recipe)
    theirs = logits(load(folder))
    assert theirs.isfinite().all()
    ours = load_model(folder, dtype=torch.float32).logits(tokens())
    assert relative(ours, theirs) < TOLERANCE
    original = logits(load(sources / name))
    assert 1e-3 < relative(theirs, original) < 1, "quantization shows, and is not the end of the model"


@pytest.mark.parametrize(
    ("recipe", "kernel"), [("int4-all", "int4pack"), ("int8-weight", "int8pack"), ("int8-all", INT8_KERNEL)]
)
@pytest.mark.parametrize("name", RUNTIME)
def test_the_kernels_for_bfloat16_are_as_exact_as_transformers(sources, tmp_path, name, recipe, kernel):
    folder = quantize(sources / name, tmp_path / "quantized", recipe)
    exact = logits(load(folder))
    rounded = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())
    model = load_model(folder, dtype=torch.bfloat16)
    parts = [part for layer in model.decoder.layers for part in (layer.attention, layer.mlp)]
    linears = [linear for part in parts for linear in vars(part).values()]
    used = {repr(linear) for linear in linears if isinstance(linear, QuantLinear)}
    assert used and all(kernel in text for text in used)
    assert relative(model.logits(tokens()), exact) < 1.5 * relative(rounded, exact)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "kv" not in name])
@pytest.mark.parametrize("name", OTHERS)
def test_transformers_computes_with_our_weights(sources, tmp_path, name, recipe):
    if recipe in UNLOADABLE_EXPERTS:
        folder = quantize(sources / name, tmp_path / "quantized", recipe, loads="no")
        if (name, recipe) != ("qwen3-moe", "fp8-block"):  # one block per expert happens to broadcast
            with pytest.raises(RuntimeError, match="conversion"):
                load(folder)
        return
    folder = quantize(sources / name, tmp_path / "quantized", recipe)
    model = load(folder)
    assert logits(model).isfinite().all()
    # transformers leaves packed experts in bfloat16 and computes there, whatever dtype it is asked for
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            assert parameter.dtype == torch.bfloat16 and ".experts." in key
            parameter.data = parameter.data.float()
    theirs = logits(model)
    reference = load(dequantized(sources / name, folder, tmp_path / "dequantized"))
    quantize_inputs(reference, sources / name, folder)
    expected = logits(reference)
    assert relative(theirs, expected) < TOLERANCE


@pytest.mark.parametrize("name", OTHERS)
def test_an_fp8_cache_loads_in_every_architecture(sources, tmp_path, name):
    folder = quantize(sources / name, tmp_path / "quantized", "int4-all-kv-fp8")
    theirs = logits(load(folder))
    plain = logits(load(dequantized(sources / name, folder, tmp_path / "dequantized")))
    assert 1e-4 < relative(theirs, plain) < 0.3, "quantized, but no garbage"


VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory):
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=GEMMA,
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=120,
        eoi_token_index=121,
        image_token_index=122,
    )
    folder = tmp_path_factory.mktemp("multimodal")
    save_random(Gemma3ForConditionalGeneration(config), folder)
    return folder


@pytest.mark.parametrize("recipe", ["int4-all", "int4", "int4-attn8", "int8-all", "int4-all-kv-fp8"])
def test_the_text_part_of_a_vision_model_is_quantized_alone(multimodal, tmp_path, recipe):
    """On disk a module is language_model.model.layers…, in transformers model.language_model.layers…."""
    folder = quantize(multimodal, tmp_path / "quantized", recipe)
    assert any(name.startswith("language_model.model.layers.") for name in open_checkpoint(folder).tensors)
    model = load(folder, Gemma3ForConditionalGeneration)
    theirs = logits(model)
    reference = load(
        dequantized(multimodal, folder, tmp_path / "dequantized"), Gemma3ForConditionalGeneration
    )
    weights = dict(model.named_parameters())
    for name, weight in reference.named_parameters():
        assert torch.equal(weights[name], weight), name
    vision = [module for name, module in model.named_modules() if "vision_tower" in name]
    assert vision and not any(hasattr(module, "quantization_scheme") for module in vision)
    ours = load_model(folder, dtype=torch.float32).logits(tokens())
    assert relative(ours, theirs) < TOLERANCE
