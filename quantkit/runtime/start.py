"""From a checkpoint and settings to an engine that is ready: plan the memory, load, size the cache, warm up."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from quantkit.errors import GenerationError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.quantization_config import read_quantization
from quantkit.runtime.block_manager import BlockManager
from quantkit.runtime.engine import Engine
from quantkit.runtime.graphs import Capture, cuda_capture, graph_bytes
from quantkit.runtime.kv_pool import KVFormat
from quantkit.runtime.layers.gpu_linear import inputs_kept_in_16_bits
from quantkit.runtime.limits import Limits
from quantkit.runtime.load import DTYPES, kv_format, limited, load_model, model_dtype
from quantkit.runtime.memory_plan import plan_memory
from quantkit.runtime.model import Model
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.models.spec import DecoderSpec
from quantkit.runtime.out_of_memory import out_of_memory
from quantkit.runtime.runner import Runner
from quantkit.runtime.scheduler import Scheduler
from quantkit.runtime.settings import EngineSettings, KVCacheDtypeName
from quantkit.runtime.target import Target
from quantkit_kernels.paged_kv import BLOCK_SIZE

CPU_KV_BYTES = 1 << 30
WIDENING_BYTES = 528 << 20  # of `attention_widen` for one layer, records of scales with it
STEP_TOKENS = {"cuda": 8192, "cpu": 512}


class Started(NamedTuple):
    """An engine, what it was started with, and the seconds of each part of the start."""

    engine: Engine
    model: Model
    max_model_len: int
    max_num_batched_tokens: int
    num_kv_tokens: int
    seconds: dict[str, float]


class _Sizes(NamedTuple):
    """What the engine takes, blocks of the cache with the one that is nobody's."""

    limits: Limits
    num_blocks: int


def start_engine(
    checkpoint: Checkpoint, settings: EngineSettings, *, announce: Callable[[str], None] = lambda line: None
) -> Started:
    """Load a checkpoint and get ready. announce: told the plan of a GPU's memory, line by line, before it is filled.

    Raises what `load_model` does; MemoryPlanError if the device is too small; GenerationError for a device that is not
    there, or whose memory does not do in spite of the plan.
    """
    try:
        return _start(checkpoint, settings, announce)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, "loading the model") from error


def _start(checkpoint: Checkpoint, settings: EngineSettings, announce: Callable[[str], None]) -> Started:
    clock = _Clock()
    target = _target(checkpoint, settings)
    spec = limited(read_spec(checkpoint), settings.max_model_len)
    sizes = _plan(checkpoint, spec, target, settings, announce)
    schemes = [scheme for _, scheme in read_quantization(checkpoint.config).groups]
    for label in inputs_kept_in_16_bits(schemes, target):
        announce(
            f"{label}: this GPU has no FP8 instructions; weights stay FP8, inputs are computed in 16 bits"
        )
    clock.lap("plan")
    model = load_model(
        checkpoint,
        dtype=target.dtype,
        device=target.device,
        kv_cache_dtype=settings.kv_cache_dtype,
        batch_invariant=settings.batch_invariant,
        max_model_len=settings.max_model_len,  # not what fits: LongRoPE's factors do not depend on memory
    )
    clock.lap("load")
    blocks = BlockManager(
        sizes.num_blocks,
        BLOCK_SIZE,
        salt=_salt(checkpoint, target, settings.kv_cache_dtype, spec.max_positions),
        prefix_caching=settings.prefix_caching,
    )
    runner = Runner(
        model,
        num_blocks=sizes.num_blocks,
        num_rows=settings.max_num_seqs,
        max_model_len=sizes.limits.max_model_len,
        capture=capture_on(model.target) if not settings.eager else None,
    )
    runner.warm_up()
    clock.lap("warm up")
    num_tokens = (sizes.num_blocks - 1) * BLOCK_SIZE
    return Started(
        Engine(Scheduler(blocks, sizes.limits), runner),
        model,
        sizes.limits.max_model_len,
        sizes.limits.max_num_batched_tokens,
        num_tokens,
        clock.seconds,
    )


