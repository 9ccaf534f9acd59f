"""Scheduler and blocks under anything that can happen in any order: a long random walk, and hypothesis."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quantkit.runtime.sequence import FinishReason
from tests.unit.runtime.engine_invariants import Invariants
from tests.unit.runtime.fake_engine import FakeEngine

PREFIXES = [[], [5, 6, 7, 8, 9], [5, 6, 7, 8, 2, 3, 4, 5, 6, 7], [9] * 13]
NUM_STEPS = 100_000

WALKS = {
    "small pool": {"num_blocks": 12, "block_size": 4, "max_num_seqs": 4, "budget": 8, "max_model_len": 44},
    "one token a block": {
        "num_blocks": 34,
        "block_size": 1,
        "max_num_seqs": 3,
        "budget": 12,
        "max_model_len": 34,
    },
    "long blocks": {"num_blocks": 6, "block_size": 16, "max_num_seqs": 8, "budget": 24, "max_model_len": 64},
    "enough of all": {
        "num_blocks": 99,
        "block_size": 4,
        "max_num_seqs": 8,
        "budget": 64,
        "max_model_len": 40,
    },
    "no prefix caching": {
        "num_blocks": 14,
        "block_size": 4,
        "max_num_seqs": 5,
        "budget": 9,
        "prefix_caching": False,
    },
    "three steps deep": {"num_blocks": 12, "block_size": 4, "max_num_seqs": 4, "budget": 9, "depth": 3},
    "one step deep": {"num_blocks": 12, "block_size": 4, "max_num_seqs": 4, "budget": 9, "depth": 1},
}


class Walk:
    """Adds, steps, aborts and ends early at random."""

    def __init__(self, seed, **sizes):
        self.engine = FakeEngine(**{"max_model_len": 40, **sizes})
        self.invariants = Invariants(self.engine)
        self.random = random.Random(seed)

    def go(self, num_steps):
        num_launched = 0
        while num_launched < num_steps:
            self.forget_ended()
            if self.random.random() < 0.15 and len(self.engine.sequences) < 12:
                self.add()
            if self.random.random() < 0.02:
                self.end_one()
            if len(self.engine.in_flight) >= self.engine.depth or self.random.random() < 0.1:
                self.engine.process()
            else:
                num_launched += self.engine.launch() is not None
            if self.random.random() < 0.25:  # each takes longer than a step
                self.invariants.check()

    def add(self):
        prompt_ids = self.random.choice(PREFIXES) + self.random.choices(
            range(2, 9), k=self.random.randint(1, 12)
        )
        params = {
            "max_tokens": self.random.randint(1, 14),
            "min_tokens": self.random.choice([0, 0, 3]),
            "ignore_eos": self.random.random() < 0.2,
            "stop_token_ids": (7,) if self.random.random() < 0.2 else (),
        }
        priority = self.random.choice([0, 0, 0, -1, 1])
        n = self.random.choice([1, 1, 1, 2, 4])
        self.engine.add_many(n, prompt_ids, priority=priority, **params)

    def end_one(self):
        """In any state, ended ones too."""
        if self.engine.sequences:
            sequence = self.random.choice(self.engine.sequences)
            self.engine.end_early(sequence, self.random.choice([FinishReason.ABORT, FinishReason.STOP]))

    def forget_ended(self):
        ended = [sequence for sequence in self.engine.sequences if sequence.finish is not None]
        for sequence in ended:
            self.engine.check_result(sequence)
            if not sequence.num_in_flight:
                self.engine.forget(sequence)

    def finish(self):
        self.engine.run()
        self.invariants.check_idle()
        self.forget_ended()


@pytest.mark.parametrize("name", WALKS)
def test_no_block_row_or_sequence_is_lost_in_100_000_steps(name):
    walk = Walk(name, **WALKS[name])
    walk.go(NUM_STEPS // len(WALKS))
    walk.finish()
    stats = walk.engine.scheduler.stats
    assert walk.engine.num_dropped > 0 or name == "one step deep"
    assert (stats.num_prefix_hits > 0) == (name != "no prefix caching")
    assert (stats.num_preemptions > 0) == (name != "enough of all")


class Machine(RuleBasedStateMachine):
    """The same, for hypothesis to make small what fails."""

    @initialize(
        block_size=st.integers(1, 5),
        num_spare=st.integers(0, 8),
        max_num_seqs=st.integers(1, 5),
        chunk=st.integers(0, 12),
        prefix_caching=st.booleans(),
        depth=st.integers(1, 3),
    )
    def begin(self, block_size, num_spare, max_num_seqs, chunk, **rest):
        longest = 30
        self.engine = FakeEngine(
            num_blocks=1 - (-longest // block_size) + num_spare,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            budget=max_num_seqs + block_size + chunk,
            max_model_len=longest,
            **rest,
        )
        self.checks = Invariants(self.engine)

    @rule(
        prefix=st.sampled_from(PREFIXES),
        rest=st.lists(st.integers(2, 4), min_size=1, max_size=9),
        priority=st.integers(-1, 1),
        n=st.integers(1, 3),
        max_tokens=st.integers(1, 9),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
    )
    def add(self, prefix, rest, priority, n, **params):
        self.engine.add_many(n, prefix + rest, priority=priority, **params)

    @rule()
    def launch(self):
        if len(self.engine.in_flight) < self.engine.depth:
            self.engine.launch()

    @rule()
    def launch_fails(self):
        self.engine.scheduler.schedule()
        self.engine.scheduler.preempt_all()

    @rule()
    def process(self):
        self.engine.process()

    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT, FinishReason.STOP]))
    def end_early(self, data, reason):
        if self.engine.sequences:
            self.engine.end_early(data.draw(st.sampled_from(self.engine.sequences)), reason)

    @invariant()
    def everything_adds_up(self):
        self.checks.check()

    def teardown(self):
        self.engine.run()
        self.checks.check_idle()
        for sequence in self.engine.sequences:
            self.engine.check_result(sequence)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
