"""Rotations made of Hadamard matrices, for the sizes that models have.

A Hadamard matrix (entries ±1, orthogonal rows) spreads one large value evenly over all channels. Sylvester's
construction gives the powers of two, Paley's two the rest: order q + 1 for a prime q ≡ 3 (mod 4), 2(q + 1) for
a prime q ≡ 1 (mod 4). A size is a Kronecker product of both (576 = 36 · 16); where its odd part has no such
matrix, a random orthogonal one takes its place.

Shape suffixes: K channels, T rows.
"""

from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

MAX_SYLVESTER_BITS = 7  # factors up to 128: two small products beat one of 4096


class Rotation(NamedTuple):
    """R = diag(signs) · (factors[0] ⊗ factors[1] ⊗ …), orthogonal [K, K]; float64.

    The signs come first: a Hadamard matrix alone gathers in one channel what all channels have in common.
    """

    signs_K: Tensor
    factors: tuple[Tensor, ...]


def random_rotation(size: int, seed: int) -> Rotation:
    """A rotation of `size` channels: random signs, then `orthogonal_factors`."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return Rotation(signs, orthogonal_factors(size, generator))


def rotate(x_TK: Tensor, rotation: Rotation) -> Tensor:
    """x · R along the last dimension, in the shape of x; float64 if x is, else float32.

    K · (sum of the factors' sizes) products per row, not K².
    """
    dtype = torch.float64 if x_TK.dtype == torch.float64 else torch.float32
    signs = rotation.signs_K.to(x_TK.device, dtype)
    rotated = (x_TK.to(dtype) * signs).reshape(-1, *(len(factor) for factor in rotation.factors))
    # a product puts its dimension last, so after all the order is the old one
    for factor in rotation.factors:
        rotated = torch.tensordot(rotated, factor.to(x_TK.device, dtype), dims=([1], [0]))
    return rotated.reshape(x_TK.shape)


def orthogonal_factors(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Orthonormal float64 matrices whose Kronecker product is [size, size] and mixes all channels.

    All entries of the product are ±1/√size, unless size is no multiple of a Paley order with the same odd
    part; then the factor of the odd part is drawn from `generator`.
    """
    odd = size // (size & -size)
    orders = [odd << shift for shift in range((size // odd).bit_length())]
    order = next((order for order in orders if odd > 1 and _paley_prime(order)), odd)
    factors = [_sylvester(bits) for bits in _parts((size // order).bit_length() - 1)]
    if order > odd:
        factors.insert(0, _paley(order))
    elif odd > 1:
        factors.insert(0, _random_orthogonal(odd, generator))
    return tuple(factors)


def _parts(bits: int) -> list[int]:
    """`bits` as the fewest, most even parts of at most MAX_SYLVESTER_BITS."""
    num_parts = -(-bits // MAX_SYLVESTER_BITS)
    return [(bits + part) // num_parts for part in range(num_parts)]


def _sylvester(bits: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(bits):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix.div(len(matrix) ** 0.5)


def _paley_prime(order: int) -> int | None:
    """The prime that gives a Hadamard matrix of this order: order − 1 ≡ 3, or order/2 − 1 ≡ 1 (mod 4)."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    if order % 4 == 0 and order // 2 % 4 == 2 and _is_prime(order // 2 - 1):
        return order // 2 - 1
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _paley(order: int) -> Tensor:
    """Paley's matrix of an order that has a prime, orthonormal."""
    prime = _paley_prime(order)
    assert prime is not None, "asked for before"
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)  # conference matrix: 0 on the diagonal
    core[0, 1:] = 1
    core[1:, 0] = 1 if prime % 4 == 1 else -1
    core[1:, 1:] = _residue_signs(prime)
    one = torch.eye(prime + 1, dtype=torch.float64)
    if prime % 4 == 3:
        return (core + one).div(order**0.5)
    off, on = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
    return (torch.kron(core, off) + torch.kron(one, on)).div(order**0.5)


def _residue_signs(prime: int) -> Tensor:
    """[prime, prime]: 1 where column − row is a square modulo prime, −1 where it is none, 0 on the diagonal."""
    signs = torch.full((prime,), -1.0, dtype=torch.float64)
    signs[torch.arange(prime) ** 2 % prime] = 1
    signs[0] = 0
    row, column = torch.arange(prime)[:, None], torch.arange(prime)
    return signs.take((column - row) % prime)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Drawn evenly from all orthogonal matrices: the Q of a Gaussian one, with R's diagonal made positive."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal.contiguous()
