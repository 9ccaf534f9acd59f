"""A picture of a load: how latencies are distributed, and what the server did over time."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.bench.load import Outcome
from quantkit.bench.load_report import answered_of
from quantkit.bench.slo import Slo
from quantkit.errors import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SLICES = 60  # of the run, in each of which tokens are counted


def check_plot(path: Path) -> None:
    """Before anything is measured: whether a plot can be made there. Raises BenchError."""
    try:
        import matplotlib
    except ImportError:
        raise BenchError(
            "--plot needs matplotlib, which is not installed", fix="pip install 'quantkit[plot]'"
        ) from None
    from matplotlib.backend_bases import FigureCanvasBase

    matplotlib.use("agg")
    if path.suffix[1:] not in FigureCanvasBase.filetypes or not path.parent.is_dir():
        raise BenchError(
            f"--plot {path}: no kind of picture, or no folder to put it in",
            fix="give a .png, .svg or .pdf file in a folder that exists",
        )


def write_plot(path: Path, outcomes: Sequence[Outcome], slo: Slo | None, title: str) -> None:
    """Latencies above, tokens a second and requests under way below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    above, below = figure.subplots(2)
    figure.suptitle(title)
    _plot_latencies(above, outcomes, slo or Slo())
    _plot_progress(below, outcomes)
    figure.savefig(path)


def _plot_latencies(axes: "Axes", outcomes: Sequence[Outcome], slo: Slo) -> None:
    answered = answered_of(outcomes)
    seconds = {
        "TTFT": ([arrivals.ttft for _, arrivals in answered], slo.ttft),
        "TPOT": ([tpot for _, arrivals in answered if (tpot := arrivals.tpot) is not None], slo.tpot),
        "E2E": ([outcome.answer.seconds for outcome, _ in answered], slo.e2e),
    }
    for name, (values, most) in seconds.items():
        if not values:
            continue
        line = axes.ecdf([1e3 * value for value in values], label=name)
        if most is not None:
            axes.axvline(1e3 * most, color=line.get_color(), linestyle="--", label=f"{name} objective")
    axes.set(xscale="log", xlabel="ms", ylabel="share of answers", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if answered:
        axes.legend()


def _plot_progress(axes: "Axes", outcomes: Sequence[Outcome]) -> None:
    end = max(outcome.sent + outcome.answer.seconds for outcome in outcomes)
    moments: list[float] = []
    weights: list[float] = []  # tokens of an event: the answer's, spread evenly over its events
    for outcome, arrivals in answered_of(outcomes):
        moments += [outcome.sent + second for second in arrivals.seconds]
        num_events = len(arrivals.seconds)
        weights += [arrivals.num_output_tokens / num_events * SLICES / end] * num_events
    axes.hist(moments, bins=SLICES, range=(0, end), weights=weights, histtype="stepfilled", alpha=0.5)
    axes.set(xlabel="s", ylabel="output tokens a second", xlim=(0, end))
    changes = sorted(
        change
        for outcome in outcomes
        for change in ((outcome.sent, 1), (outcome.sent + outcome.answer.seconds, -1))
    )
    running = list(accumulate(step for _, step in changes))
    twin = axes.twinx()
    twin.step([moment for moment, _ in changes], running, where="post", color="black", linewidth=1)
    twin.set(ylabel="requests under way", ylim=(0, None))
    twin.locator_params(axis="y", integer=True)
