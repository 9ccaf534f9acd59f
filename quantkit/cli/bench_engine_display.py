"""How the speed of an engine looks on a terminal."""

from quantkit.bench.engine import EngineReport
from quantkit.bench.timeline import Timeline
from quantkit.cli.output import table_console, times_table


def show(report: EngineReport) -> None:
    """Print everything."""
    console = table_console()
    speed = report.speed
    start = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.start_seconds.items())
    memory = "" if report.peak_bytes is None else f", peak {report.peak_bytes / 1e9:.2f} GB"
    console.print(
        f"{report.device}, {report.dtype}; {start}; KV cache {report.num_kv_tokens:,} tokens{memory}"
    )
    console.print(
        f"{speed.num_requests} requests, {speed.num_prompt_tokens} tokens of prompts, "
        f"{speed.num_output_tokens} of answers in {speed.seconds:.3f} s"
    )
    console.print(times_table({"TTFT": speed.ttft_ms, "TPOT": speed.tpot_ms, "ITL": speed.itl_ms}))
    decode = "" if speed.decode_rate is None else f"decode {speed.decode_rate:,.1f} tok/s, "
    share = "" if report.bandwidth is None else f"; decode reads {report.bandwidth:.0%} of what memory gives"
    console.print(f"{decode}answers {speed.output_rate:,.1f} tok/s, all {speed.total_rate:,.1f} tok/s{share}")
    if report.timeline is not None:
        console.print(_timeline(report.timeline))


def _timeline(timeline: Timeline) -> str:
    kinds = sorted(timeline.by_kind.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{kind} {time:.0f}" for kind, time in kinds)
    return (
        f"a decode step, us: {timeline.step_us:.0f} with {timeline.num_kernels:.0f} kernels: {parts}, "
        f"idle {timeline.idle_us:.0f} ({timeline.idle_share:.1%})"
    )
