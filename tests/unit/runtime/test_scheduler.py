"""Who is served when: budget, order, sharing, preemption, and ends in every state."""

import pytest

from quantkit.errors import GenerationError
from quantkit.runtime.sequence import FinishReason
from tests.unit.runtime.engine_invariants import Invariants
from tests.unit.runtime.fake_engine import FakeEngine, alone

NO_EOS = frozenset()


def prompt(number, length):
    """Different beginnings for different numbers."""
    return [100 + number] * length


def sizes(plan):
    """Tokens of each sequence in a step."""
    return {row.sequence.sequence_id: row.num_new for row in plan.rows}


def last_possible(engine, prompt_ids, **params):
    """What the request generates."""
    sequence = engine.add(prompt_ids, **params)
    engine.scheduler.abort(sequence)
    return alone(sequence, engine.max_model_len)[0][len(prompt_ids) :]


def finished(engine, *sequences):
    engine.run()
    Invariants(engine).check_idle()
    for sequence in sequences:
        engine.check_result(sequence)


# budget


def test_a_prompt_is_computed_in_chunks_of_what_the_budget_leaves():
    engine = FakeEngine(budget=10, max_num_seqs=4)
    long = engine.add(prompt(0, 25), max_tokens=2, eos_ids=NO_EOS)
    short = engine.add(prompt(1, 3), max_tokens=2, eos_ids=NO_EOS)
    plans = [engine.step() for _ in range(4)]
    assert [sizes(plan) for plan in plans[:3]] == [{0: 10}, {0: 10}, {0: 5, 1: 3}]
    assert [[row.samples for row in plan.rows] for plan in plans[:3]] == [[False], [False], [True, True]]
    assert sizes(plans[3]) == {0: 1, 1: 1}
    finished(engine, long, short)


def test_rows_of_one_token_come_first():
    engine = FakeEngine(budget=10, max_num_seqs=4)
    first = engine.add(prompt(0, 4), max_tokens=9, eos_ids=NO_EOS)
    engine.step()
    second = engine.add(prompt(1, 30), priority=-1, max_tokens=1)
    plan = engine.step()
    assert [(row.sequence, row.num_new) for row in plan.rows] == [(first, 1), (second, 9)]
    assert plan.num_decode == 1


def test_a_row_of_one_token_always_samples():
    engine = FakeEngine(budget=9, max_num_seqs=4)
    engine.add(prompt(0, 8), max_tokens=1)
    second = engine.add(prompt(1, 4), max_tokens=1)
    assert sizes(engine.step()) == {0: 8}, "one token of four would not sample"
    assert sizes(engine.step()) == {1: 4}
    finished(engine, second)


def test_a_long_prompt_moves_on_while_all_other_rows_generate():
    engine = FakeEngine(num_blocks=200, block_size=4, max_num_seqs=8, budget=12, max_model_len=100)
    for number in range(7):
        engine.add(prompt(number, 1), max_tokens=90, eos_ids=NO_EOS)
    while engine.step().num_decode < 7:
        pass
    long = engine.add(prompt(9, 50), max_tokens=1)
    for _ in range(10):
        plan = engine.step()
        assert plan.num_decode == 7 and sizes(plan)[long.sequence_id] == 5
    engine.step()
    assert long.finish is FinishReason.LENGTH


def test_a_sequence_with_a_grammar_has_one_token_in_flight_and_others_do_not_notice():
    engine = FakeEngine()
    guided, free = engine.add(range(2, 9), max_tokens=9), engine.add(range(12, 15), max_tokens=9)
    guided.mask = object()
    steps = {guided: [], free: []}
    for number in range(40):
        engine.step()
        assert guided.num_in_flight <= 1
        for plan, _ in list(engine.in_flight)[-1:]:
            for sequence in plan.sampling():
                steps[sequence].append(number)
    for sequence in (guided, free):
        engine.check_result(sequence)
    assert len(steps[guided]) > 2
    assert all(later - earlier == 2 for earlier, later in zip(steps[guided], steps[guided][1:], strict=False))


