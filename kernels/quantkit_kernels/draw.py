"""A token of each row, drawn from the softmax of its logits / temperature after the filters of the row.

    token = argmin over the kept tokens of   noise(seed, position, token) / exp((logit − largest) / temperature)

With exponential noise that is a draw from the softmax: the first of many clocks to ring, each as fast as its token is
likely. Noise is made of Philox4x32-10, keyed by the row's seed and counted by token and position: a row's draw depends
on nothing else in its batch, and is the same on every device up to the rounding of float32.

The filters look at tokens in order, larger logits first, of equal ones the lower index, and keep a first part of them:

    top k     while fewer than k are before
    top p     while the probability of those before is below p, of what top k left
    min p     those at least p times as likely as the first

Shape suffixes: B rows, V vocab, R rows of the settings.
"""

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.operators import operator
from quantkit_kernels.sampling import argmax

NUM_SETTINGS = 6
MAX_FLOAT = torch.finfo(torch.float32).max
PHILOX_FACTORS = (0xD2511F53, 0xCD9E8D57)
PHILOX_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


class Settings(NamedTuple):
    """How rows are drawn, a number of each row: float32 [B], and int64 [B] of top_k and the seed's halves."""

    inverse_temperature: Tensor  # 0: the first token
    top_k: Tensor  # 0: all
    top_p: Tensor  # 1: all
    log_min_p: Tensor  # −inf: all
    seed_low: Tensor
    seed_high: Tensor


def pack_settings(*, temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> list[int]:
    """One row of settings, int32 numbers, floats by their bits. temperature 0: the first token. seed: 64 bits."""
    inverse = min(1 / temperature, MAX_FLOAT) if temperature > 0 else 0.0
    log_min_p = math.log(min_p) if min_p > 0 else -math.inf
    return list(struct.unpack("<6i", struct.pack("<fiffQ", inverse, top_k, top_p, log_min_p, seed)))


def unpack_settings(settings_R: Tensor, rows_B: Tensor) -> Settings:
    """The settings of some rows."""
    whole = settings_R[rows_B]
    floats, integers = whole.view(torch.float32), whole.long()
    low, high = integers[:, 4] & LOW, integers[:, 5] & LOW
    return Settings(floats[:, 0], integers[:, 1], floats[:, 2], floats[:, 3], low, high)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 bits for four of a counter and two of a key, all in int64 tensors.

    Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * PHILOX_FACTORS[0], c2 * PHILOX_FACTORS[1]  # of 64 bits, which wrap
        c0, c1 = (second >> 32 & LOW) ^ c1 ^ k0, second & LOW
        c2, c3 = (first >> 32 & LOW) ^ c3 ^ k1, first & LOW
        k0, k1 = k0 + PHILOX_STEPS[0] & LOW, k1 + PHILOX_STEPS[1] & LOW
    return c0, c1, c2, c3


def noise(settings: Settings, positions_B: Tensor, num_tokens: int) -> Tensor:
    """Exponential noise of each token, float32 [B, V]. Tokens 4 n … 4 n + 3 take the four words of counter n."""
    number = torch.arange(-(-num_tokens // 4), device=positions_B.device)
    zero = torch.zeros_like(number)
    counter = (number, positions_B.long()[:, None], zero, zero)
    words = philox(counter, (settings.seed_low[:, None], settings.seed_high[:, None]))
    return exponential(torch.stack(words, dim=2).flatten(1)[:, :num_tokens])


def exponential(words: Tensor) -> Tensor:
    """−log(1 − v) of v = (word + 1/2) / 2³², in float32: finest where it decides, at small v."""
    v = (words.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    near_zero = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4))))
    return torch.where(v < 1 / 64, near_zero, -torch.log(1 - v))


def scaled_logits(logits_BV: Tensor, settings: Settings) -> Tensor:
    """(logit − largest) / temperature, float32; 0 for the largest, even if infinite."""
    logits_BV = logits_BV.float()
    largest_B1 = logits_BV.amax(dim=1, keepdim=True)
    scaled_BV = (logits_BV - largest_B1) * settings.inverse_temperature[:, None]
    return scaled_BV.masked_fill(logits_BV == largest_B1, 0)


