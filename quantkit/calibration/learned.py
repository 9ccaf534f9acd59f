"""Weights and norms as something to learn: parameters, the values that compute, and the tensors that are stored.

Shape suffixes: N out_features, K in_features.
"""

import torch
from torch import Tensor, nn

from quantkit.formats.compressed_tensors import StoredLinear, encode_linear
from quantkit.numerics import affine
from quantkit.schemes import IntSpec, QParams, Scheme
from quantkit.schemes.tiles import expand_to_weight, from_tiles, to_tiles

ROOM = 0.45  # how far from its code a weight may start: half a step would already be another code


class LearnedWeight:
    """A quantized weight. `change`: of its scales, relative; `position_NK`: of each weight, in steps of its code.

    weight_NK: before rounding, float32; where it fell to the code that was chosen, its position starts there, else at
    the edge. with_codes: whether codes learn; those of FP8 do not, whose steps are not even. On weight_NK's device.
    """

    def __init__(self, stored: StoredLinear, scheme: Scheme, weight_NK: Tensor, *, with_codes: bool) -> None:
        self._scheme = scheme
        self._device = weight_NK.device
        self._input_qparams = stored.input_qparams
        self._scale_dtype = stored.qparams.scale.dtype
        self._scale = stored.qparams.scale.to(self._device).float()
        zero_point = stored.qparams.zero_point
        self._zero_point = None if zero_point is None else zero_point.to(self._device)
        self._first_NK = stored.codes_NK
        self.change = nn.Parameter(torch.zeros_like(self._scale))
        self.position_NK: nn.Parameter | None = None
        spec = scheme.weight
        if with_codes and isinstance(spec, IntSpec):
            codes_NK = stored.codes_NK.to(self._device).float()
            fell_NK = weight_NK.float() / expand_to_weight(self._scale, spec.granularity, *codes_NK.shape)
            if self._zero_point is not None:
                fell_NK = fell_NK + expand_to_weight(
                    self._zero_point.float(), spec.granularity, *codes_NK.shape
                )
            start_NK = codes_NK + (fell_NK - codes_NK).clamp(-ROOM, ROOM)
            self.position_NK = nn.Parameter(start_NK.clamp(spec.qmin - ROOM, spec.qmax + ROOM))

    def value(self) -> Tensor:
        """The dequantized weight, float32 [N, K], with gradients to what learns."""
        tiles = to_tiles(self._codes(), self._scheme.weight.granularity)
        scale = _straight_through(self._scale * (1 + self.change), self._scale_dtype)
        zero_point = None if self._zero_point is None else self._zero_point.unsqueeze(-1)
        values = affine.dequantize(tiles, scale.unsqueeze(-1), zero_point)
        return from_tiles(values, self._scheme.weight.granularity, *self._first_NK.shape)

    def stored(self) -> dict[str, Tensor]:
        """The tensors to store, by suffix, on the CPU."""
        scale = (self._scale * (1 + self.change.detach())).to(self._scale_dtype).cpu()
        zero_point = None if self._zero_point is None else self._zero_point.cpu()
        linear = StoredLinear(self._final_codes(), QParams(scale, zero_point), self._input_qparams)
        return encode_linear(linear, self._scheme)

    def changed_share(self) -> float:
        """Share of the codes that are others than before."""
        return round((self._final_codes() != self._first_NK).float().mean().item(), 6)

    def _final_codes(self) -> Tensor:
        if self.position_NK is None:
            return self._first_NK
        return self._codes().detach().to(torch.int8).cpu()

    def _codes(self) -> Tensor:
        if self.position_NK is None:
            return self._first_NK.to(self._device).float()
        spec = self._scheme.weight
        assert isinstance(spec, IntSpec), "only integer codes learn"
        inside_NK = self.position_NK.clamp(spec.qmin - ROOM, spec.qmax + ROOM)
        return inside_NK + (inside_NK.round() - inside_NK).detach()


class LearnedNorm:
    """A norm's weight. `change`: of what it multiplies by, relative. offset: 1 where that is 1 + weight."""

    def __init__(self, weight: Tensor, offset: float, dtype: torch.dtype) -> None:
        self._factor = weight.float() + offset
        self._offset = offset
        self._dtype = dtype
        self.change = nn.Parameter(torch.zeros_like(self._factor))

    def value(self) -> Tensor:
        """The weight, float32, with gradients to what learns."""
        return _straight_through(self._factor * (1 + self.change) - self._offset, self._dtype)

    def stored(self) -> Tensor:
        """The weight in its dtype on disk, on the CPU."""
        return self.value().detach().to(self._dtype).cpu()


def _straight_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as it is after a trip through its dtype on disk, with the gradient of x."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()
