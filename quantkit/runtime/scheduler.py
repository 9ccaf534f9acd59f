"""Which tokens of which sequences the next step computes. The scheduler never sees a tensor, nor text.

    add ─► waiting ── a row, blocks for every known token ──► running ── finish, abort ──► ended
              ▲                                                  │
              └──────────── preempted: no row, no block ─────────┘

There are no phases: a sequence has `num_computed` of `num_tokens`, and a step computes more of it. What the order of
service promises:

- Rows with one token left come first, one token each; prompts get the rest of the budget in chunks, the most important
  first. The budget exceeds `max_num_seqs` by a block at least: decoding never keeps the first prompt from moving on.
- Nobody overtakes a sequence that waits for blocks or a row, so it gets them when others end. It is overtaken while a
  more important one computes the very block that it needs next: it waits to find that block in the cache.
- A running sequence that needs a block takes it, if none is left, from the newest of the least important that run. The
  most important one can take all; every sequence let in fits alone; so it ends, and then the next one does.
- A sequence with a grammar is left out while a token of it is in flight, which decides what may come next.
- A waiting sequence takes nothing from those that run, however important it is.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from heapq import merge
from operator import attrgetter
from typing import NamedTuple

from quantkit.runtime.block_manager import BlockManager
from quantkit.runtime.limits import Limits
from quantkit.runtime.prefix_cache import PrefixCache
from quantkit.runtime.sequence import FinishReason, Sequence
from quantkit.runtime.step_plan import Scheduled, StepPlan, schedule_tokens

_order = attrgetter("order")


class Update(NamedTuple):
    """A new token of a sequence, and why it is the last one (None: it is not)."""

    sequence: Sequence
    token_id: int
    finish: FinishReason | None


class Stats(NamedTuple):
    """Prefix queries and hits count tokens of prompts, once for each prompt."""

    num_waiting: int
    num_running: int
    kv_usage: float
    num_prefix_queries: int
    num_prefix_hits: int
    num_preemptions: int


class Scheduler:
    """Owns the waiting and the running sequences, their blocks and rows.

    A step is `schedule`, `launched` at once and, any number of steps later but in the same order, `processed`.
    """

    def __init__(self, blocks: BlockManager, limits: Limits) -> None:
        assert limits.max_num_seqs >= 1, "somebody has to run"
        limits.check_budget(blocks.block_size)
        self._limits = limits
        self._blocks = blocks
        self._prefixes = PrefixCache(blocks)
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_preemptions = 0
        self.reset()

    def reset(self) -> None:
        """Forget every sequence and what is cached, whatever was half done."""
        self._waiting: list[Sequence] = []  # both lists: the most important first
        self._running: list[Sequence] = []
        self._free_rows = list(reversed(range(self._limits.max_num_seqs)))
        self._blocks.reset()

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def stats(self) -> Stats:
        return Stats(
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            kv_usage=self._blocks.num_used / (self._blocks.num_blocks - 1),
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            num_preemptions=self._num_preemptions,
        )

    def add(self, *sequences: Sequence) -> None:
        """Let all sequences of a request wait for their turn, or none.

        Raises GenerationError if their turn could never come.
        """
        for sequence in sequences:
            self._limits.check(sequence, self._blocks)
        for sequence in sequences:
            sequence.limit = min(sequence.limit, self._limits.longest(sequence))
            self._prefixes.hash_known(sequence)
            self._enqueue(sequence)

    def schedule(self) -> StepPlan | None:
        """The next step; None if nothing can run before tokens in flight have arrived, or at all."""
        decode, prompts = self._next_tokens()
        waiting = self._waiting[: self._limits.max_num_seqs] if self._free_rows else []
        chunks = self._next_chunks(prompts, waiting, self._limits.max_num_batched_tokens - len(decode))
        return StepPlan.of(decode, chunks) if decode or chunks else None

    def launched(self, plan: StepPlan) -> None:
        """The device will compute the plan: what it fills may be shared, by steps launched later."""
        for sequence, _, start, num_new, samples, _, scored in plan.rows:
            assert sequence.num_computed == start, "a plan is launched once, before anything else happens"
            sequence.num_computed = start + num_new
            sequence.num_in_flight += samples
            if scored:
                sequence.num_scored = scored.stop
            self._prefixes.publish(sequence)

    def processed(self, plan: StepPlan, token_ids: Iterable[int]) -> list[Update]:
        """Take the plan's tokens, one for each row that samples; those of sequences that have ended are dropped."""
        updates = []
        for sequence, token_id in zip(plan.sampling(), token_ids, strict=True):
            sequence.num_in_flight -= 1
            if sequence.finish is None:
                updates.append(self._append(sequence, token_id))
        return updates

    def preempt_all(self) -> None:
        """Have every running sequence begin anew: rows and blocks may not hold what was to be computed."""
        while self._running:
            self._preempt(self._running[-1])

    def abort(self, sequence: Sequence) -> None:
        """End it, wherever it is; nothing happens to one that has ended."""
        self.finish_early(sequence, FinishReason.ABORT)

    def finish_early(self, sequence: Sequence, reason: FinishReason) -> None:
        """End it for a reason that its tokens do not tell, such as a stop string."""
        if sequence.finish is None:
            self._end(sequence, reason)

    def _next_tokens(self) -> tuple[list[Scheduled], list[Sequence]]:
        """Rows of those with one token left, and those with more."""
        decode: list[Scheduled] = []
        prompts: list[Sequence] = []
        block_size = self._blocks.block_size
        for sequence in self._running:  # preemption shortens it at its end, where this has not been yet
            if sequence.mask is not None and sequence.num_in_flight:
                continue
            num_tokens, start = sequence.num_tokens, sequence.num_computed
            if num_tokens - start > 1:
                prompts.append(sequence)
            elif num_tokens < sequence.limit and (start % block_size or self._has_slot(sequence)):
                decode.append(schedule_tokens(sequence, 1))
        return decode, prompts

    def _next_chunks(self, prompts: list[Sequence], waiting: list[Sequence], left: int) -> list[Scheduled]:
        """More of the prompts that run and of those that can begin now, the most important first."""
        chunks = []
        computing = self._prefixes.computing(prompts)
        is_full = False
        for sequence in merge(prompts, waiting, key=_order):
            if left < 2:  # a row of one token samples; one of several tokens would not
                break
            if sequence.row is None:
                if is_full:
                    continue
                shared, is_awaited = self._prefixes.find(sequence, computing)
                if is_awaited:
                    continue
                is_full = not self._start(sequence, shared)
                if is_full:
                    continue
                computing.setdefault(self._prefixes.next_hash(sequence), sequence.order)
            chunks.append(schedule_tokens(sequence, min(sequence.num_tokens - sequence.num_computed, left)))
            left -= chunks[-1].num_new
        return chunks

    def _start(self, sequence: Sequence, shared: list[int]) -> bool:
        """Give it a row and blocks for all tokens that are known; False, and nothing done, if that cannot be yet.

        As many blocks remain as sequences run, so that these can grow and do not preempt the new one at once.

        A row may have had an owner a moment ago, and a step that writes this owner's token there may be in flight. That
        does no harm: steps run in the order of launches, and the new owner, all of whose tokens the host knows, reads
        nothing from the row before a step of its own has written there.
        """
        if not self._free_rows or sequence.num_in_flight:  # preempted: its token in flight comes first
            return False
        num_new = self._blocks.num_needed(len(sequence.token_ids)) - len(shared)
        blocks = self._blocks.take(shared, num_new, leave=len(self._running))
        if blocks is None:
            return False
        self._dequeue(sequence)
        insort(self._running, sequence, key=_order)
        sequence.row = self._free_rows.pop()
        sequence.blocks = blocks
        sequence.num_published = len(shared)
        sequence.num_computed = len(shared) * self._blocks.block_size
        if not sequence.generation:
            self._count_hits(sequence)
        sequence.generation += 1
        return True

    def _count_hits(self, sequence: Sequence) -> None:
        sequence.num_cached = sequence.num_computed
        self._num_prefix_queries += len(sequence.prompt_ids)
        self._num_prefix_hits += sequence.num_cached

    def _has_slot(self, sequence: Sequence) -> bool:
        """See to a place for its next token; False if it was preempted itself."""
        if sequence.num_computed < len(sequence.blocks) * self._blocks.block_size:
            return True
        while (block := self._blocks.take([], 1)) is None:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += block
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Leave it nothing but its tokens; what it published is found again, if nobody needs the room."""
        self._num_preemptions += 1
        self._stop_running(sequence)
        sequence.num_computed = sequence.num_published = 0
        self._enqueue(sequence)

    def _append(self, sequence: Sequence, token_id: int) -> Update:
        sequence.token_ids.append(token_id)
        finish = sequence.finish_after_last()
        if finish is not None:
            self._end(sequence, finish)
        else:
            self._prefixes.publish(sequence)
        return Update(sequence, token_id, finish)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish = reason
        if sequence.row is None:
            self._dequeue(sequence)
        else:
            self._stop_running(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        assert sequence.row is not None, "what runs has a row"
        _remove(self._running, sequence)
        self._free_rows.append(sequence.row)
        self._blocks.release(sequence.blocks)
        sequence.row, sequence.blocks = None, []

    def _enqueue(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_order)

    def _dequeue(self, sequence: Sequence) -> None:
        _remove(self._waiting, sequence)


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(queue, sequence.order, key=_order)
    assert queue[index] is sequence, "a sequence is where its order says"
    del queue[index]