def test_a_budget_that_generating_rows_could_use_up_is_refused():
    with pytest.raises(GenerationError, match=r"max_num_batched_tokens 11 .* 8 sequences") as error:
        FakeEngine(block_size=4, max_num_seqs=8, budget=11)
    assert "max_num_batched_tokens 12 or more" in error.value.fix


# what can never be computed


@pytest.mark.parametrize("length", [0, 64, 65, 1000])
def test_a_prompt_that_leaves_no_room_is_refused(length):
    engine = FakeEngine(max_model_len=64)
    with pytest.raises(GenerationError, match=f"the prompt has {length} tokens, and the model takes 64"):
        engine.add(prompt(0, length))
    assert not engine.scheduler.has_unfinished


def test_the_longest_prompt_gets_one_token():
    engine = FakeEngine(max_model_len=64, num_blocks=17, block_size=4)
    sequence = engine.add(prompt(0, 63), max_tokens=9, eos_ids=NO_EOS)
    finished(engine, sequence)
    assert sequence.finish is FinishReason.CONTEXT and len(sequence.token_ids) == 64


def test_more_blocks_than_exist_are_refused_with_numbers():
    engine = FakeEngine(num_blocks=6, block_size=4, max_model_len=64)
    with pytest.raises(
        GenerationError, match="12 tokens and up to 10 new ones need 6 KV blocks of 4"
    ) as error:
        engine.add(prompt(0, 12), max_tokens=10)
    assert "there are 5" in error.value.problem and "down to 21" in error.value.fix
    sequence = engine.add(prompt(0, 12), max_tokens=9, eos_ids=NO_EOS)  # the last token needs no slot
    finished(engine, sequence)
    assert engine.scheduler.stats.num_preemptions == 0


# order


def test_waiting_sequences_are_served_by_priority_then_arrival():
    engine = FakeEngine(max_num_seqs=1)
    for number, priority in enumerate([0, 1, 0, -1]):
        engine.add(prompt(number, 3), priority=priority, max_tokens=1)
    order = []
    while engine.scheduler.has_unfinished:
        if plan := engine.step():
            order += sizes(plan)
    assert order == [3, 0, 2, 1]


def test_nobody_overtakes_what_waits_for_blocks():
    engine = FakeEngine(num_blocks=9, block_size=4, max_num_seqs=4)
    running = engine.add(prompt(0, 16), max_tokens=5, eos_ids=NO_EOS)
    engine.step()
    large, small = engine.add(prompt(1, 20), max_tokens=3), engine.add(prompt(2, 2), max_tokens=3)
    while running.finish is None:
        assert large.row is None and small.row is None
        engine.step()
    finished(engine, running, large, small)


def test_what_runs_keeps_a_block_each_to_grow_into():
    engine = FakeEngine(num_blocks=8, block_size=4, max_num_seqs=4)  # seven blocks
    first = engine.add(prompt(0, 8), max_tokens=9)
    second = engine.add(prompt(1, 16), max_tokens=9)
    third = engine.add(prompt(2, 4), max_tokens=9)
    engine.step()
    assert (first.row, second.row, third.row) == (0, 1, None)


def test_an_important_prompt_gets_the_budget_before_one_that_runs():
    engine = FakeEngine(budget=12, max_num_seqs=4)
    running = engine.add(prompt(0, 40), priority=1, max_tokens=2)
    engine.step()
    important = engine.add(prompt(1, 18), max_tokens=2)
    assert sizes(engine.step()) == {important.sequence_id: 12}
    assert sizes(engine.step()) == {important.sequence_id: 6, running.sequence_id: 6}
    finished(engine, running, important)


# sharing


