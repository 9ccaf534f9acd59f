"""Each family against transformers, on tiny random models: logits, token by token, shards, Gemma's wrapper."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3TextConfig

from quantkit.errors import GenerationError
from quantkit.runtime.load import load_model
from tests.tiny_models import COMMON, CONFIGS, reference_logits, save_tiny, tokens

LENGTH = 41  # above every window


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_equal_transformers(name, tmp_path):
    save_tiny(name, tmp_path)
    ids = tokens(LENGTH)
    ours = load_model(tmp_path, dtype=torch.float32).logits(ids)
    assert ours.dtype == torch.float32
    assert ours.shape == (LENGTH, 97)
    assert relative(ours, reference_logits(tmp_path, ids, torch.float32)) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_logits_are_as_near_to_float32_as_those_of_transformers(name, tmp_path):
    save_tiny(name, tmp_path, dtype=torch.bfloat16)
    ids = tokens(LENGTH)
    exact = reference_logits(tmp_path, ids, torch.float32)
    theirs = reference_logits(tmp_path, ids, torch.bfloat16)
    model = load_model(tmp_path)
    assert model.dtype == torch.bfloat16, "the dtype that config.json names"
    ours = model.logits(ids)
    assert relative(ours, exact) < 1.5 * relative(theirs, exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_step_by_step_equals_the_full_pass(name, tmp_path):
    model = load_model(save_tiny(name, tmp_path), dtype=torch.float32)
    ids = tokens(LENGTH)
    full = model.logits(ids)
    cache = model.new_cache(LENGTH)
    steps = [
        ids[:10],
        ids[10:11],
        ids[11:12],
        ids[12:25],
        *ids[25:].split(1),
    ]  # prompt, single, chunk, singles
    ends = torch.tensor([len(step) for step in steps]).cumsum(0) - 1
    last = torch.stack([model.forward(step, cache) for step in steps])
    assert cache.num_tokens == LENGTH
    assert relative(last, full[ends]) < 1e-5


def test_a_window_forgets_and_full_attention_does_not(tmp_path):
    ids, other = tokens(LENGTH), tokens(LENGTH)
    other[0] = (other[0] + 1) % 97
    for name, forgets in (("mistral-window", True), ("llama", False)):
        model = load_model(save_tiny(name, tmp_path / name), dtype=torch.float32)
        changed = (model.logits(ids) - model.logits(other)).abs().amax(dim=-1) > 0
        reach = 3 * (7 - 1) if forgets else LENGTH - 1  # each of 3 layers sees 6 tokens back
        assert changed[0]
        assert changed[reach] or not forgets
        assert not changed[reach + 1 :].any()
        assert changed[-1] != forgets


def test_shards_give_the_same_logits(tmp_path):
    one = save_tiny("qwen3", tmp_path / "one")
    many = save_tiny("qwen3", tmp_path / "many", shard_size="50KB")
    assert (many / "model.safetensors.index.json").is_file()
    ids = tokens(9)
    assert torch.equal(load_model(one).logits(ids), load_model(many).logits(ids))


def test_the_language_model_of_a_multimodal_gemma3(tmp_path):
    text = {key: value for key, value in CONFIGS["gemma3"].to_dict().items() if key != "model_type"}
    text["final_logit_softcapping"] = (
        None  # transformers ignores it in this class only; no published model has it
    )
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"}
    config = Gemma3Config(text_config=Gemma3TextConfig(**text), vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(tmp_path)
    ids = tokens(LENGTH)
    with torch.no_grad():
        reference = model(input_ids=ids[None]).logits[0]
    assert relative(load_model(tmp_path, dtype=torch.float32).logits(ids), reference) < 1e-5


@pytest.mark.parametrize("name", ["llama-linear", "llama-tied-biased-llama3", "llama-yarn", "gemma3"])
def test_the_older_spelling_of_rope_means_the_same(name, tmp_path):
    save_tiny(name, tmp_path)
    ids = tokens(LENGTH)
    before = load_model(tmp_path).logits(ids)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    if name == "gemma3":
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope
    file.write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path).logits(ids), before)


def test_gemma3_takes_the_defaults_that_published_configs_rely_on(tmp_path):
    """google/gemma-3-4b-it's text_config names six keys; the pattern and thetas come from transformers."""
    kept = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "sliding_window": 6}
    config = Gemma3TextConfig(**kept, vocab_size=97)
    model_config = {**kept, "vocab_size": 97, "model_type": "gemma3_text", "dtype": "float32"}
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids = tokens(LENGTH)
    reference = reference_logits(tmp_path, ids, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(model_config))
    assert relative(load_model(tmp_path).logits(ids), reference) < 1e-5


def test_lengths_up_to_the_context_are_fine(tmp_path):
    model = load_model(save_tiny("llama", tmp_path))
    assert model.logits(tokens(COMMON["max_position_embeddings"])).isfinite().all()


def test_a_long_prompt_is_run_in_chunks(tmp_path, monkeypatch):
    model = load_model(save_tiny("gemma3", tmp_path))
    ids = tokens(LENGTH)
    whole = model.logits(ids)
    monkeypatch.setattr("quantkit.runtime.model.CHUNK_TOKENS", 8)
    assert relative(model.forward(ids, model.new_cache(LENGTH)), whole[-1]) < 1e-5
    assert relative(model.logits(ids), whole) < 1e-5


def test_an_original_length_outside_of_the_rope_object_goes_first(tmp_path):
    save_tiny("llama-yarn", tmp_path)
    ids = tokens(LENGTH)
    inside = load_model(tmp_path).logits(ids)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "original_max_position_embeddings": 32}))
    outside = load_model(tmp_path).logits(ids)
    assert relative(outside, inside) > 1e-3
    assert relative(outside, reference_logits(tmp_path, ids, torch.float32)) < 1e-5


def test_a_shorter_context_has_the_short_factors(tmp_path):
    """As transformers has them for a text that is no longer than the first training's."""
    save_tiny("phi3-long", tmp_path)
    ids = tokens(8)
    short, long = (load_model(tmp_path, max_model_len=length) for length in (8, None))
    reference = reference_logits(tmp_path, ids, torch.float32)
    assert relative(short.logits(ids), reference) < 1e-5
    assert relative(long.logits(ids), reference) > 1e-3
    with pytest.raises(GenerationError, match="9 tokens, but the model was made for at most 8"):
        short.logits(tokens(9))


@pytest.mark.parametrize("length", [0, 65])
def test_a_context_that_the_model_was_not_made_for(length, tmp_path):
    with pytest.raises(GenerationError, match=f"a context of {length} tokens .* at most 64"):
        load_model(save_tiny("llama", tmp_path), max_model_len=length)


def test_more_positions_than_are_told_apart_need_a_limit(tmp_path):
    config = json.loads((save_tiny("llama", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**12}))
    with pytest.raises(GenerationError, match=r"10{12} tokens") as error:
        load_model(tmp_path)
    assert "max_model_len" in error.value.fix
    assert load_model(tmp_path, max_model_len=8).logits(tokens(8)).isfinite().all()
