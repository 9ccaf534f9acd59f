"""What a user may ask of generation, checked when made. Free of torch: a command line reads its defaults from here."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quantkit.errors import GenerationError
from quantkit.runtime.structured_outputs import StructuredOutputsParams

MAX_SEQUENCES = 16
MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_STOP_TOKENS = 256
MAX_BIASES = 1024
MAX_SEED = 2**63 - 1
MAX_NUM_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, how many, and what ends them.

    n: answers to a prompt, each with a seed of its own. min_tokens: neither stop tokens nor stop strings end it before
    so many. temperature 0: always the likeliest token. In this order: logit_bias (token id: what is added to its
    logit), the penalties, temperature, and the filters: top_k, the k likeliest; top_p, the likeliest that together
    reach probability p; min_p, those at least p times as likely as the likeliest. seed: None draws a new one.

    stop: strings (or one) that end the text and, unless include_stop_str_in_output, are no part of it; stop_token_ids:
    tokens that do. ignore_eos: the model's own stop tokens do not. presence_penalty is taken from the logits of tokens
    in the answer, frequency_penalty once for each time; repetition_penalty divides the positive logits of tokens in
    prompt and answer, and multiplies the negative ones. logprobs: report each token's, and of so many likeliest ones,
    before all of the above. skip_special_tokens: they have no text. structured_outputs: what the answer has to be,
    whatever else is asked for; it ends where that may end, so with neither min_tokens nor ignore_eos.

    prompt_logprobs: like logprobs, of the prompt's own tokens, from number prompt_logprobs_start on; what is before
    that may come from the prefix cache. With them, max_tokens may be 0: the prompt is scored, and nothing generated.
    """

    n: int = 1
    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0

    def __post_init__(self) -> None:
        self._take_stops()
        self._check_numbers()
        self._check_collections()
        self._check_structure()
        self._check_prompt_logprobs()

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0, 0, 1)

    def answer(self, number: int) -> "SamplingParams":
        """The parameters of one of `n` answers: seeds follow one another.

        Where nothing is to be generated it is one token, which nobody sees: a step ends with the next token.
        """
        seed = None if self.seed is None else (self.seed + number) & MAX_SEED
        if self.max_tokens == 0:
            return replace(self, max_tokens=1, ignore_eos=True, stop_token_ids=())
        return replace(self, n=1, seed=seed)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raises GenerationError for tokens that a model with so many does not have."""
        for name in ("stop_token_ids", "logit_bias"):
            largest = max(getattr(self, name), default=0)
            if largest >= vocab_size:
                raise GenerationError(
                    f"{name}: the model has no token {largest}", fix=f"give token ids below {vocab_size}"
                )

    def _take_stops(self) -> None:
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))

    def _check_numbers(self) -> None:
        self._check_integer("n", 1, MAX_SEQUENCES)
        self._check_integer("max_tokens", 1 if self.prompt_logprobs is None else 0, MAX_NUM_TOKENS)
        self._check_integer("min_tokens", 0, MAX_NUM_TOKENS)
        self._check(
            "min_tokens", self.min_tokens <= self.max_tokens, f"at most max_tokens, {self.max_tokens}"
        )
        self._check_float("temperature", 0, 100)
        self._check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, up to 1")
        self._check_integer("top_k", 1, MAX_NUM_TOKENS, optional=True)
        self._check_float("min_p", 0, 1)
        self._check_integer("seed", 0, MAX_SEED, optional=True)
        self._check_float("presence_penalty", -2, 2)
        self._check_float("frequency_penalty", -2, 2)
        is_positive = _is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= 100
        self._check("repetition_penalty", is_positive, "a number above 0, up to 100; 1 changes nothing")
        self._check_integer("logprobs", 0, MAX_LOGPROBS, optional=True)

    def _check_collections(self) -> None:
        self._check("stop", len(self.stop) <= MAX_STOPS, f"at most {MAX_STOPS} strings")
        are_strings = all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in self.stop)
        self._check("stop", are_strings, f"strings of 1 to {MAX_STOP_CHARS} characters")
        self._check(
            "stop_token_ids",
            len(self.stop_token_ids) <= MAX_STOP_TOKENS and _are_token_ids(self.stop_token_ids),
            f"at most {MAX_STOP_TOKENS} token ids, numbers from 0 on",
        )
        bias = self.logit_bias
        are_fine = all(_is_number(value) and -100 <= value <= 100 for value in bias.values())
        self._check(
            "logit_bias",
            len(bias) <= MAX_BIASES and _are_token_ids(bias) and are_fine,
            f"numbers from -100 to 100 for at most {MAX_BIASES} token ids",
        )

    def _check_structure(self) -> None:
        wanted: Any = self.structured_outputs
        if isinstance(wanted, Mapping):
            object.__setattr__(self, "structured_outputs", StructuredOutputsParams(**wanted))
        for name in ("min_tokens", "ignore_eos"):
            self._check(
                name, not (wanted and getattr(self, name)), "it without structured_outputs (JSON, a grammar)"
            )

    def _check_prompt_logprobs(self) -> None:
        self._check_integer("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        self._check_integer("prompt_logprobs_start", 0, MAX_NUM_TOKENS)
        if self.prompt_logprobs is None:
            self._check("prompt_logprobs_start", self.prompt_logprobs_start == 0, "it with prompt_logprobs")
        else:
            self._check("n", self.n == 1, "1 with prompt_logprobs")
            self._check("max_tokens", bool(self.max_tokens or not self.structured_outputs), "1 or more")

    def _check_integer(self, name: str, least: int, most: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        is_fine = (optional and value is None) or (type(value) is int and least <= value <= most)
        expected = f"a whole number from {least} to {most}" + (", or leave it out" if optional else "")
        self._check(name, is_fine, expected)

    def _check_float(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        self._check(name, _is_number(value) and least <= value <= most, f"a number from {least} to {most}")

    def _check(self, name: str, is_fine: bool, expected: str) -> None:
        if not is_fine:
            value = _shortened(str(getattr(self, name)))
            raise GenerationError(f"{name} {value} makes no sense", fix=f"give {expected}")


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _are_token_ids(ids: Iterable[object]) -> bool:
    return all(type(token) is int and 0 <= token < MAX_NUM_TOKENS for token in ids)
