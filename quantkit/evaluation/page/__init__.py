"""An evaluation as one HTML file that needs no other: charts in SVG, styles inside, no script, nothing loaded."""

from pathlib import Path

from quantkit.evaluation.page.distribution import distribution
from quantkit.evaluation.page.everything import environment, everything
from quantkit.evaluation.page.examples import examples
from quantkit.evaluation.page.figures import names
from quantkit.evaluation.page.heatmap import heatmap
from quantkit.evaluation.page.html import Html, element
from quantkit.evaluation.page.pareto import pareto
from quantkit.evaluation.page.skills import flips, skills
from quantkit.evaluation.page.verdict import headline, verdicts
from quantkit.evaluation.report import EvalReport
from quantkit.formats.durable import write_atomically

STYLE = Path(__file__).parent / "style.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # whatever gets into the page loads nothing


def render_page(report: EvalReport) -> str:
    """The whole file."""
    name = names(report)[report.reference.path]
    sections = [
        part(report)
        for part in (pareto, skills, distribution, heatmap, examples, flips, everything, environment)
    ]
    body = element(
        "body",
        element(
            "header",
            element("p", f"Evaluation of {name}", class_="kicker"),
            element("h1", headline(report)),
            verdicts(report),
        ),
        element("main", [part for part in sections if part is not None]),
        element("footer", f"Written by quantkit {report.environment['quantkit']}."),
    )
    return f"<!doctype html>\n{element('html', _head(f'{name}: {headline(report)}'), body, lang='en')}\n"


def write_page(report: EvalReport, path: str | Path) -> None:
    """Write the page, whole or not at all. Raises OSError if the folder cannot be written."""
    write_atomically(Path(path), render_page(report).encode(errors="replace"))


def _head(title: str) -> Html:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
