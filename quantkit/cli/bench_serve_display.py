"""How a load on a server looks on a terminal."""

from quantkit.bench.load_report import LoadReport
from quantkit.cli.output import table_console, times_table

TOO_BUSY = 0.8  # of a core: beyond, times may be the generator's own


def show(report: LoadReport) -> None:
    """Print everything."""
    console = table_console()
    console.print(
        f"{report.num_answered} of {report.num_requests} requests answered, {report.num_prompt_tokens} tokens of "
        f"prompts, {report.num_output_tokens} of answers in {report.seconds:.3f} s"
    )
    times = {"TTFT": report.ttft_ms, "TPOT": report.tpot_ms, "ITL": report.itl_ms, "E2E": report.e2e_ms}
    console.print(times_table(times))
    goodput = "" if report.goodput is None else f", {report.goodput:.2f} of them within the objective"
    console.print(f"answers {report.output_rate:,.1f} tok/s, {report.request_rate:.2f} requests/s{goodput}")
    for kind, count in report.errors.items():
        console.print(f"{count} x {kind}: {report.messages[kind]}", markup=False)
    if not report.has_usage:
        console.print("the server counts no tokens (usage): each event of a stream counts as one")
    if report.busy > TOO_BUSY:
        console.print(f"the load generator itself used {report.busy:.0%} of a core: times may be its own")
