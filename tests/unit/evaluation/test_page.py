"""The report as a page: well formed, self-contained, with text as text and the report's own figures."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from quantkit.evaluation.page import render_page, write_page
from quantkit.evaluation.page.figures import DASH, nats, nats_range, size
from quantkit.evaluation.page.html import VOID, element
from quantkit.evaluation.page.plot import LinearScale, LogScale
from quantkit.evaluation.page.verdict import headline, standing
from quantkit.evaluation.report import GateResult
from tests.reports import candidate, comparison, rich_report


class Page(HTMLParser):
    """What a page is made of; fails where tags are not nested."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.styles = [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] == "style" else self.text).append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def report():
    return rich_report()


@pytest.fixture(scope="module")
def page(report):
    return Page(render_page(report))


def test_nothing_is_loaded_and_nothing_runs(page):
    assert not {"script", "img", "iframe", "object", "embed", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert [value for name, value in page.attributes if name == "href"] == ["data:,"]
    assert len(page.styles) == 1 and not re.search(r"url\(|@import|//", page.styles[0])
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_text_of_models_stays_text(page):
    assert (
        page.words.count("</style><script>alert('x')</script>") == 2 * 3 + 2 * 2 + 1
    )  # examples, flips, note
    assert "\x00" not in page.words and "\u2400" in page.words and "\u241b[31m" in page.words


def test_figures_are_those_of_the_report(report, page):
    for one in report.candidates:
        assert f"{one.bits_per_weight:.2f}" in page.words and size(one.bytes) in page.words
        if one.damage is not None:
            shown = (
                nats(one.damage.kl_mean),
                nats_range(one.damage.kl_ci),
                f"{one.damage.ppl_increase:+.2f} %",
            )
            assert all(figure in page.words for figure in (*shown, f"{one.damage.ppl:.3f}", "91.3 %"))
            for linear in one.where.linears:
                assert (
                    f"{linear.linear}: in {nats(linear.kl_in)}, out {nats(linear.kl_out)}"
                    in str(page.attributes)
                    or linear.layer is None
                )
        for task in one.tasks:
            assert f"{task.candidate:.4g}" in page.words and f"{task.recovery:.1f} %" in page.words
    for fact in (report.command, report.data.hash, report.reference.content_hash, "2.13.0", "NaN logits"):
        assert fact in page.words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (6.776, "6.78"),
        (0.38514, "0.385"),
        (0.0249, "0.0249"),
        (0.00099, "0.000990"),
        (3.1e-5, "3.1e-05"),
        (0.0, "0"),
    ],
)
def test_three_figures_of_a_divergence(value, shown):
    assert nats(value) == shown


def test_the_verdict_comes_first_and_says_what_was_missed(report, page):
    assert [standing(report, one) for one in report.candidates] == ["meets", "misses", "broken"]
    assert headline(report) == "1 of 3 candidates met their gates, 1 broken"
    start = page.words[page.words.index("Evaluation of demo") :][:1500]
    assert headline(report) in start and "KL 0.4203 is 0.32 above the limit" in start
    assert "25 times the noise of bfloat16" in start and "Worse beyond luck on 1 of 2" in start
    assert (
        headline(replace(report, gates=())) == "3 candidates measured against demo, without gates, 1 broken"
    )


def test_a_card_names_the_worst_scores_and_folds_all_gates_but_the_first(report):
    lost = {"a": 0.05, "b": 0.4, "c": 0.3, "d": 0.01, "e": 0.2}
    tasks = tuple(comparison(name, "task", loss, p_value=0.001) for name, loss in lost.items())
    worse = candidate("/out/worse", 0.4, 152_000_000, tasks=tasks)
    gates = [
        GateResult(gate="min_recovery", candidate=worse.path, task=name, limit=99.0, value=98.0, passed=False)
        for name in lost
    ]
    page = render_page(replace(report, candidates=(worse,), gates=tuple(gates)))
    words = Page(page).words
    assert (
        "on 5 of 5 task scores: b (55.6 %" in words
        and "e (77.8 %, p = 0.001), and 2 that lost less." in words
    )
    card = page[page.index("<article") : page.index("</article>")]
    folded = card[card.index("<details") :]
    assert "2 more" in folded and folded.count("<li>") == 2 and card.count("<li>") == 5


