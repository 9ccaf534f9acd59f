"""Which schemes can be stored and run at all; everything else is refused here, with the reason.

"Run" means that at least one of transformers, vLLM, SGLang and our runtime computes with it.
"""

from quantkit.errors import SchemeError
from quantkit.schemes.specs import (
    FloatSpec,
    IntSpec,
    KVScheme,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
)

GROUP_SIZES = (32, 64, 128)
FP8_BLOCK = PerBlock(128, 128)


def check_scheme(scheme: Scheme) -> None:
    """Raise SchemeError, with the reason and what to use instead, unless something can run the scheme."""
    _check_weight(scheme)
    activation = scheme.activation
    if activation is None:
        return
    if isinstance(activation, IntSpec) and activation.bits != 8:
        raise _no_kernel(f"activations of {activation.bits} bits", fix="use int8 or fp8 activations")
    if isinstance(scheme.weight, FloatSpec) and isinstance(activation, IntSpec):
        raise SchemeError(
            "FP8 weights with INT8 activations: no hardware multiplies them",
            fix="use fp8 activations, or int8 weights",
        )
    if isinstance(scheme.weight, IntSpec) and isinstance(activation, FloatSpec) and scheme.weight.bits != 4:
        raise _no_kernel(
            f"INT{scheme.weight.bits} weights with FP8 activations",
            fix="use int4 weights with fp8 activations, or int8 with int8, or fp8 with fp8",
        )
    if isinstance(scheme.weight, IntSpec) and scheme.weight.bits == 2:
        raise _no_kernel(
            "INT2 weights with INT8 activations", fix="keep the activations in 16 bits, or use int4 weights"
        )
    if isinstance(scheme.weight, IntSpec) and scheme.weight.bits == 4 and scheme.is_static:
        raise _no_kernel(
            "INT4 weights with static activation scales", fix="use dynamic activation scales, one per token"
        )
    if isinstance(scheme.weight, IntSpec) and not scheme.weight.symmetric:
        raise _no_kernel(
            "asymmetric weights with quantized activations",
            fix="set `symmetric: true`, or keep the activations in 16 bits",
        )
    _check_activation_granularity(scheme)


def check_kv_scheme(kv: KVScheme) -> None:
    """Raise SchemeError for a KV cache format that nothing can run."""
    if kv.dtype == "fp8" and kv.granularity == "token":
        raise SchemeError(
            "an FP8 KV cache with one scale per token: no loader has it, and e4m3 gains nothing from it",
            fix="use `kv_granularity: tensor` or `head`, or `kv_cache: int8`",
        )
    if kv.dtype == "int8" and kv.granularity == "tensor":
        raise SchemeError(
            "an INT8 KV cache with one scale per tensor: no loader has it",
            fix="use `kv_granularity: token` (dynamic) or `head` (calibrated)",
        )


def _check_weight(scheme: Scheme) -> None:
    weight = scheme.weight
    if isinstance(weight, FloatSpec):
        if not (isinstance(weight.granularity, PerTensor | PerChannel) or weight.granularity == FP8_BLOCK):
            raise _no_kernel(
                f"FP8 weights with {_words(weight.granularity)}",
                fix="use one scale per tensor, per channel, or per 128x128 block",
            )
        if weight.granularity == FP8_BLOCK and scheme.activation is None:
            raise _no_kernel(
                "FP8 weights in 128x128 blocks without FP8 activations",
                fix="set `activations: fp8`, or `granularity: channel`",
            )
        return
    if weight.bits not in (2, 4, 8):
        raise SchemeError(
            f"INT{weight.bits} weights: two published versions of the format lay these bits out differently",
            fix="use 2, 4 or 8 bits",
        )
    match weight.granularity:
        case PerGroup(size) if size not in GROUP_SIZES:
            raise SchemeError(f"group_size {size}: no kernel has it", fix="use 32, 64 or 128")
        case PerBlock() | PerToken() as granularity:
            raise _no_kernel(
                f"INT{weight.bits} weights with {_words(granularity)}", fix="use groups or channels"
            )
        case PerGroup() if weight.bits == 8 and scheme.activation is not None:
            raise _no_kernel(
                "INT8 weights in groups with quantized activations",
                fix="use `granularity: channel`, or keep the activations in 16 bits",
            )
        case PerTensor() if scheme.activation is None:
            raise _no_kernel(
                f"INT{weight.bits} weights with one scale per tensor and 16-bit inputs",
                fix="use groups or channels",
            )


def _check_activation_granularity(scheme: Scheme) -> None:
    assert scheme.activation is not None, "the caller looked"
    granularity = scheme.activation.granularity
    if scheme.weight.granularity == FP8_BLOCK:
        if granularity != PerGroup(128):
            raise SchemeError(
                "FP8 weights in 128x128 blocks take activations with one dynamic scale per token and "
                f"128 channels, not {_words(granularity)}",
                fix="leave the activation scales of a block scheme at their default",
            )
    elif not isinstance(granularity, PerToken | PerTensor):
        raise _no_kernel(
            f"activations with {_words(granularity)}",
            fix="use one dynamic scale per token, or one static scale per tensor",
        )
    if not scheme.activation.symmetric and not isinstance(granularity, PerTensor):
        raise _no_kernel(
            "asymmetric activations with dynamic scales", fix="use symmetric activations, or static scales"
        )


def _no_kernel(what: str, *, fix: str) -> SchemeError:
    return SchemeError(f"{what}: no loader has a kernel for them", fix=fix)


def _words(granularity: object) -> str:
    match granularity:
        case PerTensor():
            return "one scale per tensor"
        case PerChannel():
            return "one scale per channel"
        case PerGroup(size):
            return f"one scale per group of {size}"
        case PerBlock(rows, cols):
            return f"one scale per {rows}x{cols} block"
        case _:
            return "one scale per token"
