"""Folding by what it must not change: the logits of a random model of every family."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.arch.pairs import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    WIRINGS,
    Heads,
    LayerWiring,
    Link,
    Pair,
    layer_wiring,
    why_unrotatable,
)
from quantkit.calibration.folding import (
    fold_scale,
    rotate_ends,
    rotate_stream,
    rotate_values,
)
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.numerics.hadamard import random_rotation
from tests.tiny_families import TEXT_FAMILIES, logits_of, save_family

ROTATABLE = [name for name in TEXT_FAMILIES if WIRINGS[name].unrotatable is None]
HEADS = Heads(4, 2, 16)
# float32 through two layers: about 1e-6 of the largest logit; a forgotten weight changes them by their own size
TOLERANCE = 2e-5

LayerChange = Callable[[dict[str, Tensor], LayerWiring], dict[str, Tensor]]


def changed_copy(
    checkpoint: Checkpoint, folder: Path, change: LayerChange, ends: dict[str, Tensor] | None = None
) -> Path:
    """The checkpoint with `change` applied to the tensors of each layer."""
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors} | (ends or {})
    for layer in (0, 1):
        wiring = layer_wiring(checkpoint, layer)
        own = {
            name.removeprefix(wiring.prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(wiring.prefix)
        }
        changes = change(own, wiring)
        assert all(tensor.dtype == torch.float32 for tensor in changes.values())
        assert all(tensor.shape == own[name].shape for name, tensor in changes.items())
        tensors |= {wiring.prefix + name: tensor for name, tensor in changes.items()}
    config = checkpoint.config | ({} if ends is None else {"tie_word_embeddings": False})
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def distance(before: Tensor, after: Tensor) -> float:
    """Largest change of a logit, in units of the largest logit."""
    return float((before - after).abs().max() / before.abs().max())


def random_scale(size: int, seed: int = 0) -> Tensor:
    """Between 1/4 and 4."""
    return 4 ** (torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1)


def scaled(tensors: dict[str, Tensor], pairs: tuple[Pair, ...], links: set[Link]) -> dict[str, Tensor]:
    changed: dict[str, Tensor] = {}
    for pair in pairs:
        if pair.link in links:
            size = (
                HEADS.num_kv * HEADS.dim
                if pair.link is Link.VALUES
                else tensors[f"{pair.to[0]}.weight"].shape[1]
            )
            changed |= fold_scale(
                tensors | changed, pair, random_scale(size), heads=HEADS, dtype=torch.float32
            )
    return changed


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_scales_of_all_pairs_leave_the_logits(tmp_path, model_type):
    checkpoint = open_checkpoint(save_family(model_type, tmp_path / "a"))
    folder = changed_copy(
        checkpoint, tmp_path / "b", lambda own, wiring: scaled(own, wiring.pairs, set(Link))
    )
    assert distance(logits_of(tmp_path / "a"), logits_of(folder)) < TOLERANCE


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_rotated_values_leave_the_logits(tmp_path, model_type):
    checkpoint = open_checkpoint(save_family(model_type, tmp_path / "a"))
    rotation = random_rotation(HEADS.dim, seed=1)

    def change(own: dict[str, Tensor], wiring: LayerWiring) -> dict[str, Tensor]:
        (pair,) = (pair for pair in wiring.pairs if pair.link is Link.VALUES)
        changed = rotate_values(own, pair, HEADS, rotation)
        name = f"{pair.prev}.weight"
        assert not torch.allclose(changed[name], own[name], atol=0.1)
        return changed

    folder = changed_copy(checkpoint, tmp_path / "b", change)
    assert distance(logits_of(tmp_path / "a"), logits_of(folder)) < TOLERANCE


def rotated_copy(checkpoint: Checkpoint, folder: Path) -> Path:
    rotation = random_rotation(checkpoint.config["hidden_size"], seed=2)
    embedding = checkpoint.read(f"{EMBEDDING}.weight")
    is_tied = f"{HEAD}.weight" not in checkpoint.tensors
    head = embedding if is_tied else checkpoint.read(f"{HEAD}.weight")
    ends = rotate_ends(embedding, checkpoint.read(f"{FINAL_NORM}.weight"), head, rotation)
    names = (f"{EMBEDDING}.weight", f"{FINAL_NORM}.weight", f"{HEAD}.weight")
    return changed_copy(
        checkpoint,
        folder,
        lambda own, wiring: rotate_stream(own, wiring.pairs, wiring.writers, rotation),
        dict(zip(names, ends, strict=True)),
    )


@pytest.mark.parametrize("model_type", ROTATABLE)
def test_a_rotated_stream_leaves_the_logits(tmp_path, model_type):
    checkpoint = open_checkpoint(save_family(model_type, tmp_path / "a"))
    folder = rotated_copy(checkpoint, tmp_path / "b")
    assert distance(logits_of(tmp_path / "a"), logits_of(folder)) < TOLERANCE


def test_a_rotated_stream_unties_a_tied_head(tmp_path):
    checkpoint = open_checkpoint(save_family("qwen3", tmp_path / "a", tie_word_embeddings=True))
    folder = rotated_copy(checkpoint, tmp_path / "b")
    assert distance(logits_of(tmp_path / "a"), logits_of(folder)) < TOLERANCE
    assert open_checkpoint(folder).num_bytes - checkpoint.num_bytes == 96 * 48 * 4


def test_every_weight_of_a_rotated_layer_changes(tmp_path):
    checkpoint = open_checkpoint(save_family("llama", tmp_path / "a"))
    rotated = open_checkpoint(rotated_copy(checkpoint, tmp_path / "b"))
    untouched = {
        name for name in checkpoint.tensors if torch.equal(checkpoint.read(name), rotated.read(name))
    }
    writers = ("o_proj", "down_proj")  # the biases of all others are not in the stream
    assert untouched == {
        name
        for name in checkpoint.tensors
        if name.endswith(".bias") and not name.removesuffix(".bias").endswith(writers)
    }


@pytest.mark.parametrize("model_type", [name for name in TEXT_FAMILIES if name not in ROTATABLE])
def test_post_norm_families_are_refused(tmp_path, model_type):
    assert "norm" in (why_unrotatable(open_checkpoint(save_family(model_type, tmp_path))) or "")


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_rounded_norm_costs_nothing(tmp_path, model_type):
    """The linears take the scale that the norm in bfloat16 was divided by in effect."""
    folder = save_family(model_type, tmp_path / "a", dtype="bfloat16")
    checkpoint = open_checkpoint(folder)

    def change(own: dict[str, Tensor], wiring: LayerWiring) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for pair in wiring.pairs:
            if pair.link in {Link.NORM, Link.NORM_PLUS_ONE}:
                changed |= fold_scale(own, pair, random_scale(48), heads=HEADS, dtype=torch.bfloat16)
                norm = changed[f"{pair.prev}.weight"]
                assert torch.equal(norm, norm.bfloat16().float())
        return changed

    assert (
        distance(logits_of(folder), logits_of(changed_copy(checkpoint, tmp_path / "b", change))) < TOLERANCE
    )


@pytest.mark.parametrize("link", [Link.NORM, Link.NORM_PLUS_ONE])
def test_a_norm_channel_that_would_vanish_stays(link):
    """1 + w = 1/512 is not representable a second time smaller in bfloat16; w = 0 has nothing to scale."""
    offset = 1.0 if link is Link.NORM_PLUS_ONE else 0.0
    norm = torch.tensor([1.0, 2.0**-8, 0.0]) - offset
    tensors = {"norm.weight": norm, "q.weight": torch.ones(2, 3)}
    pair = Pair(prev="norm", to=("q",), link=link)
    changed = fold_scale(tensors, pair, torch.full((3,), 5.0), heads=HEADS, dtype=torch.bfloat16)
    product = (changed["norm.weight"] + offset) * changed["q.weight"]
    torch.testing.assert_close(product, (norm + offset) * tensors["q.weight"], rtol=1e-6, atol=0)
    assert changed["q.weight"][0, 0] > 4


def test_fused_rows_before_the_values_stay(tmp_path):
    checkpoint = open_checkpoint(save_family("phi3", tmp_path))
    wiring = layer_wiring(checkpoint, 0)
    name = "self_attn.qkv_proj.weight"
    own = {part: checkpoint.read(wiring.prefix + part) for part in (name, "self_attn.o_proj.weight")}
    (pair,) = (pair for pair in wiring.pairs if pair.link is Link.VALUES)
    for changed in (
        rotate_values(own, pair, HEADS, random_rotation(16, seed=0)),
        fold_scale(own, pair, random_scale(32), heads=HEADS, dtype=torch.float32),
    ):
        assert torch.equal(changed[name][:-32], own[name][:-32])
        assert not torch.equal(changed[name][-32:], own[name][-32:])
