"""The engine's loop around the real scheduler, with a model of hashes instead of a device.

What the model keeps for a position is a hash of its token and of what it keeps for the position before, found through
the block table. The next token is a hash of everything kept so far. So it depends on all tokens, in order, and on
nothing else; after a block that was lost, mixed up or not written, a sequence goes on differently from `alone`.
"""

from collections import deque
from dataclasses import dataclass
from itertools import count

from quantkit.runtime.block_manager import BlockManager
from quantkit.runtime.limits import Limits
from quantkit.runtime.scheduler import Scheduler
from quantkit.runtime.sequence import Sequence

VOCABULARY = 40
EOS = frozenset({0, 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """What scheduling reads of SamplingParams."""

    max_tokens: int = 8
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


def next_token(kept):
    return hash(tuple(kept)) % VOCABULARY


def keep(before, token_id):
    return hash((before, token_id))


def alone(sequence, max_model_len):
    """The tokens and the end of the same request, computed by itself from first to last."""
    copy = Sequence(
        sequence_id=0, prompt_ids=sequence.prompt_ids, params=sequence.params, eos_ids=sequence.eos_ids
    )
    copy.limit = min(copy.limit, max_model_len)
    kept = [0]
    for token_id in copy.token_ids:
        kept.append(keep(kept[-1], token_id))
    finish = None
    while finish is None:
        copy.token_ids.append(next_token(kept[1:]))
        kept.append(keep(kept[-1], copy.token_ids[-1]))
        finish = copy.finish_after_last()
    return copy.token_ids, finish


class FakeRunner:
    """The device: pool and rows. A step is computed when it is launched, and its tokens are seen later."""

    def __init__(self, num_rows, num_blocks, block_size):
        self.pool = [[None] * block_size for _ in range(num_blocks)]
        self.last_token = [None] * num_rows
        self.owner = [(None, 0, 0)] * num_rows  # sequence, generation, tokens computed
        self.num_computed = 0
        self.num_launched = 0

    def launch(self, plan):
        """The tokens of the rows that sample."""
        self.num_launched += 1
        return [token for row in plan.rows if (token := self._compute(row)) is not None]

    def _compute(self, row):
        sequence, end = row.sequence, row.start + row.num_new
        self._check_owner(row, end)
        for position in range(row.start, end):
            before = self._slots(sequence, position)[-1] if position else 0
            assert before is not None, "nobody reads what was not written"
            block, offset = divmod(position, len(self.pool[0]))
            self.pool[sequence.blocks[block]][offset] = keep(before, self._token(row, position))
        self.num_computed += row.num_new
        if not row.samples:
            return None
        self.last_token[row.row] = next_token(self._slots(sequence, end))
        return self.last_token[row.row]

    def _check_owner(self, row, end):
        owner, generation, num_computed = self.owner[row.row]
        if (owner, generation) == (row.sequence, row.generation):
            assert row.start == num_computed, "each position is computed once"
        else:
            assert end <= len(row.sequence.token_ids), "a new owner needs nothing from the row"
        self.owner[row.row] = row.sequence, row.generation, end

    def _token(self, row, position):
        known = row.sequence.token_ids
        return known[position] if position < len(known) else self.last_token[row.row]

    def _slots(self, sequence, num_tokens):
        size = len(self.pool[0])
        blocks = sequence.blocks[: -(-num_tokens // size)]
        return [value for block in blocks for value in self.pool[block]][:num_tokens]


class FakeEngine:
    """depth: how many steps are launched before the first is processed. bounds: of `Limits`, of what waits."""

    def __init__(
        self,
        *,
        num_blocks=64,
        block_size=4,
        max_num_seqs=4,
        budget=32,
        max_model_len=64,
        prefix_caching=True,
        depth=2,
        **bounds,
    ):
        self.blocks = BlockManager(
            num_blocks, block_size, salt=b"fake", key=b"key", prefix_caching=prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            Limits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                max_model_len=max_model_len,
                **bounds,
            ),
        )
        self.runner = FakeRunner(max_num_seqs, num_blocks, block_size)
        self.budget, self.max_model_len, self.depth = budget, max_model_len, depth
        self.in_flight = deque()
        self.sequences = []
        self.given = {}  # tokens that updates gave, by sequence
        self.ended_early = set()
        self.num_dropped = 0
        self._numbers = count()

    def add(self, prompt_ids, **params):
        """A request with one answer."""
        return self.add_many(1, prompt_ids, **params)[0]

    def add_many(self, n, prompt_ids, *, priority=0, eos_ids=EOS, **params):
        """The sequences of a request with n answers."""
        sequences = [
            Sequence(
                sequence_id=number,
                prompt_ids=list(prompt_ids),
                params=Params(**params),
                eos_ids=eos_ids,
                priority=priority,
                arrival=number,
            )
            for _, number in zip(range(n), self._numbers, strict=False)
        ]
        self.scheduler.add(*sequences)
        self.sequences += sequences
        self.given |= {sequence: [] for sequence in sequences}
        return sequences

    def launch(self):
        """The plan, or None."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self._check_plan(plan)
            self.in_flight.append((plan, self.runner.launch(plan)))
            self.scheduler.launched(plan)
        return plan

    def process(self):
        """Process the oldest step in flight, if there is one."""
        if not self.in_flight:
            return []
        plan, token_ids = self.in_flight.popleft()
        updates = self.scheduler.processed(plan, token_ids)
        self.num_dropped += len(token_ids) - len(updates)
        for sequence, token_id, finish in updates:
            self.given[sequence].append(token_id)
            assert finish == sequence.finish
        return updates

    def step(self):
        """What the engine's loop does: launch, then process what was launched `depth` - 1 steps before."""
        plan = self.launch()
        if plan is None or len(self.in_flight) >= self.depth:
            self.process()
        return plan

    def end_early(self, sequence, reason):
        """As if nobody wanted the rest, or a stop string had been found."""
        if sequence.finish is None:
            self.ended_early.add(sequence)
        self.scheduler.finish_early(sequence, reason)

    def run(self, max_steps=10_000):
        """Until everything has ended and nothing is in flight."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"{self.scheduler.stats} after {max_steps} steps")

    def forget(self, sequence):
        """Nothing is known any more of one that has ended."""
        self.sequences.remove(sequence)
        self.ended_early.discard(sequence)
        del self.given[sequence]

    def check_result(self, sequence):
        """What was generated is what `alone` generates, or its beginning if it was ended early."""
        token_ids, finish = alone(sequence, self.max_model_len)
        generated = sequence.token_ids[len(sequence.prompt_ids) :]
        assert self.given[sequence] == generated
        if sequence in self.ended_early:
            assert sequence.token_ids == token_ids[: len(sequence.token_ids)]
        else:
            assert (sequence.token_ids, sequence.finish) == (token_ids, finish)

    def _check_plan(self, plan):
        sizes = [row.num_new for row in plan.rows]
        assert 1 <= sum(sizes) <= self.budget
        assert all(size == 1 for size in sizes[: plan.num_decode])
        assert all(size > 1 for size in sizes[plan.num_decode :])
        assert all(row.samples for row in plan.rows[: plan.num_decode])
        assert len({row.row for row in plan.rows}) == len({row.sequence for row in plan.rows}) == len(sizes)
