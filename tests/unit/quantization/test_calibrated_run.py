"""Runs with data: the same bytes however often they die, refusals, and what they say about themselves."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from quantkit.calibration import layer_learning, tune
from quantkit.calibration.tokens import calibration_tokens
from quantkit.errors import CalibrationError, OutputError, RecipeError, SourceError, UnsupportedModelError
from quantkit.formats.folder import FolderState, folder_state
from quantkit.formats.stage import STAGE_NAME
from quantkit.quantization import dry_run, quantize_checkpoint
from quantkit.quantization.calibrated import choose_device
from quantkit.quantization.progress import Step
from quantkit.recipe import load_recipe
from quantkit.verify import verify_checkpoint
from tests.tiny_families import save_family
from tests.tiny_llama import VOCAB_SIZE, byte_level_tokenizer, tiny_tensors, write_tiny_llama, write_tokenizer

SMALL = ("calibration.samples=4", "calibration.length=16")
EVERYTHING = (
    *SMALL,
    "algorithm=[rotate,smoothquant,weight_correction,gptq,bias_correction,tune]",
    "tune.epochs=1",
    "tune.batch=2",
)
LEARNING = (*SMALL, "algorithm=[signround,bias_correction]")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def fast_tuning(monkeypatch):
    """Tuning whose every step shows in the bytes, and is kept."""
    monkeypatch.setattr(tune, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(tune, "WARM_UP_STEPS", 1)
    for rate in ("SCALE_RATE", "NORM_RATE", "CODE_RATE"):
        monkeypatch.setattr(tune, rate, 0.1)


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Forty sentences, of which no two windows are alike."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"The {word} fox jumps over {word} dogs." for word in map(str, range(40))))
    return str(file)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Llama with biases that can be corrected."""
    biases = {
        f"model.layers.{n}.self_attn.{p}_proj.bias": 16 if p != "q" else 32 for n in (0, 1) for p in "qkv"
    }
    tensors = tiny_tensors() | {name: torch.ones(size).bfloat16() for name, size in biases.items()}
    tensors |= {f"model.layers.{n}.self_attn.o_proj.bias": torch.zeros(32).bfloat16() for n in (0, 1)}
    return write_tiny_llama(tmp_path_factory.mktemp("source") / "model", tensors, attention_bias=True)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a result but the log, which has dates and seconds."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "quantkit.log.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def quantize(source: Path, folder: Path, text: str | None, *settings: str, **options: object) -> list[Step]:
    """One run to INT4; returns what it told."""
    told: list[Step] = []
    recipe = load_recipe("int4-all", settings or SMALL)
    quantize_checkpoint(source, recipe, folder, calib=text, on_step=told.append, **options)
    return told


def test_what_it_says_of_itself(source, tmp_path, text):
    out = tmp_path / "out"
    told = quantize(source, out, text)
    plan = json.loads((out / "quantkit.json").read_text())
    tokens = calibration_tokens(source, text, 4, 16)
    assert plan["calibration"]["tokens_sha256"] == tokens.hash
    assert (plan["calibration"]["samples"], plan["calibration"]["length"]) == (4, 16)
    assert plan["observed"] == {"excluded_rows": {}, "experts": {}}
    note = plan["linears"][Q]
    assert note["algorithm"] == "gptq" and note["scales"] == "importance"
    assert 0 < note["loss"] < note["loss_rtn"]
    assert 10 < note["sqnr_db"] < 30
    log = json.loads((out / "quantkit.log.json").read_text())
    assert log["seconds_of_calibration"]["linears"].keys() == plan["linears"].keys()
    assert log["seconds_of_calibration"]["parts"].keys() == {"00000", "00001"}
    assert log["peak_device_bytes"] is None
    assert not (out / STAGE_NAME).exists()
    assert verify_checkpoint(out).findings == ()

    calibrating = [step for step in told if step.phase == "calibrating"]
    assert {step.name for step in calibrating} == {f"{name}.weight" for name in plan["linears"]}
    assert calibrating[-1].done_bytes == calibrating[-1].total_bytes
    writing = [step for step in told if step.phase == "writing"]
    assert writing[-1].done_bytes == writing[-1].total_bytes
    assert all(step.linear is None for step in writing), "each linear is told of once"


