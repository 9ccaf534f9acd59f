"""The evaluation section of a model card, and everything that must stay as it is."""

import dataclasses
from dataclasses import replace

import pytest

from quantkit.card import EVALUATION_END, EVALUATION_START, first_card, read_evaluation
from quantkit.evaluation.card import fill_card
from quantkit.evaluation.report import Damage
from tests.evaluation_reports import candidate, report
from tests.reports import DATA, REFERENCE, rich_report

DAMAGE = Damage(
    ppl=62.9,
    ppl_increase=35.5,
    kl_mean=0.3851,
    kl_ci=(0.37, 0.40),
    kl_median=0.25,
    kl_p99=2.1,
    kl_noise_floor=0.00099,
    top1=0.642,
)


def report_on(path, damage=DAMAGE, failure=None):
    found = {"dtype": "float16", "bytes": 113_000_000, "damage": damage, "failure": failure}
    evaluated = replace(candidate(str(path)), **found)
    reference = replace(REFERENCE, path="org/model")
    return replace(report(evaluated), reference=reference, data=DATA, kv_cache_dtype="int8"), evaluated


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "quantkit.json").write_text("{}")
    card = first_card(
        base="org/model",
        description="",
        treatments={"a": "INT4"},
        before_bytes=2,
        after_bytes=1,
        version="0.1.0",
    )
    (tmp_path / "README.md").write_text(card + "\n## Added by hand\n\nKept.\n")
    return tmp_path


def test_tasks_and_the_worst_linears_are_in_the_section(folder):
    report, _ = report_on(folder)
    (rich,) = [one for one in rich_report().candidates if one.path.endswith("rtn")]
    candidate = replace(rich, path=str(folder))
    assert fill_card(replace(report, candidates=(candidate,)), candidate)
    card = (folder / "README.md").read_text()
    task, (low, high) = candidate.tasks[1], candidate.tasks[1].recovery_ci
    recovered = f"(recovery {task.recovery:.1f} %, 95 %: {low:.1f} to {high:.1f})"
    assert f"| arc_easy, acc | 0.9 | {task.candidate:.4g} {recovered} |" in card
    linears = [one for one in candidate.where.linears if one.kind != "layer"]
    worst = max(linears, key=lambda one: one.kl_in)
    assert f"each alone in the original (KL): `{worst.linear}` ({worst.kl_in:.2g}), " in card
    rows = [name for name, *_ in read_evaluation(card).rows]
    assert rows[-2:] == ["probe_copying, acc", "arc_easy, acc"]


def test_figures_replace_the_section_and_nothing_else(folder):
    card = folder / "README.md"
    card.chmod(0o640)
    before = card.read_text()
    assert fill_card(*report_on(folder))
    after = card.read_text()
    assert before.partition(EVALUATION_START)[0] == after.partition(EVALUATION_START)[0]
    assert before.partition(EVALUATION_END)[2] == after.partition(EVALUATION_END)[2]
    assert "ot evaluated yet" not in after
    for figure in (
        "0.3851",
        "0.3700 to 0.4000",
        "+35.50 %",
        "64.2 %",
        "4.25",
        "0.00099",
        "`org/model`",
        "in float16 on cpu, KV cache in int8",
    ):
        assert figure in after
    assert card.stat().st_mode & 0o777 == 0o640
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "quantkit.json"]


def test_filling_again_replaces_the_figures(folder):
    fill_card(*report_on(folder))
    once = (folder / "README.md").read_text()
    fill_card(*report_on(folder, dataclasses.replace(DAMAGE, kl_mean=0.5, kl_ci=None)))
    fill_card(*report_on(folder))
    assert (folder / "README.md").read_text() == once


def test_a_broken_candidate_says_so_on_its_card(folder):
    fill_card(*report_on(folder, None, "produces NaN logits at position 3 of window 0"))
    assert "**Broken**: produces NaN logits at position 3" in (folder / "README.md").read_text()


def test_folders_of_others_are_left_alone(folder):
    card = folder / "README.md"
    (folder / "quantkit.json").unlink()
    before = card.read_text()
    assert not fill_card(*report_on(folder))
    assert card.read_text() == before


@pytest.mark.parametrize("cut", [EVALUATION_START, EVALUATION_END])
def test_a_card_without_both_markers_is_left_alone(folder, cut):
    card = folder / "README.md"
    card.write_text(card.read_text().replace(cut, ""))
    before = card.read_text()
    assert not fill_card(*report_on(folder))
    assert card.read_text() == before


def test_a_card_that_is_a_link_is_left_alone(folder):
    card = folder / "README.md"
    card.rename(folder / "blob")
    card.symlink_to(folder / "blob")
    assert not fill_card(*report_on(folder))
    assert card.is_symlink()


def test_what_is_no_folder_has_no_card(tmp_path):
    assert not fill_card(*report_on(tmp_path / "absent"))
    assert not fill_card(*report_on("org/model"))


def test_what_is_filled_in_is_read_back(folder):
    card = folder / "README.md"
    assert read_evaluation(card.read_text()) is None
    fill_card(*report_on(folder))
    found = read_evaluation(card.read_text())
    assert found.rows[:2] == [
        ("perplexity", "46.470", "62.900 (+35.50 %)"),
        ("KL divergence, mean", "0", "0.3851 (95 %: 0.3700 to 0.4000)"),
    ]
    assert len(found.rows) == 7
    assert found.remarks[0].startswith("Measured against org/model on 24 windows of 512 tokens of docs")
    assert "0.00099" in found.remarks[1]
    fill_card(*report_on(folder, damage=None, failure="its logits are no numbers"))
    assert read_evaluation(card.read_text()).rows == []
    assert read_evaluation(card.read_text()).remarks[1] == "Broken: its logits are no numbers."
    assert read_evaluation("# A card of somebody else") is None
