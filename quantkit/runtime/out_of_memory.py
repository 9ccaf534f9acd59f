"""What a user is told when a GPU's memory ends although the plan said that it would do."""

import torch

from quantkit.errors import GenerationError


def out_of_memory(error: torch.OutOfMemoryError, doing: str) -> GenerationError:
    """The error that names the options to change. doing: what could not be done."""
    said = "; ".join(str(error).split(". ")[:2])  # that it is out of memory; how much it tried to allocate
    return GenerationError(
        f"{doing}: {said}",
        fix="use a smaller gpu_memory_fraction, which leaves more beside the KV cache, a smaller "
        "max_num_batched_tokens or max_model_len, or end what else uses the device",
    )
