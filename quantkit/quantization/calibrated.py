"""The part of a run that uses data: which text, on which device, and the stage it leaves for the writer."""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit.arch.skeleton import language_config
from quantkit.calibration.loop import calibrate
from quantkit.calibration.self_text import NOT_WRITTEN, is_written, self_tokens
from quantkit.calibration.tokens import CalibrationTokens, calibration_tokens
from quantkit.calibration.tune import TUNED, tune
from quantkit.env import deterministic_cublas
from quantkit.errors import CalibrationError, QuantkitError, RecipeError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.safetensors_file import TensorInfo
from quantkit.formats.stage import Stage, layer_part
from quantkit.quantization.progress import Step
from quantkit.recipe import LinearPlan, QuantPlan, Recipe
from quantkit.text import DOCS, SELF

TELL_SECONDS = 10.0


class Staged(NamedTuple):
    """Tensors that calibration has made, by final name, and what there is to say of each linear.

    observed: what the inputs were like, for quantkit.json. seconds: where they went, for quantkit.log.json.
    """

    tensors: Mapping[str, TensorInfo]
    notes: Mapping[str, Any]
    observed: Mapping[str, Any]
    seconds: Mapping[str, Any]


NOTHING = Staged({}, {}, {}, {})  # of a run without data


def calibration_spec(
    recipe: Recipe, calib: str | None, where: str, announce: Callable[[str], None]
) -> str | None:
    """The SPEC of the text to calibrate on; None: no data. Raises RecipeError where it would change nothing."""
    if calib is None and recipe.data_reason:
        return DOCS
    if calib is None:
        if "calibration" in recipe.model_fields_set:
            announce("`calibration` changes nothing here: this recipe uses no text unless --calib names some")
        return None
    if not recipe.can_use_data:
        raise RecipeError(
            f"{where}: --calib {calib} has no effect: nothing in this recipe uses data",
            fix="leave --calib out, or --set scales=importance, or --set algorithm=gptq",
        )
    return calib


