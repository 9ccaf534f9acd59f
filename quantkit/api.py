"""The command line's verbs as Python functions, where they are not functions already."""

from collections.abc import Callable, Sequence
from pathlib import Path

from quantkit.formats.source import DEMO, resolve_source
from quantkit.quantization import QuantReport, Step, quantize_checkpoint
from quantkit.recipe import load_recipe


def quantize(
    source: str | Path,
    recipe: str | Path,
    output: str | Path,
    *,
    settings: Sequence[str] = (),
    revision: str | None = None,
    calib: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
    announce: Callable[[str], None] | None = None,
) -> QuantReport:
    """Quantize a checkpoint into a folder; an interrupted run of the same plan continues.

    source: a folder, hub id, .gguf file or "demo". recipe: a shipped recipe's name or a YAML file. settings:
    "KEY=VALUE" changes of the recipe. calib: SPEC of the calibration text. device: "cpu" or "cuda", for calibration;
    None: a GPU if there is one. on_step: told of every tensor that is done. announce: told, in a line, what will take
    a while. Raises QuantkitError.
    """
    chosen = load_recipe(str(recipe), tuple(settings))
    path = resolve_source(str(source), revision=revision, announce=announce)
    return quantize_checkpoint(
        path,
        chosen,
        Path(output),
        base=_base_name(str(source)),
        where=str(recipe),
        overwrite=overwrite,
        calib=calib,
        device=device,
        on_step=on_step,
        announce=announce or (lambda line: None),
    )


def _base_name(source: str) -> str:
    """The source's name on the card: a hub id as it is, a path's last part, the demo's real name."""
    if source == DEMO:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    if not Path(source).exists():
        return source
    # a name in bytes that are not UTF-8 goes on the card with question marks
    return Path(source).resolve().name.encode(errors="replace").decode()
