"""What a body asks of generation, and what the checkpoint says where it asks for nothing."""

from pathlib import Path
from typing import Any, NamedTuple

from quantkit.errors import GenerationError
from quantkit.formats.checkpoint import read_json
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.server.errors import invalid
from quantkit.server.schema import SamplingBody

FILE = "generation_config.json"
OFF = (0, -1)  # what clients send as top_k for none
OWN_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}  # OpenAI's
READ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
FIELDS = (
    "n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "include_stop_str_in_output",
    "skip_special_tokens",
)  # fmt: skip


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
    if own.get("top_k") in OFF:
        del own["top_k"]
    settings = OWN_DEFAULTS | own
    try:
        SamplingParams(**settings)
    except GenerationError as error:
        raise GenerationError(f"{file}: {error.problem}", fix="repair the file, or remove it") from error
    return Defaults(settings, f"{FILE}: {', '.join(own)}" if own else "OpenAI's; the checkpoint has none")


def sampling_params(
    body: SamplingBody, defaults: Defaults, *, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """The body's settings. Raises ApiError, a 400 that names the field, for those that make no sense."""
    given = {name: value for name in FIELDS if (value := getattr(body, name)) is not None}
    if given.get("top_k") in OFF:
        given["top_k"] = None
    if body.logit_bias is not None:
        given["logit_bias"] = _token_ids(body.logit_bias)
    try:
        return SamplingParams(
            **{**defaults.settings, **given, "max_tokens": max_tokens, "logprobs": logprobs}
        )
    except GenerationError as error:
        name = error.problem.split()[0]
        raise invalid(f"{error.problem}; {error.fix}", param=name) from error


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    """JSON has no numbers as keys."""
    wrong = next((key for key in bias if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if wrong is not None:
        raise invalid(f"logit_bias: {wrong[:80]!r} is no token id", param="logit_bias")
    return {int(key): value for key, value in bias.items()}
