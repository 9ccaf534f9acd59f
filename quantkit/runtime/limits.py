"""What an engine takes, said before anything waits: nothing is let in whose turn could never come."""

from dataclasses import dataclass

from quantkit.errors import GenerationError
from quantkit.runtime.block_manager import BlockManager
from quantkit.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sequences that run at once, tokens of one step, tokens of one sequence. How many may wait, a server decides."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    def check_budget(self, block_size: int) -> None:
        """Raises GenerationError if sequences that generate could use up a step, and prompts wait for ever."""
        least = self.max_num_seqs + block_size
        if self.max_num_batched_tokens < least:
            raise GenerationError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} leaves no room for prompts while "
                f"{self.max_num_seqs} sequences generate",
                fix=f"give max_num_batched_tokens {least} or more, or lower max_num_seqs",
            )

    def longest(self, sequence: Sequence) -> int:
        """Tokens that it may have; the one that nobody sees, of a prompt that is only scored, is one more."""
        return self.max_model_len + sequence.is_only_scored

    def check(self, sequence: Sequence, blocks: BlockManager) -> None:
        """Raises GenerationError if the model cannot take it, or all blocks together cannot hold it."""
        num_prompt, longest = len(sequence.prompt_ids), self.longest(sequence) - 1
        if not 1 <= num_prompt <= longest:
            raise GenerationError(
                f"the prompt has {num_prompt} tokens, and the model takes {self.max_model_len} with the answer",
                fix=f"shorten it to {longest} tokens" if num_prompt else "give a prompt that is not empty",
            )
        num_most = min(sequence.limit, longest + 1)
        num_needed = blocks.num_needed(num_most - 1)  # the last token is never computed
        num_blocks = blocks.num_blocks - 1
        if num_needed > num_blocks:
            raise GenerationError(
                f"{num_prompt} tokens and up to {num_most - num_prompt} new ones need {num_needed} KV blocks "
                f"of {blocks.block_size} tokens, and there are {num_blocks}",
                fix="raise kv_cache_bytes or gpu_memory_fraction, or take prompt and max_tokens together down to "
                f"{num_blocks * blocks.block_size + 1}",
            )
