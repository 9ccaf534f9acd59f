"""Self-attention of one layer over paged keys and values; scores, softmax and sums stay in 16 or 32 bits.

Shape suffixes: T new tokens, Q query heads, D head_dim, E hidden size, X features of q, k and v side by side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.layers.rotary import Angles
from quantkit.runtime.layers.rows import AnyLinear, Rows
from quantkit.runtime.step import Step
from quantkit_kernels.norm_quant import rms_norm
from quantkit_kernels.operators import for_device
from quantkit_kernels.paged_attention import paged_decode, paged_prefill
from quantkit_kernels.paged_kv import KVPool, Masking
from quantkit_kernels.rope_append import rope_append
from quantkit_kernels.row_codes import Codes

_HeadNorms = tuple[Tensor | None, Tensor | None, float, bool]  # as `rope_append` takes them


class QKNorms(NamedTuple):
    """Weights of the norms of queries and keys: of one head, the same for all, or of all heads at once."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    plus_one: bool
    is_per_head: bool


class Attention:
    """Projection to q, k and v, optional norms of q and k, rotation, pages, attention, output projection.

    batch_invariant: single tokens too go to the kernel for many, which adds up keys in one order whatever else is in
    the batch, and in whatever chunks a prompt came.
    """

    def __init__(
        self,
        qkv: AnyLinear,
        output: AnyLinear,
        *,
        norms: QKNorms | None,
        angles: Angles,
        masking: Masking,
        batch_invariant: bool = False,
    ) -> None:
        self.qkv, self.output = qkv, output
        self.norms = norms
        self.head_norms: _HeadNorms = (None, None, 0.0, False)
        if norms is not None and norms.is_per_head:
            self.head_norms = norms.q_weight, norms.k_weight, norms.eps, norms.plus_one
        self.angles = angles
        self.masking = masking
        self._decode = paged_prefill if batch_invariant else paged_decode
        self._rope_append = for_device(rope_append, angles.cos.device)
        self.input_codes: Codes | None = qkv.input_codes

    def __call__(self, x: Rows, step: Step, pool: KVPool) -> Tensor:
        """[T, E] to [T, E]; the new keys and values are in the pool afterwards."""
        qkv_TX = self.qkv(x)
        if self.norms is not None and not self.norms.is_per_head:
            qkv_TX = _norm_all_heads(qkv_TX, self.norms)
        cos, sin = self.angles
        q_TQD = self._rope_append(qkv_TX, step.positions_T, cos, sin, step.slots_T, *self.head_norms, *pool)
        return self.output(self._attend(q_TQD, step, pool).flatten(1))

    def _attend(self, q_TQD: Tensor, step: Step, pool: KVPool) -> Tensor:
        if step.prefill is None:
            assert step.decode is not None, "a step has rows"
            return self._decode(q_TQD, pool, step.decode, self.masking)
        if step.decode is None:
            return paged_prefill(q_TQD, pool, step.prefill, self.masking)
        few_TQD, many_TQD = q_TQD.tensor_split((step.num_decode_tokens,))
        decoded = self._decode(few_TQD, pool, step.decode, self.masking)
        return torch.cat((decoded, paged_prefill(many_TQD, pool, step.prefill, self.masking)))


def _norm_all_heads(qkv_TX: Tensor, norms: QKNorms) -> Tensor:
    """Queries of all heads, and keys of all heads, each normed as one."""
    q_size, k_size = len(norms.q_weight), len(norms.k_weight)
    q_TX, k_TX, v_TX = qkv_TX.tensor_split((q_size, q_size + k_size), dim=1)
    q_TX = rms_norm(q_TX, None, norms.q_weight, norms.eps, norms.plus_one, None)
    k_TX = rms_norm(k_TX, None, norms.k_weight, norms.eps, norms.plus_one, None)
    return torch.cat((q_TX, k_TX, v_TX), dim=1)
