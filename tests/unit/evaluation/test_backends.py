"""Candidates of any kind: what runs them, with the figures of whoever else runs them, and how large they are."""

import json
import math
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StableLmConfig
from transformers.utils import logging

from quantkit.errors import EvaluationError, SchemeError, SourceError, UnsupportedModelError
from quantkit.evaluation import evaluate
from quantkit.evaluation.backends import load_subject
from quantkit.evaluation.backends.bitsandbytes import SETTINGS
from quantkit.evaluation.cache import TensorCache
from quantkit.runtime.start import STEP_TOKENS
from quantkit.text import load_documents
from quantkit.tokens import load_tokenizer, read_windows, tokenize
from tests.gguf_files import write_gguf
from tests.packers import write_packed_llama
from tests.product_schemes import SCHEMES
from tests.tiny_llama import (
    CONFIG,
    HIDDEN,
    INNER,
    LAYERS,
    tiny_tensors,
    write_tiny_llama,
    write_tiny_pair,
    write_tokenizer,
)
from tests.tiny_models import quantize_tiny

WINDOWS, LENGTH = 3, 24
NUM_WEIGHTS = LAYERS * (3 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
EXACT = 1e-7  # of a KL divergence: what float32 and the 16 bits of kept logits cost

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_tiny_pair(tmp_path_factory.mktemp("backends"))


def run(world, *candidates, reference="original", **options):
    return evaluate(
        world / reference,
        [name if str(name).startswith("bnb:") else world / name for name in candidates],
        data=str(world / "text.txt"),
        windows=WINDOWS,
        length=LENGTH,
        device="cpu",
        cache=TensorCache(world / "cache", free_bytes=0),
        **options,
    )


def windows_of(world, folder):
    with tokenize(load_documents(str(world / "text.txt")), load_tokenizer(folder)) as ids:
        return torch.stack(list(read_windows(ids, WINDOWS, LENGTH)))


@torch.no_grad()
def figures_by_hand(world, original, candidate):
    """KL divergence and perplexity in float64, of models of transformers."""
    ids_BT = windows_of(world, world / "original")
    p, q = (model(ids_BT).logits.double().log_softmax(-1) for model in (original, candidate))
    of_next = q[:, :-1].gather(-1, ids_BT[:, 1:, None])
    return (p.exp() * (p - q)).sum(-1).mean().item(), of_next.mean().neg().exp().item()


def assert_same_figures(found, expected):
    """A distance, the root of a KL divergence, moves by no more than the distance of the disturbances."""
    assert math.sqrt(found.kl_mean) == pytest.approx(math.sqrt(expected.kl_mean), abs=math.sqrt(EXACT))
    assert found.kl_mean == pytest.approx(expected.kl_mean, rel=1e-3)
    assert found.ppl == pytest.approx(expected.ppl, rel=1e-5)
    assert found.top1 == expected.top1


@pytest.mark.parametrize("step_tokens", [1, 2 * LENGTH, 10**6])
def test_transformers_gives_the_figures_of_our_runtime(world, step_tokens, monkeypatch):
    monkeypatch.setitem(STEP_TOKENS, "cpu", step_tokens)
    ours, theirs = (run(world, "moved", backend=backend) for backend in ("quantkit", "transformers"))
    assert_same_figures(theirs.candidates[0].damage, ours.candidates[0].damage)
    assert theirs.reference.ppl == pytest.approx(ours.reference.ppl, rel=1e-5)
    rows = [(row.backend, row.kernels, row.kind) for row in (ours.candidates[0], theirs.candidates[0])]
    assert rows == [("quantkit", "torch", "16-bit"), ("transformers", "transformers", "16-bit")]
    assert ours.notes == theirs.notes == ()


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int8-w8a8-dynamic", "fp8-channel-token"])
def test_a_quantized_checkpoint_has_the_figures_of_transformers_and_compressed_tensors(world, scheme):
    if not (world / scheme).exists():
        write_tokenizer(quantize_tiny(world / "original", world / scheme, SCHEMES[scheme]))
    ours, theirs = (run(world, scheme, backend=backend).candidates[0] for backend in ("auto", "transformers"))
    assert ours.damage.kl_mean > 100 * EXACT
    assert_same_figures(theirs.damage, ours.damage)
    assert (ours.backend, theirs.backend) == ("quantkit", "transformers")
    assert ours.kind == theirs.kind == "compressed-tensors"
    assert ours.bits_per_weight == theirs.bits_per_weight < 10


def write_stablelm(folder, seed=0):
    """An architecture that our runtime does not have."""
    torch.manual_seed(0)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    config = StableLmConfig(
        **{name: CONFIG[name] for name in (*names, "num_key_value_heads", "max_position_embeddings")}
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if seed:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_an_architecture_that_is_not_ours_runs_through_transformers(world):
    models = [
        AutoModelForCausalLM.from_pretrained(write_stablelm(world / name, seed)).eval()
        for name, seed in (("stable", 0), ("stable-moved", 1))
    ]
    report = run(world, "stable-moved", "bnb:int8", reference="stable")
    moved, int8 = report.candidates
    kl, ppl = figures_by_hand(world, *models)
    assert moved.damage.kl_mean == pytest.approx(kl, rel=1e-3) and moved.damage.ppl == pytest.approx(
        ppl, rel=1e-5
    )
    assert (moved.backend, moved.kind, moved.bits_per_weight) == ("transformers", "32-bit", 32.0)
    assert int8.damage.kl_mean > 0 and int8.bits_per_weight < 10
    assert "stable runs through transformers, since here" in report.notes[0]
    assert "stable-moved runs through transformers" in report.notes[1]
    with pytest.raises(UnsupportedModelError, match="no model_type 'stablelm'"):
        run(world, "stable-moved", reference="stable", backend="quantkit")


def test_bitsandbytes_makes_its_candidates_from_the_reference(world):
    report = run(world, "bnb:nf4", "bnb:int8", "moved")
    nf4, int8, _ = report.candidates
    assert report.passed and int8.damage.kl_mean < nf4.damage.kl_mean
    original = AutoModelForCausalLM.from_pretrained(world / "original", dtype=torch.float32).eval()
    for candidate, settings in zip((nf4, int8), SETTINGS.values(), strict=True):
        model = AutoModelForCausalLM.from_pretrained(
            world / "original",
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32),
        )
        kl, ppl = figures_by_hand(world, original, model.eval())
        assert candidate.damage.kl_mean == pytest.approx(kl, rel=1e-3)
        assert candidate.damage.ppl == pytest.approx(ppl, rel=1e-5)
        assert candidate.bits_per_weight == 8 * stored_bytes(model) / NUM_WEIGHTS
        assert candidate.bytes == report.reference.bytes - 2 * NUM_WEIGHTS + stored_bytes(model)
        assert candidate.backend == candidate.kernels == "bitsandbytes"
    assert (nf4.kind, int8.kind) == ("bnb:nf4", "bnb:int8")
    assert "float16" in report.notes[1]


def stored_bytes(model):
    """Of the codes and scales of the layers' linears, as bitsandbytes would save them."""
    total = 0
    for name, tensor in model.model.layers.state_dict().items():
        if name.endswith(("proj.weight", ".absmax", ".SCB")):
            total += tensor.nbytes
    return total


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptq_and_awq_have_the_figures_of_the_weights_they_stand_for(world, method):
    folder = write_packed_llama(world / method, method, {"sym": False})
    plain = {name: tensor.half().float() for name, tensor in tiny_tensors().items()}
    plain |= {f"{module}.weight": weight.float() for module, weight in folder.weights.items()}
    write_tiny_llama(world / f"{method}-plain", plain, dtype="float32")
    report = run(world, method, f"{method}-plain", "moved")
    packed, dequantized, _ = report.candidates
    assert packed.damage == dequantized.damage and packed.damage.kl_mean > 100 * EXACT
    assert (packed.kind, packed.backend) == (method.upper(), "quantkit")
    assert "are dequantized" in report.notes[0] and len(report.notes) == 1
    stored = load_file(folder.path / "model.safetensors")
    in_linears = sum(tensor.nbytes for name, tensor in stored.items() if "_proj" in name)
    assert packed.bits_per_weight == 8 * in_linears / NUM_WEIGHTS
    assert packed.bytes == sum(tensor.nbytes for tensor in stored.values())


def test_a_gguf_file_is_as_large_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text("hello world hello words\n\n" * 100)
    report = run(tmp_path, "tiny.gguf", "bnb:nf4", reference="tiny.gguf")
    gguf = report.candidates[0]
    assert (gguf.kind, gguf.backend) == ("GGUF", "quantkit") and gguf.damage.kl_mean < EXACT
    assert gguf.bits_per_weight == 8.5  # Q8_0: 32 codes of 8 bits and a scale of 16
    assert gguf.bytes < (tmp_path / "tiny.gguf").stat().st_size
    assert any("converted to bf16" in note for note in report.notes)


def test_a_format_that_is_not_ours_runs_through_transformers(world):
    """DeepSeek's FP8, by blocks; on a CPU transformers dequantizes it, and the report says so."""
    folder = world / "fp8"
    shutil.copytree(world / "original", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        scale = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": section}))
    report = run(world, "fp8", "moved")
    fp8 = report.candidates[0]
    assert (fp8.kind, fp8.backend) == ("fp8", "transformers")
    assert 100 * EXACT < fp8.damage.kl_mean < 0.1
    assert 8 < fp8.bits_per_weight < 8.1
    assert "since here config.json: quantization_config has quant_method 'fp8'" in report.notes[0]
    assert "dequantizes" in report.notes[1]


def test_no_model_stays_in_memory_after_its_turn(world):
    alive, most = weakref.WeakSet(), []

    def load(subject, serving):
        model = load_subject(subject, serving)  # has collected what is left of the one before
        most.append(len(alive))
        alive.add(model.model if subject.backend != "quantkit" else model)
        return model

    run(world, "moved", "bnb:nf4", "bnb:int8", load=load)
    run(world, "moved", "bnb:nf4", backend="transformers", load=load)
    assert len(most) >= 5 and not any(most)  # and the original, unless its predictions are kept


def test_what_a_backend_cannot_do_is_refused(world):
    with pytest.raises(SchemeError, match="no KV cache in int8"):
        run(world, "bnb:nf4", kv_cache_dtype="int8")
    folder = write_packed_llama(world / "quantized", "awq", {}).path
    with pytest.raises(EvaluationError, match="is quantized itself"):
        run(world, "bnb:nf4", reference=folder.name)
    with pytest.raises(SourceError, match="which transformers cannot run here"):  # without GPTQModel
        run(world, folder.name, backend="transformers")


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"), "transformers does not find"),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.zeros(3)}),
            "transformers has no place for model.layers.0.mlp.extra.weight",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            "cannot be run by transformers",
        ),
    ],
)
def test_what_transformers_passes_over_is_refused(world, tmp_path, change, finding):
    tensors = tiny_tensors()
    change(tensors)
    write_tiny_llama(tmp_path / "changed", tensors)
    with pytest.raises((SourceError, EvaluationError), match=finding):
        run(world, tmp_path / "changed", backend="transformers")


