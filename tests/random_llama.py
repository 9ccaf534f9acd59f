"""A Llama-shaped checkpoint of random bf16 weights of any size, written a few rows at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.formats.safetensors_file import as_bytes, encode_header
from tests.tiny_llama import CONFIG, write_tokenizer

CHUNK_WEIGHTS = 1 << 24
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a Llama with grouped KV heads of 64 channels and an untied head."""

    hidden: int
    inner: int
    layers: int
    vocab: int
    kv_heads: int

    @property
    def num_weights(self) -> int:
        """Weights of all tensors."""
        return sum(torch.Size(shape).numel() for group in self.shapes() for shape in group.values())

    def shapes(self) -> Iterator[dict[str, Shape]]:
        """Tensors by name: embedding and head, then a layer at a time."""
        yield {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        yield {"lm_head.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        for layer in range(self.layers):
            kinds: dict[str, Shape] = {
                "input_layernorm": (self.hidden,),
                "post_attention_layernorm": (self.hidden,),
                "self_attn.q_proj": (self.hidden, self.hidden),
                "self_attn.k_proj": (self.kv_heads * 64, self.hidden),
                "self_attn.v_proj": (self.kv_heads * 64, self.hidden),
                "self_attn.o_proj": (self.hidden, self.hidden),
                "mlp.gate_proj": (self.inner, self.hidden),
                "mlp.up_proj": (self.inner, self.hidden),
                "mlp.down_proj": (self.hidden, self.inner),
            }
            yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in kinds.items()}


def write_random_llama(folder: Path, sizes: Sizes, *, shard_weights: int) -> Path:
    """A checkpoint of several shards with config and tokenizer; memory for CHUNK_WEIGHTS at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Shape]] = [{}]
    for group in sizes.shapes():
        if shards[-1] and _count(shards[-1]) + _count(group) > shard_weights:
            shards.append({})
        shards[-1] |= group
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, tensors, generator)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 2 * sizes.num_weights}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | _config(sizes)))
    write_tokenizer(folder)
    return folder


def _config(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.hidden // 64,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": 64,
        "vocab_size": sizes.vocab,
    }


def _count(tensors: dict[str, Shape]) -> int:
    return sum(torch.Size(shape).numel() for shape in tensors.values())


def _write_shard(file: Path, tensors: dict[str, Shape], generator: torch.Generator) -> None:
    with file.open("wb") as out:
        out.write(encode_header({name: (torch.bfloat16, shape) for name, shape in tensors.items()}))
        for shape in tensors.values():
            left = torch.Size(shape).numel()
            while left:
                count = min(left, CHUNK_WEIGHTS)
                weights = torch.empty(count).normal_(0, 0.02, generator=generator)
                out.write(as_bytes(weights.bfloat16()))
                left -= count
