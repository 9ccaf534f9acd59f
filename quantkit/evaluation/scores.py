"""Predictions of one window scored against the reference's, and the scores of all windows summarised.

Shape suffixes: T positions of a window, R rows of a chunk, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quantkit.evaluation.report import Damage
from quantkit.numerics.divergence import divergence, log_probs, row_chunks
from quantkit.numerics.logit_codes import LogitCodes, decode_logits, encode_logits

RESAMPLES = 10_000
RESAMPLED_AT_ONCE = 1 << 16  # values
BOOTSTRAP_SEED = 0


class NotFiniteError(Exception):
    """A model's logits hold NaN or infinity; says at which position of the window."""


class ReferenceWindow(NamedTuple):
    """The reference's predictions for one window: logits in 16 bits, the rest exact.

    log_prob_T: of the token that follows, float64 [T − 1]. top1_T: int64 [T].
    """

    logits: LogitCodes
    log_prob_T: Tensor
    top1_T: Tensor

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.logits.codes_TV.shape[1]


class WindowScores(NamedTuple):
    """A candidate on one window: kl_T float64 nats [T], log_prob_T float64 [T − 1], agrees_T bool [T]."""

    kl_T: Tensor
    log_prob_T: Tensor
    agrees_T: Tensor


def reference_window(logits_TV: Tensor, token_ids_T: Tensor) -> ReferenceWindow:
    """What is kept of the reference's logits. Raises NotFiniteError."""
    targets_T = _targets(token_ids_T)
    log_prob, top1 = [], []
    for rows in row_chunks(*logits_TV.shape):
        _check_finite(logits_TV[rows], rows.start)
        log_prob.append(log_probs(logits_TV[rows], targets_T[rows]))
        top1.append(logits_TV[rows].argmax(dim=-1))
    return ReferenceWindow(encode_logits(logits_TV), torch.cat(log_prob)[:-1], torch.cat(top1))


def score_window(reference: ReferenceWindow, logits_TV: Tensor, token_ids_T: Tensor) -> WindowScores:
    """Compare a candidate's logits with the reference's. Raises NotFiniteError."""
    targets_T = _targets(token_ids_T)
    parts = []
    for rows in row_chunks(*logits_TV.shape):
        _check_finite(logits_TV[rows], rows.start)
        parts.append(divergence(decode_logits(reference.logits, rows), logits_TV[rows], targets_T[rows]))
    top1_T = torch.cat([part.top1_R for part in parts])
    return WindowScores(
        kl_T=torch.cat([part.kl_R for part in parts]),
        log_prob_T=torch.cat([part.log_prob_R for part in parts])[:-1],
        agrees_T=top1_T == reference.top1_T,
    )


def summarise(scores: Sequence[WindowScores], reference_ppl: float, kl_noise_floor: float) -> Damage:
    """Figures over all positions of all windows, which are of one length."""
    kl = torch.stack([window.kl_T for window in scores]).numpy()
    ppl = perplexity([window.log_prob_T for window in scores])
    return Damage(
        ppl=ppl,
        ppl_increase=100 * (ppl / reference_ppl - 1),
        kl_mean=float(kl.mean()),
        kl_ci=bootstrap_interval(kl.mean(axis=1)),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_noise_floor=kl_noise_floor,
        top1=float(torch.stack([window.agrees_T for window in scores]).double().mean()),
    )


def perplexity(log_probs_per_window: Sequence[Tensor]) -> float:
    """exp of minus the mean log-probability of the tokens that followed."""
    return float(torch.cat(list(log_probs_per_window)).mean().neg().exp())


def bootstrap_interval(window_means: np.ndarray, *, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean; None for a single window.

    Whole windows are resampled, because positions within one are correlated. Seeded: the same scores give the
    same interval.
    """
    num_windows = len(window_means)
    if num_windows < 2:
        return None
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    means = np.empty(RESAMPLES)
    step = max(1, RESAMPLED_AT_ONCE // num_windows)  # any number of windows in the same memory
    for start in range(0, RESAMPLES, step):
        chosen = generator.integers(num_windows, size=(min(step, RESAMPLES - start), num_windows))
        means[start : start + step] = window_means[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _targets(token_ids_T: Tensor) -> Tensor:
    """The token after each position; the last position has none and gets a stand-in, dropped later."""
    return token_ids_T.roll(-1)


def _check_finite(logits_RV: Tensor, start: int) -> None:
    low_R, high_R = logits_RV.aminmax(dim=-1)
    broken_R = ~(high_R - low_R).isfinite()
    if broken_R.any():
        row = int(broken_R.nonzero()[0])
        kind = "NaN" if logits_RV[row].isnan().any() else "infinite"
        raise NotFiniteError(f"{kind} logits at position {start + row}")
