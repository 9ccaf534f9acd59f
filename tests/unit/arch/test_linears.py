"""Names, nested language models, refusals, and layers that are not all there."""

import pytest
import torch

from quantkit.arch import Role, already_quantized, complete_survey, survey
from quantkit.arch.names import place_of
from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.formats.checkpoint import open_checkpoint
from tests.checkpoints import LLAMA_CONFIG, llama_tensors, write_checkpoint

NESTED = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": LLAMA_CONFIG,
}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.down_proj.weight", 12),
        ("language_model.model.layers.3.self_attn.q_proj", 3),
        ("model.language_model.layers.3.self_attn.q_proj.weight", 3),
        ("transformer.h.7.attn.c_attn.weight", 7),
        ("gpt_neox.layers.0.attention.dense.bias", 0),
        ("model.decoder.layers.5.fc1.weight", 5),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", None),
        ("model.visual.blocks.0.attn.proj.weight", None),
        ("vision_model.model.layers.0.self_attn.q_proj.weight", None),
        ("model.layers.x.mlp.down_proj.weight", None),
    ],
)
def test_the_layer_of_a_name(name, layer):
    place = place_of(name)
    assert (place and place.layer) == layer


def test_a_place_splits_off_the_experts_number():
    place = place_of("model.layers.4.mlp.experts.17.up_proj")
    assert (place.prefix, place.layer, place.rest, place.expert) == (
        "model.layers.4.",
        4,
        "mlp.experts.{}.up_proj",
        17,
    )


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_only_the_language_part_of_a_multimodal_model_has_linears(tmp_path, prefix):
    tensors = llama_tensors(prefix)
    tensors["vision_tower.encoder.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32)
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(64, 32)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, NESTED))
    assert len(complete_survey(checkpoint).linears) == 14
    assert all(linear.name.startswith(prefix) for linear in complete_survey(checkpoint).linears)
    others = {stay.name: stay.reason for stay in survey(checkpoint).stays if stay.role is Role.OTHER}
    assert others == {
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight": "not part of the language model",
        "multi_modal_projector.linear_1.weight": "not part of the language model",
    }


def test_every_tensor_has_a_role_and_every_matrix_is_a_linear_or_stays(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, llama_tensors(), LLAMA_CONFIG))
    found = survey(checkpoint)
    assert found.roles.keys() == checkpoint.tensors.keys()
    matrices = {name for name, info in checkpoint.tensors.items() if len(info.shape) >= 2}
    named = [f"{linear.name}.weight" for linear in found.linears] + [stay.name for stay in found.stays]
    assert sorted(named) == sorted(matrices)


def test_a_weight_that_is_no_float_is_quantized_already(tmp_path):
    tensors = llama_tensors()
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = torch.zeros(64, 128, dtype=torch.int8)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, LLAMA_CONFIG))
    assert {stay.name: stay.reason for stay in survey(checkpoint).stays}[
        name
    ] == "stored as I8: quantized already"


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("layers.1.", "layers.1.self_attn"),
        ("layers.0.self_attn.k_proj", "layers.0.self_attn.k_proj"),
        ("layers.1.mlp.up_proj", "layers.1.mlp.up_proj"),
        ("layers.1.mlp.down_proj", "layers.1.mlp.down_proj"),
    ],
)
def test_what_is_missing_of_a_known_family_is_named(tmp_path, gone, named):
    tensors = {name: tensor for name, tensor in llama_tensors().items() if gone not in name}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, LLAMA_CONFIG))
    with pytest.raises(SourceError, match=rf"model\.{named}.* is missing"):
        complete_survey(checkpoint)


def test_a_layer_too_many_is_named(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, llama_tensors(layers=3), LLAMA_CONFIG))
    with pytest.raises(SourceError, match=r"holds model\.layers\.2 but config\.json counts 2 layers"):
        complete_survey(checkpoint)


def mixtral_tensors(num_experts: int) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in llama_tensors().items() if ".mlp." not in name}
    for layer in (0, 1):
        moe = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = torch.zeros(4, 64)
        for expert in range(num_experts):
            for name, shape in {"w1": (32, 64), "w2": (64, 32), "w3": (32, 64)}.items():
                tensors[f"{moe}.experts.{expert}.{name}.weight"] = torch.zeros(shape)
    return tensors


MIXTRAL_CONFIG = {**LLAMA_CONFIG, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}


def test_a_missing_expert_is_named(tmp_path):
    config = {**MIXTRAL_CONFIG, "num_local_experts": 4}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, mixtral_tensors(3), config))
    with pytest.raises(SourceError, match=r"model\.layers\.0\.block_sparse_moe\.experts\.3\.w\d is missing"):
        complete_survey(checkpoint)


def test_experts_come_in_order_of_number_not_of_name(tmp_path):
    config = {**MIXTRAL_CONFIG, "num_local_experts": 11}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, mixtral_tensors(11), config))
    names = [
        linear.name
        for linear in complete_survey(checkpoint).linears
        if linear.role is Role.EXPERT and linear.layer == 0
    ]
    assert names == [
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}"
        for expert in range(11)
        for name in ("w1", "w3", "w2")
    ]


@pytest.mark.parametrize("layers", [0, -1, "2", None, 2.0, True])
def test_a_layer_count_that_is_no_count_is_refused(tmp_path, layers):
    config = {**LLAMA_CONFIG, "num_hidden_layers": layers}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, llama_tensors(), config))
    with pytest.raises(SourceError, match="num_hidden_layers"):
        complete_survey(checkpoint)


@pytest.mark.parametrize(
    ("config", "finding"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
            "t5 is an",
        ),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM is not a model that"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
            "SequenceClassification",
        ),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel is part of a diffusion pipeline"),
        ({"architectures": ["XForCausalLM"], "model_type": "no_such_model"}, "does not know no_such_model"),
        (
            {"architectures": ["XForCausalLM"], "model_type": "no_such", "auto_map": {"AutoConfig": "x.X"}},
            "brings its own code, which is never run",
        ),
        ({"architectures": ["XForCausalLM"]}, "names no model_type"),
        ({"architectures": "LlamaForCausalLM", "model_type": "llama"}, "not a list of names"),
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64},
            "no decoder layers",
        ),
        (
            {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": "wide"},
            "granite",
        ),
    ],
)
def test_what_is_no_decoder_is_refused_by_name(tmp_path, config, finding):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, llama_tensors(), config))
    with pytest.raises(UnsupportedModelError, match=finding) as caught:
        complete_survey(checkpoint)
    assert str(tmp_path) in caught.value.problem
    assert "\n" not in caught.value.problem


def test_code_of_the_checkpoint_is_not_run_for_a_known_architecture(tmp_path):
    config = {**LLAMA_CONFIG, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    write_checkpoint(tmp_path, llama_tensors(), config)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert len(complete_survey(open_checkpoint(tmp_path)).linears) == 14


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "a method that its config.json does not name"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ({"compression_config": {"quant_method": "sparseml"}}, "sparseml"),
        ({"quantization_config": "gptq"}, "a method that its config.json does not describe"),
    ],
)
def test_already_quantized(config, method):
    assert already_quantized(config) == method
