"""Evaluations through the runtime: figures are those of transformers, and how models are served shows in them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.evaluation import evaluate
from quantkit.evaluation.cache import TensorCache
from quantkit.runtime.load import load_model
from quantkit.text import load_documents
from quantkit.tokens import load_tokenizer, read_windows, tokenize
from tests.tiny_llama import write_tiny_pair
from tests.tiny_models import save_tiny, tokens

WINDOWS, LENGTH = 5, 40


@pytest.fixture
def world(tmp_path):
    return write_tiny_pair(tmp_path)


def run(world, candidate="original", **options):
    return evaluate(
        world / "original",
        [world / candidate],
        data=str(world / "text.txt"),
        windows=WINDOWS,
        length=LENGTH,
        device="cpu",
        cache=TensorCache(world / "cache", free_bytes=0),
        **options,
    )


def transformers_log_probs(folder, data, windows, length, dtype=torch.float32):
    """Of all tokens at all positions of the windows, float64 [windows, length, V], and the windows themselves."""
    with tokenize(load_documents(data), load_tokenizer(folder)) as ids:
        ids_BT = torch.stack(list(read_windows(ids, windows, length)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(ids_BT).logits.double().log_softmax(-1), ids_BT


def perplexity(log_probs, ids_BT):
    of_next = log_probs[:, :-1].gather(-1, ids_BT[:, 1:, None])
    return of_next.mean().neg().exp().item()


def test_figures_are_those_of_transformers(world):
    data = str(world / "text.txt"), WINDOWS, LENGTH
    p, ids_BT = transformers_log_probs(world / "original", *data)
    q, _ = transformers_log_probs(world / "moved", *data)
    report = run(world, "moved")
    damage = report.candidates[0].damage
    assert report.reference.ppl == pytest.approx(perplexity(p, ids_BT), rel=1e-5)
    assert damage.ppl == pytest.approx(perplexity(q, ids_BT), rel=1e-5)
    assert damage.kl_mean == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert damage.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmoe"])
@pytest.mark.parametrize(("step_tokens", "elements"), [(1000, 1 << 20), (82, 97 * 5), (13, 1)])
def test_several_texts_to_a_step_or_parts_of_one_are_each_text(
    name, step_tokens, elements, tmp_path, monkeypatch
):
    model = load_model(save_tiny(name, tmp_path))
    texts = [tokens(41, seed) for seed in range(5)]
    whole = [model.logits(text) for text in texts]
    monkeypatch.setattr("quantkit.runtime.model.LOGITS_ELEMENTS", elements)
    parts = [list(of_one) for of_one in model.predictions(texts, step_tokens=step_tokens)]
    assert len(parts[0]) == -(-41 // max(1, elements // 97))
    for one, of_one in zip(whole, parts, strict=True):
        assert (torch.cat(of_one) - one).norm() < 1e-5 * one.norm()


def test_a_dtype_costs_its_noise_floor_and_a_quantized_cache_more(world):
    exact, rounded = run(world), run(world, dtype="bfloat16")
    assert exact.candidates[0].damage.kl_mean < 5e-8
    assert rounded.candidates[0].damage.kl_mean == rounded.reference.kl_noise_floor > 1e-6
    kl = {kv: run(world, kv_cache_dtype=kv).candidates[0].damage.kl_mean for kv in ("auto", "int8", "fp8")}
    assert kl["auto"] < 5e-8 < kl["int8"] < kl["fp8"]
