"""Logits to tokens on the device. What a row asks for stands there beside it, written when a sequence gets the row.

    logits ─► adjustments, grammars, if a row asks ─► temperature, top k, top p, min p ─► noise ─► argmax

A row's token depends on its logits, its parameters, and the seed and position that its noise is made of; not on other
rows. The host knows what a row may ask for, and so what the kernels of a step have to do: `work` says it.

Shape suffixes: B rows of a step, R rows of the device's state, V vocab.
"""

import secrets
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quantkit.runtime.logit_adjustments import ALWAYS, LogitAdjustments
from quantkit.runtime.logprobs import Logprobs, logprobs_of
from quantkit.runtime.masks import Masks, masked
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.upload import upload
from quantkit_kernels.draw import NUM_SETTINGS, draw, pack_settings
from quantkit_kernels.sampling import argmax


class Choice(IntEnum):
    """How the rows of a step are chosen: each can do what those before it can."""

    GREEDY = 0
    RANDOM = 1
    FILTERED = 2  # by top k or top p


class Work(NamedTuple):
    """What a step has to do."""

    choice: Choice
    adjusts: bool = False
    num_logprobs: int | None = None


class NewRow(NamedTuple):
    """A row, and the sequence that it belongs to from the next step on. answer_ids: what it has generated already."""

    row: int
    params: SamplingParams
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    stop_ids: frozenset[int]


class Sampled(NamedTuple):
    """int64 [B] tokens, always of the vocabulary; bool [B], whether a row's logits held NaN."""

    token_ids_B: Tensor
    is_nan_B: Tensor
    logprobs: Logprobs | None


class Sampler:
    """The sampling state of `num_rows` rows."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._settings_R = torch.zeros(num_rows, NUM_SETTINGS, dtype=torch.int32, device=device)
        self._adjustments = LogitAdjustments(num_rows, vocab_size, device)
        self._choice_R = np.zeros(num_rows, dtype=np.int64)
        self._adjusts_until_R = np.zeros(num_rows, dtype=np.int64)
        self._num_logprobs_R = np.full(num_rows, -1, dtype=np.int64)

    def assign(self, new_rows: Sequence[NewRow]) -> None:
        """Rows get their sequences: one copy to the device, more for those that ask for adjustments."""
        numbers = []
        for row, params, prompt_ids, answer_ids, stop_ids in new_rows:
            numbers.append([row, *_settings(params)])
            self._choice_R[row] = _choice(params)
            self._adjusts_until_R[row] = _adjusts_until(params, len(prompt_ids))
            self._num_logprobs_R[row] = -1 if params.logprobs is None else params.logprobs
            self._adjustments.assign(row, params, prompt_ids, answer_ids, stop_ids)
        if numbers:
            packed = upload(numbers, torch.int32, self._device)
            self._settings_R.index_copy_(0, packed[:, 0].long(), packed[:, 1:])

    def work(self, rows: Sequence[int], positions: Sequence[int]) -> Work:
        """What a step over these rows has to do. positions: places in their sequences of the tokens to be chosen."""
        chosen = np.asarray(rows, dtype=np.int64)
        num_logprobs = int(self._num_logprobs_R[chosen].max(initial=-1))
        return Work(
            Choice(int(self._choice_R[chosen].max(initial=0))),
            bool((np.asarray(positions) < self._adjusts_until_R[chosen]).any()),
            None if num_logprobs < 0 else num_logprobs,
        )

    def sample(
        self, logits_BV: Tensor, rows_B: Tensor, positions_B: Tensor, work: Work, masks: Masks | None = None
    ) -> Sampled:
        """A token of each row. rows_B, positions_B: int64, as `work` was asked for, on the device."""
        raw_BV = logits_BV
        if work.adjusts:
            logits_BV = self._adjustments.apply(raw_BV, rows_B, positions_B)
        if masks is not None:
            logits_BV = masked(logits_BV, masks)
        if work.choice == Choice.GREEDY:
            token_ids_B, is_nan_B = argmax(logits_BV)
        else:
            is_filtered = work.choice == Choice.FILTERED
            token_ids_B, is_nan_B = draw(logits_BV, self._settings_R, rows_B, positions_B, is_filtered)
        if work.adjusts:
            self._adjustments.count(rows_B, token_ids_B)
        num_logprobs = work.num_logprobs
        logprobs = None if num_logprobs is None else logprobs_of(raw_BV, token_ids_B, num_logprobs)
        return Sampled(token_ids_B, is_nan_B, logprobs)


def _settings(params: SamplingParams) -> list[int]:
    return pack_settings(
        temperature=params.temperature,
        top_k=params.top_k or 0,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
    )


def _choice(params: SamplingParams) -> Choice:
    if params.temperature == 0:
        return Choice.GREEDY
    return Choice.RANDOM if params.top_k is None and params.top_p == 1 else Choice.FILTERED


def _adjusts_until(params: SamplingParams, num_prompt_tokens: int) -> int:
    """The first position whose logits are taken as they are."""
    if params.has_penalties or params.logit_bias:
        return ALWAYS
    return num_prompt_tokens + params.min_tokens if params.min_tokens else 0
