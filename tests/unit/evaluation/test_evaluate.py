"""An evaluation from end to end, with models that are tables: what is loaded when, kept, recomputed, refused."""

import json
import re
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import (
    EvaluationError,
    GenerationError,
    SchemeError,
    SourceError,
    TextError,
    UnsupportedModelError,
)
from quantkit.evaluation import Gates, evaluate
from quantkit.evaluation.cache import TensorCache
from quantkit.evaluation.serving import Serving
from tests.tiny_llama import CONFIG, VOCAB_SIZE, write_tiny_llama, write_tokenizer

WINDOWS, LENGTH = 4, 16
TABLE = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3


class TableModel:
    """Logits looked up by the last token, disturbed, in two parts; counts its windows and its logits still held."""

    def __init__(self, disturb, log):
        self.disturb = disturb
        self.log = log

    def predictions(self, texts, *, step_tokens):
        for token_ids_T in texts:
            self.log.passes += 1
            yield self.parts(self.disturb(TABLE[token_ids_T].clone()))

    def parts(self, logits_TV):
        for part_RV in logits_TV.clone().split(9):
            self.log.held = max(self.log.held, len(self.log.logits))
            part_RV = part_RV.clone()
            self.log.logits.add(part_RV)
            yield part_RV


class TableLoader:
    """Loads TableModels by folder name; remembers what was loaded and how many models were alive at once."""

    def __init__(self, **disturbances):
        self.disturbances = disturbances
        self.loads = []
        self.alive = weakref.WeakSet()
        self.logits = weakref.WeakSet()
        self.most_alive = self.held = self.passes = 0

    def __call__(self, subject, serving):
        name, dtype = subject.checkpoint.path.name, serving.target.dtype
        self.loads.append((name, dtype, serving.kv_cache_dtype))
        disturb = self.disturbances.get(name, lambda logits_TV: logits_TV)
        if dtype != torch.float32:
            disturb = lambda logits_TV: logits_TV.to(dtype)  # noqa: E731
        model = TableModel(disturb, self)
        self.alive.add(model)
        self.most_alive = max(self.most_alive, len(self.alive))
        return model


class Diary:
    def __init__(self):
        self.lines, self.steps = [], []

    def say(self, line):
        self.lines.append(line)

    def step(self, label, done, total):
        self.steps.append((done, total))


def noisy(amount):
    noise = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * amount
    return lambda logits_TV: logits_TV + noise


def poisoned(logits_TV):
    logits_TV[3, 7] = float("nan")
    return logits_TV


@pytest.fixture
def world(tmp_path):
    """Folders `original`, `small` and `large`, a text, a cache, and `run(...)` over them."""
    for name in ("original", "small", "large"):
        write_tiny_llama(tmp_path / name)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. Why?\n\n" * 30)

    class World:
        path = tmp_path
        cache = TensorCache(tmp_path / "cache", free_bytes=0)
        loader = TableLoader(small=noisy(0.05), large=noisy(0.5))

        def run(self, *candidates, **options):
            options = {
                "data": str(tmp_path / "text.txt"),
                "windows": WINDOWS,
                "length": LENGTH,
                "device": "cpu",
                "load": self.loader,
                "cache": self.cache,
            } | options
            return evaluate(tmp_path / "original", [tmp_path / name for name in candidates], **options)

    return World()


def figures(report):
    return report.to_json() | {"notes": []}


def test_more_damage_is_measured_as_more(world):
    report = world.run("small", "large")
    small, large = (candidate.damage for candidate in report.candidates)
    assert 1e-4 < small.kl_mean < large.kl_mean / 10
    assert large.top1 < small.top1 <= 1
    assert report.reference.kl_noise_floor > 0 and report.reference.dtype == "bfloat16"
    assert report.candidates[0].bits_per_weight == 16.0
    assert report.passed and report.notes == ()
    assert report.data.windows == WINDOWS and report.data.tokens > WINDOWS * LENGTH


def test_the_original_has_no_damage_to_itself(world):
    (candidate,) = world.run("original").candidates
    assert candidate.damage.kl_mean < 4.7e-8
    assert candidate.damage.ppl_increase == pytest.approx(0, abs=1e-9) and candidate.damage.top1 == 1


