"""What a request generates depends on its tokens alone: not on chunks, the cache, preemption, or who else is served."""

import random
from typing import NamedTuple

from tests.unit.runtime.fake_engine import FakeEngine

ROOMY = {"num_blocks": 400, "block_size": 4, "max_num_seqs": 8, "budget": 512, "max_model_len": 64}
SEEDS = range(20)


class Figures(NamedTuple):
    """Over all seeds."""

    num_launched: int
    num_hits: int
    num_preemptions: int
    num_dropped: int


def requests(seed):
    """Prompts that often begin alike, and their options."""
    rng = random.Random(seed)
    beginnings = [rng.choices(range(2, 40), k=rng.randint(0, 24)) for _ in range(3)]
    for _ in range(10):
        prompt_ids = rng.choice(beginnings) + rng.choices(range(2, 40), k=rng.randint(1, 12))
        yield prompt_ids, {"max_tokens": rng.randint(1, 25), "priority": rng.randint(-1, 1)}


def run(seed, **sizes):
    """What each request generates, its end, and the engine afterwards."""
    engine = FakeEngine(**{**ROOMY, **sizes})
    sequences = [engine.add(prompt_ids, **options) for prompt_ids, options in requests(seed)]
    engine.run()
    return [(sequence.token_ids, sequence.finish) for sequence in sequences], engine


def assert_same(one, other):
    """For all seeds; returns the figures of both kinds of engine, added up."""
    totals = [[], []]
    for seed in SEEDS:
        (tokens, first), (other_tokens, second) = run(seed, **one), run(seed, **other)
        assert tokens == other_tokens, seed
        for engine, total in zip((first, second), totals, strict=True):
            stats = engine.scheduler.stats
            total.append(
                (engine.runner.num_launched, stats.num_prefix_hits, stats.num_preemptions, engine.num_dropped)
            )
    return [Figures(*map(sum, zip(*total, strict=True))) for total in totals]


def test_chunked_is_whole():
    whole, chunked = assert_same({}, {"budget": 13})
    assert chunked.num_launched > 1.1 * whole.num_launched


def test_cached_is_cold():
    cold, cached = assert_same({"prefix_caching": False}, {})
    assert cold.num_hits == 0 < cached.num_hits


def test_a_cache_that_forgets_changes_nothing():
    cached, forgetting = assert_same({}, {"num_blocks": 17, "max_num_seqs": 2})
    assert 0 < forgetting.num_hits < cached.num_hits


def test_preempted_is_not_preempted():
    roomy, tight = assert_same({}, {"num_blocks": 17})
    assert roomy.num_preemptions == 0 < tight.num_preemptions


def test_company_changes_nothing():
    together, one_by_one = assert_same({}, {"max_num_seqs": 1})
    assert one_by_one.num_launched > 2 * together.num_launched


def test_overlap_changes_nothing():
    at_once, overlapped = assert_same({"depth": 1}, {"depth": 2})
    assert at_once.num_dropped == 0 < overlapped.num_dropped
    assert_same({"depth": 2}, {"depth": 3})
