"""Self-attention of one layer over the KV cache; scores, softmax and sums stay in 16 or 32 bits.

Shape suffixes: T new tokens, S cached tokens with the new ones, H heads, D head_dim, E hidden size.
"""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from quantkit.runtime.layers.norm import RMSNorm
from quantkit.runtime.layers.rotary import Rope, rotate
from quantkit.runtime.step import Step


class Attention(nn.Module):
    """Projections, optional norms of q and k, rotation, cache, attention, output projection.

    scale: what q · k is multiplied by. window: how many last tokens, its own included, a token sees; None: all.
    """

    def __init__(
        self,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        o_proj: nn.Module,
        *,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        layer: int,
        head_dim: int,
        scale: float,
        rope: Rope,
        window: int | None,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        self.q_norm, self.k_norm = q_norm, k_norm
        self.layer = layer
        self.head_dim = head_dim
        self.scale = scale
        self.rope = rope
        self.window = window

    def forward(self, hidden_TE: Tensor, step: Step) -> Tensor:
        """[T, E] to [T, E]; appends this layer's keys and values to the step's cache."""
        q_THD = self.q_proj(hidden_TE).unflatten(-1, (-1, self.head_dim))
        k_THD = self.k_proj(hidden_TE).unflatten(-1, (-1, self.head_dim))
        v_THD = self.v_proj(hidden_TE).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_THD = self.q_norm(q_THD), self.k_norm(k_THD)
        cos_TD, sin_TD = step.cos_sin[self.rope]
        q_THD, k_THD = rotate(q_THD, cos_TD, sin_TD), rotate(k_THD, cos_TD, sin_TD)
        k_HSD, v_HSD = step.cache.append(self.layer, k_THD.transpose(0, 1), v_THD.transpose(0, 1))
        first = step.first_visible(self.window)
        attended_TE = attend(
            q_THD.transpose(0, 1), k_HSD[:, first:], v_HSD[:, first:], self.scale, step.mask(self.window)
        )
        result: Tensor = self.o_proj(attended_TE)
        return result


def attend(q_HTD: Tensor, k_HSD: Tensor, v_HSD: Tensor, scale: float, visible_TS: Tensor | None) -> Tensor:
    """Softmax(q · k · scale) · v for grouped heads, [T, H · D]; float32 softmax inside.

    visible_TS: bool, which keys each query may see; None: all for one query, else as many as causality allows.
    """
    num_heads, num_tokens, head_dim = q_HTD.shape
    if num_tokens == 1:  # one query sees everything: its heads of a group become rows of one small matmul
        grouped = q_HTD.reshape(1, k_HSD.shape[0], -1, head_dim)
        out = scaled_dot_product_attention(grouped, k_HSD[None], v_HSD[None], scale=scale)
        return out.reshape(1, num_heads * head_dim)
    out_HTD = scaled_dot_product_attention(
        q_HTD[None],
        k_HSD[None],
        v_HSD[None],
        attn_mask=visible_TS,
        is_causal=visible_TS is None,
        scale=scale,
        enable_gqa=num_heads != k_HSD.shape[0],
    )[0]
    return out_HTD.transpose(0, 1).reshape(num_tokens, num_heads * head_dim)
