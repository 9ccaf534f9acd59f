"""A recipe resolved on one checkpoint: for every linear its scheme, or the reason why it stays.

Reads headers and config only. Raises where the recipe asks for something that cannot be stored, loaded or
run, before anything is written.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from quantkit.arch import LinearInfo, Role, Stays, already_quantized, complete_survey
from quantkit.arch.linears import WEIGHT_DTYPES
from quantkit.errors import RecipeError, SchemeError, SourceError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.safetensors_file import DTYPE_NAMES
from quantkit.recipe.model import Recipe
from quantkit.recipe.treatment import Treatment, find_treatments
from quantkit.schemes import (
    FloatSpec,
    Granularity,
    IntSpec,
    KVScheme,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    Spec,
)
from quantkit.schemes.support import FP8_BLOCK, GROUP_SIZES, check_kv_scheme, check_scheme

ChosenScales = Literal["minmax", "mse", "importance"]
_LINEAR_ROLES = (Role.ATTENTION, Role.MLP, Role.EXPERT)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """What happens to one linear: a scheme, or (scheme None) the reason why it stays in 16 bits.

    layer: number of its decoder layer. group: linears that run as one matmul in serving engines.
    """

    name: str
    role: Role
    layer: int
    group: str
    shape: tuple[int, int]
    scheme: Scheme | None
    scales: ChosenScales
    reason: str | None = None

    @property
    def num_weights(self) -> int:
        """Elements of its weight."""
        return self.shape[0] * self.shape[1]

    @property
    def quantized_to(self) -> Scheme:
        """The scheme of a linear that is quantized."""
        assert self.scheme is not None, f"{self.name} stays in 16 bits"
        return self.scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantPlan:
    """The recipe, resolved. `stays`: the other tensors of two or more dimensions, with reasons.

    scale_dtype: of every stored scale: the model's own dtype. calibrates_kv: scales of the KV cache are measured, and
    layers that suffer from it may keep theirs in 16 bits.
    """

    recipe: Recipe
    linears: tuple[LinearPlan, ...]
    stays: tuple[Stays, ...]
    kv: KVScheme | None
    calibrates_kv: bool
    scale_dtype: torch.dtype

    @property
    def schemes(self) -> dict[str, Scheme | None]:
        """Scheme of every linear by name, in model order; None: stays."""
        return {linear.name: linear.scheme for linear in self.linears}

    @property
    def quantized(self) -> list[LinearPlan]:
        """The linears that are quantized, in model order."""
        return [linear for linear in self.linears if linear.scheme is not None]

    @property
    def layers(self) -> dict[int, list[LinearPlan]]:
        """All linears by layer."""
        layers: dict[int, list[LinearPlan]] = defaultdict(list)
        for linear in self.linears:
            layers[linear.layer].append(linear)
        return dict(layers)


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, *, where: str = "recipe", has_data: bool = False
) -> QuantPlan:
    """Resolve a recipe on a checkpoint. `where` names the recipe in errors. has_data: calibration text is there.

    Raises SourceError (already quantized), SchemeError (a combination that nothing can run), RecipeError (a
    pattern without a match, fused linears treated differently, a group size that does not divide, nothing to do).
    """
    method = already_quantized(checkpoint.config)
    if method:
        raise SourceError(
            f"{checkpoint.path}: already quantized with {method}",
            fix="start from the original 16-bit checkpoint: quantizing twice adds the errors up",
        )
    linears, stays, _ = complete_survey(checkpoint)
    _refuse_quantized_weights(checkpoint, stays)
    treatments = find_treatments(recipe, linears, where)
    groups: dict[str, list[LinearInfo]] = defaultdict(list)
    for linear in linears:
        groups[linear.group].append(linear)
    auto_size = _auto_group_size(linears, treatments)
    plans: dict[str, LinearPlan] = {}
    for members in groups.values():
        scheme, reason = _scheme_of(treatments[members[0].name], members, auto_size, where)
        for linear in members:
            plans[linear.name] = LinearPlan(
                name=linear.name,
                role=linear.role,
                layer=linear.layer,
                group=linear.group,
                shape=linear.shape,
                scheme=scheme,
                scales=_chosen_scales(treatments[linear.name].recipe, has_data),
                reason=reason,
            )
    kv = _kv_scheme(recipe, where)
    nothing_quantized = all(plan.scheme is None for plan in plans.values())
    if kv is None and nothing_quantized:
        reasons = sorted({plan.reason for plan in plans.values() if plan.reason}) or ["it has no linears"]
        raise RecipeError(
            f"{where}: leaves every linear of {checkpoint.path} in 16 bits ({'; '.join(reasons)})",
            fix="choose another recipe, or narrow its `ignore` and overrides; `quantkit inspect` shows what fits",
        )
    # a rotation changes what the KV cache holds, too
    unused = [name for name in recipe.algorithms if name not in ("rotate", "rtn")]
    if unused and nothing_quantized:
        raise RecipeError(
            f"{where}: algorithm {unused[0]} has no effect: every linear stays in 16 bits",
            fix="leave it out, or quantize some linears: narrow `ignore` and overrides",
        )
    return QuantPlan(
        recipe=recipe,
        linears=tuple(plans[linear.name] for linear in linears),
        stays=tuple(stays),
        kv=kv,
        calibrates_kv=has_data and kv is not None and kv.granularity != "token",
        scale_dtype=_scale_dtype(checkpoint, linears),
    )


def _chosen_scales(recipe: Recipe, has_data: bool) -> ChosenScales:
    if recipe.scales == "auto":
        return "importance" if has_data else "mse"
    return recipe.scales


def _refuse_quantized_weights(checkpoint: Checkpoint, stays: Sequence[Stays]) -> None:
    """A linear among the others whose weight is no 16-bit one: what config.json says is not all."""
    for stay in stays:
        dtype = checkpoint.info(stay.name).dtype
        if stay.role in _LINEAR_ROLES and dtype not in WEIGHT_DTYPES:
            raise SourceError(
                f"{checkpoint.path}: {stay.name} is stored as {DTYPE_NAMES[dtype]}, so it is quantized already",
                fix="start from the original 16-bit checkpoint",
            )


def _auto_group_size(linears: Sequence[LinearInfo], treatments: dict[str, Treatment]) -> int:
    """The largest group size that fits all linears which take any; one size, so that the model has one scheme.

    With two sizes in one checkpoint, transformers' `dequantize=True` decodes all of it with the first.
    """
    num_inputs = {linear.shape[1] for linear in linears if not treatments[linear.name].keep}
    return max(
        (
            size
            for size in GROUP_SIZES
            if all(count % size == 0 or count % GROUP_SIZES[0] for count in num_inputs)
        ),
        default=GROUP_SIZES[0],
    )


def _scheme_of(
    treatment: Treatment, members: Sequence[LinearInfo], auto_size: int, where: str
) -> tuple[Scheme | None, str | None]:
    """The scheme of the linears of one fused group, or None and the reason why they stay."""
    if treatment.keep:
        return None, treatment.keep
    weight = _weight_spec(treatment.recipe, members, auto_size, where)
    scheme = Scheme(weight=weight, activation=_activation_spec(treatment.recipe, weight))
    try:
        check_scheme(scheme)
    except SchemeError as error:
        raise SchemeError(f"{where}: {members[0].name}: {error.problem}", fix=error.fix) from None
    if weight.granularity == FP8_BLOCK:
        return _fits_blocks(scheme, members)
    return scheme, None


def _weight_spec(recipe: Recipe, members: Sequence[LinearInfo], auto_size: int, where: str) -> Spec:
    granularity = _weight_granularity(recipe, members, auto_size, where)
    if recipe.weights == "fp8":
        if not recipe.symmetric:
            raise SchemeError(f"{where}: FP8 has no zero point", fix="remove `symmetric: false`")
        return FloatSpec(granularity=granularity)
    return IntSpec(bits=int(recipe.weights[3:]), granularity=granularity, symmetric=recipe.symmetric)


def _weight_granularity(
    recipe: Recipe, members: Sequence[LinearInfo], auto_size: int, where: str
) -> Granularity:
    chosen = recipe.granularity
    if chosen == "auto":
        chosen = "group" if recipe.weights in ("int2", "int4") or recipe.group_size != "auto" else "channel"
    elif chosen != "group" and recipe.group_size != "auto":
        raise RecipeError(
            f"{where}: group_size {recipe.group_size} has no effect with `granularity: {chosen}`",
            fix="remove one of the two",
        )
    match chosen:
        case "channel":
            return PerChannel()
        case "tensor":
            return PerTensor()
        case "block":
            return FP8_BLOCK
    if recipe.group_size == "auto":
        is_divisible = all(linear.shape[1] % auto_size == 0 for linear in members)
        return PerGroup(auto_size) if is_divisible else PerChannel()
    for linear in members:
        if recipe.group_size in GROUP_SIZES and linear.shape[1] % recipe.group_size:
            fitting_sizes = [str(size) for size in GROUP_SIZES if linear.shape[1] % size == 0]
            raise RecipeError(
                f"{where}: group_size {recipe.group_size} does not divide the {linear.shape[1]} "
                f"input features of {linear.name}",
                fix=f"use {' or '.join([*fitting_sizes, '`auto`'])}, or list the linear under `ignore`",
            )
    return PerGroup(recipe.group_size)


def _activation_spec(recipe: Recipe, weight: Spec) -> Spec | None:
    granularity: Granularity = PerGroup(128) if weight.granularity == FP8_BLOCK else PerToken()
    if recipe.activation_scales == "static":
        granularity = PerTensor()
    match recipe.activations:
        case "none":
            return None
        case "int8":
            return IntSpec(bits=8, granularity=granularity, symmetric=recipe.activation_symmetric)
        case "fp8":
            return FloatSpec(granularity=granularity)


def _fits_blocks(scheme: Scheme, members: Sequence[LinearInfo]) -> tuple[Scheme | None, str | None]:
    """Loaders take 128x128 blocks only where the inputs, and each fused part's outputs, divide by 128."""
    for linear in members:
        num_rows, num_cols = linear.shape
        if num_cols % FP8_BLOCK.cols:
            return None, f"its {num_cols} input features do not divide by the block's {FP8_BLOCK.cols}"
        if len(members) > 1 and num_rows % FP8_BLOCK.rows:
            return (
                None,
                f"fused, and the {num_rows} outputs of {linear.name} do not divide by {FP8_BLOCK.rows}",
            )
    return scheme, None


