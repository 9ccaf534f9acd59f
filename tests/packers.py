"""Packers of the layouts of GPTQ and AWQ checkpoints, one integer at a time: unsigned codes in, words out."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny_llama import CONFIG, tiny_tensors, write_tokenizer

AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's eight fields, the lowest bits first


class Grid(NamedTuple):
    """Unsigned codes [N, K], zero points and scales [G, N], group of each input [K]."""

    codes: Tensor
    zero_points: Tensor
    scales: Tensor
    groups: Tensor

    def weight(self) -> Tensor:
        """w = (q − z) · s, float64 [N, K]."""
        groups = self.groups.long()
        return (self.codes - self.zero_points[groups].T).double() * self.scales[groups].T.double()


def to_grid(
    weight: Tensor, bits: int, group_size: int, *, symmetric: bool = False, order_seed: int | None = None
) -> Grid:
    """Round a weight [N, K]; with a seed, inputs belong to groups in a random order (act-order)."""
    num_rows, num_cols = weight.shape
    groups = torch.arange(num_cols) // group_size
    if order_seed is not None:
        groups = groups[torch.randperm(num_cols, generator=torch.Generator().manual_seed(order_seed))]
    most, num_groups = 2**bits - 1, num_cols // group_size
    scales, zero_points = torch.empty(2, num_groups, num_rows)
    for group in range(num_groups):
        part = weight[:, groups == group].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales[group] = ((high - low) / most).half().float()
        zero_points[group] = (
            torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scales[group]).round()
        )
    codes = (weight.float() / scales[groups].T + zero_points[groups].T).round().clamp(0, most)
    return Grid(codes.int(), zero_points.int().clamp(0, most), scales.half(), groups)


def words(codes: list[int], bits: int) -> list[int]:
    """A little-endian bit stream as signed 32-bit words."""
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    return _as_words(stream, -(-len(codes) * bits // 32))


def _as_words(stream: int, count: int) -> list[int]:
    fields = [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
    return [field - (1 << 32) if field >> 31 else field for field in fields]


def gptq_tensors(grid: Grid, bits: int, *, version: str = "gptq") -> dict[str, Tensor]:
    """The tensors of a linear by suffix; version "gptq" takes one off every zero point, word by word."""
    qweight = torch.tensor(
        [words(row, bits) for row in grid.codes.tolist()], dtype=torch.int32
    ).T.contiguous()
    rows = grid.zero_points.tolist()
    if version == "gptq" and bits == 3:
        rows = [[(zero_point - 1) % 8 for zero_point in row] for row in rows]
    qzeros = torch.tensor([words(row, bits) for row in rows], dtype=torch.int64)
    if version == "gptq" and bits != 3:
        qzeros -= sum(1 << place for place in range(0, 32, bits))
    return {
        "qweight": qweight,
        "qzeros": qzeros.to(torch.int32),  # wraps
        "scales": grid.scales.clone(),
        "g_idx": grid.groups.to(torch.int32),
    }


def awq_tensors(grid: Grid) -> dict[str, Tensor]:
    """The tensors of a linear by suffix, 4 bits, layout gemm."""

    def pack(rows: list[list[int]]) -> Tensor:
        packed = [
            words([row[start + output] for start in range(0, len(row), 8) for output in AWQ_OUTPUTS], 4)
            for row in rows
        ]
        return torch.tensor(packed, dtype=torch.int32)

    return {
        "qweight": pack(grid.codes.T.tolist()),
        "qzeros": pack(grid.zero_points.tolist()),
        "scales": grid.scales.clone(),
    }


class PackedFolder(NamedTuple):
    """A folder, and the weights [N, K] by module that its packed linears stand for."""

    path: Path
    weights: dict[str, Tensor]


def write_packed_llama(
    folder: Path, method: str, section: dict[str, Any], *, bits: int = 4, group_size: int = 16, **options: Any
) -> PackedFolder:
    """The tiny Llama with its layers' linears packed; the second layer's down_proj is left in 16 bits."""
    tensors, weights = {}, {}
    for name, tensor in tiny_tensors().items():
        module = name.removesuffix(".weight")
        if "_proj" not in name or name.startswith("model.layers.1.mlp.down"):
            tensors[name] = tensor.half()
            continue
        grid = to_grid(tensor, bits, group_size if group_size > 0 else tensor.shape[1], **options)
        weights[module] = grid.weight()
        version = section.get("checkpoint_format", "gptq")
        parts = awq_tensors(grid) if method == "awq" else gptq_tensors(grid, bits, version=version)
        tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": method, "bits": bits, "group_size": group_size} | section
    config = CONFIG | {"dtype": "float16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return PackedFolder(folder, weights)
