"""How fast an engine answers: requests that are all submitted at once, and what their arrivals amount to.

A step brings tokens of many requests at the same time.
"""

import time
from collections.abc import Sequence as Many
from typing import NamedTuple

from quantkit.bench.arrivals import Arrivals, percentiles
from quantkit.errors import BenchError
from quantkit.runtime.engine import Engine
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.sequence import Sequence


class Speed(NamedTuple):
    """Of one run. Times in milliseconds, at percentiles; None where no request has two tokens.

    decode_rate: tokens a second after all first ones have come, None where some wait for others to end. output_rate,
    total_rate: of the whole run, new tokens, and prompts too.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: float
    ttft_ms: dict[int, float] | None
    tpot_ms: dict[int, float] | None
    itl_ms: dict[int, float] | None
    decode_rate: float | None
    output_rate: float
    total_rate: float


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
    return [Arrivals(len(prompts[number]), len(seconds), tuple(seconds)) for number, seconds in times.items()]


def speed_of(requests: Many[Arrivals], max_num_seqs: int) -> Speed:
    """What the arrivals of one run amount to. max_num_seqs: so many run at once."""
    num_prompt = sum(request.num_prompt_tokens for request in requests)
    num_output = sum(request.num_output_tokens for request in requests)
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
        ttft_ms=percentiles([request.ttft for request in requests]),
        tpot_ms=percentiles(tpots),
        itl_ms=percentiles(gaps),
        decode_rate=late / (seconds - all_started) if late else None,
        output_rate=num_output / seconds,
        total_rate=(num_prompt + num_output) / seconds,
    )


def _check_length(sequence: Sequence, num_output_tokens: int) -> None:
    if sequence.num_generated != num_output_tokens:
        raise BenchError(
            f"a request of {len(sequence.prompt_ids)} tokens ended after {sequence.num_generated} new ones, "
            f"of {num_output_tokens}: that is all that the model, or the KV cache, takes",
            fix="ask for shorter prompts or fewer output tokens",
        )
