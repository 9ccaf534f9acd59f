"""Which KV block belongs to whom. It knows neither sequences nor what is in a block.

    free    nobody uses it, no hash                     a stack
    cached  nobody uses it, published under a hash      least recently used first; handed out when no free one is left
    used    by one or more, published or not            counted

free + used + cached == num_blocks - 1: block 0 belongs to nobody. Every operation takes constant time per block.
"""

import secrets
from array import array
from collections import OrderedDict
from hashlib import blake2b


class BlockManager:
    """Hands out blocks of `block_size` tokens, shares those published under the same hash, takes them back.

    salt: whatever else the contents depend on: model, scheme, KV dtype, scales. key: of the hash; a random one, if
    None, so that nobody can send a prompt that collides with somebody else's. prefix_caching False: no block is shared.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        salt: bytes,
        key: bytes | None = None,
        prefix_caching: bool = True,
    ) -> None:
        assert num_blocks >= 2 and block_size >= 1, f"no pool: {num_blocks} blocks of {block_size}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._hasher = blake2b(digest_size=16, key=secrets.token_bytes(32) if key is None else key)
        self._root = self._digest(salt)
        self.reset()

    def reset(self) -> None:
        """Nobody uses any block, and nothing is cached."""
        self._num_users = [0] * self.num_blocks
        self._hashes: list[bytes | None] = [None] * self.num_blocks
        self._published: dict[bytes, int] = {}
        self._free = list(range(self.num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = (
            OrderedDict()
        )  # a linked list: any end or middle leaves at once

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """How many can be handed out: all that nobody uses."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_available

    def num_needed(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def num_shareable(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill to the last slot, and may so be published and found."""
        return num_tokens // self.block_size if self._prefix_caching else 0

    def hash_blocks(self, parent: bytes | None, token_ids: list[int]) -> list[bytes]:
        """Hashes of the full blocks of tokens that follow the block with hash `parent`; None: that follow nothing."""
        data, num_bytes = array("I", token_ids).tobytes(), 4 * self.block_size
        last, hashes = self._root if parent is None else parent, []
        for end in range(num_bytes, len(data) + 1, num_bytes):
            last = self._digest(last + data[end - num_bytes : end])
            hashes.append(last)
        return hashes

    def find(self, hashes: list[bytes]) -> list[int]:
        """The blocks published under these hashes, up to the first that is not."""
        found = []
        for block_hash in hashes:
            block = self._published.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, shared: list[int], num_new: int, *, leave: int = 0) -> list[int] | None:
        """Use `shared`, found just now, and `num_new` fresh ones; the list of both.

        None, and nothing taken, if fewer than `leave` would still be available.
        """
        num_revived = sum(1 for block in shared if not self._num_users[block])
        if num_revived + num_new + leave > self.num_available:
            return None
        for block in shared:  # before fresh ones are taken: those may be cached ones
            if not self._num_users[block]:
                del self._cached[block]
            self._num_users[block] += 1
        return shared + [self._take_fresh() for _ in range(num_new)]

    def publish(self, block: int, block_hash: bytes) -> None:
        """Let others find a block in use; where its hash is published already, the older block remains."""
        assert self._num_users[block] and self._hashes[block] is None, f"block {block} is not to be published"
        if block_hash not in self._published:
            self._published[block_hash] = block
            self._hashes[block] = block_hash

    def release(self, blocks: list[int]) -> None:
        """End one use of each: the last first, so that the end of a chain is forgotten before its beginning."""
        for block in reversed(blocks):
            assert self._num_users[block], f"block {block} is released more often than taken"
            self._num_users[block] -= 1
            if not self._num_users[block]:
                self._put_back(block)

    def _put_back(self, block: int) -> None:
        if self._hashes[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _take_fresh(self) -> int:
        block = self._free.pop() if self._free else self._forget_oldest()
        self._num_users[block] = 1
        return block

    def _forget_oldest(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hashes[block]
        assert block_hash is not None, "a cached block is published"
        del self._published[block_hash]
        self._hashes[block] = None
        return block

    def _digest(self, data: bytes) -> bytes:
        hasher = self._hasher.copy()
        hasher.update(data)
        return hasher.digest()