def test_followers_compute_only_what_differs():
    engine = FakeEngine(num_blocks=400, block_size=4, max_num_seqs=16, budget=64, max_model_len=300)
    shared = list(range(200, 440))
    sequences = [engine.add([*shared, 500 + n, 600], max_tokens=4) for n in range(16)]
    finished(engine, *sequences)
    generated = sum(len(sequence.token_ids) - 242 for sequence in sequences)
    assert engine.runner.num_computed <= 242 + 15 * 2 + generated
    assert [sequence.num_cached for sequence in sequences] == [0] + [240] * 15
    stats = engine.scheduler.stats
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (16 * 242, 15 * 240)


@pytest.mark.parametrize("length", range(1, 14))
def test_several_sequences_of_one_prompt_compute_it_once(length):
    engine = FakeEngine(num_blocks=100, block_size=4, max_num_seqs=4, budget=9, max_model_len=30)
    sequences = [engine.add(range(50, 50 + length), max_tokens=3, eos_ids=NO_EOS) for _ in range(4)]
    finished(engine, *sequences)
    rest = length - (length - 1) // 4 * 4  # the last block at most
    assert engine.runner.num_computed == length + 3 * rest + 4 * 2


def test_others_pass_those_that_wait_for_a_block_in_work():
    engine = FakeEngine(budget=12, max_num_seqs=4)
    leader, follower = engine.add(prompt(0, 24), max_tokens=2), engine.add(prompt(0, 24), max_tokens=2)
    other = engine.add(prompt(1, 6), max_tokens=2)
    engine.step()
    engine.step()
    assert engine.scheduler.num_waiting == 2
    plan = engine.step()
    assert set(sizes(plan)) >= {other.sequence_id, follower.sequence_id} and follower.num_cached == 20
    finished(engine, leader, follower, other)


def test_a_follower_goes_on_by_itself_when_its_leader_is_aborted():
    engine = FakeEngine(budget=12, max_num_seqs=4)
    leader, follower = engine.add(prompt(0, 50), max_tokens=2), engine.add(prompt(0, 50), max_tokens=2)
    engine.step()
    engine.scheduler.abort(leader)
    engine.step()
    assert follower.row is not None and follower.num_cached == 12, "what was computed is found"
    finished(engine, follower)


def test_nobody_waits_for_a_less_important_one():
    engine = FakeEngine(budget=12, max_num_seqs=4)
    engine.add(prompt(0, 50), priority=1, max_tokens=2)
    engine.step()
    important = engine.add(prompt(0, 50), max_tokens=2)
    engine.step()
    assert important.row is not None


def test_at_least_one_token_is_computed():
    engine = FakeEngine(block_size=4)
    first = engine.add(prompt(0, 8), max_tokens=1)
    engine.run()
    again = engine.add(prompt(0, 8), max_tokens=1)
    plan = engine.step()
    assert sizes(plan) == {again.sequence_id: 4} and again.num_cached == 4
    finished(engine, first, again)


def test_generated_tokens_are_found_by_the_next_turn_of_a_chat():
    engine = FakeEngine(block_size=4)
    first = engine.add(prompt(0, 6), max_tokens=8, eos_ids=NO_EOS)
    engine.run()
    second = engine.add([*first.token_ids, 77, 78], max_tokens=2)
    engine.run()
    assert second.num_cached == 12, "13 tokens were computed, the last was not"
    finished(engine, second)


def test_without_prefix_caching_nothing_is_found():
    engine = FakeEngine(prefix_caching=False)
    sequences = [engine.add(prompt(0, 20), max_tokens=3) for _ in range(3)]
    assert len(engine.step().rows) == 2, "nobody waits for anybody"
    finished(engine, *sequences)
    assert engine.scheduler.stats.num_prefix_hits == 0 and engine.blocks.num_cached == 0


# preemption


def full_pool():
    """Two sequences on eight blocks; the second must leave when the first grows to its fifth."""
    engine = FakeEngine(num_blocks=9, block_size=4, max_num_seqs=2, max_model_len=33)
    first = engine.add(prompt(0, 13), max_tokens=16, eos_ids=NO_EOS)
    second = engine.add(prompt(1, 11), max_tokens=16, eos_ids=NO_EOS)
    return engine, first, second


