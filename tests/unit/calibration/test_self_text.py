"""Text that the model writes: by its own probabilities, the same for the same seed, written once."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.calibration import self_text
from quantkit.calibration.self_text import batch_size, is_written, self_tokens, write_text
from quantkit.errors import CalibrationError, TextError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.text import load_documents
from tests.tiny_llama import VOCAB_SIZE, tiny_tensors, write_tiny_llama, write_tokenizer
from tests.tiny_models import save_tiny

CPU = torch.device("cpu")


def write(checkpoint, samples, length, seed=0):
    return write_text(checkpoint, samples, length, seed=seed, device=CPU, on_token=lambda done, total: None)


@pytest.fixture
def llama(tmp_path):
    return open_checkpoint(write_tiny_llama(tmp_path / "llama"))


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased-llama3", "mistral-window", "gemma3", "qwen3"])
def test_every_token_is_drawn_from_what_the_model_predicts(name, tmp_path, monkeypatch):
    """Drawn again with the same random numbers from predictions without a cache, the text is the same."""
    folder = save_tiny(name, tmp_path / name)
    write_tokenizer(folder)
    monkeypatch.setattr(self_text, "MAX_BATCH", 3)
    ids_SL = write(open_checkpoint(folder), 6, 20)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for ids_BL in torch.split(ids_SL, 3):
        with torch.no_grad():
            reached_BLV = model(ids_BL).logits.double().softmax(-1).cumsum(-1)
        for position in range(1, 20):
            drawn = (
                torch.rand(3, 1, generator=generator, dtype=torch.float64) * reached_BLV[:, position - 1, -1:]
            )
            expected = torch.searchsorted(reached_BLV[:, position - 1].contiguous(), drawn)[:, 0]
            assert torch.equal(ids_BL[:, position], expected), position


def test_frequencies_are_the_models_probabilities(llama):
    text = write(llama, 4000, 2)
    start = text[0, 0].item()
    assert set(text[:, 0].tolist()) != {start}  # this tokenizer has no BOS
    model = AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float32)
    expected_V = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    with torch.no_grad():
        for token, count in Counter(text[:, 0].tolist()).items():
            expected_V += count * model(torch.tensor([[token]])).logits[0, -1].double().softmax(-1)
    found_V = torch.bincount(text[:, 1], minlength=VOCAB_SIZE).double()
    deviation_V = (found_V - expected_V) / expected_V.clamp(min=1).sqrt()
    assert deviation_V.abs().max() < 5 and deviation_V.square().mean() < 1.3


def test_same_seed_same_text(llama):
    assert torch.equal(write(llama, 3, 8), write(llama, 3, 8))
    assert not torch.equal(write(llama, 3, 8), write(llama, 3, 8, seed=1))


def test_texts_start_with_bos_where_there_is_one(llama):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "a"}
    (llama.path / "tokenizer_config.json").write_text(json.dumps(settings))
    first_S = write(llama, 5, 2)[:, 0]
    assert len(first_S.unique()) == 1


def test_without_bos_no_text_starts_with_a_special_token(llama):
    special = [chr(code) for code in range(ord("a"), ord("z"))]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": special}
    (llama.path / "tokenizer_config.json").write_text(json.dumps(settings))
    from quantkit.tokens import load_tokenizer

    backend = load_tokenizer(llama.path).backend
    first_S = write(llama, 400, 2)[:, 0]
    assert len(first_S.unique()) > 100
    assert len(backend.all_special_ids) >= 25 and not set(first_S.tolist()) & set(backend.all_special_ids)


def test_written_once(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    wanted = {"seed": 3, "device": CPU}
    assert not is_written(llama, 3, 8, **wanted)
    first = self_tokens(llama, 3, 8, **wanted)
    assert is_written(llama, 3, 8, **wanted) and not is_written(llama, 3, 9, **wanted)
    assert not is_written(llama, 3, 8, seed=4, device=CPU)

    def fail(*args, **kwargs):
        raise AssertionError("written twice")

    monkeypatch.setattr(self_text, "write_text", fail)
    again = self_tokens(llama, 3, 8, **wanted)
    assert torch.equal(again.ids_SL, first.ids_SL) and again.hash == first.hash and again.spec == "self"


def test_another_model_writes_another_text(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    other = open_checkpoint(write_tiny_llama(tmp_path / "other", tiny_tensors(seed=1)))
    texts = [self_tokens(model, 3, 8, seed=0, device=CPU) for model in (llama, other)]
    assert texts[0].hash != texts[1].hash


def test_progress_reaches_the_end(llama, monkeypatch):
    monkeypatch.setattr(self_text, "MAX_BATCH", 2)
    told = []
    write_text(llama, 4, 5, seed=0, device=CPU, on_token=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1] == (10, 10)


@pytest.mark.parametrize(("samples", "limit"), [(1, 128), (128, 128), (129, 128), (128, 86), (7, 3), (5, 1)])
def test_batches_hold_the_limit_and_are_even(llama, monkeypatch, samples, limit):
    monkeypatch.setattr(self_text, "MAX_BATCH", limit)
    batch = batch_size(llama, samples, 16, CPU)
    sizes = [len(part) for part in torch.split(torch.zeros(samples), batch)]
    assert max(sizes) <= limit and len(sizes) == -(-samples // limit)


def test_memory_of_a_batch_is_limited(llama, monkeypatch):
    monkeypatch.setattr(self_text, "KV_BYTES", {"cpu": 10 * 16 * self_text.kv_token_bytes(llama, CPU)})
    assert batch_size(llama, 20, 16, CPU) == 10


def test_a_model_that_predicts_nan_cannot_write(tmp_path):
    tensors = tiny_tensors()
    tensors["model.norm.weight"][:] = float("nan")
    checkpoint = open_checkpoint(write_tiny_llama(tmp_path / "nan", tensors))
    with pytest.raises(CalibrationError, match="NaN"):
        write(checkpoint, 2, 4)


def test_evaluation_does_not_take_text_that_the_model_writes():
    with pytest.raises(TextError, match="calibration only"):
        load_documents("self")
