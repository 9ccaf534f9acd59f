"""Which schemes are refused, with the reason and a way out; every scheme of the product is not."""

import pytest

from quantkit.errors import SchemeError
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
from quantkit.schemes.support import check_kv_scheme, check_scheme
from tests.product_schemes import KV_SCHEMES, SCHEMES, STATIC_FP8, TOKEN_FP8, TOKEN_INT8


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_of_the_product_is_accepted(name):
    check_scheme(SCHEMES[name])


@pytest.mark.parametrize("name", KV_SCHEMES)
def test_every_cache_of_the_product_is_accepted(name):
    check_kv_scheme(KV_SCHEMES[name])


def integers(bits, granularity, symmetric=True):
    return IntSpec(bits=bits, granularity=granularity, symmetric=symmetric)


FP8_BLOCK = FloatSpec(granularity=PerBlock(128, 128))
INT8, FP8 = integers(8, PerChannel()), FloatSpec(granularity=PerChannel())


@pytest.mark.parametrize(
    "weight, activation, reason",
    [
        (integers(3, PerGroup(128)), None, "INT3 weights"),
        (integers(16, PerChannel()), None, "INT16 weights"),
        (integers(4, PerGroup(16)), None, "group_size 16"),
        (integers(4, PerBlock(128, 128)), None, "one scale per 128x128 block"),
        (integers(4, PerToken()), None, "one scale per token"),
        (integers(4, PerTensor()), None, "one scale per tensor"),
        (integers(8, PerGroup(128)), TOKEN_INT8, "INT8 weights in groups with quantized activations"),
        (integers(4, PerGroup(128), False), TOKEN_INT8, "asymmetric weights with quantized activations"),
        (integers(4, PerGroup(128), False), TOKEN_FP8, "asymmetric weights with quantized activations"),
        (INT8, TOKEN_FP8, "INT8 weights with FP8 activations"),
        (integers(2, PerGroup(64)), TOKEN_FP8, "INT2 weights with FP8 activations"),
        (integers(2, PerGroup(64)), TOKEN_INT8, "INT2 weights with INT8 activations"),
        (INT8, integers(4, PerToken()), "activations of 4 bits"),
        (INT8, integers(8, PerGroup(128)), "activations with one scale per group of 128"),
        (INT8, integers(8, PerToken(), False), "asymmetric activations with dynamic scales"),
        (integers(4, PerGroup(128)), STATIC_FP8, "INT4 weights with static activation scales"),
        (integers(4, PerGroup(128)), integers(8, PerTensor()), "INT4 weights with static activation scales"),
        (FP8, TOKEN_INT8, "FP8 weights with INT8 activations"),
        (FloatSpec(granularity=PerGroup(128)), None, "FP8 weights with one scale per group of 128"),
        (FloatSpec(granularity=PerBlock(64, 64)), TOKEN_FP8, "one scale per 64x64 block"),
        (FP8_BLOCK, None, "without FP8 activations"),
        (FP8_BLOCK, TOKEN_FP8, "not one scale per token"),
    ],
    ids=str,
)
def test_what_nothing_can_run_is_refused_with_the_reason(weight, activation, reason):
    with pytest.raises(SchemeError) as error:
        check_scheme(Scheme(weight=weight, activation=activation))
    assert reason in error.value.problem
    assert error.value.fix


@pytest.mark.parametrize("dtype, granularity", [("fp8", "token"), ("int8", "tensor")])
def test_caches_without_a_loader_are_refused(dtype, granularity):
    with pytest.raises(SchemeError, match="no loader has it"):
        check_kv_scheme(KVScheme(dtype=dtype, granularity=granularity))