def until_preempted(engine, sequence):
    while sequence.row is not None or not sequence.generation:
        engine.step()


def test_the_newest_of_the_least_important_leaves():
    engine = FakeEngine(num_blocks=16, block_size=4, max_num_seqs=4, budget=64, max_model_len=61)
    sequences = [
        engine.add(prompt(number, 9), priority=priority, max_tokens=40, eos_ids=NO_EOS)
        for number, priority in enumerate([1, 0, 1, 0])
    ]
    left = []
    while len(left) < 3:
        engine.step()
        left += [
            s.sequence_id for s in sequences if s.generation and s.row is None and s.sequence_id not in left
        ]
    assert left == [2, 0, 3]
    finished(engine, *sequences)


def test_a_preempted_sequence_keeps_its_token_in_flight_and_waits_for_it():
    engine, first, second = full_pool()
    engine.step()
    while second.row is not None:
        engine.launch()
        if second.row is not None:
            engine.process()
    assert second.num_in_flight == 1 and second.num_computed == 0
    num_known = len(second.token_ids)
    engine.scheduler.abort(first)  # now there is room, but no token
    assert engine.scheduler.schedule() is None
    while engine.in_flight:
        engine.process()
    assert len(second.token_ids) == num_known + 1 and second.num_in_flight == 0
    assert sizes(engine.launch()).keys() == {second.sequence_id}
    finished(engine, second)


