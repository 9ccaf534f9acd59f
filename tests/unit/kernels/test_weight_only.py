"""Products of 16-bit inputs without a GPU: the operator computes what it defines, for tensors with and without data."""

import pytest
import torch

from quantkit_kernels.strip_weight import dense, prepare, prepare_dense
from quantkit_kernels.weight import LinearWeight
from quantkit_kernels.weight_only import OF_BITS, multiply, weight_only


def random_weight(bits: int, *, asymmetric: bool = False) -> LinearWeight:
    draw = torch.Generator().manual_seed(bits)
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (40, 100), dtype=torch.int8, generator=draw)
    scale = torch.rand(40, 4, generator=draw).to(torch.bfloat16)
    zero = torch.randint(-8, 8, (40, 4), dtype=torch.int8, generator=draw) if asymmetric else None
    return LinearWeight(codes, scale, zero, (1, 32), bits)


@pytest.mark.parametrize(("bits", "asymmetric"), [(4, False), (4, True), (8, False)])
def test_product_with_a_quantized_weight(bits, asymmetric):
    operand = prepare(random_weight(bits, asymmetric=asymmetric))
    x = torch.randn(5, 100, dtype=torch.float64).float()
    expected = x.double() @ dense(operand, torch.float32).double().T
    magnitude = x.double().abs() @ dense(operand, torch.float32).double().abs().T
    assert ((multiply(x, operand).double() - expected).abs() <= 2.0**-20 * magnitude).all()


def test_product_with_a_weight_in_16_bits_and_a_bias():
    w, x, bias = (torch.randn(*size).bfloat16() for size in ((40, 61), (3, 61), (40,)))
    assert torch.equal(multiply(x, prepare_dense(w), bias), torch.nn.functional.linear(x, w, bias))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_operator_is_what_its_schema_says(bits):
    stored, scale, zero, _, (n, _), _, group = prepare(random_weight(bits))
    arguments = (torch.randn(5, 100), stored, scale, zero, torch.randn(n), n, bits, group, False)
    torch.library.opcheck(weight_only, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operands_that_do_not_fit_are_named():
    operand = prepare(random_weight(4))
    with pytest.raises(AssertionError, match="bias: expected float32"):
        multiply(torch.randn(2, 100), operand, torch.randn(40).half())
    with pytest.raises(AssertionError, match="x of shape"):
        multiply(torch.randn(100), operand)
    with pytest.raises(AssertionError, match="weights of 2 bits"):
        multiply(torch.randn(2, 100), operand._replace(bits=2))


def test_columns_of_x_are_those_of_the_weight():
    for operand in (
        prepare(random_weight(4)),
        prepare(random_weight(8)),
        prepare_dense(torch.randn(40, 100)),
    ):
        for num_cols in (36, 200):
            with pytest.raises(AssertionError, match=r"fragments|weights"):
                multiply(torch.randn(2, num_cols), operand)
    operand = prepare(random_weight(8))
    with pytest.raises(AssertionError, match="scales"):
        multiply(torch.randn(2, 100), operand._replace(group_size=64))


@pytest.mark.parametrize("family", OF_BITS.values(), ids=lambda family: family.name)
def test_every_device_has_a_route_for_every_number_of_rows(family):
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        for num_rows in (1, 32, 33, 4096):
            assert family.usable(num_rows, capability)
            assert family.usable(num_rows, capability)[-1].max_rows is None
