"""The tables of the known families against what transformers saves: names on disk, and which are linears."""

from pathlib import Path

import pytest
import torch
import transformers

from quantkit.arch import FAMILIES, LinearInfo, Role, complete_survey, survey
from quantkit.arch.skeleton import family_from_skeleton
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
}
TOWERS = {"qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text"}
DENSE = sorted(FAMILIES.keys() - MOE.keys() - TOWERS)


@pytest.fixture(autouse=True)
def _quiet_transformers():
    transformers.utils.logging.disable_progress_bar()


def saved(folder: Path, model_type: str) -> Checkpoint:
    """A tiny random model of that type, as transformers writes it."""
    config = transformers.AutoConfig.for_model(model_type, **SIZES, **MOE.get(model_type, {}))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return open_checkpoint(folder)


def groups(linears: list[LinearInfo]) -> dict[str, list[str]]:
    """Group -> the last part of the names in it."""
    found: dict[str, list[str]] = {}
    for linear in linears:
        found.setdefault(linear.group, []).append(linear.name.rpartition(".")[2])
    return found


@pytest.mark.parametrize("model_type", DENSE)
def test_the_table_names_the_linears_that_transformers_builds(tmp_path, model_type):
    checkpoint = saved(tmp_path, model_type)
    table = {part.name for part in FAMILIES[model_type]}
    assert table == {part.name for part in family_from_skeleton(checkpoint)}


@pytest.mark.parametrize("model_type", DENSE)
def test_every_matrix_of_a_layer_is_a_linear(tmp_path, model_type):
    checkpoint = saved(tmp_path, model_type)
    in_layers = {
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if ".layers." in name and len(info.shape) == 2
    }
    linears = complete_survey(checkpoint).linears
    assert {linear.name for linear in linears} == in_layers
    assert all(linear.shape == checkpoint.info(f"{linear.name}.weight").shape for linear in linears)
    assert [linear.layer for linear in linears] == sorted(linear.layer for linear in linears)
    assert {stay.role for stay in survey(checkpoint).stays} <= {Role.EMBEDDING, Role.HEAD}


@pytest.mark.parametrize("model_type", sorted(MOE))
def test_experts_of_a_layer_share_a_group_and_routers_stay(tmp_path, model_type):
    checkpoint = saved(tmp_path, model_type)
    linears = [linear for linear in complete_survey(checkpoint).linears if linear.layer == 1]
    experts = [linear for linear in linears if linear.role is Role.EXPERT]
    assert len(experts) == 4 * 3
    assert len({linear.group for linear in experts}) == 1
    assert {linear.group for linear in linears if linear.role is not Role.EXPERT}.isdisjoint(
        linear.group for linear in experts
    )
    routers = [stay.name for stay in survey(checkpoint).stays if stay.role is Role.ROUTER]
    assert (
        "model.layers.1.block_sparse_moe.gate.weight" in routers
        or "model.layers.1.mlp.gate.weight" in routers
    )


def test_a_dense_layer_of_qwen3_moe_is_an_mlp(tmp_path):
    linears = [
        linear for linear in complete_survey(saved(tmp_path, "qwen3_moe")).linears if linear.layer == 0
    ]
    assert [linear.role for linear in linears] == [Role.ATTENTION] * 4 + [Role.MLP] * 3


def test_the_shared_expert_of_qwen2_moe_is_an_mlp_of_its_own(tmp_path):
    found = groups(complete_survey(saved(tmp_path, "qwen2_moe")).linears)
    assert found["model.layers.0.mlp.shared_expert.gate_up_proj"] == ["gate_proj", "up_proj"]


def test_fused_groups_and_order_of_a_llama_layer(tmp_path):
    assert groups(complete_survey(saved(tmp_path, "llama")).linears) == {
        group: members
        for layer in (0, 1)
        for group, members in {
            f"model.layers.{layer}.self_attn.qkv_proj": ["q_proj", "k_proj", "v_proj"],
            f"model.layers.{layer}.self_attn.o_proj": ["o_proj"],
            f"model.layers.{layer}.mlp.gate_up_proj": ["gate_proj", "up_proj"],
            f"model.layers.{layer}.mlp.down_proj": ["down_proj"],
        }.items()
    }


def test_phi3_is_fused_on_disk_so_each_linear_is_alone(tmp_path):
    linears = complete_survey(saved(tmp_path, "phi3")).linears
    assert all(linear.group == linear.name for linear in linears)
    assert len(linears) == 2 * 4


@pytest.mark.parametrize(
    ("model_type", "settings", "per_layer"),
    [
        ("gpt_neox", {}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
        (
            "opt",
            {"ffn_dim": 128, "word_embed_proj_dim": 64},
            ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ),
        ("granite", {}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("starcoder2", {}, ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]),
    ],
)
def test_an_unknown_decoder_is_read_from_its_skeleton(tmp_path, model_type, settings, per_layer):
    assert model_type not in FAMILIES
    config = transformers.AutoConfig.for_model(model_type, **SIZES, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    linears = complete_survey(open_checkpoint(tmp_path)).linears
    for layer in (0, 1):
        names = [linear.name.rpartition(".")[2] for linear in linears if linear.layer == layer]
        assert sorted(names) == sorted(per_layer)
    fused = [linear for linear in linears if linear.name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert len({linear.group for linear in fused}) == (2 if fused else 0)


def test_experts_of_an_unknown_moe_are_found_by_their_names(tmp_path):
    sizes = SIZES | {
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
    }
    sizes |= {"q_lora_rank": 32, "kv_lora_rank": 32, "topk_group": 1, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model("deepseek_v3", **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    linears = complete_survey(open_checkpoint(tmp_path)).linears
    experts = {linear.group for linear in linears if linear.role is Role.EXPERT}
    assert experts == {"model.layers.1.mlp.experts"}
    assert "model.layers.1.self_attn.qkv_a_proj" in {linear.group for linear in linears}


def test_experts_in_one_3d_tensor_stay_with_the_reason(tmp_path):
    config = transformers.AutoConfig.for_model("gpt_oss", **SIZES, num_local_experts=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    found = survey(open_checkpoint(tmp_path))
    stays = {stay.name: stay for stay in found.stays}
    assert "3-D" in stays["model.layers.0.mlp.experts.gate_up_proj"].reason
    assert stays["model.layers.0.mlp.experts.gate_up_proj"].role is Role.EXPERT
    assert {linear.role for linear in found.linears} == {Role.ATTENTION}


def test_the_skeleton_takes_no_memory_for_weights(tmp_path):
    big = SIZES | {"hidden_size": 8192, "intermediate_size": 65536, "num_attention_heads": 64}
    checkpoint = saved(tmp_path, "llama")
    config = transformers.AutoConfig.for_model("granite", **big).to_dict()
    family = family_from_skeleton(Checkpoint(tmp_path, config, checkpoint.tensors))
    assert {part.name for part in family} == {part.name for part in FAMILIES["llama"]}
    assert torch.get_default_device() == torch.device("cpu")
