"""Which sequences begin alike: hashes of their full blocks, and the blocks published under them.

A block's hash covers all tokens up to its end, so one lookup for each block, from the first on, finds the longest
beginning that somebody has computed. Each block of a sequence is hashed once, when it is first looked for or published.
"""

from collections.abc import Iterable

from quantkit.runtime.block_manager import BlockManager
from quantkit.runtime.sequence import Sequence

# hash of a block: `order` of the sequence that computes it now
Computing = dict[bytes | None, tuple[int, int, int]]


class PrefixCache:
    """Finds and publishes the blocks of sequences."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks

    def find(self, sequence: Sequence, computing: Computing) -> tuple[list[int], bool]:
        """Published blocks of its beginning, and whether a more important sequence computes the next one.

        At least one token is left to compute. What has waited before is known by the last hash that it looked for.
        """
        hashes = sequence.block_hashes
        if hashes and self._is_awaited(hashes[-1], sequence, computing):
            return [], True
        shared: list[int] = []
        for index in range(self._blocks.num_shareable(len(sequence.token_ids) - 1)):
            block_hash = self._hash(sequence, index)
            block = self._blocks.find(block_hash)
            if block is None:
                return shared, self._is_awaited(block_hash, sequence, computing)
            shared.append(block)
        return shared, False

    def publish(self, sequence: Sequence) -> None:
        """Let others find its blocks that are computed, full, and of known tokens."""
        if sequence.num_computed // self._blocks.block_size == sequence.num_published:
            return  # the usual case
        num_full = self._blocks.num_shareable(min(sequence.num_computed, len(sequence.token_ids)))
        for index in range(sequence.num_published, num_full):
            self._blocks.publish(sequence.blocks[index], self._hash(sequence, index))
            sequence.num_published = index + 1

    def computing(self, sequences: Iterable[Sequence]) -> Computing:
        """What these compute now, where others could wait for it; the most important is given first."""
        computing: Computing = {}
        for sequence in sequences:
            computing.setdefault(self.next_hash(sequence), sequence.order)
        return computing

    def next_hash(self, sequence: Sequence) -> bytes | None:
        """The hash of its first block that is not published; None: not all of its tokens are known."""
        if sequence.num_published < self._blocks.num_shareable(len(sequence.token_ids)):
            return self._hash(sequence, sequence.num_published)
        return None

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        hashes, size = sequence.block_hashes, self._blocks.block_size
        for number in range(len(hashes), index + 1):
            token_ids = sequence.token_ids[number * size : (number + 1) * size]
            hashes.append(self._blocks.hash_block(hashes[-1] if hashes else None, token_ids))
        return hashes[index]

    @staticmethod
    def _is_awaited(block_hash: bytes, sequence: Sequence, computing: Computing) -> bool:
        order = computing.get(block_hash)
        return order is not None and order < sequence.order
