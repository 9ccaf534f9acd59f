"""The recipe: a dozen YAML keys, every one documented here, unknown ones rejected."""

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

GroupSize = Literal["auto"] | Annotated[int, Field(gt=0)]
Weights = Literal["int2", "int4", "int8", "fp8"]
Activations = Literal["none", "int8", "fp8"]
ActivationScales = Literal["dynamic", "static"]
WeightGranularity = Literal["auto", "group", "channel", "tensor", "block"]
Scales = Literal["auto", "minmax", "mse", "importance"]
# In the order in which they can be applied.
AlgorithmName = Literal[
    "rotate",
    "smoothquant",
    "awq",
    "weight_correction",
    "rtn",
    "gptq",
    "refine",
    "signround",
    "bias_correction",
    "tune",
]
ALGORITHM_ORDER: tuple[AlgorithmName, ...] = get_args(AlgorithmName)


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


class Calibration(_Strict):
    """How much text a run looks at; which text is the command line's to say."""

    samples: Annotated[
        int,
        Field(gt=0, description="Windows of text, spread evenly over it; fewer where the text has no more."),
    ] = 128
    length: Annotated[
        int, Field(gt=1, description="Tokens of a window; if not given, at most the model's positions.")
    ] = 512


class Tune(_Strict):
    """How `tune` learns; what it holds in memory is the whole model."""

    epochs: Annotated[int, Field(gt=0, description="How often it goes through the windows.")] = 12
    batch: Annotated[int, Field(gt=0, description="Windows of a step.")] = 8
    codes: Annotated[
        bool,
        Field(description="Learn the codes too, not only scales and norms; takes 16 bytes per weight."),
    ] = True


SECTIONS: dict[str, type[BaseModel]] = {"calibration": Calibration, "tune": Tune}


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
    algorithm: AlgorithmName | list[AlgorithmName] = Field(
        "rtn",
        description="One, or a list applied in order. rotate: Hadamard rotations folded into the weights. "
        "smoothquant, awq: scales of input channels folded into the weights. weight_correction: weights that make up "
        "for what the layers before lost. rtn: round to nearest; gptq: round, making up for each column's error in "
        "the others. refine: scales and codes improved in turn, after gptq. signround: codes and scales of integer "
        "weights learned layer by layer from the original layer's output, starting from what rtn or gptq chose; "
        "experts do not learn. bias_correction: biases that make up for the mean error. tune: scales, norms and "
        "codes learned end to end from the original's logits.",
    )
    scales: Scales = Field(
        "auto",
        description="How scales are chosen. minmax: the largest weight; mse: least squared error; importance: least "
        "squared error weighted by the inputs' second moments. auto: importance with calibration text, else mse.",
    )
    attention: Literal["bf16", "8bit", "same"] = Field(
        "bf16",
        description="The attention projections: bf16: stay in 16 bits; 8bit: INT8 weights per channel where the "
        "inputs stay 16-bit, else the inputs' format; same: as the MLP.",
    )
    kv_cache: Literal["none", "fp8", "int8"] = Field(
        "none",
        description="Number format of the KV cache. fp8: scales measured on calibration text, or 1.0; int8: scaled "
        "while running, or, per head, measured. A layer whose attention suffers keeps its cache in 16 bits.",
    )
    kv_granularity: Literal["auto", "tensor", "head", "token"] = Field(
        "auto",
        description="Which cache entries share a scale. auto: tensor for fp8, token (and head) for int8.",
    )
    activation_scales: ActivationScales = Field(
        "dynamic",
        description="Scales of quantized inputs. dynamic: one per token, while running; static: one per tensor.",
    )
    activation_symmetric: bool = Field(
        True, description="Static INT8 inputs: a grid around 0; false adds a zero point."
    )
    calibration: Calibration = Field(
        default_factory=Calibration, description="How much calibration text is used."
    )
    tune: Tune = Field(Tune(), description="Settings of the algorithm `tune`.")
    budget_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Time that `tune` may take, by an estimate from the model's size and the device."
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Seed of rotations, and of the order in which signround and tune take windows."
    )
    ignore: list[str] = Field([], description="Linears that stay in 16 bits; patterns as in overrides.match.")
    overrides: list[Override] = Field([], description="Other treatments by name; a later match wins.")

    @property
    def algorithms(self) -> tuple[AlgorithmName, ...]:
        """The algorithms in order, with exactly one of rtn and gptq."""
        given = [self.algorithm] if isinstance(self.algorithm, str) else self.algorithm
        names = {*given} if {"rtn", "gptq"} & {*given} else {*given, "rtn"}
        return tuple(name for name in ALGORITHM_ORDER if name in names)

    @property
    def data_reason(self) -> str | None:
        """What in this recipe cannot be done without calibration text; None: nothing."""
        for name in self.algorithms:
            if name != "rtn":
                return f"algorithm {name}"
        if "importance" in [self.scales, *(override.scales for override in self.overrides)]:
            return "scales: importance"
        if self.activation_scales == "static" and self.activations != "none":
            return "activation_scales: static"
        if self.kv_cache == "int8" and self.kv_granularity == "head":
            return "kv_granularity: head"
        return None

    @property
    def _may_round_to_fp8(self) -> bool:
        """Whether a weight would be FP8: the recipe's, an override's, or attention's, whose 8 bits are the inputs'."""
        all_weights = [self.weights, *(override.weights for override in self.overrides)]
        is_attention = self.attention == "8bit" and self.activations == "fp8"
        return "fp8" in all_weights or is_attention

    @property
    def can_use_data(self) -> bool:
        """Whether calibration text would change anything."""
        scales = [self.scales, *(override.scales for override in self.overrides if override.scales)]
        return self.data_reason is not None or self.kv_cache == "fp8" or "auto" in scales

    @model_validator(mode="after")
    def _algorithms_fit(self) -> Self:
        given = [self.algorithm] if isinstance(self.algorithm, str) else self.algorithm
        doubled = next((name for name in given if given.count(name) > 1), None)
        if doubled:
            raise ValueError(f"algorithm {doubled} is given twice")
        if {"rtn", "gptq"} <= {*given}:
            raise ValueError("algorithms rtn and gptq exclude each other: each chooses the codes")
        if "refine" in given and "gptq" not in given:
            raise ValueError("algorithm refine improves what gptq chose, and needs it before")
        if "signround" in given and self._may_round_to_fp8:
            raise ValueError(
                "algorithm signround learns integer codes, and this recipe has FP8 weights: choose other weights, "
                "or leave signround out"
            )
        if {"smoothquant", "awq"} <= {*given}:
            raise ValueError(
                "algorithms smoothquant and awq exclude each other: each scales the same channels"
            )
        order = [name for name in ALGORITHM_ORDER if name in given]
        if given != order:
            raise ValueError(f"the order of these algorithms can only be {', '.join(order)}")
        if "tune" not in given:
            unused = next((key for key in ("tune", "budget_minutes") if key in self.model_fields_set), None)
            if unused and getattr(self, unused) is not None:
                raise ValueError(f"{unused} has no effect without algorithm tune")
        return self

    @model_validator(mode="after")
    def _inputs_fit(self) -> Self:
        if self.activation_scales == "static" and self.activations == "none":
            raise ValueError("activation_scales: static has no effect where inputs stay in 16 bits")
        is_static_int8 = self.activation_scales == "static" and self.activations == "int8"
        if not self.activation_symmetric and not is_static_int8:
            raise ValueError("activation_symmetric: false is for static INT8 inputs alone")
        return self
