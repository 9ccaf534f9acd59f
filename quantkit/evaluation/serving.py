"""How an evaluation runs models: as the engine does, over windows of text that are there already.

The same decoder, kernels, paged KV cache and tokens per step; no scheduler and no sampler, since nothing is written.
"""

import gc
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quantkit.errors import MemoryPlanError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.quantization_config import read_quantization
from quantkit.runtime.load import DTYPES, check_kernels, kv_format, load_model, model_dtype
from quantkit.runtime.memory_plan import plan_memory
from quantkit.runtime.model import LOGITS_ELEMENTS
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.settings import EngineSettings, KVCacheDtypeName
from quantkit.runtime.start import STEP_TOKENS, chosen_device, reserved_bytes
from quantkit.runtime.target import Target


class Serving(NamedTuple):
    """How one model is run over windows of `length` tokens."""

    target: Target
    kv_cache_dtype: KVCacheDtypeName
    length: int

    @property
    def dtype_name(self) -> str:
        """As config.json names dtypes."""
        return str(self.target.dtype).removeprefix("torch.")

    @property
    def kernels(self) -> str:
        """What computes: the kernels that serve on a GPU, or torch."""
        return "quantkit_kernels" if self.target.has_kernels else "torch"

    @property
    def device_name(self) -> str:
        """A GPU's name, or cpu."""
        device = self.target.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    @property
    def step_tokens(self) -> int:
        """Of one step. Attention in torch holds the scores of all of them, so there it is fewer on a GPU too."""
        return STEP_TOKENS["cuda" if self.target.has_kernels else "cpu"]


class Setup(NamedTuple):
    """What an evaluation was asked for. dtype None: each model's own on a GPU, float32 on a CPU."""

    device: torch.device
    dtype: torch.dtype | None
    kv_cache_dtype: KVCacheDtypeName
    length: int

    @classmethod
    def of(cls, settings: EngineSettings, length: int) -> "Setup":
        """Raises GenerationError for a device that is not there."""
        dtype = None if settings.dtype is None else DTYPES[settings.dtype]
        return cls(chosen_device(settings.device), dtype, settings.kv_cache_dtype, length)

    def candidate(self, checkpoint: Checkpoint) -> Serving:
        """As asked."""
        own = model_dtype(checkpoint) if self.device.type == "cuda" else torch.float32
        return Serving(Target(self.device, self.dtype or own), self.kv_cache_dtype, self.length)

    def exact(self) -> Serving:
        """The original, to compare with: in float32."""
        return Serving(Target(self.device, torch.float32), "auto", self.length)

    def rounded(self, original: Checkpoint) -> Serving:
        """The original in the 16 bits asked for, or its own dtype: what that costs is the noise floor."""
        asked = None if self.dtype == torch.float32 else self.dtype
        return Serving(Target(self.device, asked or model_dtype(original)), "auto", self.length)


class Model(Protocol):
    """A model that can be run."""

    def predictions(self, texts: Sequence[Tensor], /, *, step_tokens: int) -> Iterator[Iterator[Tensor]]:
        """Next-token logits of windows, int64 [T] each: for each in turn, consecutive rows of its [T, V]."""
        ...


class LoadModel(Protocol):
    """Loads a checkpoint to run it in some way."""

    def __call__(self, checkpoint: Checkpoint, serving: Serving, /) -> Model:
        """The model; raises QuantkitError if it cannot be run."""
        ...


def check_serving(checkpoint: Checkpoint, serving: Serving) -> None:
    """Raise SchemeError, from headers, for a KV cache or a number format that cannot be run like this."""
    kv_format(checkpoint, read_spec(checkpoint), serving.target, serving.kv_cache_dtype)
    if serving.target.has_kernels:
        check_kernels(checkpoint, read_quantization(checkpoint.config), serving.target)


def load_served(checkpoint: Checkpoint, serving: Serving) -> Model:
    """Load what serves. Raises what `load_model` does; MemoryPlanError, before reading, if a GPU is too small."""
    target = serving.target
    if target.device.type == "cuda":
        _check_memory(checkpoint, serving)
    return load_model(
        checkpoint, dtype=target.dtype, device=target.device, kv_cache_dtype=serving.kv_cache_dtype
    )


def _check_memory(checkpoint: Checkpoint, serving: Serving) -> None:
    gc.collect()
    torch.cuda.empty_cache()  # of the model before this one
    spec, target = read_spec(checkpoint), serving.target
    kv = kv_format(checkpoint, spec, target, serving.kv_cache_dtype)
    settings = EngineSettings(eager=True)
    plan = plan_memory(
        checkpoint,
        spec,
        target,
        kv,
        fraction=settings.gpu_memory_fraction,
        max_num_batched_tokens=serving.step_tokens,
        max_num_seqs=LOGITS_ELEMENTS // spec.vocab_size,
        reserved=reserved_bytes(spec, target, kv, settings, serving.length),
    )
    try:
        plan.check(max(serving.step_tokens, serving.length))
    except MemoryPlanError as error:
        raise MemoryPlanError(
            f"{checkpoint.path} in {serving.dtype_name} on {serving.device_name}: {error.problem}",
            fix="evaluate with --device cpu, with a smaller --length, or end what else uses the GPU",
        ) from None
