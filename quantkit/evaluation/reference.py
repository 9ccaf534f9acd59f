"""The original's predictions, window by window: from disk where they were kept, else computed.

Decides when the original's weights are in memory; what the predictions are compared with is not its business.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from quantkit.errors import EvaluationError
from quantkit.evaluation.cache import DamagedEntryError, TensorCache, Tensors
from quantkit.evaluation.scores import NotFiniteError, ReferenceWindow, reference_window, score_window
from quantkit.evaluation.serving import LoadModel, Model, Serving, Setup
from quantkit.evaluation.subjects import Subject
from quantkit.numerics.logit_codes import LogitCodes
from quantkit.version import __version__

CACHE_VERSION = 3  # raise it when the runtime's logits or the stored tensors change

Say = Callable[[str], None]


class Reference:
    """The original and what is kept of its predictions.

    While the cache works, weights are in memory only from the first window that has to be computed to the next
    `release`; without a cache the float32 ones stay, beside those of a candidate.
    """

    def __init__(self, subject: Subject, setup: Setup, load: LoadModel, cache: TensorCache, say: Say) -> None:
        self.subject = subject
        self.content_hash = subject.checkpoint.content_hash()
        self.exact, self.rounded = setup.exact(subject), setup.rounded(subject)
        self._load = load
        self._cache = cache
        self._say = say
        self._keeps = True
        self._models: dict[Serving, Model] = {}

    def claim(self, windows: Sequence[Tensor]) -> int:
        """Protect what is kept of these windows from being thrown out; returns how many passes are left to do."""
        keys = {self._key(window, serving) for window in windows for serving in {self.exact, self.rounded}}
        self._cache.in_use |= keys
        return sum(not self._cache.has(key) for key in keys)

    def is_kept(self, token_ids_T: Tensor, serving: Serving) -> bool:
        """Whether what one window gives, run like this, is on disk."""
        return self._cache.has(self._key(token_ids_T, serving))

    def windows(self, windows: Sequence[Tensor]) -> Iterator[ReferenceWindow]:
        """`window` for each, as many in a step as there is room for."""
        for token_ids_T, parts in self._passes(windows, self.exact):
            yield self.window(token_ids_T, parts)

    def window(self, token_ids_T: Tensor, parts: Iterable[Tensor] | None = None) -> ReferenceWindow:
        """Predictions in float32 for one window. parts: its logits, where they have been computed.

        Raises EvaluationError if they are not finite.
        """
        key = self._key(token_ids_T, self.exact)
        stored = self._lookup(key) if parts is None else None
        if stored is not None:
            return ReferenceWindow(
                LogitCodes(stored["codes"], stored["step"]), stored["log_prob"], stored["top1"]
            )
        try:
            window = reference_window(parts or self._run_one(token_ids_T, self.exact), token_ids_T)
        except NotFiniteError as error:
            raise self._broken(error) from None
        codes, log_prob_T, top1_T = window
        self._keep(
            key, {"codes": codes.codes_TV, "step": codes.step_T, "log_prob": log_prob_T, "top1": top1_T}
        )
        return window

    def noise_kls(self, windows: Sequence[Tensor]) -> Iterator[Tensor]:
        """KL(float32 ‖ rounded) per position of each window, float64 [T]; zeros where that is float32 too."""
        if self.rounded == self.exact:
            yield from (torch.zeros(len(token_ids_T), dtype=torch.float64) for token_ids_T in windows)
            return
        for token_ids_T, parts in self._passes(windows, self.rounded):
            yield self._noise_kl(token_ids_T, parts)

    def release(self) -> None:
        """Free the weights, but for those in float32 if they are needed again because nothing can be kept."""
        for serving in list(self._models):
            if self._keeps or serving != self.exact:
                del self._models[serving]

    def _noise_kl(self, token_ids_T: Tensor, parts: Iterable[Tensor] | None) -> Tensor:
        key = self._key(token_ids_T, self.rounded)
        stored = self._lookup(key) if parts is None else None
        if stored is not None:
            return stored["kl"]
        try:
            parts = parts or self._run_one(token_ids_T, self.rounded)
            kl_T = score_window(self.window(token_ids_T), parts, token_ids_T).kl_T
        except NotFiniteError as error:
            raise self._broken(error) from None
        self._keep(key, {"kl": kl_T})
        return kl_T

    def _passes(
        self, windows: Sequence[Tensor], serving: Serving
    ) -> Iterator[tuple[Tensor, Iterable[Tensor] | None]]:
        """Each window, with its logits unless what is made of them is kept."""
        missing = {self._key(ids_T, serving): ids_T for ids_T in windows if not self.is_kept(ids_T, serving)}
        computed = self._run(list(missing.values()), serving)
        for token_ids_T in windows:
            is_missing = missing.pop(self._key(token_ids_T, serving), None) is not None
            yield token_ids_T, next(computed) if is_missing else None

    def _run(self, windows: Sequence[Tensor], serving: Serving) -> Iterator[Iterator[Tensor]]:
        """Logits of windows; the model is loaded when the first are asked for."""
        if serving not in self._models:
            self._models[serving] = self._load(self.subject, serving)
        yield from self._models[serving].predictions(windows, step_tokens=serving.step_tokens)

    def _run_one(self, token_ids_T: Tensor, serving: Serving) -> Iterator[Tensor]:
        return next(self._run([token_ids_T], serving))

    def _key(self, token_ids_T: Tensor, serving: Serving) -> str:
        """What the numbers depend on. The kernels are of this version; which of them run depends on the GPU."""
        where = f"{serving.device_name} {serving.dtype_name} {serving.kernels}"
        if serving.backend != "quantkit":
            where += f" {version(serving.backend)}"
        digest = hashlib.sha256(f"{CACHE_VERSION} {__version__} {self.content_hash} {where}".encode())
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

    def _broken(self, error: NotFiniteError) -> EvaluationError:
        problem = f"{self.subject.checkpoint.path}: the reference produces {error}, so nothing can be compared with it"
        return EvaluationError(problem, fix="check the reference checkpoint; its weights may be damaged")
