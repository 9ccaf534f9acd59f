"""Build or buy: what tokens cost on one's own GPU at a measured speed, and from which volume on that is cheaper."""

from typing import NamedTuple

SECONDS_PER_HOUR = 3600
HOURS_PER_MONTH = 730
MILLION = 1_000_000


class Prices(NamedTuple):
    """gpu: for an hour, above 0. api_in, api_out: for a million tokens of prompts and answers, one of them above 0."""

    gpu: float
    api_in: float
    api_out: float


class Cost(NamedTuple):
    """Of one kind of request. A GPU that is always full against an API.

    own_request, api_request: price of one request. tokens_per_unit: tokens, of prompts and answers, for one unit of
    money on the GPU. break_even_requests: in a month, above which a GPU that is paid for all month costs less; None:
    not even a full GPU does. break_even_load: the same as a share of what the GPU can do.
    """

    own_request: float
    api_request: float
    tokens_per_unit: float
    requests_per_month: float
    break_even_requests: float | None
    break_even_load: float | None


def cost_of(
    prices: Prices, *, num_prompt_tokens: float, num_output_tokens: float, request_rate: float
) -> Cost:
    """request_rate: requests a second, as measured; tokens: of one request, on average."""
    own_request = prices.gpu / SECONDS_PER_HOUR / request_rate
    api_request = (num_prompt_tokens * prices.api_in + num_output_tokens * prices.api_out) / MILLION
    month = request_rate * SECONDS_PER_HOUR * HOURS_PER_MONTH
    needed = prices.gpu * HOURS_PER_MONTH / api_request
    is_cheaper = needed <= month
    return Cost(
        own_request=own_request,
        api_request=api_request,
        tokens_per_unit=(num_prompt_tokens + num_output_tokens) / own_request,
        requests_per_month=month,
        break_even_requests=needed if is_cheaper else None,
        break_even_load=needed / month if is_cheaper else None,
    )
