"""The recipe: a dozen YAML keys, every one documented here, unknown ones rejected."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

GroupSize = Literal["auto"] | Annotated[int, Field(gt=0)]
Weights = Literal["int2", "int4", "int8", "fp8"]
Activations = Literal["none", "int8", "fp8"]
WeightGranularity = Literal["auto", "group", "channel", "tensor", "block"]
Scales = Literal["minmax", "mse"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Override(_Strict):
    """Another treatment for the linears whose name matches; keys left out are the recipe's."""

    match: str = Field(description="Linear names: a shell pattern (*), or a regular expression after `re:`.")
    keep: bool = Field(False, description="Leave these linears in 16 bits.")
    weights: Weights | None = Field(None, description="As in the recipe.")
    activations: Activations | None = Field(None, description="As in the recipe.")
    granularity: WeightGranularity | None = Field(None, description="As in the recipe.")
    group_size: GroupSize | None = Field(None, description="As in the recipe.")
    symmetric: bool | None = Field(None, description="As in the recipe.")
    scales: Scales | None = Field(None, description="As in the recipe.")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        given = self.model_fields_set - {"match", "keep"}
        if self.keep and given:
            raise ValueError(f"`keep: true` leaves the linears in 16 bits, so {min(given)} has no effect")
        if not self.keep and not given:
            raise ValueError("an override needs `keep: true` or another treatment")
        return self


class Recipe(_Strict):
    """How to quantize a model."""

    description: str = Field("", description="One line for `quantkit recipes`.")
    weights: Weights = Field(description="Number format of the weights.")
    activations: Activations = Field(
        "none",
        description="Number format of the inputs of quantized linears, scaled while running; none: 16 bits.",
    )
    granularity: WeightGranularity = Field(
        "auto",
        description="Which weights share a scale: group (of input channels), channel (an output row), tensor, "
        "block (128x128, FP8 only). auto: group for int2 and int4, channel for int8 and fp8.",
    )
    group_size: GroupSize = Field(
        "auto",
        description="Input channels per group: 32, 64 or 128; strict. auto: the largest of these that divides the "
        "inputs of every linear; those that 32 does not divide get one scale per channel.",
    )
    symmetric: bool = Field(True, description="Integer grid around 0; false adds a zero point per scale.")
    algorithm: Literal["rtn"] = Field("rtn", description="How codes are chosen. rtn: round to nearest.")
    scales: Scales = Field(
        "mse", description="How scales are chosen. minmax: the largest weight; mse: least squared error."
    )
    attention: Literal["bf16", "8bit", "same"] = Field(
        "bf16",
        description="The attention projections: bf16: stay in 16 bits; 8bit: INT8 weights per channel where the "
        "inputs stay 16-bit, else the inputs' format; same: as the MLP.",
    )
    kv_cache: Literal["none", "fp8", "int8"] = Field(
        "none", description="Number format of the KV cache. fp8: scale 1.0; int8: scaled while running."
    )
    kv_granularity: Literal["auto", "tensor", "head", "token"] = Field(
        "auto",
        description="Which cache entries share a scale. auto: tensor for fp8, token (and head) for int8.",
    )
    ignore: list[str] = Field([], description="Linears that stay in 16 bits; patterns as in overrides.match.")
    overrides: list[Override] = Field([], description="Other treatments by name; a later match wins.")