def _target(checkpoint: Checkpoint, settings: EngineSettings) -> Target:
    dtype = model_dtype(checkpoint) if settings.dtype is None else DTYPES[settings.dtype]
    return Target(chosen_device(settings.device), dtype, settings.batch_invariant)


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one. Raises GenerationError if it is not here."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cpu" and not number:
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind != "cuda" or not (number or "0").isdecimal() or int(number or 0) >= count:
        known = ["cpu", *(f"cuda:{gpu}" for gpu in range(count))]
        raise GenerationError(f"device {name!r} is not here", fix=f"give one of: {', '.join(known)}")
    return torch.device("cuda", int(number or torch.cuda.current_device()))


def _plan(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    target: Target,
    settings: EngineSettings,
    announce: Callable[[str], None],
) -> _Sizes:
    """How long sequences may be, and how many blocks there are for all of them."""
    kv = kv_format(checkpoint, spec, target, settings.kv_cache_dtype)
    step_tokens = settings.max_num_batched_tokens or STEP_TOKENS[target.device.type]
    longest = spec.max_positions
    num_bytes = settings.kv_cache_bytes or CPU_KV_BYTES
    num_tokens = num_bytes // kv.token_bytes
    limits = Limits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=step_tokens,
        max_model_len=longest,
    )
    limits.check_budget(BLOCK_SIZE)
    if target.device.type == "cuda":
        gc.collect()  # graphs and the runner that captured them hold each other
        torch.cuda.empty_cache()
        plan = plan_memory(
            checkpoint,
            spec,
            target,
            kv,
            fraction=settings.gpu_memory_fraction,
            max_num_batched_tokens=step_tokens,
            max_num_seqs=settings.max_num_seqs,
            reserved=reserved_bytes(spec, target, kv, settings, longest),
        )
        for line in plan.lines():
            announce(line)
        plan.check(settings.max_model_len or 1)
        num_tokens = num_tokens if settings.kv_cache_bytes else plan.num_tokens
    num_blocks = min(num_tokens // BLOCK_SIZE, settings.max_num_seqs * -(-longest // BLOCK_SIZE))
    if num_blocks * BLOCK_SIZE < min(longest, settings.max_model_len or BLOCK_SIZE):
        raise GenerationError(
            f"the KV cache holds {num_blocks * BLOCK_SIZE:,} tokens, and one sequence may have {longest:,}",
            fix=f"give kv_cache_bytes {kv.token_bytes * (longest + BLOCK_SIZE)} or more, or a smaller max_model_len",
        )
    return _Sizes(replace(limits, max_model_len=min(longest, num_blocks * BLOCK_SIZE)), num_blocks + 1)


def capture_on(target: Target) -> Capture | None:
    """How steps are captured on a target; None: they cannot be."""
    return cuda_capture(target.device) if target.has_kernels else None


def reserved_bytes(
    spec: DecoderSpec, target: Target, kv: KVFormat, settings: EngineSettings, longest: int
) -> int:
    """Beside weights, steps and cache: what graphs keep, and 8-bit keys and values in 16 bits for prompts."""
    reserved = 0
    if target.has_kernels and not settings.eager:
        reserved += graph_bytes(settings.max_num_seqs, longest, spec.vocab_size, target.dtype)
    if any(layer.dtype.itemsize == 1 for layer in kv.layers):
        one_sequence = 4 * longest * spec.num_kv_heads * spec.head_dim
        reserved += max(WIDENING_BYTES, one_sequence) * (2 if settings.batch_invariant else 1)
    return reserved


def _salt(
    checkpoint: Checkpoint, target: Target, kv_cache_dtype: KVCacheDtypeName, max_positions: int
) -> bytes:
    """What cached keys and values depend on besides tokens; LongRoPE's factors on how long a context may be."""
    kind = (target.device.type, target.dtype, target.batch_invariant)
    return repr((str(checkpoint.path), kind, kv_cache_dtype, max_positions)).encode()


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
