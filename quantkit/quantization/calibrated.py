"""The part of a run that uses data: which text, on which device, and the stage it leaves for the writer."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit.calibration.loop import calibrate
from quantkit.calibration.tokens import CalibrationTokens, calibration_tokens
from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.safetensors_file import TensorInfo
from quantkit.formats.stage import Stage, layer_part
from quantkit.quantization.progress import Step
from quantkit.recipe import LinearPlan, QuantPlan, Recipe
from quantkit.text import DOCS


class Staged(NamedTuple):
    """Tensors that calibration has made, by final name, and what there is to say of each linear."""

    tensors: Mapping[str, TensorInfo]
    notes: Mapping[str, Any]

    @classmethod
    def nothing(cls) -> "Staged":
        """Of a run without data."""
        return cls({}, {})


def calibration_spec(recipe: Recipe, calib: str | None, where: str) -> str | None:
    """The SPEC of the text to calibrate on; None: no data. Raises RecipeError where text would change nothing."""
    if calib is None:
        return DOCS if recipe.data_reason else None
    if not recipe.can_use_data:
        raise RecipeError(
            f"{where}: --calib {calib} has no effect: nothing in this recipe uses data",
            fix="leave --calib out, or --set scales=importance, or --set algorithm=gptq",
        )
    return calib


def choose_device(name: str) -> torch.device:
    """The device to calibrate on. Raises QuantkitError if there is none of that name."""
    if name not in {"cpu", "cuda"}:
        raise QuantkitError(f"--device {name}: not a device", fix="use --device cpu or --device cuda")
    if name == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a driver that is missing or too old; said below
            is_there = torch.cuda.is_available()
        if not is_there:
            raise QuantkitError(
                f"--device cuda: torch {torch.__version__} finds no usable GPU",
                fix="use --device cpu, or install the CUDA build of torch and a driver",
            )
    return torch.device(name)


def read_tokens(
    source: Path, recipe: Recipe, spec: str, announce: Callable[[str], None]
) -> CalibrationTokens:
    """The calibration tokens of a run."""
    wanted = recipe.calibration
    tokens = calibration_tokens(source, spec, wanted.samples, wanted.length)
    count = len(tokens.ids_SL)
    less = f", fewer than the {wanted.samples} asked for: the text has no more" if count < wanted.samples else ""
    announce(f"calibrating on {count} x {wanted.length} tokens of {spec}{less}")
    return tokens


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
    total = checkpoint.num_bytes
    quantized = [linear for linear in plan.linears if linear.scheme is not None]
    sizes = {linear.name: checkpoint.info(f"{linear.name}.weight").num_bytes for linear in quantized}
    done = 0

    def tell(linear: LinearPlan, note: Mapping[str, Any]) -> None:
        nonlocal done
        done += sizes[linear.name]
        on_step(Step(f"{linear.name}.weight", done, total, linear, note))

    calibrate(checkpoint, plan, tokens, stage, device=device, on_linear=tell)
    return collect(stage)


def collect(stage: Stage) -> Staged:
    """Everything staged."""
    tensors: dict[str, TensorInfo] = {}
    notes: dict[str, Any] = {}
    for part in stage.parts():
        tensors |= stage.infos(part)
        notes |= stage.notes(part).get("linears", {})
    return Staged(tensors, notes)