def test_one_model_and_one_window_of_logits_at_a_time(world):
    (world.path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. Why?\n\n" * 300)
    world.run("small", "large", windows=40)
    assert world.loader.loads == [
        ("original", torch.float32, "auto"),
        ("original", torch.bfloat16, "auto"),
        ("small", torch.float32, "auto"),
        ("large", torch.float32, "auto"),
    ]
    assert world.loader.most_alive == 1
    assert world.loader.held <= 1  # the part before, until the next has been made


def test_second_run_takes_the_reference_from_disk_with_the_same_figures(world):
    first = world.run("small")
    assert world.loader.passes == 3 * WINDOWS
    second = world.run("small")
    assert world.loader.passes == 4 * WINDOWS
    assert [name for name, *_ in world.loader.loads[2:]] == ["small", "small"]
    assert figures(first) == figures(second)


def test_interrupted_run_continues(world):
    undisturbed = figures(world.run("small", cache=TensorCache(world.path / "other", free_bytes=0)))

    def break_at(count):
        def load(subject, serving):
            model = world.loader(subject, serving)
            parts = model.parts

            def interrupted(logits_TV):
                if world.loader.passes > count:
                    raise KeyboardInterrupt
                return parts(logits_TV)

            model.parts = interrupted
            return model

        return load

    world.loader.passes = 0
    with pytest.raises(KeyboardInterrupt):
        world.run("small", load=break_at(3))
    diary = Diary()
    world.loader.passes = 0
    assert figures(world.run("small", listener=diary)) == undisturbed
    assert world.loader.passes == 3 * WINDOWS - 3
    assert diary.steps[-1] == (3 * WINDOWS - 3, 3 * WINDOWS - 3)


def test_progress_counts_what_has_to_be_run(world):
    diary = Diary()
    world.run("small", "large", listener=diary)
    assert diary.steps == [(done, 4 * WINDOWS) for done in range(1, 4 * WINDOWS + 1)]


def test_other_text_model_or_length_is_not_taken_for_the_cached(world):
    world.run("small")
    passes = world.loader.passes
    world.run("small", length=LENGTH + 1)
    assert world.loader.passes == passes + 3 * WINDOWS
    tensors = load_file(world.path / "original" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, world.path / "original" / "model.safetensors")
    world.run("small")
    assert world.loader.passes == passes + 6 * WINDOWS


def test_damaged_cache_is_recomputed_and_said(world):
    expected = figures(world.run("small"))
    entries = sorted(world.cache.folder.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(entries[-1].read_bytes())
    content[-500] ^= 0x10
    entries[-1].write_bytes(content)
    diary = Diary()
    passes = world.loader.passes
    report = world.run("small", listener=diary)
    assert world.loader.passes == passes + WINDOWS + 1
    assert figures(report) == expected
    assert len(report.notes) == 1 and entries[-1].name in report.notes[0]
    assert "computing them again" in diary.lines[0]
    assert diary.steps[-1][0] == diary.steps[-1][1]


@pytest.mark.parametrize("kept", [0, 2])
def test_a_full_cache_is_said_and_changes_no_figure(world, kept):
    expected = figures(world.run("small", "large"))
    entry_bytes = max(file.stat().st_size for file in world.cache.folder.iterdir())
    full = TensorCache(world.path / "full", limit_bytes=kept * entry_bytes, free_bytes=0)
    world.loader.most_alive = 0
    report = world.run("small", "large", cache=full)
    assert figures(report) == expected
    assert len(report.notes) == 1 and "going on without" in report.notes[0]
    assert world.loader.most_alive == 2


def test_nan_of_one_candidate_does_not_stop_the_others(world):
    world.loader.disturbances["small"] = poisoned
    report = world.run("small", "large", gates=Gates(max_kl=100))
    broken, fine = report.candidates
    assert broken.failure == "produces NaN logits at position 3 of window 0" and broken.damage is None
    assert fine.damage is not None
    assert not report.passed and [gate.passed for gate in report.gates] == [False, True]
    assert "small produces NaN" in report.notes[0]
    row = report.to_json()["candidates"][0]
    assert row["kl_mean"] is None and row["failure"] == broken.failure
    json.dumps(report.to_json(), allow_nan=False)


def test_nan_without_any_gate_does_not_pass_either(world):
    world.loader.disturbances["small"] = poisoned
    assert not world.run("small").passed


def test_nan_of_the_reference_is_refused(world):
    world.loader.disturbances["original"] = poisoned
    with pytest.raises(EvaluationError, match="the reference produces NaN logits at position 3"):
        world.run("small")


def test_a_float32_original_has_no_noise_floor(world):
    write_tiny_llama(world.path / "original", dtype="float32")
    report = world.run("small")
    assert report.reference.kl_noise_floor == 0.0 and report.reference.dtype == "float32"
    assert world.loader.passes == 2 * WINDOWS


def test_candidates_are_run_as_asked_and_the_noise_floor_is_of_that_dtype(world):
    report = world.run("small", dtype="float16", kv_cache_dtype="int8")
    assert world.loader.loads == [
        ("original", torch.float32, "auto"),
        ("original", torch.float16, "auto"),
        ("small", torch.float16, "int8"),
    ]
    plain = world.run("small")
    assert report.reference.kl_noise_floor < plain.reference.kl_noise_floor / 4  # 11 bits, 8 bits
    assert [name for name, *_ in world.loader.loads[3:]] == ["original", "small"]  # the float32 ones are kept
    row = report.to_json()
    assert (row["device"], row["kv_cache_dtype"]) == ("cpu", "int8")
    assert (row["candidates"][0]["dtype"], row["candidates"][0]["kernels"]) == ("float16", "torch")
    assert (row["reference"]["dtype"], plain.candidates[0].dtype) == ("float16", "float32")


def test_what_a_gpu_computed_is_not_taken_for_what_the_cpu_would(world, monkeypatch):
    world.run("small")
    passes = world.loader.passes
    monkeypatch.setattr(Serving, "device_name", "a GPU")
    world.run("small")
    assert world.loader.passes == passes + 3 * WINDOWS


def rewrite_config(folder, **keys):
    (folder / "config.json").write_text(json.dumps(CONFIG | keys))


def test_vocabulary_mismatch_names_both(world):
    rewrite_config(world.path / "small", vocab_size=VOCAB_SIZE + 8)
    with pytest.raises(
        EvaluationError, match=rf"original has .* {VOCAB_SIZE} .*small one of {VOCAB_SIZE + 8}"
    ):
        world.run("small")
    assert world.loader.loads == []


def test_other_merges_of_the_tokenizer_are_refused(world):
    write_tokenizer(world.path / "small", vocab_size=280)  # the same ids, but fewer merges
    with pytest.raises(
        EvaluationError, match=r"original and .*small differ: they split the same text differently"
    ):
        world.run("small")


def test_other_ids_of_the_tokenizer_are_refused(world):
    file = world.path / "small" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["~"], vocabulary["}"] = vocabulary["}"], vocabulary["~"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(EvaluationError, match="differ: token"):
        world.run("small")


@pytest.mark.parametrize(
    ("options", "kind", "finding"),
    [
        ({"windows": 0}, EvaluationError, "--windows 0"),
        ({"windows": -3}, EvaluationError, "--windows -3"),
        ({"length": 1}, EvaluationError, "--length 1"),
        ({"tasks": ["probe_cloze"], "limit": 0}, EvaluationError, "--limit 0: out of range"),
        ({"tasks": "probe_clozure"}, EvaluationError, "probe_clozure"),
        ({"backend": "hf"}, EvaluationError, "--backend hf: there is none"),
        ({"length": 129}, EvaluationError, "--length 129: .*original has 128 positions"),
        ({"device": "cuda:99"}, GenerationError, "'cuda:99' is not here"),
        ({"dtype": "int8"}, GenerationError, "dtype 'int8'"),
        ({"kv_cache_dtype": "bf16"}, SchemeError, "bf16 for a model that computes in fp32"),
        ({"windows": 10_000}, TextError, "10000 windows of 16 need 160000"),
        ({"data": "nowhere.txt"}, TextError, "nowhere.txt: no such file"),
    ],
)
def test_impossible_requests_load_no_model(world, options, kind, finding):
    for candidates in (("small",), ("small", "large")):
        with pytest.raises(kind, match=finding):
            world.run(*candidates, **options)
    assert world.loader.loads == []


def test_no_candidate_is_refused(world):
    with pytest.raises(EvaluationError, match="no candidate"):
        world.run()


def test_a_candidate_that_cannot_be_run_is_refused_before_the_reference_is(world):
    rewrite_config(world.path / "small", model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="mamba"):
        world.run("small", backend="quantkit")
    rewrite_config(world.path / "small", model_type="mammoth", architectures=["MammothForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="mammoth"):
        world.run("small")
    write_tiny_llama(world.path / "small", quantization_config={"quant_method": "gptq"})
    with pytest.raises(SourceError, match="quantization_config: group_size None"):
        world.run("small")
    assert world.loader.loads == []


def test_a_candidate_without_tokenizer_is_refused(world):
    (world.path / "small" / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=re.escape(str(world.path / "small"))):
        world.run("small")


def test_a_candidate_named_twice_is_run_once(world):
    report = world.run("small", "small", "large", gates=Gates(max_kl=100))
    assert [(world.path / name).name for name in (one.path for one in report.candidates)] == [
        "small",
        "large",
    ]
    assert len(report.gates) == 2 and len(world.loader.loads) == 4


def test_one_candidate_needs_no_list(world):
    options = {"data": str(world.path / "text.txt"), "windows": 1, "length": LENGTH, "device": "cpu"}
    small = world.path / "small"
    for name in (small, str(small)):
        report = evaluate(world.path / "original", name, load=world.loader, cache=world.cache, **options)
        assert [one.path for one in report.candidates] == [str(small)]
