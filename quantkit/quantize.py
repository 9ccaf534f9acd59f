"""The story of a quantization run: read, plan, quantize, write; a tensor at a time, resumable.

Peak memory is a few tensors: weights are read in row chunks, codes of one linear are held until they are
packed. What a run leaves behind is described in `output.py`.
"""

import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit import __version__
from quantkit.algorithms.rtn import rtn
from quantkit.arch import layer_of
from quantkit.errors import OutputError, QuantkitError, SourceError
from quantkit.folder import FINISHED_NAME, FolderState, folder_state, remove_run, write_folder
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.compressed_tensors import StoredLinear, encode_linear, linear_layout
from quantkit.formats.kv_cache import kv_layout
from quantkit.formats.safetensors_file import iter_bytes
from quantkit.formats.shards import OutputTensor, ShardWriter
from quantkit.recipe import LinearPlan, QuantPlan, Recipe, make_plan
from quantkit.schemes import PerTensor, QParams
from quantkit.schemes.tiles import dequantize_weight

CHUNK_ELEMENTS = 1 << 24  # weights in float32 at a time


class Step(NamedTuple):
    """Progress: source bytes read so far and in all, and what was just done to one linear (None: copied)."""

    done_bytes: int
    total_bytes: int
    name: str
    note: Mapping[str, Any] | None
