"""SignRound: rounding offsets and clipping of all linears of a layer, learned by signed gradient descent.

Each weight's code is round(w / scale + offset), each scale the start's times a factor; offsets and factors move by the
sign of the gradient of the layer's output error, so that the step alone says how far they can get. Offsets start
where the given codes are, so a better start (GPTQ's) is not lost.

Source: arXiv:2309.05516 section 3.
Shape suffixes: N out_features, K in_features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.rounded import Rounded
from quantkit.schemes import Granularity, IntSpec, QParams
from quantkit.schemes.tiles import dequantize_weight, expand_to_weight, round_scale

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
MAX_OFFSET = 0.5  # on top of the start's: any code can go to a neighbour
# How far inside its code's interval a weight starts that another code is nearest to. At the edge the first step would
# move half of all such weights, and what GPTQ found would be lost; this is a fifth of the way that an offset can go.
MARGIN = 0.1
FACTORS = (0.5, 1.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast: `steps` of `batch` samples; the step size falls linearly from 1 / steps to 0."""

    steps: int = 200
    batch: int = 8
    seed: int = 0


class Learned(NamedTuple):
    """By name what was learned, or the starts where that is no better; the layer's loss with the starts and with it."""

    rounded: dict[str, Rounded]
    loss_start: float
    loss: float


def signround(
    forward: Forward,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    starts: Mapping[str, Rounded],
    specs: Mapping[str, IntSpec],
    *,
    schedule: Schedule,
) -> Learned:
    """Codes and scales by name, of less squared error at the layer's output than the starts'; else the starts.

    forward: (weights by name, some `inputs` [S, ...]) -> the layer's output; differentiable in the weights.
    inputs, targets: by sample, what the layer gets and what the original gives; finite, on any device.
    weights: [N, K], float32. Losses are the layer's mean squared error over all samples.
    On a GPU `forward` runs under bfloat16 autocast. Peak memory: about ten times the weights, and a batch's graph.
    """
    device = next(iter(weights.values())).device
    learned = {name: _Learned(weights[name], starts[name], specs[name]) for name in starts}
    before = _loss_of_all(forward, inputs, targets, _dequantized(starts, specs), schedule.batch, device)
    generator = torch.Generator().manual_seed(schedule.seed)
    for step in range(schedule.steps):
        picked = torch.randperm(len(inputs), generator=generator)[: schedule.batch].tolist()
        x, target = _stacked(inputs, picked, device), _stacked(targets, picked, device)
        with torch.enable_grad():
            values = {name: linear.values() for name, linear in learned.items()}
            loss = _loss(forward, x, target, values)
        gradients = torch.autograd.grad(
            loss, [part for linear in learned.values() for part in linear.parameters]
        )
        size = (1 - step / schedule.steps) / schedule.steps
        for number, linear in enumerate(learned.values()):
            linear.move(gradients[2 * number], gradients[2 * number + 1], size)
    results = {name: linear.result() for name, linear in learned.items()}
    after = _loss_of_all(forward, inputs, targets, _dequantized(results, specs), schedule.batch, device)
    return Learned(results, before, after) if after < before else Learned(dict(starts), before, before)


class _Learned:
    """Offsets and scale factors of one linear."""

    def __init__(self, w_NK: Tensor, start: Rounded, spec: IntSpec) -> None:
        self.spec, self.start = spec, start
        self.scale = start.qparams.scale.float()
        self.w_NK = w_NK.float()
        steps_NK = start.codes_NK.float()
        self.zero_point_NK: Tensor | None = None
        if start.qparams.zero_point is not None:
            self.zero_point_NK = self._expanded(start.qparams.zero_point.float())
            steps_NK = steps_NK - self.zero_point_NK
        # what has to be added to w / scale, so that it rounds to the start's code
        exact_NK = self.w_NK / self._expanded(self.scale)
        inside_NK = torch.minimum(torch.maximum(exact_NK, steps_NK - 0.5 + MARGIN), steps_NK + 0.5 - MARGIN)
        is_nearest_NK = (exact_NK - steps_NK).abs() < 0.5
        self.shift_NK = torch.where(is_nearest_NK, 0.0, inside_NK - exact_NK)
        self.parameters = (
            torch.zeros_like(self.w_NK, requires_grad=True),
            torch.ones_like(self.scale, requires_grad=True),
        )

    def values(self) -> Tensor:
        """The dequantized weight, differentiable in the parameters (rounding passes gradients straight through)."""
        scale = self._expanded(self._scale())
        return self._steps(scale) * scale

    def move(self, offset_gradient: Tensor, factor_gradient: Tensor, size: float) -> None:
        """One step against the gradients' signs."""
        offset, factor = self.parameters
        with torch.no_grad():
            offset.sub_(size * offset_gradient.sign()).clamp_(-MAX_OFFSET, MAX_OFFSET)
            factor.sub_(size * factor_gradient.sign()).clamp_(*FACTORS)

    @torch.no_grad()
    def result(self) -> Rounded:
        """Codes and scales where the parameters are."""
        scale = self._scale()
        codes_NK = self._steps(self._expanded(scale))
        if self.zero_point_NK is not None:
            codes_NK = codes_NK + self.zero_point_NK
        qparams = QParams(scale.to(self.start.qparams.scale.dtype), self.start.qparams.zero_point)
        return Rounded(codes_NK.to(torch.int8), qparams)

    def _scale(self) -> Tensor:
        """The scale as it will be on disk, in float32."""
        scale = self.scale * self.parameters[1]
        return _straight_through(scale, round_scale(scale, self.start.qparams.scale.dtype).float())

    def _steps(self, scale_NK: Tensor) -> Tensor:
        """code − zero_point, float32."""
        exact_NK = self.w_NK / scale_NK + self.shift_NK + self.parameters[0]
        steps_NK = _straight_through(exact_NK, exact_NK.round())
        if self.zero_point_NK is None:
            return steps_NK.clamp(self.spec.qmin, self.spec.qmax)
        return steps_NK.clamp(self.spec.qmin - self.zero_point_NK, self.spec.qmax - self.zero_point_NK)

    def _expanded(self, qparam: Tensor) -> Tensor:
        num_rows, num_cols = self.w_NK.shape
        return expand_to_weight(qparam, self.spec.granularity, num_rows, num_cols)


def _straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `exact`."""
    return rounded.detach() + (exact - exact.detach())  # adds exactly 0


def _dequantized(rounded: Mapping[str, Rounded], specs: Mapping[str, IntSpec]) -> dict[str, Tensor]:
    granularities: dict[str, Granularity] = {name: spec.granularity for name, spec in specs.items()}
    return {
        name: dequantize_weight(part.codes_NK, granularities[name], part.qparams)
        for name, part in rounded.items()
    }


def _loss(forward: Forward, inputs: Tensor, targets: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        outputs = forward(values, inputs)
    return (outputs.float() - targets.float()).square().mean()


@torch.no_grad()
def _loss_of_all(
    forward: Forward,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    values: Mapping[str, Tensor],
    batch: int,
    device: torch.device,
) -> float:
    total = 0.0
    for start in range(0, len(inputs), batch):
        part = range(start, min(start + batch, len(inputs)))
        x, target = _stacked(inputs, part, device), _stacked(targets, part, device)
        total += _loss(forward, x, target, values).item() * len(part)
    return total / len(inputs)


def _stacked(samples: Sequence[Tensor], picked: Iterable[int], device: torch.device) -> Tensor:
    return torch.stack([samples[number] for number in picked]).to(device)
