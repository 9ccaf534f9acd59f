"""From logits to the next token. Shape suffix: V vocab."""

import torch
from torch import Tensor

from quantkit.runtime.sampling_params import SamplingParams


class Sampler:
    """Draws tokens with a random state of its own: the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    def choose(self, logits_V: Tensor) -> int:
        """The next token id; ties in greedy choice go to the lowest id."""
        if self._params.temperature == 0:
            return int(logits_V.argmax())
        probabilities_V = next_token_probabilities(logits_V, self._params)
        return int(torch.multinomial(probabilities_V, 1, generator=self._random))


def next_token_probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that is sampled from, float32 [V], sum 1, zero for what the filters drop.

    params.temperature > 0. The likeliest token always remains.
    """
    assert params.temperature > 0, "greedy choice has no distribution"
    logits_V = logits_V.to(torch.float32)
    scaled_V = (logits_V - logits_V.max()) / params.temperature  # the largest is 0, whatever the temperature
    sorted_V, order_V = scaled_V.sort(descending=True, stable=True)
    if params.top_k is not None:
        sorted_V = _keep_first(sorted_V, params.top_k)
    before_V = sorted_V.softmax(-1).cumsum(-1).roll(1)  # probability of everything likelier
    before_V[0] = 0
    sorted_V = sorted_V.masked_fill(before_V >= params.top_p, -torch.inf)
    probabilities_V = sorted_V.softmax(-1)
    probabilities_V = probabilities_V.masked_fill(probabilities_V < params.min_p * probabilities_V[0], 0)
    result_V = torch.zeros_like(scaled_V)
    result_V[order_V] = probabilities_V / probabilities_V.sum()
    return result_V


def _keep_first(sorted_V: Tensor, count: int) -> Tensor:
    kept = sorted_V.clone()
    kept[count:] = -torch.inf
    return kept