def kept_tokens(logits_BV: Tensor, settings: Settings) -> Tensor:
    """What the filters leave, bool [B, V]; the largest logit always remains."""
    sorted_BV, order_BV = logits_BV.float().sort(dim=1, descending=True, stable=True)
    num_tokens = logits_BV.shape[1]
    top_k_B = torch.where(settings.top_k > 0, settings.top_k, num_tokens)
    is_kept = torch.arange(num_tokens, device=logits_BV.device) < top_k_B[:, None]
    scaled_BV = scaled_logits(sorted_BV, settings)
    weight_BV = scaled_BV.double().exp() * is_kept
    until_BV = weight_BV.cumsum(dim=1)
    target_B = torch.where(settings.top_p < 1, settings.top_p * until_BV[:, -1], torch.inf)
    is_kept &= until_BV - weight_BV < target_B[:, None]
    is_kept &= scaled_BV >= settings.log_min_p[:, None]
    is_kept[:, 0] = True
    return torch.zeros_like(is_kept).scatter_(1, order_BV, is_kept)


def check(logits_BV: Tensor, settings_R: Tensor, rows_B: Tensor, positions_B: Tensor) -> None:
    """What `draw` says about its operands."""
    assert logits_BV.ndim == 2 and logits_BV.stride(1) == 1 and logits_BV.shape[1] > 0, (
        f"logits {logits_BV.shape} by {logits_BV.stride()}"
    )
    assert logits_BV.shape[1] < 2**24, f"{logits_BV.shape[1]} logits, more than float32 counts"
    assert settings_R.dtype == torch.int32 and settings_R.is_contiguous(), f"settings {settings_R.dtype}"
    assert settings_R.ndim == 2 and settings_R.shape[1] == NUM_SETTINGS, f"settings {settings_R.shape}"
    for name, tensor in (("rows", rows_B), ("positions", positions_B)):
        assert tensor.shape == logits_BV.shape[:1] and tensor.dtype == torch.int64, f"{name} {tensor.shape}"


def _draw(
    logits_BV: Tensor, settings_R: Tensor, rows_B: Tensor, positions_B: Tensor, is_filtered: bool
) -> tuple[Tensor, Tensor]:
    check(logits_BV, settings_R, rows_B, positions_B)
    first_B, is_nan_B = argmax(logits_BV)
    settings = unpack_settings(settings_R, rows_B)
    scaled_BV = scaled_logits(logits_BV, settings)
    is_kept = scaled_BV >= settings.log_min_p[:, None]
    if is_filtered:
        is_kept = kept_tokens(logits_BV, settings)
    scores_BV = noise(settings, positions_B, logits_BV.shape[1]) * torch.exp(-scaled_BV)
    drawn_B = scores_BV.masked_fill(~is_kept, torch.inf).argmin(dim=1)
    return torch.where(is_nan_B | (settings.inverse_temperature == 0), first_B, drawn_B), is_nan_B


def _fake(logits_BV: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    num_rows = logits_BV.shape[0]
    return logits_BV.new_empty(num_rows, dtype=torch.int64), logits_BV.new_empty(num_rows, dtype=torch.bool)


@operator("draw", cpu=_draw, fake=_fake)
def draw(
    logits_BV: Tensor, settings_R: Tensor, rows_B: Tensor, positions_B: Tensor, is_filtered: bool
) -> tuple[Tensor, Tensor]:
    """A token of each row, int64 [B], and whether its logits hold NaN, bool [B]: its token is then the first of those.

    logits_BV: any float dtype, rows contiguous. settings_R: int32 [R, 6] of `pack_settings`. rows_B, positions_B:
    int64, the row of the settings, and the token's place in its sequence. is_filtered: without, top k and top p are not
    looked at.
    """
    from quantkit_kernels import draw_kernel

    return draw_kernel.launch(logits_BV, settings_R, rows_B, positions_B, is_filtered)
