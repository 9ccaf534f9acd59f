"""config.json, read key by key: each value typed, and no key that changes the computation left unread."""

from collections.abc import Mapping
from typing import Any, TypeVar

from quantkit.errors import SourceError, UnsupportedModelError

T = TypeVar("T")

# Keys that change what a model of some family computes, with the values that change nothing. A family reads
# those it implements; of the others only these values pass.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1.0),
    "final_logit_softcapping": (None,),
    "layer_types": (None,),
    "lm_head_bias": (None, False),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "mlp_bias": (None, False),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1.0),
    "pretraining_tp": (None, 0, 1),
    "qk_layernorm": (None, False),
    "qkv_bias": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1.0),
    "rope_interleaved": (None, False),
    "rope_local_base_freq": (None,),
    "shared_expert_intermediate_size": (None, 0),
    "sliding_window": (None,),
    "sliding_window_pattern": (None,),
    "use_bidirectional_attention": (None, False),
    "use_qk_norm": (None, False),
    "use_sliding_window": (None, False),
}


class Config:
    """The language model's keys of a config.json. `place` names it in errors."""

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        self.place = place
        self._values = values
        self._read: set[str] = set()

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; without a default the key is required."""
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise self.wrong(key, value, "a positive integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A positive integer, or None where the key is absent or null."""
        return None if self._peek(key) is None else self.integer(key)

    def nullable_integer(self, key: str) -> int | None:
        """A positive integer or null; the key is required."""
        if key not in self._values:
            raise self.missing(key)
        return self.optional_integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; without a default the key is required."""
        value = self._get(key, default)
        if not _is_positive(value):
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None where the key is absent or null."""
        return None if self._peek(key) is None else self.number(key)

    def nullable_number(self, key: str) -> float | None:
        """A positive number or null; the key is required."""
        if key not in self._values:
            raise self.missing(key)
        return self.optional_number(key)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, T], default: str | None = None) -> T:
        """What `choices` has for the value. Raises UnsupportedModelError for a value that it lacks."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.unsupported(key, value, f"supported: {', '.join(sorted(choices))}")
        return choices[value]

    def names(self, key: str, allowed: tuple[str, ...], count: int) -> tuple[str, ...] | None:
        """A list of `count` names out of `allowed`, or None where the key is absent or null."""
        value = self._peek(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(key, value, f"a list of {count}, one for each layer")
        for name in value:
            if name not in allowed:
                raise self.unsupported(key, name, f"supported: {', '.join(allowed)}")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...] | None:
        """A list of integers, 0 or more, or None where the key is absent or null."""
        value = self._peek(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
            raise self.wrong(key, value, "a list of integers, 0 or more")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive finite numbers; the key is required."""
        value = self._peek(key)
        if value is None:
            raise self.missing(key)
        if not isinstance(value, list) or any(not _is_positive(item) for item in value):
            raise self.wrong(key, value, "a list of positive numbers")
        return tuple(float(item) for item in value)

    def section(self, key: str) -> "Config | None":
        """A nested object, or None where the key is absent or null."""
        value = self._peek(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return Config(value, f"{self.place}: {key}")

    def ignore(self, *keys: str) -> None:
        """Say that keys are understood to change nothing here."""
        self._read.update(keys)

    def finish(self) -> None:
        """Raise UnsupportedModelError if an unread key asks for something that nobody implements."""
        for key, neutral in NEUTRAL.items():
            if key not in self._read and self._values.get(key) not in neutral:
                raise self.unsupported(key, self._values[key], f"supported: {_list(neutral)}")

    def finish_strictly(self) -> None:
        """Raise UnsupportedModelError if any key was not read and is not null."""
        for key, value in self._values.items():
            if key not in self._read and value is not None:
                raise self.unsupported(key, value, "that key is not implemented")

    def wrong(self, key: str, value: Any, expected: str) -> SourceError:
        """The error for a value of the wrong type or range."""
        return SourceError(f"{self.place}: {key} is {value!r}, not {expected}", fix="fetch config.json again")

    def unsupported(self, key: str, value: Any, hint: str) -> UnsupportedModelError:
        """The error for a value that means something which is not implemented."""
        return UnsupportedModelError(
            f"{self.place}: {key} {value!r} is not supported", fix=f"use another model; {hint}"
        )

    def missing(self, key: str) -> SourceError:
        """The error for a key that has to be there."""
        return SourceError(
            f"{self.place}: no {key}, without which the model cannot be run",
            fix=f"fetch config.json again, or add {key} as the model was trained with it",
        )

    def _peek(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def _get(self, key: str, default: T | None) -> Any:
        value = self._peek(key)
        if value is None:
            value = default
        if value is None:
            raise self.missing(key)
        return value


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _list(values: tuple[Any, ...]) -> str:
    return " or ".join("absent" if value is None else repr(value) for value in values)