def test_a_loss_within_noise_is_called_that(report):
    quiet = replace(report, candidates=(candidate("/out/same", 0.0010, 190_000_000, tasks=()),), gates=())
    assert "no more than the noise of bfloat16" in Page(render_page(quiet)).words


def test_what_was_not_measured_has_no_section(report):
    bare = tuple(replace(one, where=None, worst=(), tasks=(), kl_histogram=None) for one in report.candidates)
    sections = [
        value
        for name, value in Page(render_page(replace(report, candidates=bare))).attributes
        if name == "id"
    ]
    assert [name for name in sections if not name.endswith("-title")] == ["pareto", "figures", "environment"]
    nothing = Page(render_page(replace(report, candidates=(report.candidates[2],), gates=())))
    assert "pareto" not in [value for _, value in nothing.attributes]


def test_unusual_figures_are_drawn(report):
    """One window has no interval, an original in float32 no floor, a candidate no loss, a score can be 0 or huge."""
    odd = candidate("/out/odd", 0.0, 190_000_000)
    damage = replace(odd.damage, kl_ci=None, kl_noise_floor=0.0)
    tasks = (
        replace(comparison("zero", "task", 0.9, p_value=0.5), p_value=None, recovery_ci=None, chance=None),
        replace(
            comparison("ppl", "probe", 0, p_value=0.01),
            higher_is_better=False,
            candidate=1e9,
            candidate_ci=(1e8, 1e10),
        ),
    )
    alone = replace(
        report,
        reference=replace(report.reference, kl_noise_floor=0.0),
        candidates=(replace(odd, damage=damage, tasks=tasks),) * 2,
        gates=(),
    )
    page = Page(render_page(alone))
    numbers = [
        value
        for name, value in page.attributes
        if name in ("x", "x1", "x2", "y", "cx", "cy", "width", "height")
    ]
    assert not [value for value in numbers if "nan" in value or "inf" in value]


def test_labels_of_a_crowd_do_not_meet(report):
    crowd = tuple(candidate(f"/out/candidate-{number}", 0.1, 190_000_000) for number in range(12))
    source = render_page(replace(report, candidates=crowd, gates=()))
    heights = [float(y) for y in re.findall(r'<text x="[\d.]+%" y="([\d.]+)"[^>]*class="label"', source)]
    assert len(heights) == 12
    assert min(abs(one - other) for at, one in enumerate(heights) for other in heights[:at]) > 14.9


def test_scales_put_ends_at_ends_and_ticks_inside():
    log, linear = LogScale(1e-3, 1.0), LinearScale(0, 2.7e8)
    assert (log.at(1e-3), log.at(1e-9), log.at(1.0)) == (0, 0, pytest.approx(1))
    assert [round(tick, 6) for tick in log.ticks()][:3] == [0.001, 0.002, 0.005]
    assert linear.ticks() == [0, 1e8, 2e8]


def test_attributes_and_children_are_escaped():
    assert (
        element("p", "a<b", title='"x"', hidden=True, lang=None)
        == '<p title="&quot;x&quot;" hidden>a&lt;b</p>'
    )


def test_written_whole_or_not_at_all(report, tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    write_page(report, file)
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    before = file.read_bytes()
    monkeypatch.setattr("quantkit.evaluation.page.render_page", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(report, file)
    assert file.read_bytes() == before


def test_a_loss_whose_recovery_is_not_known_is_a_loss_however_sure(report):
    unknown = {"recovery": math.nan, "recovery_ci": None, "higher_is_better": False}
    lost = replace(comparison("lost_all", "task", 0.1, p_value=0.0), reference=0.0, candidate=5.0, **unknown)
    first, *others = report.candidates
    page = render_page(replace(report, candidates=(replace(first, tasks=(lost,)), *others)))
    assert f"lost_all ({DASH}, p = 0)" in page and "worse, p = 0" in page and "nan %" not in page


def test_gates_of_tasks_are_told_apart():
    report = rich_report()
    gates = tuple(
        GateResult(
            gate="min_recovery",
            candidate=report.candidates[0].path,
            task=task,
            limit=95.0,
            value=90.0,
            passed=False,
        )
        for task in ("probe_copying (acc)", "arc_easy (acc)")
    )
    shown = Page(render_page(replace(report, gates=gates))).text
    assert {"min recovery of probe_copying (acc)", "min recovery of arc_easy (acc)"} <= set(shown)
