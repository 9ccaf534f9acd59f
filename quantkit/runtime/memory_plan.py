"""What a model will take of a device's memory, from headers alone, before anything of it is allocated.

    fraction · total  =  used by others | weights | workspace | reserved (graphs) | tokens of the KV cache …

Weights count as they are kept: codes as on disk, but INT2 in 4 bits where kernels compute, all else in the dtype of the
model. While they are loaded a layer and the next lie beside them as they are on disk; that is less than the workspace
or the cache, which come later.
"""

from dataclasses import dataclass

import torch

from quantkit.errors import MemoryPlanError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.quantization_config import QuantizedModules, read_quantization
from quantkit.formats.safetensors_file import TensorInfo
from quantkit.runtime.kv_pool import KVFormat
from quantkit.runtime.layers.gpu_linear import kept_bits
from quantkit.runtime.layers.rotary import NoRope
from quantkit.runtime.logit_adjustments import SLOT_BYTES
from quantkit.runtime.models.spec import DecoderSpec, LayerSpec
from quantkit.runtime.target import Target
from quantkit.runtime.weights import UNUSED_SUFFIXES, find_place

KERNEL_BYTES = (
    128 << 20
)  # slices of dequantized weights, partial sums of attention, fragments of the allocator
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes. total, used: of the device, and what of it others have. fraction: of the total that we may fill."""

    total: int
    used: int
    fraction: float
    weights: int
    workspace: int
    reserved: int
    token: int

    @property
    def left(self) -> int:
        """For keys and values; negative where not even the rest fits."""
        return int(self.fraction * self.total) - self.used - self.weights - self.workspace - self.reserved

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences whose keys and values fit."""
        return max(0, self.left // self.token)

    def lines(self) -> list[str]:
        """The plan in words, to be printed before it is carried out."""
        budget = int(self.fraction * self.total)
        return [
            f"memory: {_gb(budget)} of {_gb(self.total)} GB, {_gb(self.used)} in use before",
            f"  weights    {_gb(self.weights):>7} GB",
            f"  workspace  {_gb(self.workspace):>7} GB",
            f"  graphs     {_gb(self.reserved):>7} GB",
            f"  KV cache   {_gb(max(0, self.left)):>7} GB: {self.num_tokens:,} tokens of {self.token:,} bytes",
        ]

    def check(self, max_model_len: int) -> None:
        """Raise MemoryPlanError, naming the option to change, unless one sequence of this length fits."""
        if self.left <= 0:
            raise self._too_small()
        if self.num_tokens < max_model_len:
            raise MemoryPlanError(
                f"{self.num_tokens:,} tokens of the KV cache fit, and one sequence may have {max_model_len:,}",
                fix=f"use max_model_len {self.num_tokens}, kv_cache_dtype fp8 or int8, or a larger gpu_memory_fraction "
                f"than {self.fraction:g}",
            )

    def _too_small(self) -> MemoryPlanError:
        missing = f"{_gb(-self.left)} GB too little memory before any token is cached"
        if self.used + self.weights > self.fraction * self.total:
            return MemoryPlanError(
                f"{missing}: weights take {_gb(self.weights)} GB of {_gb(self.total)}, others {_gb(self.used)}",
                fix=f"use a checkpoint of fewer bits, a larger gpu_memory_fraction than {self.fraction:g}, or end what "
                "else uses the device",
            )
        return MemoryPlanError(
            f"{missing}: a step takes {_gb(self.workspace)} GB, graphs {_gb(self.reserved)} GB",
            fix="use a smaller max_num_batched_tokens or max_num_seqs, or a larger gpu_memory_fraction "
            f"than {self.fraction:g}",
        )


def plan_memory(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    target: Target,
    kv: KVFormat,
    *,
    fraction: float,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    reserved: int = 0,
) -> MemoryPlan:
    """The plan for a model on a GPU. reserved: bytes that the caller keeps for CUDA graphs."""
    free, total = torch.cuda.mem_get_info(target.device)
    return MemoryPlan(
        total=total,
        used=total - free,
        fraction=fraction,
        weights=weight_bytes(checkpoint, spec, target),
        workspace=workspace_bytes(spec, target.dtype, max_num_batched_tokens, max_num_seqs),
        reserved=reserved,
        token=kv.token_bytes,
    )


def weight_bytes(checkpoint: Checkpoint, spec: DecoderSpec, target: Target) -> int:
    """Of all tensors of the language model, and of the angles of its rotations."""
    base, head = find_place(checkpoint)
    spare = f"{head}." if spec.is_head_tied else "nothing"
    tensors = [
        info
        for name, info in checkpoint.tensors.items()
        if name.startswith((base, f"{head}."))
        and not name.startswith(spare)
        and not name.endswith(UNUSED_SUFFIXES)
    ]
    quantized = read_quantization(checkpoint.config)
    kept = sum(_kept_bytes(info, quantized, target) for info in tensors)
    ropes = {layer.rope for layer in spec.layers if not isinstance(layer.rope, NoRope)}
    return kept + len(ropes) * spec.max_positions * (spec.rotary_dim or spec.head_dim) * 4


def _kept_bytes(info: TensorInfo, quantized: QuantizedModules, target: Target) -> int:
    if info.dtype in FLOATS:
        return info.num_bytes // info.dtype.itemsize * target.dtype.itemsize
    module, _, kind = info.name.rpartition(".")
    scheme = quantized.scheme_of(module) if kind == "weight_packed" and target.has_kernels else None
    if scheme is None:
        return info.num_bytes
    return info.num_bytes // scheme.weight.bits * kept_bits(scheme.weight)


def workspace_bytes(spec: DecoderSpec, dtype: torch.dtype, num_tokens: int, num_rows: int) -> int:
    """Of the largest layer in a step over `num_tokens`; of the logits of `num_rows`, in float32 too, and penalties."""
    heads = spec.num_heads + 2 * spec.num_kv_heads
    attention = (heads + 2 * spec.num_heads) * spec.head_dim
    mlp = max(_mlp_features(spec, layer) for layer in spec.layers)
    activations = num_tokens * (3 * spec.hidden_size + max(attention, mlp)) * dtype.itemsize
    return activations + num_rows * spec.vocab_size * (dtype.itemsize + 4 + SLOT_BYTES) + KERNEL_BYTES


def _mlp_features(spec: DecoderSpec, layer: LayerSpec) -> int:
    """Of a token: gate, up and their product, and with experts the outputs of each of them."""
    experts = layer.experts
    if experts is None:
        return 3 * spec.intermediate_size
    shared = 0 if experts.shared is None else 3 * experts.shared.intermediate_size
    return max(experts.num_per_token * (3 * experts.intermediate_size + spec.hidden_size), shared)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}"
