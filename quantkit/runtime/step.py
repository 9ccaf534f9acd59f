"""One step as tensors: new tokens of several sequences, where their keys and values go, and what they may see.

    rows        | one new token each: decode | padding | chunks of prompts: prefill |
    token_ids   | t | t | t |                | 0 | 0   | t t t t t t | t t t t |
    slots       block · block_size + offset of each new token; −1 of padding, which is stored nowhere

Knows nothing of why these sequences, and nothing of layers.
Shape suffixes: T new tokens of all sequences, B sequences, L blocks of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.paged_kv import Pages


class Row(NamedTuple):
    """A sequence's part of a step: its new tokens, how many are in the pool before them, its blocks in order."""

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens in the pool after the step."""
        return self.start + len(self.token_ids)


PADDING = Row((0,), 0, (0,))  # reads block 0, which is nobody's and finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """token_ids_T, positions_T, slots_T: int64, decode rows first.

    decode, prefill: pages of the two kinds of rows, None where there are none of a kind. num_decode_tokens: of the
    first kind, padding included.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    decode: Pages | None
    prefill: Pages | None
    num_decode_tokens: int


def build_step(
    rows: Sequence[Row],
    *,
    block_size: int,
    device: torch.device,
    decode_tokens: int = 1,
    num_padding: int = 0,
) -> Step:
    """The step over `rows`, whose decode rows come first.

    decode_tokens: rows at the front with at most so many new tokens are decode rows, up to 16 (1, or 1 + k where k
    tokens were guessed). num_padding: rows of nothing behind the decode rows.
    """
    num_decode = next((at for at, row in enumerate(rows) if len(row.token_ids) > decode_tokens), len(rows))
    decode = [*rows[:num_decode], *[PADDING] * num_padding]
    prefill = rows[num_decode:]
    ordered = [*decode, *prefill]
    slots = [slot for row in rows[:num_decode] for slot in _slots(row, block_size)]
    slots += [-1] * num_padding + [slot for row in prefill for slot in _slots(row, block_size)]
    positions = [position for row in ordered for position in range(row.start, row.length)]
    return Step(
        token_ids_T=torch.tensor([token for row in ordered for token in row.token_ids], device=device),
        positions_T=torch.tensor(positions, device=device),
        slots_T=torch.tensor(slots, device=device),
        decode=_pages(decode, device),
        prefill=_pages(prefill, device),
        num_decode_tokens=sum(len(row.token_ids) for row in decode),
    )


def _slots(row: Row, block_size: int) -> list[int]:
    return [
        row.blocks[position // block_size] * block_size + position % block_size
        for position in range(row.start, row.length)
    ]


def _pages(rows: Sequence[Row], device: torch.device) -> Pages | None:
    if not rows:
        return None
    width = max(len(row.blocks) for row in rows)
    table = [[*row.blocks, *[0] * (width - len(row.blocks))] for row in rows]
    ends = [0]
    for row in rows:
        ends.append(ends[-1] + len(row.token_ids))
    return Pages(
        torch.tensor(table, dtype=torch.int32, device=device),
        torch.tensor([row.length for row in rows], dtype=torch.int32, device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        max_q_len=max(len(row.token_ids) for row in rows),
        max_context=max(row.length for row in rows),
    )