def test_the_same_run_gives_the_same_bytes_and_other_text_others(source, tmp_path, text):
    quantize(source, tmp_path / "a", text)
    quantize(source, tmp_path / "b", text)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    other = tmp_path / "other.txt"
    other.write_text("Why would 3 dogs mind?\n\n" * 40)
    quantize(source, tmp_path / "c", str(other))
    weights = [content(tmp_path / name)["model.safetensors"] for name in "ac"]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("operation", ["os.fsync", "os.pwrite", "pathlib.Path.replace"])
@pytest.mark.parametrize("settings", [EVERYTHING, LEARNING], ids=["everything", "learning"])
def test_killed_before_any_step_it_continues_to_the_same_bytes(
    source, tmp_path, text, monkeypatch, fast_tuning, operation, settings
):
    """Every call of one kind dies once, on what the one before left; then the run is continued and compared."""
    monkeypatch.setattr(layer_learning, "STEPS", 10)
    quantize(source, tmp_path / "undisturbed", text, *settings)
    expected = content(tmp_path / "undisturbed")
    module_name, _, rest = operation.partition(".")
    owner = importlib.import_module(module_name)
    *path, name = rest.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    out, step, is_done = tmp_path / "out", 0, False
    while not is_done:
        calls = iter(range(10_000))

        def dying(*arguments, _calls=calls, _step=step, **options):
            if next(_calls) == _step:
                raise Killed
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            try:
                quantize(source, out, text, *settings)
                is_done = True
            except Killed:
                step += 1
        if is_done or step % 2:
            quantize(source, out, text, *settings)
            assert content(out) == expected
            quantize_started_again(source, out, text)
    assert step > 3


def test_tuning_goes_on_as_long_as_was_planned_whatever_the_machine_has_become(
    source, tmp_path, text, monkeypatch, fast_tuning
):
    settings = (*EVERYTHING, "tune.epochs=4", "budget_minutes=100")
    quantize(source, tmp_path / "undisturbed", text, *settings)
    learn, steps = tune.TuneRun.learn, iter(range(100))

    def dying(run):
        if next(steps) == 3:
            raise Killed
        return learn(run)

    with monkeypatch.context() as patch:
        patch.setattr(tune.TuneRun, "learn", dying)
        with pytest.raises(Killed):
            quantize(source, tmp_path / "out", text, *settings)
    monkeypatch.setattr(tune, "FLOPS", {"cpu": 1e-3})  # by which a step is all that 100 minutes allow
    quantize(source, tmp_path / "out", text, *settings)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def quantize_started_again(source: Path, out: Path, text: str) -> None:
    """Another plan in the same folder, so that the next run starts from nothing."""
    import shutil

    with pytest.raises(OutputError, match="another plan"):
        quantize(source, out, text)
    shutil.rmtree(out)


def interrupted(source: Path, out: Path, text: str, *settings: str) -> None:
    """A run that stops in the second layer."""

    def stop(step: Step) -> None:
        if step.name.startswith("model.layers.1"):
            raise Killed

    with pytest.raises(Killed):
        quantize_checkpoint(source, load_recipe("int4-all", settings or SMALL), out, calib=text, on_step=stop)
    assert folder_state(out) is FolderState.UNFINISHED
    assert [file.name for file in (out / STAGE_NAME).iterdir()] == ["00000.safetensors"]


def test_a_finished_layer_is_not_observed_again(source, tmp_path, text):
    out = tmp_path / "out"
    interrupted(source, out, text)
    told = quantize(source, out, text)
    calibrated = [step for step in told if step.phase == "calibrating"]
    assert all(step.name.startswith("model.layers.1.") for step in calibrated)
    assert calibrated[-1].done_bytes == calibrated[-1].total_bytes
    quantize(source, tmp_path / "undisturbed", text)
    assert content(out) == content(tmp_path / "undisturbed")


