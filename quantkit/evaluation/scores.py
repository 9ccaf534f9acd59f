"""Predictions of one window scored against the reference's, and the scores of all windows summarised.

Shape suffixes: T positions of a window, R rows of a chunk, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
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


class WindowScores(NamedTuple):
    """A candidate on one window: kl_T float64 nats [T], log_prob_T float64 [T − 1], agrees_T bool [T]."""

    kl_T: Tensor
    log_prob_T: Tensor
    agrees_T: Tensor


def reference_window(parts: Iterable[Tensor], token_ids_T: Tensor) -> ReferenceWindow:
    """What is kept of the reference's logits: consecutive rows of all [T, V]. Raises NotFiniteError."""
    targets_T = _targets(token_ids_T)
    codes, log_prob, top1 = [], [], []
    for rows, logits_RV in _chunks(parts):
        codes.append(LogitCodes(*(tensor.cpu() for tensor in encode_logits(logits_RV))))
        log_prob.append(log_probs(logits_RV, targets_T[rows].to(logits_RV.device)).cpu())
        top1.append(logits_RV.argmax(dim=-1).cpu())
    codes_TV, step_T = (torch.cat(column) for column in zip(*codes, strict=True))
    return ReferenceWindow(LogitCodes(codes_TV, step_T), torch.cat(log_prob)[:-1], torch.cat(top1))


def score_window(reference: ReferenceWindow, parts: Iterable[Tensor], token_ids_T: Tensor) -> WindowScores:
    """Compare a candidate's logits, consecutive rows of all [T, V], with the reference's where they lie.

    Raises NotFiniteError.
    """
    targets_T = _targets(token_ids_T)
    found = []
    for rows, logits_RV in _chunks(parts):
        device = logits_RV.device
        reference_RV = decode_logits(reference.logits, rows, device)
        found.append(divergence(reference_RV, logits_RV, targets_T[rows].to(device)))
    kl_T, log_prob_T, top1_T = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    return WindowScores(kl_T, log_prob_T[:-1], agrees_T=top1_T == reference.top1_T)


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


def _chunks(parts: Iterable[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Positions and their logits, few enough at a time for temporaries in float32. Raises NotFiniteError."""
    start = 0
    for part_RV in parts:
        for rows in row_chunks(len(part_RV), part_RV.shape[1], part_RV.device):
            at = slice(start + rows.start, start + rows.stop)
            _check_finite(part_RV[rows], at.start)
            yield at, part_RV[rows]
        start += len(part_RV)


def _check_finite(logits_RV: Tensor, start: int) -> None:
    low_R, high_R = (bound_R.float() for bound_R in logits_RV.aminmax(dim=-1))  # float16's have no difference
    broken_R = ~(high_R - low_R).isfinite()
    if broken_R.any():
        row = int(broken_R.nonzero()[0])
        kind = "NaN" if logits_RV[row].isnan().any() else "infinite"
        raise NotFiniteError(f"{kind} logits at position {start + row}")
