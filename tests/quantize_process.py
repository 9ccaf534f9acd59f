"""Quantize as a process of its own, with small shards and frequent commits; to be killed.

python -m tests.quantize_process SOURCE FOLDER SHARD_BYTES
"""

import sys
from pathlib import Path

import torch

from quantkit.formats.shards import Limits
from quantkit.quantization import quantize_checkpoint
from quantkit.recipe import load_recipe


def main() -> None:
    source, folder, shard_bytes = sys.argv[1:]
    torch.set_num_threads(2)
    limits = Limits(shard_bytes=int(shard_bytes), commit_bytes=4 << 20, commit_seconds=0.1)
    quantize_checkpoint(Path(source), load_recipe("int4-all"), Path(folder), limits=limits)


if __name__ == "__main__":
    main()