def _kv_scheme(recipe: Recipe, where: str) -> KVScheme | None:
    granularity = recipe.kv_granularity
    if recipe.kv_cache == "none":
        if granularity != "auto":
            raise RecipeError(
                f"{where}: kv_granularity {granularity} has no effect with `kv_cache: none`",
                fix="remove one of the two",
            )
        return None
    if granularity == "auto":
        granularity = "tensor" if recipe.kv_cache == "fp8" else "token"
    kv = KVScheme(dtype=recipe.kv_cache, granularity=granularity)
    try:
        check_kv_scheme(kv)
    except SchemeError as error:
        raise SchemeError(f"{where}: {error.problem}", fix=error.fix) from None
    return kv


def _scale_dtype(checkpoint: Checkpoint, linears: Sequence[LinearInfo]) -> torch.dtype:
    dtypes = sorted({str(checkpoint.info(f"{linear.name}.weight").dtype) for linear in linears})
    if len(dtypes) > 1:
        raise SourceError(
            f"{checkpoint.path}: linears of several dtypes: {', '.join(dtypes)}",
            fix="convert the checkpoint to one dtype first",
        )
    dtype = checkpoint.info(f"{linears[0].name}.weight").dtype if linears else torch.bfloat16
    return torch.float32 if dtype == torch.float64 else dtype
