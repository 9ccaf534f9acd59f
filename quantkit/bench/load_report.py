"""What a load on a server amounts to."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.bench.arrivals import Arrivals, percentiles
from quantkit.bench.load import Outcome, Run
from quantkit.bench.slo import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Tokens, times and rates are of answered requests. Times in milliseconds, at percentiles; None of none.

    seconds: from the first request to the last end. errors: how many by kind; messages: an example of each.
    request_rate, output_rate: a second. goodput: answers a second that kept the objective; None without one. busy:
    share of a core that the generator used. has_usage: whether the server counted tokens; else each event is one.
    """

    num_requests: int
    num_answered: int
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: float
    errors: dict[str, int]
    messages: dict[str, str]
    ttft_ms: dict[int, float] | None
    tpot_ms: dict[int, float] | None
    itl_ms: dict[int, float] | None
    e2e_ms: dict[int, float] | None
    request_rate: float
    output_rate: float
    slo: Slo | None
    goodput: float | None
    busy: float
    has_usage: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"slo": None if self.slo is None else self.slo._asdict()}


def report_of(run: Run, slo: Slo | None) -> LoadReport:
    """Of one run that has sent something."""
    answered = answered_of(run.outcomes)
    all_arrivals = [arrivals for _, arrivals in answered]
    seconds = max(outcome.sent + outcome.answer.seconds for outcome in run.outcomes)
    problems = [problem for outcome in run.outcomes if (problem := outcome.answer.problem) is not None]
    num_output = sum(arrivals.num_output_tokens for arrivals in all_arrivals)
    tpots = [tpot for arrivals in all_arrivals if (tpot := arrivals.tpot) is not None]
    good = [outcome for outcome, arrivals in answered if slo and slo.is_met(arrivals, outcome.answer.seconds)]
    return LoadReport(
        num_requests=len(run.outcomes),
        num_answered=len(answered),
        num_prompt_tokens=sum(arrivals.num_prompt_tokens for arrivals in all_arrivals),
        num_output_tokens=num_output,
        seconds=seconds,
        errors=dict(Counter(problem.kind for problem in problems).most_common()),
        messages={problem.kind: problem.message for problem in reversed(problems)},
        ttft_ms=percentiles([arrivals.ttft for arrivals in all_arrivals]),
        tpot_ms=percentiles(tpots),
        itl_ms=percentiles([gap for arrivals in all_arrivals for gap in arrivals.gaps]),
        e2e_ms=percentiles([outcome.answer.seconds for outcome, _ in answered]),
        request_rate=len(answered) / seconds,
        output_rate=num_output / seconds,
        slo=slo,
        goodput=None if slo is None else len(good) / seconds,
        busy=run.busy,
        has_usage=all(outcome.answer.is_counted for outcome, _ in answered),
    )


def answered_of(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, Arrivals]]:
    """Those that have an answer, with its arrivals."""
    return [(outcome, arrivals) for outcome in outcomes if (arrivals := outcome.answer.arrivals) is not None]
