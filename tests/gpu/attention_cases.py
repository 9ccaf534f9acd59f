"""Paged pools and batches for tests and timings of attention: random blocks, poison wherever nothing may be read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.paged_kv import EIGHT_BIT, KVPool, Masking, Pages, attend

NAN_CODE = 0x7F  # of e4m3; of int8 it is the largest code


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch: lengths with the new tokens, how many of these each sequence has, and how it is stored."""

    lengths: tuple[int, ...]
    q_lens: tuple[int, ...]
    num_queries: int = 8
    num_heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    per_token: bool = False
    q_dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    q_size: float = 1.0

    def masking(self) -> Masking:
        return Masking(1.0 / math.sqrt(self.head_dim), self.window, self.soft_cap)


def build(case: Case, device: str, *, seed: int = 0, spare: int = 3) -> tuple[Tensor, KVPool, Pages]:
    """Queries, pool and pages. Blocks are in random order; whatever no row sees is NaN, and so are spare blocks.

    Also poisoned: scales of unseen tokens; entries of the table that nobody may follow point outside the pool.
    """
    random = torch.Generator().manual_seed(seed)
    size = case.block_size
    num_used = [-(-length // size) for length in case.lengths]
    num_blocks = sum(num_used) + spare
    order = torch.randperm(num_blocks, generator=random)
    table_BL = torch.full((len(case.lengths), max(num_used) + 2), 1 << 30, dtype=torch.int32)
    is_seen_PS = torch.zeros(num_blocks, size, dtype=torch.bool)
    taken = 0
    for sequence, (length, q_len, used) in enumerate(zip(case.lengths, case.q_lens, num_used, strict=True)):
        blocks_L = order[taken : taken + used]
        lowest = max(0, length - q_len - case.window + 1) if case.window else 0
        table_BL[sequence, lowest // size : used] = blocks_L[lowest // size :].int()
        token_C = torch.arange(lowest, length)
        is_seen_PS[blocks_L[token_C // size], token_C % size] = True
        taken += used
    shape = (num_blocks, case.num_heads, size, case.head_dim)
    values = [torch.randn(shape, generator=random) for _ in range(2)]
    values[1] += 0.5  # sums that do not cancel
    pool = _store(case, values, is_seen_PS, random, device)
    bounds = torch.tensor([0, *case.q_lens]).cumsum(0).int()
    total = int(bounds[-1])
    q = torch.randn(total, case.num_queries + 2, case.head_dim, generator=random) * case.q_size
    q_TQD = q.to(case.q_dtype).to(device)[:, 1:-1]  # a part of a wider row
    pages = Pages(table_BL.to(device), torch.tensor(case.lengths).int().to(device), bounds.to(device),
                  max(case.q_lens), max(case.lengths))  # fmt: skip
    return q_TQD, pool, pages


def _store(
    case: Case, values: list[Tensor], is_seen_PS: Tensor, random: torch.Generator, device: str
) -> KVPool:
    is_unseen = ~is_seen_PS[:, None, :, None]
    if case.dtype not in EIGHT_BIT:
        return KVPool(*(x.masked_fill(is_unseen, torch.nan).to(case.dtype).to(device) for x in values))
    largest = 448.0 if case.dtype == torch.float8_e4m3fn else 127.0
    codes, scales = [], []
    for x in values:
        if case.per_token:
            x = x * torch.exp(2 * torch.randn(*x.shape[:3], 1, generator=random))
            scale = x.abs().amax(dim=3) / largest
            per_element = scale.unsqueeze(-1)
            scale = scale.masked_fill(is_unseen.squeeze(-1), torch.nan)
        else:
            scale = x.abs().amax(dim=(0, 2, 3)) / largest
            per_element = scale[:, None, None]
        code = x / per_element
        code = (
            code.clamp(-largest, largest).to(case.dtype) if largest == 448.0 else code.round().to(case.dtype)
        )
        code = code.view(torch.int8).masked_fill(is_unseen, NAN_CODE).view(case.dtype)
        codes.append(code.to(device))
        scales.append(scale.contiguous().to(device))
    return KVPool(*codes, *scales)


def exact_and_bound(case: Case, q_TQD: Tensor, pool: KVPool, pages: Pages) -> tuple[Tensor, Tensor]:
    """The result in float64 and how far a kernel may be from it, element by element.

    Relative to Σ p |v|: probabilities rounded to 16 bits; scores off by sums in float32 (and tanh), which the
    exponential passes on; sums over tokens in float32. Relative to the largest |v|: probabilities below the
    normal range of fp16. Then one rounding of the result.
    """
    masking, wide_TQD = case.masking(), q_TQD.double()
    exact_TQD = attend(wide_TQD, pool, pages, masking)
    magnitude_TQD = attend(wide_TQD, _with_absolute_values(pool), pages, masking)
    largest_v = _largest(pool.v_PHSD, pool.v_scale)
    norm_k = _largest(pool.k_PHSD, pool.k_scale) * math.sqrt(case.head_dim)
    norm_q = wide_TQD.norm(dim=2).max()
    score_error = 2**-23 * case.head_dim * masking.softmax_scale * norm_q * norm_k + 2**-20 * (
        1 + case.soft_cap
    )
    num_tokens = max(case.lengths)
    of_probability = torch.finfo(torch.bfloat16 if case.dtype == torch.bfloat16 else torch.float16).eps / 2
    relative = of_probability + 2 * score_error + num_tokens * 2**-23
    of_result = torch.finfo(case.q_dtype).eps / 2
    bound_TQD = 1.1 * relative * magnitude_TQD + num_tokens * 2**-25 * largest_v + of_result * exact_TQD.abs()
    return exact_TQD, bound_TQD


def _with_absolute_values(pool: KVPool) -> KVPool:
    if pool.v_PHSD.dtype in EIGHT_BIT:
        return pool._replace(v_PHSD=pool.v_PHSD.float().abs().nan_to_num(0).to(pool.v_PHSD.dtype))
    return pool._replace(v_PHSD=pool.v_PHSD.abs())


def _largest(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Largest magnitude of what is stored and not poison."""
    x = codes.double()
    if scale is not None:
        x *= (scale if scale.dim() == 3 else scale[:, None]).double().unsqueeze(-1)
    return x.abs().nan_to_num(0).max()
