"""What a body asks of generation, as the engine takes it."""

from quantkit.errors import GenerationError
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.structured_outputs import StructuredOutputsParams
from quantkit.server.defaults import TOP_K_OFF
from quantkit.server.errors import invalid
from quantkit.server.lifecycle import ServedModel
from quantkit.server.schema import SamplingBody

FIELDS = (
    "n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "include_stop_str_in_output",
    "skip_special_tokens",
)  # fmt: skip


def sampling_params(
    body: SamplingBody,
    model: ServedModel,
    *,
    max_tokens: int,
    logprobs: int | None,
    structure: StructuredOutputsParams | None = None,
    shows_special_tokens: bool = False,
) -> SamplingParams:
    """The body's settings. shows_special_tokens: unless the body says otherwise.

    Raises ApiError, a 400 that names the field, for settings that make no sense.
    """
    given = {name: value for name in FIELDS if (value := getattr(body, name)) is not None}
    if given.get("top_k") in TOP_K_OFF:
        given["top_k"] = None
    if body.logit_bias is not None:
        given["logit_bias"] = _token_ids(body.logit_bias)
    if shows_special_tokens:
        given.setdefault("skip_special_tokens", False)
    asked = {"max_tokens": max_tokens, "logprobs": logprobs, "structured_outputs": structure}
    settings = {**model.defaults.settings, **given, **asked}
    try:
        params = SamplingParams(**settings)
        params.check_token_ids(model.engine.vocab_size)
    except GenerationError as error:
        name = error.problem.split()[0].rstrip(":")
        raise invalid(f"{error.problem}; {error.fix}", param=name) from error
    return params


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    """JSON has no numbers as keys."""
    wrong = next((key for key in bias if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if wrong is not None:
        raise invalid(f"logit_bias: {wrong[:80]!r} is no token id", param="logit_bias")
    return {int(key): value for key, value in bias.items()}
