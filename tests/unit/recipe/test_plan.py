"""Plans on a tiny Llama: which linear gets which scheme, and why the rest stays."""

import pytest

from quantkit.errors import RecipeError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.recipe import load_recipe, make_plan, shipped_recipes
from quantkit.schemes import IntSpec, KVScheme, PerChannel, PerGroup, PerToken
from tests.tiny_llama import write_tiny_llama
from tests.tiny_models import save_tiny

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Inputs of 32 and 64 features."""
    return open_checkpoint(write_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Inputs of 128 and 256 features."""
    return open_checkpoint(save_tiny("llama-wide", tmp_path_factory.mktemp("wide")))


def schemes(checkpoint, recipe: str, *settings: str):
    """Scheme of every linear by name."""
    return make_plan(checkpoint, load_recipe(recipe, settings)).schemes


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_every_shipped_recipe_plans(wide, recipe):
    plan = make_plan(wide, load_recipe(recipe))
    assert any(plan.schemes.values()) or plan.kv is not None
    assert all(linear.reason for linear in plan.linears if linear.scheme is None)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {stays.name for stays in plan.stays}


def test_attention_stays_unless_the_recipe_says_otherwise(tiny):
    assert schemes(tiny, "int4")[Q] is None
    assert schemes(tiny, "int4-all")[Q] == schemes(tiny, "int4-all")[DOWN]
    eight = schemes(tiny, "int4-attn8")
    assert eight[Q].weight == IntSpec(bits=8, granularity=PerChannel())
    assert eight[DOWN].weight.bits == 4


def test_auto_is_one_group_size_for_the_whole_model(tiny, wide):
    assert {scheme.weight.granularity for scheme in schemes(tiny, "int4-all").values()} == {PerGroup(32)}
    assert {scheme.weight.granularity for scheme in schemes(wide, "int4-all").values()} == {PerGroup(128)}
    assert schemes(wide, "int4-all", "group_size=64")[Q].weight.granularity == PerGroup(64)


def test_inputs_that_no_group_divides_get_one_scale_per_channel(tmp_path):
    folder = write_tiny_llama(tmp_path / "odd", odd_tensors(), intermediate_size=50)
    odd = schemes(open_checkpoint(folder), "int4-all")
    assert odd[DOWN].weight.granularity == PerChannel()
    assert odd[Q].weight.granularity == PerGroup(32)
    with pytest.raises(RecipeError, match="does not divide the 50 input features"):
        schemes(open_checkpoint(folder), "int4-all", "group_size=32")


def odd_tensors():
    """An MLP of 50 features."""
    from tests.tiny_llama import tiny_tensors

    tensors = tiny_tensors()
    for name in tensors:
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensors[name][:50].contiguous()
        elif "down_proj" in name:
            tensors[name] = tensors[name][:, :50].contiguous()
    return tensors


def test_a_later_override_wins_and_ignore_keeps(tiny):
    found = schemes(
        tiny,
        "int4-all",
        "ignore=['*layers.1.mlp.down_proj']",
        "overrides=[{match: '*layers.0*', weights: int8}, {match: 're:.*layers.0.mlp.*', keep: true}]",
    )
    assert found[Q].weight.bits == 8
    assert found[DOWN] is None
    assert found["model.layers.1.mlp.down_proj"] is None
    assert found["model.layers.1.self_attn.q_proj"].weight.bits == 4


def test_inputs_and_the_kv_cache(tiny):
    assert schemes(tiny, "w4a8-fp8")[DOWN].activation.granularity == PerToken()
    plan = make_plan(tiny, load_recipe("int4", ("kv_cache=int8",)))
    assert plan.kv == KVScheme(dtype="int8", granularity="token")
    assert make_plan(tiny, load_recipe("int4")).kv is None


def test_blocks_need_whole_blocks(tiny, wide):
    plan = make_plan(wide, load_recipe("fp8-block"))
    assert plan.schemes[DOWN] is not None
    with pytest.raises(RecipeError, match="do not divide by the block"):
        make_plan(tiny, load_recipe("fp8-block"))


def test_an_override_that_splits_fused_linears_is_refused_unless_it_changes_nothing(tiny):
    with pytest.raises(RecipeError, match="treated differently"):
        schemes(tiny, "int4-all", 'overrides=[{match: "*q_proj", weights: int8}]')
    same = schemes(tiny, "int4-all", 'overrides=[{match: "*q_proj", weights: int4}]')
    assert same == schemes(tiny, "int4-all")