def test_a_preempted_sequence_finds_what_it_published():
    engine, first, second = full_pool()
    until_preempted(engine, second)
    engine.scheduler.abort(first)
    num_computed = engine.runner.num_computed
    finished(engine, second)
    assert engine.runner.num_computed - num_computed < len(second.prompt_ids) + 16
    assert second.num_cached == 0, "of its prompt, when it came"


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", range(1, 17))
def test_full_pools_and_every_last_block_change_nothing(length, block_size):
    """A pool that just holds the longest sequence; prompts whose last block is filled to every degree."""
    num_blocks = 1 - (-(length + 12) // block_size)
    engine = FakeEngine(
        num_blocks=num_blocks, block_size=block_size, max_num_seqs=3, budget=11, max_model_len=length + 13
    )
    sequences = [engine.add(prompt(n // 2, length), max_tokens=13, eos_ids=NO_EOS) for n in range(4)]
    engine.run()
    sequences += [
        engine.add(sequences[0].token_ids[:length], max_tokens=12, eos_ids=NO_EOS)
    ]  # from the cache
    finished(engine, *sequences)


# ends


def test_no_row_is_spent_after_max_tokens():
    engine = FakeEngine()
    sequence = engine.add(prompt(0, 5), max_tokens=4, eos_ids=NO_EOS)
    finished(engine, sequence)
    assert engine.runner.num_computed == 5 + 3 and engine.num_dropped == 0


def test_the_row_after_a_stop_token_is_dropped_and_its_block_never_published():
    engine = FakeEngine(block_size=4)
    generated = last_possible(engine, prompt(0, 4), max_tokens=8, eos_ids=NO_EOS)
    sequence = engine.add(prompt(0, 4), max_tokens=9, eos_ids=frozenset({generated[3]}))
    finished(engine, sequence)
    assert sequence.finish is FinishReason.STOP
    assert sequence.token_ids[4:] == generated[: generated.index(generated[3]) + 1]
    assert engine.num_dropped == 1
    assert engine.blocks.num_cached == 1, "tokens 4 to 7 are computed, but the last of them as an extra row"


STATES = ["waiting", "in flight", "prompt in flight", "generating", "preempted", "preempted, in flight"]


def in_state(state):
    engine, _, second = full_pool()
    if state == "in flight":
        engine.launch()
    elif state == "prompt in flight":
        engine = FakeEngine(budget=8)
        second = engine.add(prompt(1, 20), max_tokens=3)
        engine.launch()
    elif state == "generating":
        engine.step()
        engine.step()
    elif state.startswith("preempted"):
        engine.step()
        while second.row is not None:
            engine.launch()
            if second.row is not None or state == "preempted":
                engine.process()
    return engine, second


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.STOP])
@pytest.mark.parametrize("state", STATES)
def test_a_sequence_can_be_ended_in_every_state(state, reason):
    engine, sequence = in_state(state)
    checks = Invariants(engine)
    engine.end_early(sequence, reason)
    checks.check()
    num_known = len(sequence.token_ids)
    engine.end_early(sequence, FinishReason.ABORT)  # twice is once
    finished(engine, *engine.sequences)
    assert sequence.finish is reason and len(sequence.token_ids) == num_known


def test_a_finished_sequence_can_be_aborted():
    engine = FakeEngine()
    sequence = engine.add(prompt(0, 5), max_tokens=1)
    engine.run()
    engine.scheduler.abort(sequence)
    finished(engine, sequence)
    assert sequence.finish is FinishReason.LENGTH


def test_abort_while_the_stop_token_is_in_flight_frees_once():
    engine = FakeEngine()
    generated = last_possible(engine, prompt(0, 5), max_tokens=1, eos_ids=NO_EOS)
    sequence = engine.add(prompt(0, 5), max_tokens=9, eos_ids=frozenset(generated))
    engine.launch()
    engine.end_early(sequence, FinishReason.ABORT)
    assert engine.process() == [] and sequence.finish is FinishReason.ABORT
    finished(engine, sequence)


def test_a_preempted_sequence_can_end_with_the_token_that_was_in_flight():
    engine, _, second = full_pool()
    engine.step()
    while second.row is not None:
        engine.launch()
        if second.row is not None:
            engine.process()
    second.stop_ids = frozenset(range(40))
    while second.finish is None:
        engine.process()
    assert second.finish is FinishReason.STOP and engine.scheduler.num_waiting == 0


def test_a_row_is_reused_while_the_last_step_of_its_owner_is_in_flight():
    """The old owner's token arrives in the row after the new owner was decided on, and disturbs nobody."""
    engine = FakeEngine(max_num_seqs=1, budget=8, prefix_caching=False)
    generated = last_possible(engine, prompt(0, 5), max_tokens=1, eos_ids=NO_EOS)
    old = engine.add(prompt(0, 5), max_tokens=9, eos_ids=frozenset(generated))
    new = engine.add(prompt(1, 1), max_tokens=5, eos_ids=NO_EOS)
    engine.launch()
    engine.launch()  # an extra row: the first token was the last
    engine.process()
    plan = engine.launch()
    assert [(row.sequence, row.row) for row in plan.rows] == [(new, 0)]
    assert old.num_in_flight == 1
    finished(engine, old, new)


def test_tokens_of_the_plan_are_all_expected():
    engine = FakeEngine()
    engine.add(prompt(0, 5), max_tokens=4)
    plan, token_ids = engine.launch(), engine.in_flight[0][1]
    with pytest.raises(ValueError, match="zip"):
        engine.scheduler.processed(plan, [*token_ids, 7])


def test_a_plan_is_launched_once():
    engine = FakeEngine()
    engine.add(prompt(0, 5), max_tokens=4)
    plan = engine.launch()
    with pytest.raises(AssertionError, match="launched once"):
        engine.scheduler.launched(plan)


# figures


def test_stats():
    engine = FakeEngine(num_blocks=11, block_size=4, max_num_seqs=1, budget=8)
    engine.add(prompt(0, 12), max_tokens=4, eos_ids=NO_EOS)
    engine.add(prompt(1, 7), max_tokens=4)
    assert engine.scheduler.num_waiting == 2
    engine.step()
    stats = engine.scheduler.stats
    assert (stats.num_waiting, stats.num_running) == (1, 1)
    assert stats.kv_usage == 0.3
    engine.run()
    assert engine.scheduler.stats.kv_usage == 0
