"""Every scheme the product offers, by name: what tests of formats, runtime and quantize go through."""

from quantkit.schemes import (
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

TOKEN_INT8 = IntSpec(bits=8, granularity=PerToken())
TOKEN_FP8 = FloatSpec(granularity=PerToken())
STATIC_INT8 = IntSpec(bits=8, granularity=PerTensor())
STATIC_INT8_ASYMMETRIC = IntSpec(bits=8, granularity=PerTensor(), symmetric=False)
STATIC_FP8 = FloatSpec(granularity=PerTensor())
GRANULARITIES = {"g32": PerGroup(32), "g64": PerGroup(64), "g128": PerGroup(128), "channel": PerChannel()}


def _weight_only() -> dict[str, Scheme]:
    return {
        f"int{bits}-{name}-{'sym' if symmetric else 'asym'}": Scheme(
            weight=IntSpec(bits=bits, granularity=granularity, symmetric=symmetric)
        )
        for bits in (2, 4, 8)
        for name, granularity in GRANULARITIES.items()
        for symmetric in (True, False)
    }


def _with_activations() -> dict[str, Scheme]:
    int8 = IntSpec(bits=8, granularity=PerChannel())
    fp8_channel, fp8_tensor = FloatSpec(granularity=PerChannel()), FloatSpec(granularity=PerTensor())
    fp8_block = FloatSpec(granularity=PerBlock(128, 128))
    schemes = {
        "int8-w8a8-dynamic": Scheme(weight=int8, activation=TOKEN_INT8),
        "int8-w8a8-static-sym": Scheme(weight=int8, activation=STATIC_INT8),
        "int8-w8a8-static-asym": Scheme(weight=int8, activation=STATIC_INT8_ASYMMETRIC),
        "fp8-channel-token": Scheme(weight=fp8_channel, activation=TOKEN_FP8),
        "fp8-tensor-static": Scheme(weight=fp8_tensor, activation=STATIC_FP8),
        "fp8-tensor-token": Scheme(weight=fp8_tensor, activation=TOKEN_FP8),
        "fp8-block": Scheme(weight=fp8_block, activation=FloatSpec(granularity=PerGroup(128))),
        "fp8-channel-weight": Scheme(weight=fp8_channel),
        "fp8-tensor-weight": Scheme(weight=fp8_tensor),
    }
    for name, granularity in GRANULARITIES.items():
        int4 = IntSpec(bits=4, granularity=granularity)
        schemes[f"w4a8-int8-{name}"] = Scheme(weight=int4, activation=TOKEN_INT8)
        schemes[f"w4a8-fp8-{name}"] = Scheme(weight=int4, activation=TOKEN_FP8)
    return schemes


SCHEMES: dict[str, Scheme] = {**_weight_only(), **_with_activations()}

KV_SCHEMES: dict[str, KVScheme] = {
    "kv-fp8-tensor": KVScheme(dtype="fp8", granularity="tensor"),
    "kv-fp8-head": KVScheme(dtype="fp8", granularity="head"),
    "kv-int8-head": KVScheme(dtype="int8", granularity="head"),
    "kv-int8-token": KVScheme(dtype="int8", granularity="token"),
}
