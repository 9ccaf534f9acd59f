"""Sampling settings for requests that leave them out: the checkpoint's, else OpenAI's."""

from pathlib import Path
from typing import Any, NamedTuple

from quantkit.errors import GenerationError
from quantkit.formats.checkpoint import read_json
from quantkit.runtime.sampling_params import SamplingParams

FILE = "generation_config.json"
TOP_K_OFF = (0, -1)  # what files and clients say for none
OWN_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}  # OpenAI's
READ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Defaults(NamedTuple):
    """Sampling settings for bodies that leave them out, and where they are from."""

    settings: dict[str, Any]
    source: str

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.settings.items()) + f" ({self.source})"


def read_defaults(folder: Path) -> Defaults:
    """OpenAI's, and over them those of the checkpoint. Raises GenerationError for some that make no sense."""
    file = folder / FILE
    found = read_json(file) if file.is_file() else {}
    own = {name: found[name] for name in READ if found.get(name) is not None}
    if own.get("top_k") in TOP_K_OFF:
        del own["top_k"]
    settings = OWN_DEFAULTS | own
    try:
        SamplingParams(**settings)
    except GenerationError as error:
        raise GenerationError(f"{file}: {error.problem}", fix="repair the file, or remove it") from error
    return Defaults(settings, f"{FILE}: {', '.join(own)}" if own else "OpenAI's; the checkpoint has none")
