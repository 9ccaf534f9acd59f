"""Generation: prompt tokens in, one event per new token out."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from quantkit.errors import GenerationError
from quantkit.runtime.model import Model
from quantkit.runtime.sampler import Sampler
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.tokenizer import Detokenizer, Tokenizer

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
    sampler, text = Sampler(params), Detokenizer(tokenizer.decode)
    cache = model.new_cache(min(len(prompt_ids) + params.max_tokens, model.spec.max_positions))
    pending = torch.tensor(prompt_ids)
    for number in range(1, params.max_tokens + 1):
        token_id = sampler.choose(model.forward(pending, cache))
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


def _check_room(model: Model, num_tokens: int) -> None:
    limit = model.spec.max_positions
    if num_tokens >= limit:
        raise GenerationError(
            f"the prompt has {num_tokens} tokens, and the model takes {limit} with the answer",
            fix=f"shorten the prompt to fewer than {limit} tokens",
        )
