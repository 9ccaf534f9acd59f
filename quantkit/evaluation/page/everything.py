"""All figures in one table, the gates, and how they came about: data, machine, versions, command, notes."""

from quantkit.evaluation.page.figures import DASH, names, nats, nats_range, percent, size
from quantkit.evaluation.page.html import Html, element, section, table
from quantkit.evaluation.report import CandidateReport, EvalReport, GateResult

HEAD = (
    "",
    "kind",
    "perplexity",
    "KL mean",
    "95 %",
    "median",
    "p99",
    "same top token",
    "bits per weight",
    "size",
)


def everything(report: EvalReport) -> Html:
    """The figures of every model, and every gate."""
    called, original = names(report), report.reference
    noise = f"{nats(original.kl_noise_floor)} in {original.dtype}"
    sizes = (f"{original.bits_per_weight:.2f}", size(original.bytes))
    rows = [(called[original.path], "the original", f"{original.ppl:.3f}", noise, *[DASH] * 4, *sizes)]
    rows += [(called[candidate.path], *_figures(candidate)) for candidate in report.candidates]
    gates = [(called[gate.candidate], *_gate(gate)) for gate in report.gates]
    head = ("candidate", "gate", "limit", "found", "")
    return section(
        "figures",
        "All figures",
        table(HEAD, rows, "All figures"),
        table(head, gates, "Gates") if gates else None,
    )


def _figures(candidate: CandidateReport) -> tuple[str, ...]:
    damage = candidate.damage
    sizes = (f"{candidate.bits_per_weight:.2f}", size(candidate.bytes)) if candidate.bytes else (DASH, DASH)
    if damage is None:
        return (candidate.kind or DASH, "broken", *[DASH] * 5, *sizes)
    ppl = f"{damage.ppl:.3f} ({damage.ppl_increase:+.2f} %)"
    spread = (nats(damage.kl_mean), nats_range(damage.kl_ci), nats(damage.kl_median), nats(damage.kl_p99))
    return (candidate.kind, ppl, *spread, percent(damage.top1), *sizes)


def _gate(gate: GateResult) -> tuple[str, ...]:
    value = DASH if gate.value is None else f"{gate.value:.4g}"
    name = gate.gate.replace("_", " ")
    name = name if gate.task is None else f"{name} of {gate.task}"
    return name, f"{gate.limit:g}", value, "met" if gate.passed else "missed"


def environment(report: EvalReport) -> Html:
    """What somebody needs who wants the same figures."""
    data = report.data
    ways = {f"{one.dtype} ({one.backend}, {one.kernels})" for one in report.candidates if one.backend}
    facts = {
        "original": f"{report.reference.path}, SHA-256 {report.reference.content_hash}",
        "candidates": ", ".join(candidate.path for candidate in report.candidates),
        "text": f"{data.windows} windows of {data.length} tokens of {data.spec}, which has {data.tokens:,}",
        "text's SHA-256": data.hash,
        "device": report.device,
        "candidates in": ", ".join(sorted(ways)),
        "KV cache": report.kv_cache_dtype,
        **report.environment,
    }
    command = element("pre", element("code", report.command)) if report.command else None
    notes = (
        element("ul", [element("li", line) for line in report.notes], class_="notes")
        if report.notes
        else None
    )
    listed = element("dl", [[element("dt", name), element("dd", fact)] for name, fact in facts.items()])
    return section("environment", "How this was measured", command, notes, listed)