def test_an_unfinished_run_of_another_plan_or_text_is_refused(source, tmp_path, text):
    out = tmp_path / "out"
    interrupted(source, out, text)
    before = content(out)
    other = tmp_path / "other.txt"
    other.write_text("Why would 3 dogs mind?\n\n" * 40)
    for calib, settings in ((str(other), SMALL), (text, ("calibration.samples=3", SMALL[1]))):
        with pytest.raises(OutputError, match="another plan"):
            quantize(source, out, calib, *settings)
    with pytest.raises(OutputError, match="another plan"):
        quantize(source, out, None, "algorithm=rtn")
    assert content(out) == before
    quantize(source, out, str(other), overwrite=True)
    assert folder_state(out) is FolderState.FINISHED
    with pytest.raises(OutputError, match="finished run of another plan"):
        quantize(source, out, text)


def test_a_finished_run_is_left_alone(source, tmp_path, text):
    out = tmp_path / "out"
    quantize(source, out, text)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    report = quantize_checkpoint(source, load_recipe("int4-all", SMALL), out, calib=text)
    assert report.was_finished
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_what_is_not_finite_leaves_nothing(tmp_path, text, name, value):
    tensors = tiny_tensors()
    tensors[name].view(-1)[:] = value
    broken = write_tiny_llama(tmp_path / "broken", tensors)
    with pytest.raises((SourceError, CalibrationError)):
        quantize(broken, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_text_where_nothing_uses_it_is_refused(source, tmp_path, text):
    with pytest.raises(RecipeError, match="has no effect") as caught:
        quantize_checkpoint(source, load_recipe("int4-rtn"), tmp_path / "out", calib=text)
    assert "algorithm=gptq" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_text_makes_rounding_to_nearest_weigh_its_errors(source, tmp_path, text):
    quantize(source, tmp_path / "with", text, *SMALL, "algorithm=rtn")
    quantize(source, tmp_path / "without", None, *SMALL, "algorithm=rtn")
    plans = [json.loads((tmp_path / name / "quantkit.json").read_text()) for name in ("with", "without")]
    assert [plan["linears"][Q]["scales"] for plan in plans] == ["importance", "mse"]
    assert plans[1]["calibration"] is None and "observed" not in plans[1]


@pytest.mark.parametrize("setting", ["scales=importance", "algorithm=rotate"])
def test_what_layers_have_to_be_run_for_needs_no_word_about_text(source, tmp_path, setting):
    told: list[str] = []
    recipe = load_recipe("int8-all", (setting, *SMALL))
    quantize_checkpoint(source, recipe, tmp_path / "out", announce=told.append)
    assert told[-1] == "calibrating on 4 x 16 tokens of docs"


def test_a_family_nobody_knows_is_refused_before_anything_is_written(tmp_path, text):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.StableLmConfig(**sizes, num_hidden_layers=1, vocab_size=320)
    transformers.utils.logging.disable_progress_bar()
    source = write_tiny_llama(tmp_path / "model")
    (source / "model.safetensors").unlink()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
    with pytest.raises(UnsupportedModelError, match="nothing is known about the layers of stablelm"):
        quantize(source, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedModelError, match="nothing is known"):
        dry_run(source, load_recipe("int4-all", SMALL), calib=text)
    quantize(source, tmp_path / "out", None, "algorithm=rtn")


def test_a_layer_that_learned_is_nearer_to_the_original(source, tmp_path, text):
    quantize(source, tmp_path / "learned", text, *SMALL, "algorithm=signround")
    quantize(source, tmp_path / "rounded", text, *SMALL, "algorithm=rtn")
    assert verify_checkpoint(tmp_path / "learned").findings == ()
    learned, rounded = (
        json.loads((tmp_path / name / "quantkit.json").read_text()) for name in ("learned", "rounded")
    )
    for name, note in learned["linears"].items():
        assert note["algorithm"] == "signround"
        assert 0.01 < note["learned_codes"] < 0.5
        if ".layers.0." in name:  # further on, other inputs arrive
            assert note["loss"] != note["loss_rtn"] == rounded["linears"][name]["loss_rtn"]
    for part in ("00000", "00001"):
        said = learned["observed"]["signround"][part]
        assert (said["samples"], said["samples_excluded"]) == (4, 0)
        assert said["loss"] < 0.7 * said["loss_start"]
    assert "signround" not in rounded["observed"]


def test_learning_follows_from_the_seed(source, tmp_path, text, monkeypatch):
    monkeypatch.setattr(layer_learning, "STEPS", 20)
    monkeypatch.setattr(layer_learning, "BATCH", 2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(source, tmp_path / name, text, *SMALL, "algorithm=signround", f"seed={seed}")
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]


@pytest.mark.parametrize(
    "settings",
    [
        ("weights=fp8",),
        ("overrides=[{match: '*.down_proj', weights: fp8}]",),
        ("attention=8bit", "activations=fp8"),
    ],
)
def test_weights_in_fp8_do_not_learn(settings):
    with pytest.raises(RecipeError, match="signround learns integer codes"):
        load_recipe("int4-all", ("algorithm=signround", *settings))


# 3: one to smooth, the original alongside; 5: the original, to measure, to advance
PASSES = {SMALL: 1, EVERYTHING: 3, LEARNING: 5}


@pytest.mark.parametrize("settings", [SMALL, EVERYTHING, LEARNING])
def test_the_dry_run_says_what_calibrating_takes(source, tmp_path, text, settings):
    plan = dry_run(source, load_recipe("int4-all", settings), calib=text)
    cost = plan.calibration
    assert cost is not None
    assert (cost.text, cost.samples, cost.length, cost.passes) == (text, 4, 16, PASSES[settings])
    assert cost.tokens_sha256 == calibration_tokens(source, text, 4, 16).hash
    assert cost.holds_model == (("tune",) if settings == EVERYTHING else ())
    assert 0 < cost.seconds < plan.seconds < 600
    assert cost.device_peak_bytes is None and 0 < cost.peak_bytes < plan.peak_bytes
    json.dumps(plan.as_dict())
    without = dry_run(source, load_recipe("int4-all", ("algorithm=rtn",)))
    assert without.calibration is None
    assert without.after_bytes == plan.after_bytes


def test_the_dry_run_counts_the_search_of_awq(source, text):
    def seconds(algorithm: str) -> float:
        plan = dry_run(source, load_recipe("int4-all", (*SMALL, f"algorithm={algorithm}")), calib=text)
        assert plan.calibration is not None
        return plan.calibration.seconds

    assert seconds("awq") > 5 * seconds("bias_correction")  # 21 roundings of every weight


def test_room_on_the_disk_is_asked_for_the_stage_too(source, tmp_path, text, monkeypatch):
    quantize(source, tmp_path / "fits", text)
    size = (tmp_path / "fits" / "model.safetensors").stat().st_size
    usage = __import__("shutil").disk_usage(tmp_path)._replace(free=size + 1000)
    monkeypatch.setattr("quantkit.formats.shards.shutil.disk_usage", lambda path: usage)
    quantize(source, tmp_path / "without-data", None, "algorithm=rtn")
    with pytest.raises(OutputError, match="are left there"):
        quantize(source, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_tuning_starts_from_the_model_that_would_be_served(source, tmp_path, text, monkeypatch):
    quantize(source, tmp_path / "untuned", text, *SMALL, "algorithm=[gptq,bias_correction]")
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "untuned", dtype=torch.float32)
    ids_SL = calibration_tokens(source, text, 4, 16).ids_SL
    found: list[torch.Tensor] = []

    def look(run: tune.TuneRun) -> float:
        found.append(run._logits(run._quantized(), ids_SL).detach())
        raise Killed

    monkeypatch.setattr(tune.TuneRun, "learn", look)
    with pytest.raises(Killed):
        quantize(source, tmp_path / "tuned", text, *SMALL, "algorithm=[gptq,bias_correction,tune]")
    with torch.no_grad():
        torch.testing.assert_close(found[0], served(ids_SL).logits, rtol=1e-4, atol=1e-3)


def test_a_batch_in_parts_has_the_gradient_of_the_whole(source, tmp_path, text, monkeypatch):
    seen: list[torch.Tensor] = []

    def look(run: tune.TuneRun) -> float:
        def keep() -> None:
            gradients = [parameter.grad.flatten() for _, parameter in run._parameters()]
            seen.append(torch.cat([run._loss[None], *gradients]).clone())

        run._ids_SL.copy_(run._batch())
        monkeypatch.setattr(run._optimizer, "step", keep)
        for samples in (4, 3, 1):
            monkeypatch.setattr(tune, "SAMPLES_AT_ONCE", {"cpu": samples})
            run._compute_step()
        raise Killed

    monkeypatch.setattr(tune.TuneRun, "learn", look)
    with pytest.raises(Killed):
        quantize(source, tmp_path / "out", text, *SMALL, "algorithm=[gptq,tune]", "tune.batch=4")
    whole, *parts = seen
    assert whole.abs().max() > 0 and len(parts) == 2
    for part in parts:
        assert (part - whole).norm() < 1e-5 * whole.norm()


@pytest.fixture
def overflowing(tmp_path, text) -> tuple[Path, str]:
    """A model, and a text in whose first window it overflows."""
    with_z = tmp_path / "text.txt"
    with_z.write_text("Z" + Path(text).read_text())  # nowhere else
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"][byte_level_tokenizer().encode("Z").ids[0]] = float("inf")
    return write_tiny_llama(tmp_path / "source", tensors), str(with_z)


def test_windows_that_overflow_are_left_out_of_tuning(overflowing, tmp_path):
    source, text = overflowing
    quantize(source, tmp_path / "out", text, *SMALL, "algorithm=[gptq,tune]", "tune.epochs=1", "tune.batch=2")
    plan = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert plan["observed"]["excluded_rows"]["tuned"] == 16
    written = load_file(tmp_path / "out" / "model.safetensors")
    broken = [name for name, tensor in written.items() if not tensor.float().isfinite().all()]
    assert broken == ["model.embed_tokens.weight"]


def test_tuning_a_model_that_overflows_everywhere_leaves_nothing(source, tmp_path, text, monkeypatch):
    monkeypatch.setattr(tune.TuneRun, "_compute_step", lambda run: run._loss.fill_(float("nan")))
    with pytest.raises(CalibrationError, match="overflow"):
        quantize(source, tmp_path / "out", text, *SMALL, "algorithm=[gptq,tune]")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family, settings, expected",
    [
        ("mixtral", ("attention=bf16", "algorithm=weight_correction"), "weight_correction changes nothing"),
        ("mixtral", ("attention=bf16", "algorithm=smoothquant"), "smoothquant changes nothing"),
        ("mistral", ("algorithm=bias_correction",), "bias_correction changes nothing"),
        ("gemma2", ("algorithm=[rotate,gptq]",), "rotate leaves the residual stream"),
    ],
)
def test_an_algorithm_that_finds_nothing_to_do_is_told_of(tmp_path, text, family, settings, expected):
    source = save_family(family, tmp_path / "source", vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    told: list[str] = []
    recipe = load_recipe("int4-all", (*SMALL, *settings))
    dry_run(source, recipe, calib=text, announce=told.append)
    assert any(line.startswith(expected) for line in told), told


def test_what_is_not_done_to_experts_is_noted(tmp_path, text):
    source = save_family("mixtral", tmp_path / "source", vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    quantize(source, tmp_path / "out", text, *SMALL, "algorithm=[weight_correction,gptq]")
    linears = json.loads((tmp_path / "out" / "quantkit.json").read_text())["linears"]
    noted = {note["role"]: note.get("weight_correction") for note in linears.values()}
    assert noted == {"attention": None, "expert": "not done to experts"}


def test_algorithms_for_weights_are_refused_where_all_stay(source, tmp_path, text):
    with pytest.raises(RecipeError, match="algorithm gptq has no effect"):
        quantize_checkpoint(source, load_recipe("kv-int8", ("algorithm=gptq",)), tmp_path / "out", calib=text)
    assert not (tmp_path / "out").exists()


def test_tokens_whose_keys_overflow_are_counted(overflowing, tmp_path):
    source, text = overflowing
    quantize_checkpoint(source, load_recipe("kv-int8", SMALL), tmp_path / "out", calib=text)
    observed = json.loads((tmp_path / "out" / "quantkit.json").read_text())["observed"]
    assert observed["excluded_rows"] == {"00000": 1, "00001": 1}


@pytest.mark.parametrize(
    ("asked", "has_gpu", "found"),
    [(None, True, "cuda"), (None, False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_a_gpu_is_used_if_there_is_one_and_nobody_minds(monkeypatch, asked, has_gpu, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("quantkit.quantization.calibrated.deterministic_cublas", lambda: None)
    assert choose_device(asked).type == found
