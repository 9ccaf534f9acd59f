"""Suites from YAML: every shipped one parses, mistakes are refused by file and line, what is given beside one wins."""

import pytest

from quantkit.errors import EvaluationError
from quantkit.evaluation.gates import Gates
from quantkit.evaluation.probes import task_folder
from quantkit.evaluation.suites import Suite, load_suite, plan_suite, shipped_suites

TEXT = """\
windows: 4
length: 64
tasks: [probe_copying, {name: probe_needle_1k, limit: 10, num_fewshot: 1}]
where: true
thresholds:
  max_kl: 0.1
  max_ppl_increase: 5%
  min_recovery: 90%
  tasks: {probe_copying: 80%}
candidates:
  "*int4*": {max_kl: 0.5}
"""


@pytest.fixture
def suite_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(TEXT)
    return file


def test_shipped_suites_parse_and_know_their_probes():
    probes = {f"probe_{file.stem}" for file in task_folder().glob("*.yaml")}
    assert {"quick", "standard", "full", "demo"} <= shipped_suites().keys()
    for name in shipped_suites():
        suite = load_suite(name)
        named = {request.name for request in suite.tasks}
        assert {task for task in named if task.startswith("probe_")} <= probes
        assert suite.thresholds.tasks.keys() <= (named | probes if "probes" in named else named)


def test_a_suite_is_read(suite_file):
    suite = load_suite(str(suite_file))
    assert (suite.data, suite.windows, suite.length, suite.where) == ("docs", 4, 64, True)
    assert [(task.name, task.limit, task.num_fewshot) for task in suite.tasks] == [
        ("probe_copying", None, None),
        ("probe_needle_1k", 10, 1),
    ]
    assert suite.thresholds == Gates(
        max_kl=0.1, max_ppl_increase=5.0, min_recovery=90.0, tasks={"probe_copying": 80.0}
    )


def test_a_candidate_may_have_limits_of_its_own_and_an_option_wins(suite_file):
    suite = load_suite(str(suite_file))
    assert suite.gates_of("out/smol-fp8").max_kl == 0.1
    assert suite.gates_of("out/smol-int4-all").max_kl == 0.5
    assert suite.gates_of("int4/smol-fp8").max_kl == 0.1  # the last part of the name alone
    own = plan_suite(suite_file, gates=Gates(max_kl=0.2)).gates_of("out/smol-int4-all")
    assert (own.max_kl, own.max_ppl_increase) == (0.2, 5.0)


def test_a_pattern_of_nobody_is_known(suite_file):
    suite = load_suite(str(suite_file))
    assert suite.unmatched(["out/smol-fp8"]) == ["*int4*"] and suite.unmatched(["a", "out/int4"]) == []


def test_without_a_suite_there_are_defaults():
    assert plan_suite(None) == Suite()
    assert plan_suite(None, windows=3, data=None).windows == 3


def test_what_is_given_beside_a_suite_wins(suite_file):
    suite = plan_suite(suite_file, length=32, limit=7)
    assert (suite.windows, suite.length) == (4, 32)
    assert [(task.limit, task.num_fewshot) for task in suite.tasks] == [(7, None), (7, 1)]
    assert [task.name for task in plan_suite(suite_file, tasks=("arc_easy",)).tasks] == ["arc_easy"]
    assert plan_suite(suite_file, gates=Gates(min_recovery=95.0)).thresholds.tasks == {}


def test_other_tasks_than_the_suites_leave_its_limits_behind(suite_file):
    suite = plan_suite(suite_file, tasks=("arc_easy",))
    assert suite.limited_to({"arc_easy"}).thresholds == Gates(
        max_kl=0.1, max_ppl_increase=5.0, min_recovery=90.0
    )
    assert suite.limited_to({"probe_copying"}) == suite


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("windows: 4\nlenght: 3\n", ":2: unknown key lenght"),
        ("thresholds:\n  max_kll: 1\n", ":2: unknown key max_kll"),
        ("windows: 4\nwindows: 5\n", ":2: windows is given twice"),
        ("windows: many\n", ":1: windows is 'many'"),
        ("tasks:\n  - {name: a, limits: 3}\n", ":2: unknown key limits"),
        ("tasks:\n  - {name: a, limit: 0}\n", ":2: tasks.0.limit is 0"),
        ("thresholds: {max_ppl_increase: few}\n", ":1: thresholds.max_ppl_increase is 'few'"),
        ("thresholds: {min_top1: 90}\n", "--min-top1 90: out of range"),
        ("- quick\n", "not a list of `key: value` lines"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, text, finding):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(EvaluationError) as caught:
        load_suite(str(file))
    assert finding in caught.value.problem and str(file) in caught.value.problem


def test_no_suite_at_all_is_told_what_one_is(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(EvaluationError) as caught:
        load_suite(str(tmp_path / "empty.yaml"))
    assert "key: value" in caught.value.problem and "docs/evaluation.md" in caught.value.fix


def test_a_suite_that_is_not_there_has_a_near_name():
    with pytest.raises(EvaluationError) as caught:
        load_suite("quik")
    assert "`quick`" in caught.value.fix


@pytest.mark.parametrize(
    "given",
    [{"limit": 3}, {"num_fewshot": 0}, {"gates": Gates(min_recovery=90)}, {"gates": Gates(tasks={"a": 90})}],
)
def test_limits_of_tasks_need_tasks(given):
    with pytest.raises(EvaluationError, match="there are none"):
        plan_suite(None, **given)
    assert plan_suite(None, tasks=("a",), **given).tasks
