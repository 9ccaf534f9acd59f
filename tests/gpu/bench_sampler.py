"""Times of drawing tokens, by filter, of flat and of peaked logits. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_sampler.py

Each line: one draw in a CUDA graph, again and again on different logits, more than the L2 holds.
"""

import functools

import torch

from quantkit_kernels import draw_kernel, sampling_kernel
from quantkit_kernels.draw import pack_settings
from tests.gpu.bench_neighbours import VOCAB, copies_for, microseconds

ALL = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
FILTERS = {
    "temperature alone": ALL,
    "top p 0.95": ALL | {"top_p": 0.95},
    "top k 50": ALL | {"top_k": 50},
    "top k 50, top p 0.95": ALL | {"top_k": 50, "top_p": 0.95},
}
SPREADS = {"flat": 1.0, "peaked": 4.0}  # standard deviations of logits


def main() -> None:
    """Print the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {VOCAB} logits in bf16, us of a draw")
    print(f"{'rows':>24}" + "".join(f"{num_rows:>9}" for num_rows in (1, 16, 64, 256)))
    for spread_name, spread in SPREADS.items():
        lines = {"greedy": lambda x, _: sampling_kernel.launch_argmax(x)} | {
            name: functools.partial(_draw, settings) for name, settings in FILTERS.items()
        }
        for name, work in lines.items():
            times = [_time(work, num_rows, spread) for num_rows in (1, 16, 64, 256)]
            print(f"{spread_name:>7}{name:>22}" + "".join(f"{us:9.1f}" for us in times), flush=True)


def _time(work, num_rows: int, spread: float) -> float:
    copies = copies_for(2 * num_rows * VOCAB)
    logits = [(spread * torch.randn(num_rows, VOCAB, device="cuda")).bfloat16() for _ in range(copies)]
    rows = torch.arange(num_rows, device="cuda")
    return microseconds([functools.partial(work, each, rows) for each in logits])


def _draw(settings: dict, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    table = _table(tuple(settings.items()), len(rows))
    is_filtered = settings["top_k"] > 0 or settings["top_p"] < 1
    return draw_kernel.launch(logits, table, rows, rows, is_filtered)[0]


@functools.cache
def _table(settings: tuple, num_rows: int) -> torch.Tensor:
    return torch.tensor([pack_settings(**dict(settings))] * num_rows, dtype=torch.int32, device="cuda")


if __name__ == "__main__":
    main()
