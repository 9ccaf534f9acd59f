"""The story of `quantkit bench kernels`: ceilings, the bf16 product, then every family, route and number of rows."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from quantkit.bench.ceilings import Ceilings, measure_ceilings
from quantkit.bench.contenders import BASELINE, Contender, baseline, contenders, random_input
from quantkit.bench.shapes import WeightShape
from quantkit.bench.timing import num_copies, time_chain

ROWS = {
    "cuda": (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096),
    "cpu": (1, 4, 16, 64),
}
SHAPE = {"cuda": "8b", "cpu": "4096,4096"}  # two minutes; all of 8b has 13 times as many weights
OUTPUT_BYTES = 2


class Timing(NamedTuple):
    """One product: its time, and the bytes and operations that it cannot do without."""

    family: str
    route: str
    num_rows: int
    shape: WeightShape
    us: float
    num_bytes: float
    num_operations: int
    least_us: float  # at the ceilings

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "family": self.family,
            "route": self.route,
            "rows": self.num_rows,
            **self.shape._asdict(),
            "us": round(self.us, 2),
            "tb_per_s": round(self.num_bytes / self.us / 1e6, 6),
            "tflop_per_s": round(self.num_operations / self.us / 1e6, 5),
            "of_ceiling": round(self.least_us / self.us, 4),
        }


class Missing(NamedTuple):
    """A route that was not measured."""

    family: str
    route: str
    needs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """Everything measured on one device."""

    device: str
    is_gpu: bool
    torch: str
    ceilings: Ceilings
    timings: tuple[Timing, ...]
    missing: tuple[Missing, ...]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        baseline_us = {(t.shape, t.num_rows): t.us for t in self.timings if t.family == BASELINE}
        return {
            "device": self.device,
            "torch": self.torch,
            "ceilings": {name: value and round(value, 6) for name, value in self.ceilings._asdict().items()},
            "timings": [
                {**t.as_dict(), "speed_over_bf16": round(baseline_us[t.shape, t.num_rows] / t.us, 3)}
                for t in self.timings
            ],
            "missing": [missing._asdict() for missing in self.missing],
        }


def bench_kernels(
    device: torch.device,
    shapes: Sequence[WeightShape],
    rows: Sequence[int],
    families: Sequence[str],
    *,
    on_family: Callable[[str], None],
) -> KernelReport:
    """Measure. on_family: called with the name of what comes next."""
    on_family("ceilings")
    ceilings = measure_ceilings(device)
    timings: list[Timing] = []
    missing: list[Missing] = []
    for name in (BASELINE, *families):
        on_family(name)
        for contender in [baseline(device)] if name == BASELINE else contenders(name, device):
            missing += [Missing(name, *of) for of in contender.missing]
            refused = ", ".join(shape.name for shape in shapes if not contender.takes(shape.k))
            if refused:  # sums over other shapes would not compare
                needs = f"weights of other columns than {refused}"
                missing += [Missing(name, route.name, needs) for route in contender.routes]
                continue
            for shape in shapes:
                timings += _measure(contender, shape, rows, ceilings, device)
    return KernelReport(
        device=device_name(device),
        is_gpu=device.type == "cuda",
        torch=torch.__version__,
        ceilings=ceilings,
        timings=tuple(timings),
        missing=tuple(missing),
    )


def device_name(device: torch.device) -> str:
    """Of a GPU by its driver; of a CPU the instructions that torch uses, and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _measure(
    contender: Contender, shape: WeightShape, rows: Sequence[int], ceilings: Ceilings, device: torch.device
) -> list[Timing]:
    """Every route and number of rows of one weight."""
    if not contender.routes:
        return []
    weight_bytes = contender.weight_bytes * shape.n * shape.k
    operands = [contender.make(shape.n, shape.k) for _ in range(num_copies(weight_bytes, device))]
    timings = []
    for num_rows, route in itertools.product(rows, contender.routes):
        if route.max_rows is not None and num_rows > route.max_rows:
            continue
        x, more = random_input(
            contender.input_dtype, num_rows, shape.k, device, in_blocks=contender.in_blocks
        )
        us = time_chain([partial(route.run, x, operand, **more) for operand in operands], device)
        num_bytes = weight_bytes + x.nbytes + OUTPUT_BYTES * num_rows * shape.n
        num_operations = 2 * num_rows * shape.n * shape.k
        least_us = 1e6 * ceilings.seconds(num_bytes, num_operations, x.dtype)
        timings.append(
            Timing(contender.family, route.name, num_rows, shape, us, num_bytes, num_operations, least_us)
        )
    return timings
