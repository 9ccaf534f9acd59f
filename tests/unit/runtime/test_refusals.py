"""Checkpoints that the runtime must not run: each is refused by name, with a way out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.runtime.load import load_model
from quantkit.schemes import FloatSpec, IntSpec, PerChannel, PerGroup, PerToken, Scheme
from tests.product_schemes import SCHEMES
from tests.tiny_models import quantize_tiny, save_tiny

GONE = object()
Q_PROJ = "model.layers.1.self_attn.q_proj"


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not GONE}))
    return folder


def edit_tensors(folder, **changes):
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not GONE}, file)
    return folder


UNSUPPORTED = [
    ("llama", {"model_type": "mamba"}, ["'mamba'"]),
    ("llama", {"model_type": GONE}, ["model_type"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ["'dynamic'", "yarn"],
    ),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2]}}, ["mrope_section"]),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor", "0.5"],
    ),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}, ["factor", "8.0"]),
    ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ("llama", {"rope_interleaved": True}, ["rope_interleaved"]),
    ("llama", {"pretraining_tp": 4}, ["pretraining_tp", "4"]),
    ("llama", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
    ("llama", {"sliding_window": 16}, ["sliding_window", "16"]),
    ("mistral-window", {"attention_bias": True}, ["attention_bias"]),
    ("mistral-window", {"layer_types": ["full_attention"] * 3}, ["layer_types"]),
    ("qwen2-tied", {"mlp_bias": True}, ["mlp_bias"]),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, ["layer_types", "sliding_attention"]),
    ("qwen3", {"layer_types": ["linear_attention"] * 3}, ["layer_types", "linear_attention"]),
    ("qwen3", {"num_experts": 8}, ["num_experts", "8"]),
    ("gemma3", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50"]),
    ("gemma3", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ("gemma3", {"hidden_activation": "relu"}, ["hidden_activation", "'relu'"]),
    ("gemma3", {"rope_parameters": {"chunked_attention": {"rope_type": "default"}}}, ["chunked_attention"]),
]


@pytest.mark.parametrize(("name", "changes", "findings"), UNSUPPORTED)
def test_what_is_not_implemented_is_refused_by_key_and_value(name, changes, findings, tmp_path):
    edit_config(save_tiny(name, tmp_path), **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(tmp_path)
    for finding in findings:
        assert finding in f"{caught.value.problem} {caught.value.fix}"
    assert "config.json" in caught.value.problem


def test_an_unknown_model_type_lists_the_known_ones(tmp_path):
    edit_config(save_tiny("llama", tmp_path), model_type="granite")
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(tmp_path)
    assert "gemma2, gemma3, gemma3_text, llama, mistral, mixtral, olmo2, olmoe, phi3" in caught.value.fix


def test_the_language_model_of_an_unknown_multimodal_model_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    with pytest.raises(UnsupportedModelError, match="'llava'"):
        load_model(tmp_path)


WRONG = [
    ("llama", {"rope_parameters": GONE}, "no rope_theta"),
    ("llama", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters: no rope_theta"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "no factor"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        "no low_freq_factor",
    ),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "no short_factor"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters is .* not an object"),
    ("llama", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0"),
    ("llama", {"hidden_size": GONE}, "no hidden_size"),
    ("llama", {"hidden_size": "64"}, "hidden_size is '64', not a positive integer"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("llama", {"rms_norm_eps": GONE}, "no rms_norm_eps"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ("llama", {"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
    ("llama", {"head_dim": 15}, "head_dim 15 is odd"),
    ("llama", {"dtype": GONE}, "no dtype"),
    ("llama", {"dtype": "float8"}, "dtype 'float8'"),
    ("mistral-window", {"sliding_window": GONE}, "no sliding_window"),
    ("mistral-window", {"sliding_window": 0}, "sliding_window is 0"),
    ("qwen3", {"head_dim": GONE}, "no head_dim"),
    ("qwen2-window", {"layer_types": ["full_attention"]}, "layer_types is .* a list of 3"),
    (
        "llama",
        {"vocab_size": 98},
        r"embed_tokens.weight has shape \[97, 64\], but config.json makes it \[98, 64\]",
    ),
    ("llama", {"hidden_size": 32, "head_dim": 16}, r"embed_tokens.weight has shape \[97, 64\]"),
    (
        "llama",
        {"intermediate_size": 100},
        r"gate_proj.weight has shape \[96, 64\], but config.json makes it \[100, 64\]",
    ),
    ("llama", {"num_attention_heads": 8, "head_dim": 16}, r"q_proj.weight has shape \[64, 64\]"),
    ("llama", {"num_hidden_layers": 4}, "tensor model.layers.3.* is missing"),
    ("llama", {"attention_bias": True}, "tensor model.layers.0.self_attn.q_proj.bias is missing"),
]


@pytest.mark.parametrize(("name", "changes", "finding"), WRONG)
def test_a_config_that_cannot_be_right_is_refused_by_key_or_tensor(name, changes, finding, tmp_path):
    edit_config(save_tiny(name, tmp_path), **changes)
    with pytest.raises(SourceError, match=finding) as caught:
        load_model(tmp_path)
    assert caught.value.fix


def test_a_missing_tensor_is_named(tmp_path):
    edit_tensors(save_tiny("llama", tmp_path), **{f"{Q_PROJ}.weight": GONE})
    with pytest.raises(SourceError, match=f"tensor {Q_PROJ}.weight is missing"):
        load_model(tmp_path)


def test_a_missing_embedding_is_named(tmp_path):
    edit_tensors(save_tiny("llama", tmp_path), **{"model.embed_tokens.weight": GONE})
    with pytest.raises(SourceError, match=r"tensor model.embed_tokens.weight is missing"):
        load_model(tmp_path)


def test_a_missing_head_is_not_taken_for_a_tied_one(tmp_path):
    edit_tensors(save_tiny("llama", tmp_path), **{"lm_head.weight": GONE})
    with pytest.raises(SourceError, match=r"tensor lm_head.weight is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name", [f"{Q_PROJ}.bias", "model.layers.3.mlp.up_proj.weight", "model.layers.0.mlp.extra.weight"]
)
def test_a_tensor_that_no_module_uses_is_refused(name, tmp_path):
    edit_tensors(save_tiny("llama", tmp_path), **{name: torch.zeros(64)})
    with pytest.raises(UnsupportedModelError, match=name):
        load_model(tmp_path)


def test_tensors_that_are_known_to_be_spare_are_not(tmp_path):
    save_tiny("qwen2-tied", tmp_path)
    before = load_model(tmp_path).logits(torch.arange(5))
    spare = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "lm_head.weight": torch.zeros(97, 64),
    }
    edit_tensors(tmp_path, **spare)
    assert torch.equal(load_model(tmp_path).logits(torch.arange(5)), before)


def test_integer_codes_without_quantization_config_are_not_taken_for_weights(tmp_path):
    edit_tensors(save_tiny("llama", tmp_path), **{f"{Q_PROJ}.weight": torch.zeros(64, 64, dtype=torch.int8)})
    with pytest.raises(
        SourceError, match=r"holds torch\.int8, but config.json does not say that it is quantized"
    ):
        load_model(tmp_path)


def _quantized(tmp_path, scheme):
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    return quantize_tiny(source, tmp_path / "quantized", scheme)


def test_fp8_nan_codes_are_found(tmp_path):
    folder = _quantized(tmp_path, Scheme(weight=FloatSpec(granularity=PerChannel())))
    codes = load_file(folder / "model.safetensors")[f"{Q_PROJ}.weight"].view(torch.uint8).clone()
    codes[3, 3] = 0x7F
    edit_tensors(folder, **{f"{Q_PROJ}.weight": codes.view(torch.float8_e4m3fn)})
    with pytest.raises(SourceError, match=f"{Q_PROJ} has NaN among its FP8 codes"):
        load_model(folder)


def test_scales_that_are_no_numbers_are_found(tmp_path):
    folder = _quantized(tmp_path, Scheme(weight=IntSpec(bits=4, granularity=PerGroup(32))))
    scale = load_file(folder / "model.safetensors")[f"{Q_PROJ}.weight_scale"]
    scale[0, 0] = torch.inf
    edit_tensors(folder, **{f"{Q_PROJ}.weight_scale": scale})
    with pytest.raises(SourceError, match=f"{Q_PROJ} has a scale that is not a finite number"):
        load_model(folder)


def test_a_quantized_shape_that_the_config_does_not_have(tmp_path):
    folder = edit_config(
        _quantized(tmp_path, Scheme(weight=IntSpec(bits=4, granularity=PerGroup(32)))), intermediate_size=128
    )
    with pytest.raises(
        SourceError, match=r"gate_proj has shape \[96, 64\], but config.json makes it \[128, 64\]"
    ):
        load_model(folder)


def test_a_tied_head_cannot_have_a_scheme(tmp_path):
    source = save_tiny("qwen2-tied", tmp_path / "source", dtype=torch.bfloat16)
    folder = quantize_tiny(
        source, tmp_path / "quantized", Scheme(weight=IntSpec(bits=4, granularity=PerGroup(32)))
    )
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**quantization, "ignore": []})
    with pytest.raises(UnsupportedModelError, match="lm_head is tied"):
        load_model(folder)


def test_blocks_of_activations_that_do_not_divide_the_inputs(tmp_path):
    folder = _quantized(tmp_path, SCHEMES["fp8-block"])
    with pytest.raises(SourceError, match="q_proj has 64 inputs, which groups of 128 do not divide"):
        load_model(folder)


def test_a_number_format_that_nothing_runs(tmp_path):
    asymmetric_tokens = IntSpec(bits=8, granularity=PerToken(), symmetric=False)
    scheme = Scheme(weight=IntSpec(bits=8, granularity=PerChannel()), activation=asymmetric_tokens)
    with pytest.raises(SourceError, match="asymmetric activations with dynamic scales"):
        load_model(_quantized(tmp_path, scheme))
