"""How models are run over windows of text: where, in which dtype, by which backend. Knows no backend's inside."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quantkit.evaluation.subjects import BackendName, Subject
from quantkit.runtime.load import DTYPES, model_dtype
from quantkit.runtime.settings import EngineSettings, KVCacheDtypeName
from quantkit.runtime.start import STEP_TOKENS, chosen_device
from quantkit.runtime.target import Target


class Serving(NamedTuple):
    """How one model is run over windows of `length` tokens."""

    target: Target
    kv_cache_dtype: KVCacheDtypeName
    length: int
    backend: BackendName = "quantkit"

    @property
    def dtype_name(self) -> str:
        """As config.json names dtypes."""
        return str(self.target.dtype).removeprefix("torch.")

    @property
    def kernels(self) -> str:
        """What computes: the kernels that serve on a GPU, torch alone, or another package."""
        if self.backend != "quantkit":
            return self.backend
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

    def candidate(self, subject: Subject) -> Serving:
        """As asked."""
        own = model_dtype(subject.checkpoint) if self.device.type == "cuda" else torch.float32
        target = Target(self.device, self.dtype or own)
        return Serving(target, self.kv_cache_dtype, self.length, subject.backend)

    def exact(self, original: Subject) -> Serving:
        """The original, to compare with: in float32."""
        return Serving(Target(self.device, torch.float32), "auto", self.length, original.backend)

    def rounded(self, original: Subject) -> Serving:
        """The original in the 16 bits asked for, or its own dtype: what that costs is the noise floor."""
        asked = None if self.dtype == torch.float32 else self.dtype
        target = Target(self.device, asked or model_dtype(original.checkpoint))
        return Serving(target, "auto", self.length, original.backend)


class Model(Protocol):
    """A model that can be run."""

    def predictions(self, texts: Sequence[Tensor], /, *, step_tokens: int) -> Iterator[Iterator[Tensor]]:
        """Next-token logits of windows, int64 [T] each: for each in turn, consecutive rows of its [T, V]."""
        ...

    def greedy(self, text_T: Tensor, num_tokens: int, /) -> list[int]:
        """The likeliest next tokens, one after another."""
        ...


class LoadModel(Protocol):
    """Loads a model to run it in some way."""

    def __call__(self, subject: Subject, serving: Serving, /) -> Model:
        """The model; raises QuantkitError if it cannot be run."""
        ...
