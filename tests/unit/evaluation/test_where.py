"""The map of the damage: swaps against models with just that linear changed, folds, fused families, experts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import EvaluationError
from quantkit.evaluation.where import map_linears
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.numerics.divergence import divergence
from quantkit.runtime.load import load_model
from quantkit.schemes import FloatSpec, IntSpec, PerChannel, PerGroup, PerToken, Scheme
from tests.quantized_folders import LINEARS, write_quantized
from tests.tiny_families import save_family
from tests.tiny_llama import CONFIG, HEADS, HIDDEN, KV_HEADS, tiny_tensors, write_tiny_llama

CPU = torch.device("cpu")
WINDOWS = list(torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(5)))
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def damage_map(original, candidate, windows=WINDOWS):
    found = map_linears(open_checkpoint(original), open_checkpoint(candidate), windows, CPU, lambda *_: None)
    return {linear.linear: linear for linear in found}


def kl(original, candidate):
    """Mean KL over all positions, from two models loaded each by itself."""
    ours, theirs = (load_model(path, dtype=torch.float32) for path in (original, candidate))
    rows = [divergence(ours.logits(ids), theirs.logits(ids), ids).kl_R for ids in WINDOWS]
    return float(torch.cat(rows).mean())


def noisy(tensor, amount=0.03, seed=1):
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return (tensor.float() * (1 + amount * noise)).to(tensor.dtype)


def write(folder, **changed):
    """The tiny Llama, float32, with some tensors changed by functions of their contents."""
    tensors = {name: tensor.float() for name, tensor in tiny_tensors().items()}
    for name, change in changed.items():
        tensors[name] = change(tensors[name])
    return write_tiny_llama(folder, tensors, dtype="float32")


@pytest.fixture
def original(tmp_path):
    return write(tmp_path / "original")


def test_an_identical_candidate_has_an_empty_map(original):
    assert damage_map(original, original) == {}


@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_only_changed_linear_has_all_of_the_kl(original, tmp_path, layer, name):
    linear = f"model.layers.{layer}.{name}"
    candidate = write(tmp_path / "candidate", **{f"{linear}.weight": noisy})
    found = damage_map(original, candidate)
    assert list(found) == [linear, f"model.layers.{layer}"]
    expected = kl(original, candidate)
    assert expected > 1e-5
    for damage in found.values():
        assert damage.kl_in == pytest.approx(expected, rel=1e-3)
        assert damage.kl_out == pytest.approx(expected, rel=1e-3)


def test_swapping_one_of_many_is_the_kl_of_a_model_that_differs_there_alone(original, tmp_path):
    names = [name for name in tiny_tensors() if "proj" in name] + ["lm_head.weight"]
    candidate = write(tmp_path / "candidate", **dict.fromkeys(names, noisy))
    found = damage_map(original, candidate)
    assert len(found) == 15 + 2 and [found[f"model.layers.{layer}"].kind for layer in (0, 1)] == ["layer"] * 2
    for name in ("model.layers.0.self_attn.v_proj", UP, "lm_head"):
        alone = write(tmp_path / "alone", **{f"{name}.weight": noisy})
        without = write(
            tmp_path / "without",
            **dict.fromkeys([other for other in names if other != f"{name}.weight"], noisy),
        )
        assert found[name].kl_in == pytest.approx(kl(original, alone), rel=1e-3)
        assert found[name].kl_out == pytest.approx(
            kl(original, candidate) - kl(original, without), rel=1e-3, abs=1e-7
        )


@pytest.mark.parametrize("planted", [UP, "model.layers.0.self_attn.o_proj"])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(weight=IntSpec(bits=8, granularity=PerGroup(64))),
        Scheme(weight=FloatSpec(granularity=PerChannel()), activation=FloatSpec(granularity=PerToken())),
    ],
)
def test_a_planted_regression_is_found_and_located(tmp_path, scheme, planted):
    original = write_quantized(tmp_path / "original", None).path
    candidate = write_quantized(tmp_path / "candidate", scheme).path
    tensors = load_file(candidate / "model.safetensors")
    tensors[f"{planted}.weight_scale"] *= 1.2 if scheme.activation else 1.03
    save_file(tensors, candidate / "model.safetensors")
    found = damage_map(original, candidate)
    linears = [damage for damage in found.values() if damage.kind != "layer"]
    assert {damage.linear for damage in linears} == set(LINEARS)
    for key in ("kl_in", "kl_out"):
        assert max(linears, key=lambda damage: getattr(damage, key)).linear == planted


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(weight=IntSpec(bits=4, granularity=PerGroup(64))),
        Scheme(weight=FloatSpec(granularity=PerChannel()), activation=FloatSpec(granularity=PerToken())),
    ],
)
def test_between_two_quantized_versions_only_what_changed_is_on_the_map(tmp_path, scheme):
    before, after = (write_quantized(tmp_path / name, scheme).path for name in ("before", "after"))
    tensors = load_file(after / "model.safetensors")
    tensors[f"{UP}.weight_scale"] *= 1.03
    save_file(tensors, after / "model.safetensors")
    found = damage_map(before, after)
    assert found.keys() == {UP, "model.layers.1"}
    assert all(one.kl_in == pytest.approx(kl(before, after), rel=1e-3) for one in found.values())


def test_the_embedding_is_a_unit_and_with_a_tied_head_both_change(original, tmp_path):
    name = "model.embed_tokens.weight"
    candidate = write(tmp_path / "candidate", **{name: noisy, "model.norm.weight": noisy})
    found = damage_map(original, candidate)
    alone = write(tmp_path / "alone", **{name: noisy})
    assert found["model.embed_tokens"].kl_in == pytest.approx(kl(original, alone), rel=1e-3)
    assert list(found) == ["model.embed_tokens"]  # the norm goes with its base
    for folder in (original, candidate, alone):
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        write_tiny_llama(folder, tensors, dtype="float32", tie_word_embeddings=True)
    found = damage_map(original, candidate)
    assert found["model.embed_tokens"].kl_in == pytest.approx(kl(original, alone), rel=1e-3)


def folded(tensors):
    """The same model with scales moved: from a norm to its readers, from values to o, from up to down."""
    generator = torch.Generator().manual_seed(3)
    norm, values, product = (torch.rand(size, generator=generator) * 3 + 0.5 for size in (HIDDEN, 16, 64))
    layer = "model.layers.1."
    tensors[f"{layer}input_layernorm.weight"] /= norm
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"{layer}self_attn.{name}.weight"] *= norm
    tensors[f"{layer}self_attn.v_proj.weight"] /= values[:, None]
    by_head = values.view(KV_HEADS, 1, -1).expand(-1, HEADS // KV_HEADS, -1).flatten()
    tensors[f"{layer}self_attn.o_proj.weight"] *= by_head
    tensors[f"{layer}mlp.up_proj.weight"] /= product[:, None]
    tensors[f"{layer}mlp.down_proj.weight"] *= product
    return tensors


def test_what_was_folded_into_neighbours_is_no_damage(original, tmp_path):
    tensors = load_file(original / "model.safetensors")
    candidate = write_tiny_llama(tmp_path / "folded", folded(dict(tensors)), dtype="float32")
    assert kl(original, candidate) < 1e-8
    found = damage_map(original, candidate)
    assert {damage.kind for damage in found.values()} >= {
        "q_proj",
        "v_proj",
        "o_proj",
        "up_proj",
        "down_proj",
    }
    assert max(abs(value) for damage in found.values() for value in (damage.kl_in, damage.kl_out)) < 1e-7
    tensors[f"{DOWN}.weight"] = noisy(tensors[f"{DOWN}.weight"])
    damaged = write_tiny_llama(tmp_path / "damaged", dict(tensors), dtype="float32")
    both = write_tiny_llama(tmp_path / "both", folded(dict(tensors)), dtype="float32")
    expected, found = kl(original, damaged), damage_map(original, both)
    assert found[DOWN].kl_in == pytest.approx(expected, rel=1e-2)
    assert found[DOWN].kl_out == pytest.approx(expected, rel=1e-2)
    assert found[UP].kl_in < expected / 100


@pytest.mark.parametrize("family", ["phi3", "gemma2", "qwen2_moe", "mixtral", "olmo2"])
def test_other_families(tmp_path, family):
    original = save_family(family, tmp_path / "original")
    candidate = save_family(family, tmp_path / "candidate")
    file = candidate / "model.safetensors"
    tensors = load_file(file)
    linear = next(name for name in tensors if "layers.1." in name and ("w2" in name or "down_proj" in name))
    tensors[linear] = noisy(tensors[linear], 0.3)
    save_file(tensors, file, metadata={"format": "pt"})
    found = damage_map(original, candidate)
    units = [damage for damage in found.values() if damage.kl_in > 1e-6]  # equal experts: rounding
    assert units and units[0].layer == 1
    assert units[0].kl_in == pytest.approx(kl(original, candidate), rel=1e-3)


def test_weights_that_mean_nothing_in_the_other_model_are_refused(original, tmp_path):
    shuffled = write(tmp_path / "rotated", **{"model.embed_tokens.weight": lambda tensor: tensor.flip(1)})
    with pytest.raises(EvaluationError, match="rotated has no map: its embedding is another one"):
        damage_map(original, shuffled)
    other = write(tmp_path / "other")
    (other / "config.json").write_text(json.dumps(CONFIG | {"dtype": "float32", "rms_norm_eps": 1e-3}))
    with pytest.raises(EvaluationError, match="describes another computation"):
        damage_map(original, other)
