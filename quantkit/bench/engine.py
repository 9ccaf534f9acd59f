"""How fast a checkpoint answers in the engine: loads it, runs requests, and how much of the memory's speed that is.

    share of bandwidth = bytes of a decode step · steps a second / bytes a second that the memory reads at best
    bytes of a step    = weights, without the embedding where it is no head + cached tokens of all requests

Mixtures of experts have no such share: which weights a step reads depends on the tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.bench.ceilings import measure_read
from quantkit.bench.generation import Speed, run_requests, speed_of
from quantkit.bench.prompts import prompts_of_file, random_prompts
from quantkit.bench.timeline import Timeline, profile_steps
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.source import resolve_source
from quantkit.runtime.memory_plan import weight_bytes
from quantkit.runtime.model import Model
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.sequence import Sequence as EngineSequence
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.start import Started, chosen_device, start_engine
from quantkit.runtime.tokenizer import load_tokenizer

PROFILED_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """start_seconds: by part. peak_bytes: of the GPU's memory; None on a CPU. bandwidth: share; None for experts.

    timeline: of decode steps; None on a CPU.
    """

    device: str
    dtype: str
    start_seconds: dict[str, float]
    num_kv_tokens: int
    peak_bytes: int | None
    speed: Speed
    bandwidth: float | None
    timeline: Timeline | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {name: getattr(self, name) for name in self.__slots__}
        timeline = (
            None
            if self.timeline is None
            else self.timeline._asdict() | {"idle_share": self.timeline.idle_share}
        )
        return own | {"speed": self.speed._asdict(), "timeline": timeline, "torch": torch.__version__}


def bench_engine(
    source: str,
    settings: EngineSettings,
    *,
    revision: str | None,
    num_requests: int,
    num_prompt_tokens: int,
    num_output_tokens: int,
    prompts_file: Path | None,
    repeats: int,
    announce: Callable[[str], None],
) -> EngineReport:
    """Load, warm up, run the requests `repeats` times, all at once each time; the fastest run counts.

    prompts_file: a prompt on each line, taken in turn; None: random tokens. Prefixes are not cached.
    """
    checkpoint = open_checkpoint(resolve_source(source, revision=revision, announce=announce))
    device = chosen_device(settings.device)
    read_rate = measure_read(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = start_engine(checkpoint, settings, announce=announce)
    spec = started.model.spec
    prompts = random_prompts(num_requests, num_prompt_tokens, spec.vocab_size)
    if prompts_file is not None:
        tokenizer = load_tokenizer(checkpoint.path)
        texts = prompts_of_file(prompts_file, num_requests)
        prompts = [tokenizer.encode_prompt(text, raw=True) for text in texts]
    speed = fastest_run(started, prompts, num_output_tokens, repeats, settings.max_num_seqs)
    is_gpu = device.type == "cuda"
    return EngineReport(
        device=torch.cuda.get_device_name(device) if is_gpu else "cpu",
        dtype=str(started.model.dtype).removeprefix("torch."),
        start_seconds=started.seconds,
        num_kv_tokens=started.num_kv_tokens,
        peak_bytes=torch.cuda.max_memory_allocated(device) if is_gpu else None,
        speed=speed,
        bandwidth=_bandwidth(checkpoint, started.model, speed, read_rate),
        timeline=decode_timeline(started, prompts[: settings.max_num_seqs]) if is_gpu else None,
    )


def fastest_run(
    started: Started, prompts: Sequence[list[int]], num_output_tokens: int, repeats: int, max_num_seqs: int
) -> Speed:
    """Of some runs of the same requests, after one that compiles, and captures every size that comes."""
    run_requests(started.engine, prompts, num_output_tokens)
    runs = [
        speed_of(run_requests(started.engine, prompts, num_output_tokens), max_num_seqs)
        for _ in range(repeats)
    ]
    return min(runs, key=lambda run: run.seconds)


def step_weight_bytes(checkpoint: Checkpoint, model: Model) -> int:
    """Bytes of weights that a decode step reads, of a model without experts."""
    weights = weight_bytes(checkpoint, model.spec, model.target)
    if model.spec.is_head_tied:
        return weights
    return weights - model.spec.vocab_size * model.spec.hidden_size * model.dtype.itemsize


def _bandwidth(checkpoint: Checkpoint, model: Model, speed: Speed, read_rate: float) -> float | None:
    """The share in decode; None where there is no decode of all at once, or where not all weights are read."""
    if speed.decode_rate is None or any(layer.experts is not None for layer in model.spec.layers):
        return None
    cached = speed.num_prompt_tokens + speed.num_output_tokens / 2
    step_bytes = step_weight_bytes(checkpoint, model) + cached * model.kv.token_bytes
    return step_bytes * speed.decode_rate / speed.num_requests / read_rate


def decode_timeline(started: Started, prompts: Sequence[list[int]]) -> Timeline | None:
    """Of decode steps of all these prompts together; None where they leave no room for so many."""
    engine = started.engine
    num_prompt_steps = sum(map(len, prompts)) // started.max_num_batched_tokens + len(prompts)
    num_tokens = num_prompt_steps + PROFILED_STEPS + 4
    if max(map(len, prompts)) + num_tokens > started.max_model_len:
        return None
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    sequences = [
        EngineSequence(
            sequence_id=number, prompt_ids=prompt, params=params, eos_ids=frozenset(), arrival=number
        )
        for number, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while any(sequence.num_generated < 2 and sequence.finish is None for sequence in sequences):
        engine.step()
    is_whole = all(sequence.finish is None for sequence in sequences)
    timeline = profile_steps(engine, PROFILED_STEPS, started.model.target.device) if is_whole else None
    for sequence in sequences:
        engine.end(sequence)
    while engine.has_work:
        engine.step()
    return timeline
