"""What is true between any two calls of the scheduler, checked from scratch: nothing is counted incrementally."""

from collections import Counter
from hashlib import blake2b


class Invariants:
    """Of one engine. Remembers what it saw under a hash: the same hash has the same contents for ever."""

    def __init__(self, engine):
        self._engine = engine
        self._contents = {}

    def check(self):
        engine = self._engine
        waiting, running = engine.scheduler._waiting, engine.scheduler._running
        self._check_queues(waiting, running)
        self._check_blocks(running)
        self._check_published(running)
        in_flight = Counter(sequence for plan, _ in engine.in_flight for sequence in plan.sampling())
        assert all(sequence.num_in_flight == in_flight[sequence] for sequence in [*waiting, *running])
        assert all(sequence.num_in_flight == number for sequence, number in in_flight.items())

    def check_idle(self):
        """After the last sequence has ended: everything is to be had again."""
        blocks, scheduler = self._engine.blocks, self._engine.scheduler
        self.check()
        assert not scheduler.has_unfinished and scheduler.schedule() is None
        assert blocks.num_used == 0 and not any(blocks._num_users)
        assert all(sequence.finish is not None for sequence in self._engine.sequences)

    def _check_queues(self, waiting, running):
        scheduler = self._engine.scheduler
        alive = [sequence for sequence in self._engine.sequences if sequence.finish is None]
        assert Counter(waiting) + Counter(running) == Counter(alive)
        for queue in (waiting, running):
            assert queue == sorted(queue, key=lambda sequence: sequence.order)
        for sequence in waiting:
            assert sequence.row is None and not sequence.blocks
            assert sequence.num_computed == sequence.num_published == 0
        rows = [sequence.row for sequence in running]
        assert sorted(rows + scheduler._free_rows) == list(range(len(self._engine.runner.last_token)))
        stats = scheduler.stats
        assert (stats.num_waiting, stats.num_running) == (len(waiting), len(running))

    def _check_blocks(self, running):
        blocks = self._engine.blocks
        users = Counter(block for sequence in running for block in sequence.blocks)
        assert [users[block] for block in range(blocks.num_blocks)] == blocks._num_users
        places = [*blocks._free, *blocks._cached, *users]
        assert sorted(places) == list(range(1, blocks.num_blocks)), "each block in one place, block 0 in none"
        assert blocks.num_free + blocks.num_cached + blocks.num_used == blocks.num_blocks - 1
        assert all(blocks._hashes[block] is None for block in blocks._free)
        assert all(blocks._hashes[block] is not None for block in blocks._cached)
        for sequence in running:
            assert sequence.num_computed <= len(sequence.blocks) * blocks.block_size
            assert len(set(sequence.blocks)) == len(sequence.blocks)

    def _check_published(self, running):
        blocks, pool = self._engine.blocks, self._engine.runner.pool
        hashes = {block: block_hash for block, block_hash in enumerate(blocks._hashes) if block_hash}
        assert {block_hash: block for block, block_hash in hashes.items()} == blocks._published
        for block, block_hash in hashes.items():
            contents = tuple(pool[block])
            assert None not in contents and self._contents.setdefault(block_hash, contents) == contents
        for sequence in running:
            expected = recomputed_hashes(sequence.token_ids, blocks.block_size)
            assert sequence.block_hashes == expected[: len(sequence.block_hashes)]
            assert len(sequence.block_hashes) <= len(expected)
            for index, block in enumerate(sequence.blocks):
                assert blocks._hashes[block] in ([None, expected[index]] if index < len(expected) else [None])


def recomputed_hashes(token_ids, block_size, *, salt=b"fake", key=b"key"):
    """Hashes of full blocks, from the definition."""
    parent, hashes = blake2b(salt, key=key, digest_size=16).digest(), []
    for end in range(block_size, len(token_ids) + 1, block_size):
        tokens = b"".join(token.to_bytes(4, "little") for token in token_ids[end - block_size : end])
        parent = blake2b(parent + tokens, key=key, digest_size=16).digest()
        hashes.append(parent)
    return hashes
