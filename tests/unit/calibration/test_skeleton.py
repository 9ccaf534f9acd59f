"""A model computed layer by layer from its shards is the model that transformers computes as a whole."""

import pytest
import torch
import transformers

from quantkit.calibration.skeleton import Skeleton, run_layer
from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.formats.checkpoint import open_checkpoint
from tests.tiny_families import TEXT_FAMILIES, save_family
from tests.tiny_llama import tiny_tensors, write_tiny_llama

CPU = torch.device("cpu")
SLIDING = {"sliding_window": 6}
SETTINGS = {"gemma2": SLIDING, "gemma3_text": SLIDING, "mistral": SLIDING, "phi3": SLIDING}


def ids(samples: int) -> torch.Tensor:
    return torch.randint(3, 96, (samples, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_by_layer(skeleton: Skeleton, batch: int) -> torch.Tensor:
    """Hidden states through one layer after the other, each read when its turn comes."""
    outside = {name: skeleton.checkpoint.read(name) for name in skeleton.outside_names()}
    hidden, calls = skeleton.start(ids(3), outside, batch)
    for layer in range(skeleton.num_layers):
        module = skeleton.fill_layer(layer, skeleton.read_layer(layer))
        hidden = [run_layer(module, part, calls[layer]) for part in hidden]
        skeleton.empty_layer(layer)
        assert all(parameter.is_meta for parameter in module.parameters())
    head = skeleton.model.get_submodule("lm_head")
    logits = head(skeleton.base.norm(torch.cat(hidden)))
    cap = skeleton.checkpoint.config.get("final_logit_softcapping")
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_layer_by_layer_gives_the_logits_of_transformers(tmp_path, model_type):
    folder = save_family(model_type, tmp_path, **SETTINGS.get(model_type, {}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids(3)).logits
    skeleton = Skeleton(open_checkpoint(folder), CPU, torch.float32)
    for batch in (3, 2):  # 2: a last batch that is not full
        assert torch.allclose(logits_by_layer(skeleton, batch), expected, rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_the_embedding(tmp_path):
    folder = save_family("llama", tmp_path, tie_word_embeddings=True)
    checkpoint = open_checkpoint(folder)
    assert "lm_head.weight" not in checkpoint.tensors
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids(3)).logits
    skeleton = Skeleton(checkpoint, CPU, torch.float32)
    assert torch.allclose(logits_by_layer(skeleton, 3), expected, rtol=1e-4, atol=1e-4)


def test_a_family_nobody_knows_is_refused_with_what_is_missing(tmp_path):
    config = transformers.StableLmConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="stablelm: which linears share an input") as caught:
        Skeleton(open_checkpoint(tmp_path), CPU, torch.float32)
    assert "int4-rtn" in caught.value.fix and "llama" in caught.value.fix


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_norm_is_refused_by_name(tmp_path, name):
    tensors = tiny_tensors()
    del tensors[name]
    checkpoint = open_checkpoint(write_tiny_llama(tmp_path / "model", tensors))
    skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
    outside = {each: checkpoint.read(each) for each in skeleton.outside_names()}
    with pytest.raises(SourceError, match=name.removeprefix("model.layers.1.")):
        skeleton.start(torch.zeros(1, 4, dtype=torch.int64), outside, 1)
        skeleton.fill_layer(1, skeleton.read_layer(1))


def test_a_norm_of_another_size_is_refused(tmp_path):
    tensors = tiny_tensors() | {"model.layers.0.input_layernorm.weight": torch.ones(5).bfloat16()}
    checkpoint = open_checkpoint(write_tiny_llama(tmp_path / "model", tensors))
    skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
    with pytest.raises(SourceError, match=r"do not fit together .*input_layernorm"):
        skeleton.fill_layer(0, skeleton.read_layer(0))