def choose_device(name: str | None) -> torch.device:
    """The device to calibrate on; None: a GPU if there is one. Raises QuantkitError if there is none of that name."""
    if name not in {None, "cpu", "cuda"}:
        raise QuantkitError(f"--device {name}: not a device", fix="use --device cpu or --device cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is missing or too old; said below
        has_gpu = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise QuantkitError(
            f"--device cuda: torch {torch.__version__} finds no usable GPU",
            fix="use --device cpu, or install the CUDA build of torch and a driver",
        )
    if has_gpu:
        deterministic_cublas()
    return torch.device("cuda" if has_gpu else "cpu")


def read_tokens(
    checkpoint: Checkpoint, recipe: Recipe, spec: str, device: torch.device, announce: Callable[[str], None]
) -> CalibrationTokens:
    """The calibration tokens of a run; `self` holds the model and may take minutes, the first time.

    Raises CalibrationError if the model has fewer positions than they take, or does not know one of them.
    """
    wanted, length = recipe.calibration, _window_length(checkpoint, recipe)
    if spec == SELF:
        progress = LongWork("self  token", announce)
        tokens = self_tokens(
            checkpoint, wanted.samples, length, seed=recipe.seed, device=device, on_token=progress
        )
    else:
        tokens = calibration_tokens(checkpoint.path, spec, wanted.samples, length)
    _check_ids(checkpoint, tokens)
    count = len(tokens.ids_SL)
    less = (
        f", fewer than the {wanted.samples} asked for: the text has no more" if count < wanted.samples else ""
    )
    place = f", on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    announce(f"calibrating on {count} x {length} tokens of {spec}{less}{place}")
    if tokens.roles is not None:
        announce(f"roles of its conversations: {tokens.roles}")
    return tokens


def _window_length(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Tokens of a window: what the recipe says, and where it says nothing, no more than the model has positions."""
    length, positions = recipe.calibration.length, checkpoint.text_config.get("max_position_embeddings")
    if not isinstance(positions, int) or length <= positions:
        return length
    if "length" not in recipe.calibration.model_fields_set:
        return positions
    raise CalibrationError(
        f"calibration.length {length}: {checkpoint.path} has {positions} positions",
        fix=f"--set calibration.length={positions}, or less",
    )


def _check_ids(checkpoint: Checkpoint, tokens: CalibrationTokens) -> None:
    size, highest = language_config(checkpoint).vocab_size, int(tokens.ids_SL.max())
    if highest >= size:
        raise CalibrationError(
            f"{checkpoint.path}: its tokenizer makes token {highest} of the text, but the model's vocabulary is {size}",
            fix="copy the tokenizer files that belong to this model into the folder",
        )


def expected_tokens(
    checkpoint: Checkpoint, recipe: Recipe, spec: str, device: torch.device, announce: Callable[[str], None]
) -> CalibrationTokens:
    """As `read_tokens`, for a dry run: what the model has yet to write is so many zeros, and has no hash."""
    sizes = recipe.calibration.samples, _window_length(checkpoint, recipe)
    if spec == SELF and not is_written(checkpoint, *sizes, seed=recipe.seed, device=device):
        return CalibrationTokens(torch.zeros(sizes, dtype=torch.int64), SELF, NOT_WRITTEN)
    return read_tokens(checkpoint, recipe, spec, device, announce)


def calibrate_into(
    folder: Path,
    checkpoint: Checkpoint,
    plan: QuantPlan,
    tokens: CalibrationTokens,
    device: torch.device,
    on_step: Callable[[Step], None],
    announce: Callable[[str], None],
) -> Staged:
    """Calibrate every layer that is not staged in the folder yet; returns all that is."""
    stage = Stage(folder)
    sizes = {linear.name: checkpoint.info(f"{linear.name}.weight").num_bytes for linear in plan.quantized}
    total = sum(sizes.values())
    done = sum(sizes[linear.name] for linear in plan.quantized if stage.has(layer_part(linear.layer)))

    def tell(linear: LinearPlan, note: Mapping[str, Any], seconds: float) -> None:
        nonlocal done
        done += sizes[linear.name]
        on_step(Step(f"{linear.name}.weight", "calibrating", done, total, seconds, linear, note))

    calibrate(checkpoint, plan, tokens, stage, device=device, on_linear=tell)
    if "tune" in plan.recipe.algorithms:
        tune(checkpoint, plan, tokens, stage, device=device, on_step=LongWork("tune  step", announce))
    return collect(stage)


class LongWork:
    """Says now and then how far some work is and how long it will take yet; what has a loss, at its end too.

    what: is counted, for example "tune  step".
    """

    def __init__(self, what: str, announce: Callable[[str], None]) -> None:
        self._what = what
        self._announce = announce
        self._first: tuple[int, float] | None = None
        self._told = time.monotonic()
        self._losses: list[float] = []

    def __call__(self, done: int, total: int, loss: float | None = None) -> None:
        """So much is done of the total; the loss is told as the mean since the last line."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        self._losses += [] if loss is None else [loss]
        if now - self._told < TELL_SECONDS and (loss is None or done < total):
            return
        pace = (now - self._first[1]) / max(1, done - self._first[0])
        mean = f"  KL {sum(self._losses) / len(self._losses):.4f}" if self._losses else ""
        self._announce(f"{self._what} {done} of {total}{mean}  {pace * (total - done):.0f} s left")
        self._told, self._losses = now, []


def collect(stage: Stage) -> Staged:
    """Everything staged; what was tuned in its tuned form."""
    tensors: dict[str, TensorInfo] = {}
    notes: dict[str, dict[str, Any]] = defaultdict(dict)
    observed: dict[str, dict[str, Any]] = {"excluded_rows": {}, "experts": {}}
    seconds: dict[str, Any] = {"linears": {}, "parts": {}}
    for part in sorted(stage.parts(), key=lambda part: part == TUNED):  # the tuned form last
        tensors |= stage.infos(part)
        said = stage.notes(part)
        for name, note in said.get("linears", {}).items():
            notes[name] |= note
        if said.get("excluded"):
            observed["excluded_rows"][part] = said["excluded"]
        for kind in ("experts", "signround", "kv_cache"):
            if kind in said:
                observed.setdefault(kind, {})[part] = said[kind]
        seconds["linears"] |= said.get("linear_seconds", {})
        seconds["parts"] |= {part: said["seconds"]} if "seconds" in said else {}
    return Staged(tensors, notes, observed, seconds)
