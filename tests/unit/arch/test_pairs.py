"""The pairs against what transformers computes: who reads a norm's output, and what the names on disk are."""

import pytest
import torch

from quantkit.arch import FAMILIES
from quantkit.arch.names import place_of
from quantkit.arch.pairs import WIRINGS, Link, Pair, layer_wiring, why_unrotatable
from quantkit.formats.checkpoint import open_checkpoint
from tests.checkpoints import LLAMA_CONFIG, llama_tensors, write_checkpoint
from tests.tiny_families import TEXT_FAMILIES, save_family, tiny_family

NORMS = {Link.NORM, Link.NORM_PLUS_ONE}


def readers_in_transformers(model_type: str) -> dict[tuple[int, str], set[str]]:
    """(layer, norm) -> the modules with weights whose input is that norm's very output."""
    model = tiny_family(model_type)
    outputs: dict[int, tuple[int, str]] = {}
    inputs: list[tuple[int, str]] = []
    kept: list[torch.Tensor] = []  # or memory would be used again, and an address mean two tensors

    def watch(name: str, module: torch.nn.Module, args: tuple, output: object) -> None:
        if "norm" in name and isinstance(output, torch.Tensor):
            outputs[output.untyped_storage().data_ptr()] = name
            kept.append(output)
        elif args and isinstance(args[0], torch.Tensor):
            inputs.append((args[0].untyped_storage().data_ptr(), name))
            kept.append(args[0])

    for name, module in model.named_modules():
        place = place_of(name)
        if place and list(module.parameters(recurse=False)):
            module.register_forward_hook(
                lambda module, args, output, name=name: watch(name, module, args, output)
            )
    model(torch.arange(3, 20)[None])
    found: dict[tuple[int, str], set[str]] = {}
    for address, name in inputs:
        if address in outputs:
            norm, reader = place_of(outputs[address]), place_of(name)
            found.setdefault((norm.layer, norm.rest), set()).add(reader.rest)
    return found


def as_module(name: str) -> str:
    """The module of transformers that holds what has this name on disk."""
    parent, separator, _ = name.partition(".experts.")
    return (parent + ".experts" if separator else name).replace("block_sparse_moe", "mlp")


def test_every_family_has_its_facts():
    assert WIRINGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_norm_pairs_name_exactly_the_readers_of_each_norm(tmp_path, model_type):
    checkpoint = open_checkpoint(save_family(model_type, tmp_path))
    table = {
        (layer, pair.prev): {as_module(name) for name in pair.to}
        for layer in (0, 1)
        for pair in layer_wiring(checkpoint, layer).pairs
        if pair.link in NORMS
    }
    assert table == readers_in_transformers(model_type)


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_shapes_on_disk_fit_the_pairs(tmp_path, model_type):
    checkpoint = open_checkpoint(save_family(model_type, tmp_path))
    for layer in (0, 1):
        wiring = layer_wiring(checkpoint, layer)
        linked = {pair.link for pair in wiring.pairs}
        assert {Link.VALUES, Link.PRODUCT} <= linked
        for name in wiring.writers:
            assert (
                checkpoint.info(f"{wiring.prefix}{name}.weight").shape[0] == checkpoint.config["hidden_size"]
            )
        for pair in wiring.pairs:
            channels = checkpoint.info(f"{wiring.prefix}{pair.prev}.weight").shape[0]
            widths = {checkpoint.info(f"{wiring.prefix}{name}.weight").shape[1] for name in pair.to}
            assert len(widths) == 1
            if pair.link in NORMS:
                assert widths == {channels}
            elif pair.link is Link.PRODUCT:
                assert channels in {max(widths), 2 * max(widths)}


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_every_linear_reads_a_pair_or_the_bare_stream(tmp_path, model_type):
    """OLMo 2 alone has linears that no pair feeds: they read the residual stream itself."""
    checkpoint = open_checkpoint(save_family(model_type, tmp_path))
    wiring = layer_wiring(checkpoint, 1)
    matrices = {
        name.removeprefix(wiring.prefix).removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name.startswith(wiring.prefix) and len(info.shape) == 2
    }
    unfed = matrices - {name for pair in wiring.pairs for name in pair.to}
    inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert unfed == (set(inputs) if model_type == "olmo2" else set())


def test_experts_come_by_number(tmp_path):
    checkpoint = open_checkpoint(save_family("qwen3_moe", tmp_path))
    pairs = layer_wiring(checkpoint, 1).pairs
    down = [pair for pair in pairs if pair.link is Link.PRODUCT]
    assert down[3] == Pair(prev="mlp.experts.3.up_proj", to=("mlp.experts.3.down_proj",), link=Link.PRODUCT)
    assert len(down) == 4
    dense = layer_wiring(checkpoint, 0)
    assert [pair.prev for pair in dense.pairs if pair.link is Link.PRODUCT] == ["mlp.up_proj"]
    assert dense.writers == ("self_attn.o_proj", "mlp.down_proj")


def test_clipped_values_are_no_pair(tmp_path):
    checkpoint = open_checkpoint(save_family("olmoe", tmp_path, clip_qkv=8.0))
    assert Link.VALUES not in {pair.link for pair in layer_wiring(checkpoint, 0).pairs}


@pytest.mark.parametrize(
    ("model_type", "reason"), [("gemma2", "norm"), ("olmo2", "norm"), ("qwen2_5_vl", "images")]
)
def test_streams_that_cannot_rotate_say_why(tmp_path, model_type, reason):
    config = {**LLAMA_CONFIG, "model_type": model_type}
    assert reason in why_unrotatable(open_checkpoint(write_checkpoint(tmp_path, llama_tensors(), config)))


def test_a_llama_rotates_unless_it_is_part_of_a_multimodal_model(tmp_path):
    plain = open_checkpoint(write_checkpoint(tmp_path / "a", llama_tensors(), LLAMA_CONFIG))
    assert why_unrotatable(plain) is None
    nested = {"model_type": "llava", "text_config": dict(LLAMA_CONFIG)}
    tensors = llama_tensors("model.language_model.")
    assert "images" in why_unrotatable(open_checkpoint(write_checkpoint(tmp_path / "b", tensors, nested)))