def test_a_failure_within_transformers_is_no_traceback(world, monkeypatch):
    def fail(self, **inputs):
        raise RuntimeError("out of something\nand more")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", fail)
    report = run(world, "bnb:nf4", "moved")
    assert report.candidates[0].failure.endswith(
        "cannot be run by transformers: RuntimeError, out of something"
    )
    assert report.candidates[1].failure is None


def test_the_reference_is_kept_apart_for_each_backend(world):
    """Or else one backend's logits would be taken for the other's."""
    loaded = []

    def load(subject, serving):
        loaded.append((subject.name, subject.backend, serving.dtype_name))
        return load_subject(subject, serving)

    original = str(world / "original")
    for backend in ("quantkit", "transformers", "transformers"):
        run(world, "moved", backend=backend, dtype="float16", load=load)
    firsts = [(backend, dtype) for name, backend, dtype in loaded if name == original]
    assert len(firsts) == len(set(firsts)) and ("transformers", "float16") in firsts


def test_a_packed_candidate_has_the_map_of_the_weights_it_stands_for(world):
    folder = write_packed_llama(world / "mapped", "awq", {"sym": False})
    plain = {name: tensor.half().float() for name, tensor in tiny_tensors().items()}
    plain |= {f"{module}.weight": weight.float() for module, weight in folder.weights.items()}
    write_tiny_llama(world / "mapped-plain", plain, dtype="float32")
    packed, dequantized = run(world, "mapped", "mapped-plain", where=True).candidates
    linears = [one for one in packed.where.linears if one.kind.endswith("_proj")]
    assert {one.linear for one in linears} == folder.weights.keys()
    assert packed.where == dequantized.where


def test_other_backends_write_examples_and_have_no_map(world):
    report = run(world, "moved", "bnb:nf4", where=True, examples=2)
    ours, nf4 = report.candidates
    assert ours.where is not None and nf4.where is None
    assert "bnb:nf4 has no map: bnb:nf4 runs through bitsandbytes" in report.notes
    assert len(ours.worst) == len(nf4.worst) == 2
    through_transformers = run(world, "moved", backend="transformers", examples=2).candidates[0]
    assert through_transformers.worst[0].context == ours.worst[0].context
    assert [one.candidate for one in through_transformers.worst] == [one.candidate for one in ours.worst]
    assert [one.reference for one in through_transformers.worst] == [one.reference for one in ours.worst]
