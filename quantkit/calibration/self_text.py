"""Calibration text that the model writes itself: sampled at temperature 1, seeded, kept in the cache.

Every window starts with the token that starts a text, and goes on past the tokens that end one, as training data
does. Holds the whole model, in float32 on a CPU, else in its own dtype, and the keys and values of a batch.

Shape suffixes: B sequences of a batch, S samples, L tokens, V vocabulary, H KV heads, D head_dim.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from quantkit.arch.pairs import read_heads
from quantkit.calibration.skeleton import Skeleton
from quantkit.calibration.tokens import CalibrationTokens, with_hash
from quantkit.env import cache_dir
from quantkit.errors import CalibrationError
from quantkit.formats.built_once import built_once
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.safetensors_file import read_header, read_tensor, write_safetensors
from quantkit.text import SELF
from quantkit.tokens import load_tokenizer

VERSION = 1  # raise it when the same seed writes another text
# keys and values of a batch; constants, since batches change the text
KV_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}
MAX_BATCH = 128
IDS = "ids"
NOT_WRITTEN = "not written yet"  # in place of a hash

OnToken = Callable[[int, int], None]


def self_tokens(
    checkpoint: Checkpoint,
    samples: int,
    length: int,
    *,
    seed: int,
    device: torch.device,
    on_token: OnToken = lambda done, total: None,
) -> CalibrationTokens:
    """Windows of text by the model, from the cache if this machine has written them before.

    on_token: told how many tokens of the longest sequence are done, over all batches, and of how many. Raises
    UnsupportedModelError for a family that is not known, CalibrationError where predictions are not finite.
    """

    def build(folder: Path) -> None:
        ids_SL = write_text(checkpoint, samples, length, seed=seed, device=device, on_token=on_token)
        write_safetensors(folder / "tokens.safetensors", {IDS: ids_SL})

    folder = built_once(_place(checkpoint, samples, length, seed, device), build)
    return with_hash(read_tensor(read_header(folder / "tokens.safetensors")[IDS]), SELF)


def is_written(checkpoint: Checkpoint, samples: int, length: int, *, seed: int, device: torch.device) -> bool:
    """Whether `self_tokens` only has to read."""
    return _place(checkpoint, samples, length, seed, device).is_dir()


def _place(checkpoint: Checkpoint, samples: int, length: int, seed: int, device: torch.device) -> Path:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = [VERSION, torch.__version__, transformers.__version__, machine]
    wanted = json.dumps([checkpoint.content_hash(), samples, length, seed, *versions])
    return cache_dir() / SELF / hashlib.sha256(wanted.encode()).hexdigest()[:40]


@torch.no_grad()
def write_text(
    checkpoint: Checkpoint, samples: int, length: int, *, seed: int, device: torch.device, on_token: OnToken
) -> Tensor:
    """Sample windows of token ids, int64 [samples, length], on the CPU."""
    model = _whole_model(checkpoint, device)
    starts_S = _start_tokens(checkpoint, samples, seed)
    generator = torch.Generator(device).manual_seed(seed)
    batches = torch.split(starts_S, batch_size(checkpoint, samples, length, device))
    written = []
    for number, starts_B in enumerate(batches):
        ids_BL = starts_B.to(device)[:, None].repeat(1, length)
        cache = Cache(layers=[_Layer(length) for _ in range(checkpoint.text_config["num_hidden_layers"])])
        for position in range(1, length):
            last_B1 = ids_BL[:, position - 1 : position]
            logits_BV = model(input_ids=last_B1, past_key_values=cache, use_cache=True).logits[:, -1]
            ids_BL[:, position] = _draw(logits_BV.float(), generator, checkpoint)
            on_token(number * length + position + 1, len(batches) * length)
        written.append(ids_BL.cpu())
    return torch.cat(written)


def batch_size(checkpoint: Checkpoint, samples: int, length: int, device: torch.device) -> int:
    """Sequences written at once: as many as the limit for keys and values holds, in batches of equal size."""
    fitting = min(MAX_BATCH, max(1, KV_BYTES[device.type] // (kv_token_bytes(checkpoint, device) * length)))
    return -(-samples // -(-samples // fitting))


def kv_token_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """Bytes of a token's keys and values in all layers."""
    heads = read_heads(checkpoint)
    num_layers = int(checkpoint.text_config["num_hidden_layers"])
    return 2 * num_layers * heads.num_kv * heads.dim * text_dtype(checkpoint, device).itemsize


def text_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """What the model computes in. float32 on a CPU: most multiply 16-bit numbers several times slower."""
    if device.type == "cpu":
        return torch.float32
    return next(info.dtype for name, info in checkpoint.tensors.items() if name.endswith("_proj.weight"))


def _whole_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    skeleton = Skeleton(checkpoint, device, text_dtype(checkpoint, device))
    skeleton.fill_outside({name: checkpoint.read(name) for name in skeleton.outside_names()})
    for layer in range(skeleton.num_layers):
        skeleton.fill_layer(layer, skeleton.read_layer(layer))
    return skeleton.model


def _start_tokens(checkpoint: Checkpoint, samples: int, seed: int) -> Tensor:
    """BOS, or, of a tokenizer that has none, any tokens that are not special."""
    backend = load_tokenizer(checkpoint.path).backend
    if backend.bos_token_id is not None:
        return torch.full((samples,), backend.bos_token_id)
    vocabulary_size = int(checkpoint.text_config["vocab_size"])
    plain = {token for token in backend.get_vocab().values() if token < vocabulary_size}
    candidates = torch.tensor(sorted(plain - set(backend.all_special_ids)))
    generator = torch.Generator().manual_seed(seed)
    return candidates[torch.randint(len(candidates), (samples,), generator=generator)]


def _draw(logits_BV: Tensor, generator: torch.Generator, checkpoint: Checkpoint) -> Tensor:
    """A token of each row at temperature 1, [B]."""
    probabilities_BV = logits_BV.softmax(dim=-1)
    if not bool(probabilities_BV.sum().isfinite()):
        raise CalibrationError(
            f"{checkpoint.path}: the model predicts NaN or Inf, so it cannot write its own text",
            fix="look at the model's weights; or calibrate on a file: --calib FILE.txt",
        )
    if probabilities_BV.is_cuda:  # where sums along the vocabulary would come out differently from run to run
        return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]
    # multinomial draws a random number for every entry of the vocabulary, which takes a CPU four times as long
    reached_BV = probabilities_BV.cumsum(dim=-1, dtype=torch.float64)
    drawn_B1 = torch.rand(len(logits_BV), 1, generator=generator, dtype=torch.float64) * reached_BV[:, -1:]
    return torch.searchsorted(reached_BV, drawn_B1, right=True)[:, 0]


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer in memory taken once; transformers' own copies all of them for every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._num_tokens = 0
        self._all_keys, self._all_values = torch.empty(0), torch.empty(0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; returns all of them, [B, H, tokens, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, _ = key_states.shape
            self._all_keys, self._all_values = (
                new.new_empty(batch, heads, self._capacity, new.shape[-1])
                for new in (key_states, value_states)
            )
        start, self._num_tokens = self._num_tokens, self._num_tokens + key_states.shape[-2]
        self._all_keys[:, :, start : self._num_tokens] = key_states
        self._all_values[:, :, start : self._num_tokens] = value_states
        self.keys, self.values = (
            self._all_keys[:, :, : self._num_tokens],
            self._all_values[:, :, : self._num_tokens],
        )
        return self.keys, self.values
