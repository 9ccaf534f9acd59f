"""The original's predictions, window by window: from disk where they were kept, else computed.

Decides when the original's weights are in memory; what the predictions are compared with is not its business.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.errors import EvaluationError
from quantkit.evaluation.cache import DamagedEntryError, TensorCache, Tensors
from quantkit.evaluation.scores import NotFiniteError, ReferenceWindow, reference_window, score_window
from quantkit.formats.checkpoint import Checkpoint
from quantkit.numerics.logit_codes import LogitCodes
from quantkit.runtime.load import model_dtype
from quantkit.version import __version__

CACHE_VERSION = 2  # raise it when the runtime's float32 logits or the stored tensors change

Say = Callable[[str], None]


class Model(Protocol):
    """A model that can be run."""

    def logits(self, token_ids_T: Tensor, /) -> Tensor:
        """Next-token logits of a window, int64 [T] to float32 [T, V]."""
        ...


class LoadModel(Protocol):
    """Loads a checkpoint to run it in a dtype."""

    def __call__(self, path: Path, /, *, dtype: torch.dtype) -> Model:
        """The model; raises QuantkitError if it cannot be run."""
        ...


class Reference:
    """The original and what is kept of its predictions.

    While the cache works, weights are in memory only from the first window that has to be computed to the next
    `release`; without a cache the float32 ones stay, beside those of a candidate.
    """

    def __init__(self, checkpoint: Checkpoint, load: LoadModel, cache: TensorCache, say: Say) -> None:
        self.path = checkpoint.path
        self.content_hash = checkpoint.content_hash()
        self.dtype = model_dtype(checkpoint)
        self._load = load
        self._cache = cache
        self._say = say
        self._keeps = True
        self._models: dict[torch.dtype, Model] = {}

    def claim(self, windows: Sequence[Tensor]) -> int:
        """Protect what is kept of these windows from being thrown out; returns how many passes are left to do."""
        dtypes = {torch.float32, self.dtype}
        keys = {self._key(window, dtype) for window in windows for dtype in dtypes}
        self._cache.in_use |= keys
        return sum(not self._cache.has(key) for key in keys)

    @property
    def dtype_name(self) -> str:
        """The original's own dtype, as config.json names it."""
        return str(self.dtype).removeprefix("torch.")

    def is_kept(self, token_ids_T: Tensor, dtype: torch.dtype) -> bool:
        """Whether what one window gives in this dtype is on disk."""
        return self._cache.has(self._key(token_ids_T, dtype))

    def window(self, token_ids_T: Tensor) -> ReferenceWindow:
        """Predictions in float32 for one window. Raises EvaluationError if they are not finite."""
        key = self._key(token_ids_T, torch.float32)
        stored = self._lookup(key)
        if stored is not None:
            return ReferenceWindow(
                LogitCodes(stored["codes"], stored["step"]), stored["log_prob"], stored["top1"]
            )
        try:
            window = reference_window(self._logits(token_ids_T, torch.float32), token_ids_T)
        except NotFiniteError as error:
            raise self._broken(error) from None
        codes, log_prob_T, top1_T = window
        self._keep(
            key, {"codes": codes.codes_TV, "step": codes.step_T, "log_prob": log_prob_T, "top1": top1_T}
        )
        return window

    def noise_kl(self, token_ids_T: Tensor) -> Tensor:
        """KL(float32 ‖ the original's own dtype) per position of one window, float64 [T]; zeros for float32."""
        if self.dtype == torch.float32:
            return torch.zeros(len(token_ids_T), dtype=torch.float64)
        key = self._key(token_ids_T, self.dtype)
        stored = self._lookup(key)
        if stored is not None:
            return stored["kl"]
        try:
            logits_TV = self._logits(token_ids_T, self.dtype)
            kl_T = score_window(self.window(token_ids_T), logits_TV, token_ids_T).kl_T
        except NotFiniteError as error:
            raise self._broken(error) from None
        self._keep(key, {"kl": kl_T})
        return kl_T

    def release(self) -> None:
        """Free the weights, but for those in float32 if they are needed again because nothing can be kept."""
        for dtype in list(self._models):
            if self._keeps or dtype != torch.float32:
                del self._models[dtype]

    def _key(self, token_ids_T: Tensor, dtype: torch.dtype) -> str:
        digest = hashlib.sha256(f"{CACHE_VERSION} {__version__} {self.content_hash} {dtype}".encode())
        digest.update(token_ids_T.numpy().tobytes())
        return f"{self.content_hash[:12]}-{digest.hexdigest()[:40]}"

    def _lookup(self, key: str) -> Tensors | None:
        try:
            return self._cache.get(key)
        except DamagedEntryError as error:
            self._say(f"cached reference logits: {error}; computing them again")
            return None

    def _keep(self, key: str, tensors: Tensors) -> None:
        if not self._keeps:
            return
        try:
            self._cache.put(key, tensors)
        except OSError as error:
            self._keeps = False
            self._say(
                f"cached reference logits: {self._cache.folder} cannot take more ({error.strerror}); going on "
                "without, which holds the original in memory beside each candidate and computes it again"
            )

    def _logits(self, token_ids_T: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype not in self._models:
            self._models[dtype] = self._load(self.path, dtype=dtype)
        return self._models[dtype].logits(token_ids_T)

    def _broken(self, error: NotFiniteError) -> EvaluationError:
        problem = f"{self.path}: the reference produces {error}, so nothing can be compared with it"
        return EvaluationError(problem, fix="check the reference checkpoint; its weights may be damaged")
