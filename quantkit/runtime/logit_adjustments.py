"""What rows ask to be done to their logits before a token is chosen: biases, banned stop tokens, penalties.

    logits ─ + biases ─ − inf for stop tokens that come too early ─ repetition, frequency, presence penalties ─►

Few requests ask, so nothing is kept for rows that do not: biases and bans are entries of a list, and the counts
that penalties need stand in slots, handed out to rows, and made when first asked for. Slot 0 is nobody's: rows
without penalties read and write it.

Shape suffixes: B rows of a step, R rows of the device's state, S slots, V vocab, N entries.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.upload import upload

ALWAYS = 2**62
SLOT_BYTES = 5  # of a token: its count, and whether the prompt has it
ROWS_AT_ONCE = 32  # of float32 intermediates, [rows, V]
NO_PENALTIES = (0.0, 0.0, 1.0)


class LogitAdjustments:
    """The adjustments of all rows, on the device."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._entries: dict[int, Entries] = {}
        self._all_entries: Entries | None = None  # made when next needed
        self._slots: dict[int, int] = {}
        self._slot_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._penalties_R = upload([NO_PENALTIES] * num_rows, torch.float32, device)
        self._counts_SV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._is_in_prompt_SV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def assign(
        self, row: int, params: SamplingParams, prompt_ids: Sequence[int], answer_ids: Sequence[int],
        stop_ids: frozenset[int],
    ) -> None:  # fmt: skip
        """The row belongs to a new sequence, or again to one that has `answer_ids` already."""
        if self._entries.pop(row, None) is not None:
            self._all_entries = None
        added = additions_of(params, len(prompt_ids), stop_ids)
        added = [each for each in added if each.token_id < self._vocab_size]
        if added:
            self._entries[row] = Entries.of(row, added, self._device)
            self._all_entries = None
        if params.has_penalties:
            self._start_counting(self._slot_for(row), prompt_ids, answer_ids)
            penalties = (params.frequency_penalty, params.presence_penalty, params.repetition_penalty)
            self._penalties_R[row] = upload(penalties, torch.float32, self._device)
        elif self._slots.pop(row, None) is not None:
            self._slot_R[row].fill_(0)
            self._penalties_R[row] = upload(NO_PENALTIES, torch.float32, self._device)

    def apply(self, logits_BV: Tensor, rows_B: Tensor, positions_B: Tensor) -> Tensor:
        """The logits as their rows want them, float32, in a tensor of its own."""
        logits_BV = logits_BV.to(torch.float32, copy=True)
        if self._entries:
            if self._all_entries is None:
                self._all_entries = Entries.joined(self._entries.values())
            self._all_entries.add_to(logits_BV, rows_B, positions_B, len(self._slot_R))
        if self._slots:
            for start in range(0, len(rows_B), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                self._penalize(logits_BV[part], rows_B[part])
        return logits_BV

    def count(self, rows_B: Tensor, token_ids_B: Tensor) -> None:
        """These tokens were chosen."""
        if self._slots:
            _count(self._counts_SV, self._slot_R[rows_B], token_ids_B)

    def _penalize(self, logits_BV: Tensor, rows_B: Tensor) -> None:
        """Logits less frequency · count, less presence where there is a count, in place."""
        slots_B = self._slot_R[rows_B]
        frequency_B1, presence_B1, repetition_B1 = self._penalties_R[rows_B].T.unsqueeze(2)
        counts_BV = self._counts_SV[slots_B]
        is_repeated_BV = self._is_in_prompt_SV[slots_B] | (counts_BV > 0)
        smaller_BV = torch.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
        logits_BV.copy_(torch.where(is_repeated_BV, smaller_BV, logits_BV))
        logits_BV -= frequency_B1 * counts_BV + presence_B1 * (counts_BV > 0)

    def _slot_for(self, row: int) -> int:
        """The row's slot; a free one, if it has none, of twice as many, if none is free."""
        slot = self._slots.get(row)
        if slot is None:
            used = set(self._slots.values())
            slot = next(number for number in range(1, len(used) + 2) if number not in used)
            self._slots[row] = slot
            self._slot_R[row].fill_(slot)  # to assign a number waits for the device
        if slot >= len(self._counts_SV):
            num_slots = min(2 * slot, len(self._slot_R) + 1)
            self._counts_SV = _with_rows(self._counts_SV, num_slots)
            self._is_in_prompt_SV = _with_rows(self._is_in_prompt_SV, num_slots)
        return slot

    def _start_counting(self, slot: int, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> None:
        self._counts_SV[slot].zero_()
        self._is_in_prompt_SV[slot].zero_().index_fill_(
            0, upload(prompt_ids, torch.int64, self._device), True
        )
        answer = upload(answer_ids, torch.int64, self._device)
        _count(self._counts_SV, torch.full_like(answer, slot), answer)


class Addition(NamedTuple):
    """What is added to the logit of a token, before a position."""

    token_id: int
    value: float
    until: int


def additions_of(params: SamplingParams, num_prompt_tokens: int, stop_ids: frozenset[int]) -> list[Addition]:
    """The biases of a sequence, and its stop tokens for as long as they come too early."""
    additions = [Addition(token_id, value, ALWAYS) for token_id, value in params.logit_bias.items()]
    if params.min_tokens > 0:
        until = num_prompt_tokens + params.min_tokens
        additions += [Addition(token_id, -torch.inf, until) for token_id in sorted(stop_ids)]
    return additions


class Entries(NamedTuple):
    """Additions to rows, on the device."""

    row_N: Tensor
    token_N: Tensor
    until_N: Tensor
    value_N: Tensor

    @classmethod
    def of(cls, row: int, additions: list[Addition], device: torch.device) -> "Entries":
        """Those to one row."""
        integers = [[row, each.token_id, each.until] for each in additions]
        row_N, token_N, until_N = upload(integers, torch.int64, device).unbind(dim=1)
        value_N = upload([each.value for each in additions], torch.float32, device)
        return cls(row_N, token_N, until_N, value_N)

    @classmethod
    def joined(cls, parts: Iterable["Entries"]) -> "Entries":
        """Those to all rows."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def add_to(self, logits_BV: Tensor, rows_B: Tensor, positions_B: Tensor, num_rows: int) -> None:
        """Add to the rows of this step, each of which is there once, in place."""
        place_R = torch.full((num_rows,), -1, dtype=torch.int64, device=rows_B.device)
        place_R[rows_B] = torch.arange(len(rows_B), device=rows_B.device)
        place_N = place_R[self.row_N]
        is_here = place_N >= 0
        place_N = place_N.clamp(min=0)
        is_here &= positions_B[place_N] < self.until_N
        value_N = torch.where(is_here, self.value_N, 0)
        logits_BV.index_put_((place_N, self.token_N), value_N, accumulate=True)


def _count(counts_SV: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    one = torch.ones((), dtype=counts_SV.dtype, device=counts_SV.device)
    counts_SV.index_put_((slots, token_ids), one, accumulate=True)


def _with_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """A longer tensor, zero where it is new."""
    longer = tensor.new_zeros(num_rows, *tensor.shape[1:])
    longer[: len(tensor)] = tensor
    return longer
