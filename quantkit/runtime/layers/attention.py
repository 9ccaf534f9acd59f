"""Self-attention of one layer over paged keys and values; scores, softmax and sums stay in 16 or 32 bits.

Shape suffixes: T new tokens, Q query heads, D head_dim, E hidden size, X features of q, k and v side by side.
"""

import torch
from torch import Tensor, nn

from quantkit.runtime.layers.rotary import Angles
from quantkit.runtime.layers.rows import AnyLinear, Rows
from quantkit.runtime.step import Step
from quantkit_kernels.paged_attention import paged_decode, paged_prefill
from quantkit_kernels.paged_kv import KVPool, Masking
from quantkit_kernels.rope_append import rope_append
from quantkit_kernels.row_codes import Codes


class Attention(nn.Module):
    """Projection to q, k and v, optional norms of q and k, rotation, pages, attention, output projection.

    q_norm, k_norm: weights over head_dim, or None. split_tokens: parts in which contexts are cut whatever else is in
    the batch; 0: as suits the device.
    """

    q_norm: Tensor | None
    k_norm: Tensor | None

    def __init__(
        self,
        qkv: AnyLinear,
        output: AnyLinear,
        *,
        q_norm_D: Tensor | None,
        k_norm_D: Tensor | None,
        norm_eps: float,
        norm_plus_one: bool,
        angles: Angles,
        masking: Masking,
        split_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.qkv, self.output = qkv, output
        self.register_buffer("q_norm", q_norm_D)
        self.register_buffer("k_norm", k_norm_D)
        self.norm_eps, self.norm_plus_one = norm_eps, norm_plus_one
        self.angles = angles
        self.masking = masking
        self.split_tokens = split_tokens

    @property
    def input_codes(self) -> Codes | None:
        """What it reads."""
        return self.qkv.input_codes

    def forward(self, x: Rows, step: Step, pool: KVPool) -> Tensor:
        """[T, E] to [T, E]; the new keys and values are in the pool afterwards."""
        qkv_TX = self.qkv(x)
        norms = (self.q_norm, self.k_norm, self.norm_eps, self.norm_plus_one)
        q_TQD = rope_append(
            qkv_TX, step.positions_T, self.angles.cos, self.angles.sin, step.slots_T, *norms, *pool
        )
        return self.output(self._attend(q_TQD, step, pool).flatten(1))

    def _attend(self, q_TQD: Tensor, step: Step, pool: KVPool) -> Tensor:
        if step.prefill is None:
            assert step.decode is not None, "a step has rows"
            return paged_decode(q_TQD, pool, step.decode, self.masking, split_tokens=self.split_tokens)
        if step.decode is None:
            return paged_prefill(q_TQD, pool, step.prefill, self.masking)
        few_TQD, many_TQD = q_TQD.tensor_split((step.num_decode_tokens,))
        decoded = paged_decode(few_TQD, pool, step.decode, self.masking, split_tokens=self.split_tokens)
        return torch.cat((decoded, paged_prefill(many_TQD, pool, step.prefill, self.masking)))
