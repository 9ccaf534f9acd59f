"""How fast an engine answers: every token's time of arrival, and what follows from these.

    submitted ──────── first token ── token ── … ── last token
        |─── TTFT ──────────|── ITL ──|
                            |────── TPOT · (tokens − 1) ──────|

All requests are submitted at once. A step brings tokens of many requests at the same time.
"""

import random
import statistics
import time
from collections.abc import Sequence as Many
from typing import NamedTuple

from quantkit.errors import BenchError
from quantkit.runtime.engine import Engine
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.sequence import Sequence

PERCENTILES = (50, 90, 99)


class Arrivals(NamedTuple):
    """Of one request: seconds from submission to each of its tokens."""

    num_prompt_tokens: int
    seconds: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.seconds[0]

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None with one token."""
        if len(self.seconds) < 2:
            return None
        return (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens that follow each other."""
        return [later - earlier for earlier, later in zip(self.seconds, self.seconds[1:], strict=False)]


class Speed(NamedTuple):
    """Of one run. Times in milliseconds, at PERCENTILES; None where no request has two tokens.

    decode_rate: tokens a second after all first ones have come, None where some wait for others to end. output_rate,
    total_rate: of the whole run, new tokens, and prompts too.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: float
    ttft_ms: dict[int, float]
    tpot_ms: dict[int, float] | None
    itl_ms: dict[int, float] | None
    decode_rate: float | None
    output_rate: float
    total_rate: float


def random_prompts(num_requests: int, num_tokens: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens, no two alike."""
    numbers = random.Random(seed)
    return [[numbers.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num_requests)]


def run_requests(engine: Engine, prompts: Many[list[int]], num_output_tokens: int) -> list[Arrivals]:
    """Submit all prompts at once, and answer each greedily with exactly so many tokens.

    Raises BenchError if a sequence ends before: the model takes no more.
    """
    params = SamplingParams(max_tokens=num_output_tokens, ignore_eos=True)
    sequences = [
        Sequence(sequence_id=number, prompt_ids=prompt, params=params, eos_ids=frozenset(), arrival=number)
        for number, prompt in enumerate(prompts)
    ]
    times: dict[int, list[float]] = {sequence.sequence_id: [] for sequence in sequences}
    started = time.perf_counter()
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        updates = engine.step()
        now = time.perf_counter() - started
        for update in updates:
            times[update.sequence.sequence_id].append(now)
    for sequence in sequences:
        _check_length(sequence, num_output_tokens)
    return [Arrivals(len(prompts[number]), tuple(seconds)) for number, seconds in times.items()]


def speed_of(requests: Many[Arrivals], max_num_seqs: int) -> Speed:
    """What the arrivals of one run amount to. max_num_seqs: so many run at once."""
    num_prompt = sum(request.num_prompt_tokens for request in requests)
    num_output = sum(len(request.seconds) for request in requests)
    seconds = max(request.seconds[-1] for request in requests)
    all_started = max(request.ttft for request in requests)
    late = sum(moment > all_started for request in requests for moment in request.seconds)
    if len(requests) > max_num_seqs:
        late = 0
    tpots = [request.tpot for request in requests if request.tpot is not None]
    gaps = [gap for request in requests for gap in request.gaps]
    return Speed(
        num_requests=len(requests),
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        seconds=seconds,
        ttft_ms=_percentiles([request.ttft for request in requests]),
        tpot_ms=_percentiles(tpots) if tpots else None,
        itl_ms=_percentiles(gaps) if gaps else None,
        decode_rate=late / (seconds - all_started) if late else None,
        output_rate=num_output / seconds,
        total_rate=(num_prompt + num_output) / seconds,
    )


def _percentiles(seconds: list[float]) -> dict[int, float]:
    """In milliseconds; of a few values the nearest ones."""
    if len(seconds) == 1:
        return dict.fromkeys(PERCENTILES, seconds[0] * 1e3)
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {percent: cuts[percent - 1] * 1e3 for percent in PERCENTILES}


def _check_length(sequence: Sequence, num_output_tokens: int) -> None:
    if sequence.num_generated != num_output_tokens:
        raise BenchError(
            f"a request of {len(sequence.prompt_ids)} tokens ended after {sequence.num_generated} new ones, "
            f"of {num_output_tokens}: that is all that the model, or the KV cache, takes",
            fix="ask for shorter prompts or fewer output tokens",
        )
