"""What the device knows of every running sequence: its last token and its block table, by row.

    last_token_R     int64 [R + 1]        sampled on the device, or written for sequences that come from the host
    block_table_RL   int32 [R + 1, L]     grows with the sequence; only new entries are sent

Row R is nobody's: padding reads it. Its table is block 0, its token is 0.
"""

from collections.abc import Iterable

import torch

from quantkit.runtime.packed import send
from quantkit.runtime.sequence import Sequence
from quantkit.runtime.step_plan import Scheduled


class RowState:
    """The tensors, and what of them has been sent. L: blocks of the longest sequence."""

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        self.padding_row = num_rows
        self._device = device
        self.last_token_R = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self.block_table_RL = torch.zeros(num_rows + 1, num_columns, dtype=torch.int32, device=device)
        self._owners: list[tuple[Sequence, int] | None] = [None] * num_rows
        self._num_blocks = [0] * num_rows
        self._has_token = [False] * num_rows

    def claim(self, rows: Iterable[Scheduled]) -> list[Scheduled]:
        """Note whose the rows are from now on; returns those that are new to their row."""
        new = []
        for item in rows:
            owner = self._owners[item.row]
            if owner is None or owner[0] is not item.sequence or owner[1] != item.generation:
                self._owners[item.row] = (item.sequence, item.generation)
                self._num_blocks[item.row] = 0
                self._has_token[item.row] = False
                new.append(item)
        return new

    def update(self, rows: Iterable[Scheduled]) -> None:
        """Write what the device lacks: blocks that the sequences were given, tokens that only the host has."""
        at_row: list[int] = []
        at_column: list[int] = []
        blocks: list[int] = []
        token_rows: list[int] = []
        tokens: list[int] = []
        for item in rows:
            sequence, row, sent = item.sequence, item.row, self._num_blocks[item.row]
            if sent < len(sequence.blocks):
                new = sequence.blocks[sent:]
                at_row += [row] * len(new)
                at_column += range(sent, sent + len(new))
                blocks += new
                self._num_blocks[row] = len(sequence.blocks)
            if item.num_new == 1 and not self._has_token[row]:
                token_rows.append(row)
                tokens.append(sequence.token_ids[item.start])
            self._has_token[row] |= item.samples
        if blocks:
            row_U, column_U, block_U = send((at_row, at_column, blocks), self._device)
            self.block_table_RL.index_put_((row_U, column_U), block_U)
        if tokens:
            row_U, token_U = send((token_rows, tokens), self._device)
            self.last_token_R.index_put_((row_U,), token_U.long())
