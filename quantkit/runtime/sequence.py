"""One sequence: its tokens, what of them is computed, what is in flight, and why it ended.

    token_ids   |---- prompt ----|---- generated, known ----| in flight |
                0                                           len(token_ids)
    computed    |--------------------------------| num_computed (launched)

The scheduler moves everything in here. A sequence knows neither what its tokens mean nor what its blocks hold.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from quantkit.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.runtime.logprobs import TokenLogprobs


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token or a stop string
    LENGTH = "length"  # max_tokens are reached
    CONTEXT = "context"  # the model can take no more
    ABORT = "abort"  # nobody wants the rest
    ERROR = "error"  # the model's logits are no numbers
    GRAMMAR = "grammar"  # its grammar can be followed no further


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A prompt and what is generated after it.

    eos_ids: the model's own stop tokens. priority, arrival: smaller is earlier, priority first; sequence_id decides
    where both are the same. All other fields are the scheduler's to write, but mask: the tokens that its grammar allows
    next, int32 words of 32 bits on the host; None: it has no grammar. A token in flight decides what comes after it.
    targets: the token after each of the prompt's, of those whose log probabilities are asked for; num_scored: of them,
    launched, or not asked for.
    """

    sequence_id: int
    prompt_ids: list[int]
    params: SamplingParams
    eos_ids: frozenset[int]
    priority: int = 0
    arrival: int = 0
    targets: list[int] = field(default_factory=list)
    num_scored: int = 0

    order: tuple[int, int, int] = field(init=False)  # smaller is more important
    stop_ids: frozenset[int] = field(
        init=False
    )  # what ends it: `eos_ids` unless ignored, and the request's own
    limit: int = field(
        init=False
    )  # it ends with so many tokens; the scheduler lowers it to what the model takes
    token_ids: list[int] = field(init=False)  # append-only

    row: int | None = None  # in the device's state, while it runs
    generation: int = 0  # how often it was given a row
    blocks: list[int] = field(default_factory=list)  # append-only while it runs
    block_hashes: list[bytes] = field(
        default_factory=list
    )  # of full blocks from the first on; kept when preempted
    num_found: int = 0  # blocks of its beginning that were published when it last looked
    num_published: int = 0  # of its blocks; those whose hash another block has count too
    num_computed: int = 0
    num_in_flight: int = 0  # sampled on the device, not yet seen
    num_cached: int = 0  # of the prompt, found in the cache when it first got a row
    finish: FinishReason | None = None
    mask: "Tensor | None" = None
    prompt_logprobs: list["TokenLogprobs"] = field(default_factory=list)  # of targets, those seen

    def __post_init__(self) -> None:
        self.order = (self.priority, self.arrival, self.sequence_id)
        own_ids = frozenset(self.params.stop_token_ids)
        self.stop_ids = own_ids if self.params.ignore_eos else own_ids | self.eos_ids
        self.limit = len(self.prompt_ids) + self.params.max_tokens
        self.token_ids = list(self.prompt_ids)

    @property
    def is_only_scored(self) -> bool:
        """Whether its last target is no part of it: the model is asked for this one's probability, and no more."""
        return len(self.targets) == len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """With those in flight."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_generated(self) -> int:
        """Known ones."""
        return len(self.token_ids) - len(self.prompt_ids)

    def finish_after_last(self) -> FinishReason | None:
        """Why the last known token is the last of all, or None: it is not. `min_tokens` come before any stop token."""
        if self.token_ids[-1] in self.stop_ids and self.num_generated > self.params.min_tokens:
            return FinishReason.STOP
        if len(self.token_ids) < self.limit:
            return None
        return FinishReason.LENGTH if self.num_generated == self.params.max_tokens else FinishReason.CONTEXT
