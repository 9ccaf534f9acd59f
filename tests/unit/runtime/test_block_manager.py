"""Blocks: who has them, what is found, and what is forgotten first."""

import pytest

from quantkit.runtime.block_manager import BlockManager
from tests.unit.runtime.engine_invariants import recomputed_hashes


def manager(num_blocks=6, block_size=2, **options):
    return BlockManager(num_blocks, block_size, salt=b"s", **options)


def published_chain(blocks, token_ids):
    """Blocks of these tokens, used and published."""
    taken = blocks.take([], len(token_ids) // 2)
    for block, block_hash in zip(taken, blocks.hash_blocks(None, token_ids), strict=True):
        blocks.publish(block, block_hash)
    return taken


def find_chain(blocks, token_ids):
    return blocks.find(blocks.hash_blocks(None, token_ids))


def counts(blocks):
    assert blocks.num_free + blocks.num_cached + blocks.num_used == blocks.num_blocks - 1
    return blocks.num_free, blocks.num_cached, blocks.num_used


def test_block_0_belongs_to_nobody():
    blocks = manager()
    assert sorted(blocks.take([], 5)) == [1, 2, 3, 4, 5]


def test_all_or_nothing():
    blocks = manager()
    first = blocks.take([], 3)
    assert blocks.take([], 3) is None
    assert counts(blocks) == (2, 0, 3)
    assert not set(first) & set(blocks.take([], 2))


def test_blocks_to_be_left_are_not_handed_out():
    blocks = manager()
    assert blocks.take([], 4, leave=2) is None
    assert len(blocks.take([], 3, leave=2)) == 3


def test_a_shared_block_that_nobody_uses_is_one_fewer_to_hand_out():
    blocks = manager()
    chain = published_chain(blocks, [7, 7, 8, 8])
    blocks.release(chain)
    assert counts(blocks) == (3, 2, 0)
    assert blocks.take(chain, 4) is None
    assert counts(blocks) == (3, 2, 0)
    assert blocks.take(chain, 3)[:2] == chain
    assert counts(blocks) == (0, 0, 5)


def test_a_shared_block_in_use_costs_nothing():
    blocks = manager()
    chain = published_chain(blocks, [7, 7, 8, 8])
    assert len(blocks.take(chain, 3)) == 5
    blocks.release(chain)
    assert counts(blocks) == (0, 0, 5), "the other one still uses them"


def test_what_is_published_is_found_after_it_is_released():
    blocks = manager()
    chain = published_chain(blocks, [7, 7, 8, 8])
    blocks.release(chain)
    assert find_chain(blocks, [7, 7, 8, 8, 9, 9]) == chain


def test_a_block_is_found_only_after_the_same_beginning():
    blocks = manager()
    published_chain(blocks, [7, 7, 8, 8])
    assert find_chain(blocks, [6, 7, 8, 8]) == []
    assert find_chain(blocks, [8, 8]) == []


def test_the_end_of_a_chain_is_forgotten_before_its_beginning():
    blocks = manager()
    chain = published_chain(blocks, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    blocks.release(chain)
    for num_left in (4, 3, 2, 1, 0):
        blocks.take([], 1)
        assert find_chain(blocks, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]) == chain[:num_left]


def test_the_least_recently_used_chain_is_forgotten_first():
    blocks = manager(num_blocks=5)
    old, new = published_chain(blocks, [1, 1, 2, 2]), published_chain(blocks, [3, 3, 4, 4])
    blocks.release(old)
    blocks.release(new)
    blocks.release(blocks.take(old, 0))  # now `new` is the older one
    blocks.take([], 2)
    assert find_chain(blocks, [3, 3, 4, 4]) == []
    assert find_chain(blocks, [1, 1, 2, 2]) == old


def test_free_blocks_are_handed_out_before_cached_ones():
    blocks = manager(num_blocks=5)
    chain = published_chain(blocks, [1, 1, 2, 2])
    blocks.release(chain)
    assert not set(blocks.take([], 2)) & set(chain)
    assert find_chain(blocks, [1, 1, 2, 2]) == chain


def test_the_older_block_keeps_a_hash():
    blocks = manager()
    first, second = published_chain(blocks, [7, 7]), published_chain(blocks, [7, 7])
    assert find_chain(blocks, [7, 7]) == first
    blocks.release(second)
    assert counts(blocks) == (4, 0, 1), "the younger one is free, not cached"
    blocks.release(first)
    assert find_chain(blocks, [7, 7]) == first


def test_bugs_of_the_caller_are_not_swallowed():
    blocks = manager()
    chain = published_chain(blocks, [7, 7])
    with pytest.raises(AssertionError, match="not to be published"):
        blocks.publish(chain[0], b"another")
    blocks.release(chain)
    with pytest.raises(AssertionError, match="more often than taken"):
        blocks.release(chain)
    with pytest.raises(AssertionError, match="not to be published"):
        blocks.publish(5, b"unused")


def test_hashes_depend_on_key_salt_parent_and_every_token():
    tokens = [1, 2, 3, 4]
    base = recomputed_hashes(tokens, 2, salt=b"s", key=b"k")
    blocks = manager(key=b"k")
    first, second = base
    assert blocks.hash_blocks(None, [*tokens, 5]) == base, "full blocks only"
    assert blocks.hash_blocks(first, tokens[2:]) == [second]
    others = [
        manager(key=b"other").hash_blocks(None, [1, 2]),
        BlockManager(6, 2, salt=b"t", key=b"k").hash_blocks(None, [1, 2]),
        blocks.hash_blocks(first, [1, 2]),
        blocks.hash_blocks(None, [2, 1]),
        blocks.hash_blocks(None, [1, 2 + 2**17]),
    ]
    assert len({first, *(block_hash for hashes in others for block_hash in hashes)}) == 6


def test_nobody_can_guess_a_hash():
    assert manager().hash_blocks(None, [1, 2]) != manager().hash_blocks(None, [1, 2])


def test_without_prefix_caching_no_block_is_shareable():
    assert manager(prefix_caching=False).num_shareable(100) == 0
    assert manager().num_shareable(5) == 2
