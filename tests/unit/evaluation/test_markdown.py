"""The Markdown summary: verdict first, tables that stay tables whatever is in them, what failed, what changed."""

import math
import re
from dataclasses import replace

import pytest

from quantkit.evaluation.candidates import Broken
from quantkit.evaluation.gates import Gates
from quantkit.evaluation.markdown import MAX_FLIPS, markdown, write_markdown
from tests.evaluation_reports import candidate, comparison, flip, report


@pytest.mark.parametrize(
    ("candidates", "gates", "verdict"),
    [
        ((candidate("a"),), None, "## ✅ 1 candidate of original was measured, without a gate"),
        ((candidate("a"),), Gates(max_kl=0.2), "## ✅ 1 candidate of original meets 1 gate"),
        ((candidate("a"), candidate("b")), Gates(max_kl=0.2), "## ✅ 2 candidates of original meet 2 gates"),
        ((candidate("a"), candidate("b", kl_mean=1.0)), Gates(max_kl=0.2), "## ❌ 1 of 2 gates not met"),
        ((candidate("a", failure="has NaN"),), None, "## ❌ 1 candidate broken"),
    ],
)
def test_the_verdict_comes_first(candidates, gates, verdict):
    text = markdown(report(*candidates, gates=gates))
    assert text.splitlines()[0] == verdict


def test_what_failed_is_listed_with_the_reason():
    text = markdown(
        report(candidate("a", kl_mean=0.3), candidate("b", failure="has NaN logits"), gates=Gates(max_kl=0.2))
    )
    section = text.split("### Not met")[1]
    assert "KL 0.3 is 0.1 above the limit" in section and "b has NaN logits" in section


def test_flips_of_the_task_that_lost_most_come_first_and_are_few():
    tasks = (
        comparison("kept", 99.0, flips=(flip(prompt="kept item"),)),
        comparison(
            "lost", 50.0, flips=tuple(flip(item=str(number), prompt="lost item") for number in range(9))
        ),
        comparison("won", 120.0, flips=(flip(was_right=False, prompt="won item"),)),
    )
    text = markdown(report(candidate("a", tasks=tasks)))
    assert "10 answers of a went from right to wrong" in text
    assert text.count("lost item") == MAX_FLIPS and "kept item" not in text and "won item" not in text
    assert "| kept (acc) | 100 | 0.800 | 0.792 | 99.0 % |" in text


def test_nothing_breaks_a_table():
    ugly = "a|b\n<script>*bold*`code`\\ [x](y)"
    tasks = (comparison("probe_copying", 50.0, flips=(flip(prompt=ugly, candidate=ugly),)),)
    text = markdown(report(candidate(ugly, tasks=tasks)))
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1
    assert "<script>" not in text and "](y)" not in text.replace("\\]", "")


def test_the_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "summary.md"
    write_markdown(report(candidate("a")), file)
    assert file.read_text(encoding="utf-8").startswith("## ✅") and list(tmp_path.iterdir()) == [file]


def test_what_is_not_known_is_left_out():
    unknown = Broken("gone", "cannot be evaluated").report()
    task = replace(comparison(), reference=0.0, candidate=0.0, recovery=math.nan)
    text = markdown(report(unknown, candidate("a", tasks=(task,))))
    assert "| 0.000 | 0.000 |  |" in text and "nan" not in text and "| gone | broken |  |  |  |  |  |" in text
