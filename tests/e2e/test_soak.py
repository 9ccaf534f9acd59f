"""A long time of random requests on a CPU: every answer is the one it is alone, nothing is lost, nothing grows.

Two engines on one tiny random model over bytes take turns, in pools so small that they preempt: one processes each
step at once, the other, with INT8 keys and values, a step late, as on a GPU. QUANTKIT_SOAK_SECONDS: how long (1800).
"""

import gc
import itertools
import os
import random
import resource
import statistics
import time
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import NamedTuple

import pytest

from quantkit import LLM, SamplingParams
from quantkit.runtime.heap import release_freed_memory
from tests.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from tests.tiny_models import CONFIGS, save_tiny

SECONDS = float(os.environ.get("QUANTKIT_SOAK_SECONDS", "1800"))
CONTEXT, BLOCK, NUM_BLOCKS = 96, 16, 14
TINY = {"max_model_len": CONTEXT, "dtype": "float32", "device": "cpu", "batch_invariant": True}
SMALL = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 24,
}
MOST_OPEN = 16
MOST_STEPS = 3000  # to finish what is there when nothing comes any more: usually a few hundred
MOST_NEW_BYTES, MOST_NEW_OBJECTS = 4 << 20, 200  # from the second third to the last
STATES = {"waiting", "preempted", "prompt", "decode", "ended"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama over bytes, with its tokenizer."""
    config = CONFIGS["llama"].to_dict() | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "bytes", type(CONFIGS["llama"])(**config))
        folder = save_tiny("bytes", tmp_path_factory.mktemp("soak"))
    byte_tokenizer().save_pretrained(folder)
    return folder


def catalogue(seed=0, count=30):
    """Requests: prompts that often begin alike, and every option that may end or change an answer."""
    rng = random.Random(seed)
    beginnings = [rng.choices(range(4, VOCAB_SIZE), k=size) for size in (0, 16, 33, 50)]
    for _ in range(count):
        prompt_ids = rng.choice(beginnings) + rng.choices(range(4, VOCAB_SIZE), k=rng.randint(1, 20))
        yield (
            prompt_ids,
            SamplingParams(
                n=rng.choice([1, 1, 1, 2, 3]),
                max_tokens=rng.choice([1, 8, 25, 40]),
                min_tokens=rng.choice([0, 0, 1]),
                temperature=rng.choice([0.0, 1.0]),
                seed=rng.randrange(1000),
                top_k=rng.choice([None, 20]),
                stop=rng.choice([(), ("e",), ("a", "th", "\n")]),
                ignore_eos=rng.random() < 0.5,
                frequency_penalty=rng.choice([0.0, 0.5]),
                logprobs=rng.choice([None, None, 2]),
            ),
        )


class LateRunner:
    """Its results are taken a step late, as a GPU's are."""

    is_async = True

    def __init__(self, runner):
        self.launch = runner.launch


class Soak:
    """One engine with random clients, who know what the answer to each request of the catalogue is."""

    def __init__(self, model, seed, *, is_late, **settings):
        self.requests = list(catalogue())
        roomy = LLM(model, **TINY, prefix_caching=False, **settings)
        self.expected = [
            [answer_of(one) for one in roomy.generate(ids, params)[0].outputs]
            for ids, params in self.requests
        ]
        token_bytes = roomy.started.model.kv.token_bytes
        self.llm = LLM(model, **TINY, **SMALL, **settings, kv_cache_bytes=NUM_BLOCKS * BLOCK * token_bytes)
        if is_late:
            self.llm.requests._engine._runner = LateRunner(self.llm.requests._engine._runner)
        self.random = random.Random(seed)
        self.open = {}  # number in the catalogue and what has come, by request
        self.sequence_ids = {}  # of the engine, by request
        self.counts = Counter()

    def round(self, num_steps=200):
        """Requests come and go, then all that are left are answered."""
        for _ in range(num_steps):
            for _ in range(self.random.choice([0, 0, 0, 1, 1, 3])):
                if len(self.open) < MOST_OPEN:
                    self.arrive()
            if self.random.random() < 0.15 and self.open:
                self.abort(self.random.choice(self.preempted() or list(self.open)))
            self.step()
        for count in itertools.count():
            if not self.llm.requests._engine.has_work:
                break
            assert count < MOST_STEPS, f"stuck: {self.llm.requests._engine.scheduler.stats}"
            self.step()
        self.check_idle()

    def arrive(self):
        number = self.random.randrange(len(self.requests))
        prompt_ids, params = self.requests[number]
        priority, is_streamed = self.random.choice([-1, 0, 0, 0, 1]), self.random.random() < 0.5
        request_id = str(next(self.llm._numbers))
        self.llm._submit(request_id, deque(), None, prompt_ids, params, priority, is_streamed=is_streamed)
        self.open[request_id] = number, defaultdict(lambda: ["", [], None])
        answers = self.llm.requests._outputs._requests[request_id].answers
        self.sequence_ids[request_id] = [answer.sequence_id for answer in answers]

    def step(self):
        if self.llm.requests._engine.has_work:
            self.llm._step()
        self.check_blocks()
        for request_id in list(self.open):
            self.take(request_id)

    def take(self, request_id):
        """What has come of a request; the whole answer is the one that is expected."""
        number, answers = self.open[request_id]
        ready = self.llm._ready[request_id]
        while ready:
            output = ready.popleft()
            for new in output.outputs:
                text, token_ids, _ = answers[new.index]
                answers[new.index] = [text + new.text, token_ids + new.token_ids, new.finish_reason]
            if output.finished:
                self.counts["answered"] += 1
                assert [tuple(answers[index]) for index in sorted(answers)] == self.expected[number]
                self.forget(request_id)
                return

    def abort(self, request_id):
        """What has come is a beginning of what is expected; a request ends as a whole, its sequences where they are."""
        number, answers = self.open[request_id]
        for index, (text, token_ids, _) in answers.items():
            all_text, all_ids, _ = self.expected[number][index]
            assert all_text.startswith(text) and all_ids[: len(token_ids)] == token_ids
        for sequence_id in self.sequence_ids[request_id]:
            self.counts[state_of(self.llm.requests._sequences.get(sequence_id))] += 1
        self.llm._end([request_id])
        self.forget(request_id)

    def preempted(self):
        """Requests with a sequence that lost its blocks: there are few, and not for long."""
        waiting = self.llm.requests._engine.scheduler._waiting
        lost = {sequence.sequence_id for sequence in waiting if sequence.generation}
        return [each for each in self.open if not lost.isdisjoint(self.sequence_ids[each])]

    def forget(self, request_id):
        self.llm._end([request_id])
        del self.open[request_id], self.sequence_ids[request_id]

    def check_blocks(self):
        scheduler = self.llm.requests._engine.scheduler
        blocks = scheduler._blocks
        assert blocks.num_free + blocks.num_cached + blocks.num_used == blocks.num_blocks - 1
        users = Counter(block for sequence in scheduler._running for block in sequence.blocks)
        assert [users[block] for block in range(blocks.num_blocks)] == blocks._num_users

    def check_idle(self):
        scheduler = self.llm.requests._engine.scheduler
        assert scheduler._blocks.num_used == scheduler.num_waiting == scheduler.num_running == 0
        kept = self.open, self.llm.requests._sequences, self.llm._ready
        assert (
            not any(kept)
            and not self.llm.requests._outputs._requests
            and not self.llm.requests._outputs._answers
        )


def answer_of(output):
    return output.text, output.token_ids, output.finish_reason


def state_of(sequence):
    if sequence is None:
        return "ended"
    if sequence.row is None:
        return "preempted" if sequence.generation else "waiting"
    return "prompt" if sequence.num_tokens - sequence.num_computed > 1 else "decode"


class Held(NamedTuple):
    """What this process holds when nobody asks for anything: resident bytes, Python objects."""

    seconds: float
    num_bytes: int
    num_objects: int

    @classmethod
    def since(cls, started):
        gc.collect()
        release_freed_memory()  # or a leak would fill what was freed before it shows
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
        seconds = time.monotonic() - started
        return cls(seconds, num_pages * resource.getpagesize(), len(gc.get_objects()))


def medians(curve, low, high):
    """Bytes and objects of one part of the curve."""
    part = [held for held in curve if low <= held.seconds / curve[-1].seconds <= high]
    return [statistics.median(getattr(held, name) for held in part) for name in ("num_bytes", "num_objects")]


def make_soaks(model):
    late = Soak(model, 2, is_late=True, kv_cache_dtype="int8")
    return [Soak(model, 1, is_late=False), late]


def check_variety(soaks):
    """Everything that was to happen has happened to each engine."""
    for soak in soaks:
        stats = soak.llm.requests._engine.scheduler.stats
        assert stats.num_preemptions and stats.num_prefix_hits
        assert soak.counts.keys() >= STATES, soak.counts


def test_a_round_of_each(model):
    for soak in make_soaks(model):
        soak.round(100)
        assert soak.counts["answered"] and soak.llm.requests._engine.scheduler.stats.num_preemptions


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 300)
def test_half_an_hour(model):
    soaks = make_soaks(model)
    started = time.monotonic()
    curve = [Held.since(started)]
    while curve[-1].seconds < SECONDS:
        for soak in soaks:
            soak.round()
        curve.append(Held.since(started))
    check_variety(soaks)
    shown = [
        f"{at:.0f} s {size / 2**20:.1f} MiB {count}" for at, size, count in curve[:: max(1, len(curve) // 12)]
    ]
    print(f"{sum((soak.counts for soak in soaks), Counter())}; held: {', '.join(shown)}")
    (warm_bytes, warm_objects), (last_bytes, last_objects) = (
        medians(curve, low, low + 1 / 3) for low in (1 / 3, 2 / 3)
    )
    assert last_bytes - warm_bytes < MOST_NEW_BYTES
    assert last_objects - warm_objects < MOST_NEW_OBJECTS
