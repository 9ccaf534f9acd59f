"""What a user may ask of sampling. Free of torch, so that a command line can read the defaults from it."""

from dataclasses import dataclass

from quantkit.errors import GenerationError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token, and how many to choose.

    temperature 0: always the likeliest token. The filters apply in this order: temperature; top_k, the k
    likeliest; top_p, the likeliest that together reach probability p; min_p, those at least p times as likely as
    the likeliest. seed: None draws a new one.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "a number from 1 on")
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "a number from 0 to 100")
        _check(
            "top_k", self.top_k, self.top_k is None or self.top_k >= 1, "a number from 1 on, or leave it out"
        )
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, up to 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "a number from 0 on")


def _check(name: str, value: object, is_fine: bool, expected: str) -> None:
    if not is_fine:
        raise GenerationError(f"{name} {value} makes no sense", fix=f"give {expected}")
