"""Which sequences begin alike: hashes of their full blocks, and the blocks published under them.

A block's hash covers all tokens up to its end, so the longest beginning that somebody has computed is found block by
block from the first on. Each block is hashed once: those of a prompt when it comes, others when they are published.
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

    def hash_known(self, sequence: Sequence) -> None:
        """Hash the full blocks of its known tokens, those that are not yet."""
        hashes, size = sequence.block_hashes, self._blocks.block_size
        if len(hashes) < self._blocks.num_shareable(len(sequence.token_ids)):
            parent = hashes[-1] if hashes else None
            hashes += self._blocks.hash_blocks(parent, sequence.token_ids[len(hashes) * size :])

    def find(self, sequence: Sequence, computing: Computing) -> tuple[list[int], bool]:
        """Published blocks of its beginning, and whether it waits for the next: a more important one computes that now.

        At least one token is left to compute. What it waits for is looked for again when nobody computes it any more.
        """
        self.hash_known(sequence)
        num_most = len(sequence.token_ids) - 1
        if sequence.num_scored < len(sequence.targets):  # of tokens in the cache there are no logits
            num_most = min(num_most, sequence.num_scored)
        findable = sequence.block_hashes[: self._blocks.num_shareable(num_most)]
        if self._is_awaited(sequence, findable, computing):
            return [], True
        shared = self._blocks.find(findable)
        sequence.num_found = len(shared)
        return shared, self._is_awaited(sequence, findable, computing)

    def publish(self, sequence: Sequence) -> None:
        """Let others find its blocks that are computed, full, and of known tokens."""
        if sequence.num_computed // self._blocks.block_size == sequence.num_published:
            return  # the usual case
        self.hash_known(sequence)
        num_full = self._blocks.num_shareable(min(sequence.num_computed, len(sequence.token_ids)))
        for index in range(sequence.num_published, num_full):
            self._blocks.publish(sequence.blocks[index], sequence.block_hashes[index])
            sequence.num_published = index + 1

    def computing(self, sequences: Iterable[Sequence]) -> Computing:
        """What these compute now, where others could wait for it; the most important is given first."""
        computing: Computing = {}
        for sequence in sequences:
            computing.setdefault(self.next_hash(sequence), sequence.order)
        return computing

    def next_hash(self, sequence: Sequence) -> bytes | None:
        """The hash of its first block that is not published; None: not all of its tokens are known."""
        hashes = sequence.block_hashes
        return hashes[sequence.num_published] if sequence.num_published < len(hashes) else None

    @staticmethod
    def _is_awaited(sequence: Sequence, findable: list[bytes], computing: Computing) -> bool:
        """Whether the block after those that it found is being computed."""
        if sequence.num_found == len(findable):
            return False
        order = computing.get(findable[sequence.num_found])
        return order is not None and order < sequence.order
