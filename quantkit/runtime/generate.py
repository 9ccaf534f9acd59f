"""Generation: prompt tokens in, one event per new token out."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantkit.errors import GenerationError
from quantkit.runtime.model import Model
from quantkit.runtime.sampler import NewRow, Sampler
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.tokenizer import Tokenizer

Finish = Literal["stop", "length", "context"]


class Generated(NamedTuple):
    """One new token, the text that became certain with it, and why it is the last (None: it is not).

    stop: it is a stop token, which has no text; length: max_tokens are reached; context: the model can take no more.
    """

    token_id: int
    text: str
    finish: Finish | None


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    params: SamplingParams,
    *,
    stop_ids: frozenset[int],
) -> Iterator[Generated]:
    """Yield tokens as they are chosen; the last one has `finish` set.

    Raises GenerationError, before any token, if the prompt leaves no room in the model's context.
    """
    _check_room(model, len(prompt_ids))
    sampler, text, cache = (
        _sampler(model, params, prompt_ids, stop_ids),
        tokenizer.detokenizer(),
        model.new_cache(),
    )
    pending = torch.tensor(prompt_ids)
    for number in range(1, params.max_tokens + 1):
        token_id = _next_token(sampler, model.forward(pending, cache), len(prompt_ids) + number - 1)
        finish: Finish | None = None
        if token_id in stop_ids:
            yield Generated(token_id, text.flush(), "stop")
            return
        if number == params.max_tokens:
            finish = "length"
        elif cache.num_tokens + 1 >= model.spec.max_positions:
            finish = "context"
        piece = text.add(token_id)
        yield Generated(token_id, piece + text.flush() if finish else piece, finish)
        if finish:
            return
        pending = torch.tensor([token_id])


def _sampler(
    model: Model, params: SamplingParams, prompt_ids: list[int], stop_ids: frozenset[int]
) -> Sampler:
    sampler = Sampler(1, model.spec.vocab_size, torch.device("cpu"))
    sampler.assign([NewRow(0, params, prompt_ids, (), stop_ids)])
    return sampler


def _next_token(sampler: Sampler, logits_V: Tensor, position: int) -> int:
    row, positions = torch.tensor([0]), torch.tensor([position])
    return int(sampler.sample(logits_V[None], row, positions, sampler.work([0], [position])).token_ids_B)


def _check_room(model: Model, num_tokens: int) -> None:
    limit = model.spec.max_positions
    if num_tokens >= limit:
        raise GenerationError(
            f"the prompt has {num_tokens} tokens, and the model takes {limit} with the answer",
            fix=f"shorten the prompt to fewer than {limit} tokens",
        )
