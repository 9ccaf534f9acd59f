"""The rotary part of a config.json, in both of its spellings, to a Rope.

transformers 5 writes `rope_parameters` {rope_type, rope_theta, …}; before it was `rope_theta` beside a
`rope_scaling` {rope_type or type, factor, …} or null.
"""

import math

from quantkit.runtime.layers.rotary import DefaultRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from quantkit.runtime.models.config import Config

TYPES = {name: name for name in ("default", "linear", "llama3", "longrope", "yarn")}
TYPES["su"] = "longrope"  # as Phi-3 first called it


def read_rope(config: Config, max_positions: int, *, rotates_all: bool = True) -> Rope:
    """The one rotation of a model whose layers all share it. Raises SourceError if there is no theta.

    rotates_all: refuse a `partial_rotary_factor`; else it is the caller's to read.
    """
    original = config.optional_integer("original_max_position_embeddings")
    theta = config.optional_number("rope_theta")
    section = rope_section(config)
    if section is None:
        if theta is None:
            raise config.missing("rope_theta (or rope_parameters)")
        return DefaultRope(theta=theta)
    return read_rope_section(
        section, theta=theta, original=original, max_positions=max_positions, rotates_all=rotates_all
    )


def rope_section(config: Config) -> Config | None:
    """The rope object of either spelling."""
    config.ignore("rope_scaling")
    return config.section("rope_parameters") or config.section("rope_scaling")


def read_rope_section(
    section: Config,
    *,
    theta: float | None,
    original: int | None,
    max_positions: int,
    rotates_all: bool = True,
) -> Rope:
    """One rope object. theta, original: what stands outside of it; inside, theta goes first, original last."""
    theta = section.number("rope_theta", theta)
    if section.number("partial_rotary_factor", 1.0) != 1.0 and rotates_all:
        raise section.unsupported(
            "partial_rotary_factor", section.number("partial_rotary_factor"), "supported: 1"
        )
    old_name = section.choice("type", TYPES, "default")
    kind = section.choice("rope_type", TYPES, old_name)
    rope: Rope
    if kind == "default":
        if section.number("factor", 1.0) != 1.0:
            raise section.unsupported(
                "factor", section.number("factor"), "supported with rope_type default: 1"
            )
        rope = DefaultRope(theta=theta)
    elif kind == "linear":
        rope = LinearRope(theta=theta, factor=section.number("factor"))
    elif kind == "llama3":
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if low >= high:
            raise section.wrong("high_freq_factor", high, f"above low_freq_factor {low}")
        rope = Llama3Rope(
            theta=theta,
            factor=section.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_positions=_original(section, original, max_positions),
        )
    elif kind == "longrope":
        rope = _long(section, theta, _original(section, original, max_positions), max_positions)
    else:
        rope = _yarn(section, theta, _original(section, original, max_positions), max_positions)
    section.finish_strictly()
    return rope


def _original(section: Config, original: int | None, max_positions: int) -> int:
    inside = section.integer("original_max_position_embeddings", max_positions)
    return inside if original is None else original


def _yarn(section: Config, theta: float, original: int, max_positions: int) -> YarnRope:
    if theta == 1.0:
        raise section.wrong("rope_theta", theta, "a base with a logarithm other than 0")
    factor = section.number("factor", max_positions / original)
    attention_factor = section.optional_number("attention_factor")
    mscale, mscale_all = section.optional_number("mscale"), section.optional_number("mscale_all_dim")
    if attention_factor is None:
        ratio = mscale is not None and mscale_all is not None
        attention_factor = (
            _mscale(factor, mscale or 1.0) / _mscale(factor, mscale_all or 1.0)
            if ratio
            else _mscale(factor, 1.0)
        )
    return YarnRope(
        theta=theta,
        factor=factor,
        original_positions=original,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=section.flag("truncate", True),
    )


def _long(section: Config, theta: float, original: int, max_positions: int) -> LongRope:
    factor = section.number("factor", max_positions / original)
    grown = math.log(factor) / math.log(original) if factor > 1 else 0.0
    return LongRope(
        theta=theta,
        short=section.numbers("short_factor"),
        long=section.numbers("long_factor"),
        original_positions=original,
        attention_factor=section.number("attention_factor", math.sqrt(1 + grown)),
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
