"""The loop: schedule a step, launch it, process the one before while it runs.

One thread at a time uses an engine. Text is none of its business: sequences come in as tokens, tokens go out.
"""

from typing import NamedTuple

import torch

from quantkit.runtime.logprobs import TokenLogprobs
from quantkit.runtime.out_of_memory import out_of_memory
from quantkit.runtime.runner import InFlight, Results, Runner
from quantkit.runtime.scheduler import Scheduler
from quantkit.runtime.sequence import FinishReason, Sequence
from quantkit.runtime.step_plan import StepPlan


class Event(NamedTuple):
    """What a step brought a sequence: a token, and why it is the last one (None: it is not).

    token_id: None where the sequence ended without one, since the model's logits were no numbers. logprobs: if asked.
    """

    sequence: Sequence
    token_id: int | None
    finish: FinishReason | None
    logprobs: TokenLogprobs | None


class _Launched(NamedTuple):
    plan: StepPlan
    in_flight: InFlight


class Engine:
    """Sequences in, events out, a step at a time."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._launched: _Launched | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self._launched is not None or self.scheduler.has_unfinished

    def add(self, *sequences: Sequence) -> None:
        """Put a request's sequences in the queue, all or none. Raises what `Scheduler.add` does."""
        self.scheduler.add(*sequences)

    def end(self, sequence: Sequence, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a sequence in whatever state it is; no event follows. Nothing happens to one that has ended."""
        self.scheduler.finish_early(sequence, reason)

    def reset(self) -> None:
        """Forget every sequence, and what is in flight: the device computes in order, so new steps may follow it."""
        self._launched = None
        self.scheduler.reset()

    def step(self) -> list[Event]:
        """Launch the next step; returns what the one before brought (this one, where launching is computing).

        Raises GenerationError if the device's memory does not do; what runs then begins anew with the next step, so end
        some of it first.
        """
        plan = self.scheduler.schedule()
        launched = None if plan is None else self._launch(plan)
        before, self._launched = self._launched, launched
        if before is None and not self._runner.is_async:
            before, self._launched = self._launched, None
        return [] if before is None else self._processed(before.plan, before.in_flight.wait())

    def _launch(self, plan: StepPlan) -> _Launched:
        try:
            in_flight = self._runner.launch(plan)
        except torch.OutOfMemoryError as error:
            self.scheduler.preempt_all()  # which rows the device knows of is uncertain
            num_tokens = sum(row.num_new for row in plan.rows)
            raise out_of_memory(error, f"a step of {num_tokens} tokens") from error
        self.scheduler.launched(plan)
        return _Launched(plan, in_flight)

    def _processed(self, plan: StepPlan, results: Results) -> list[Event]:
        """Events of the sequences that have not ended meanwhile."""
        events = []
        if results.prompt_logprobs is not None:
            _give_prompt_logprobs(plan, results.prompt_logprobs)
        sampling = list(plan.sampling())
        for sequence, is_nan in zip(sampling, results.is_nan, strict=True):
            if is_nan and sequence.finish is None:
                self.scheduler.finish_early(sequence, FinishReason.ERROR)
                events.append(Event(sequence, None, FinishReason.ERROR, None))
        logprobs = dict(zip(sampling, results.logprobs or (), strict=False))
        for sequence, token_id, finish in self.scheduler.processed(plan, results.token_ids):
            events.append(Event(sequence, token_id, finish, _wanted(sequence, logprobs.get(sequence))))
        return events


def _give_prompt_logprobs(plan: StepPlan, prompt_logprobs: list[TokenLogprobs]) -> None:
    each = iter(prompt_logprobs)
    for row in plan.rows:
        count = row.sequence.params.prompt_logprobs
        row.sequence.prompt_logprobs += [_likeliest(next(each), count) for _ in row.scored]


def _wanted(sequence: Sequence, logprobs: TokenLogprobs | None) -> TokenLogprobs | None:
    """As many of the likeliest as the sequence asks for; a step computes as many as any of it does."""
    count = sequence.params.logprobs
    return None if count is None or logprobs is None else _likeliest(logprobs, count)


def _likeliest(logprobs: TokenLogprobs, count: int | None) -> TokenLogprobs:
    top_ids, top_logprobs = logprobs.top_ids[:count], logprobs.top_logprobs[:count]
    return logprobs._replace(top_ids=top_ids, top_logprobs=top_logprobs)
