"""JUnit XML: what the readers of CI systems require, what failed and why, and any text in it."""

from xml.etree import ElementTree

from quantkit.evaluation.gates import Gates
from quantkit.evaluation.junit import junit, write_junit
from tests.evaluation_reports import candidate, report

# of Jenkins' schema junit-10.xsd: each element's attributes, those it has to have, and its children
RULES = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, set(), {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "time", "skipped"},
        {"name", "tests", "failures", "errors"},
        {"testcase"},
    ),
    "testcase": ({"name", "time", "classname"}, {"name"}, {"failure", "error"}),
    "failure": ({"type", "message"}, set(), set()),
    "error": ({"type", "message"}, set(), set()),
}


def parsed(*candidates, gates=None):
    root = ElementTree.fromstring(junit(report(*candidates, gates=gates)))
    for element in root.iter():
        known, required, children = RULES[element.tag]
        assert required <= set(element.keys()) <= known
        assert {child.tag for child in element} <= children
    for suite in (root, *root):
        counts = {"tests": "testcase", "failures": "failure", "errors": "error"}
        assert all(suite.get(name) == str(len(list(suite.iter(tag)))) for name, tag in counts.items())
    return root


def test_one_case_for_each_gate_and_candidate():
    root = parsed(candidate("a"), candidate("b", kl_mean=0.3), gates=Gates(max_kl=0.2, min_top1=0.5))
    assert [suite.get("name") for suite in root] == ["a", "b"]
    assert [case.get("name") for case in root[0]] == ["has figures", "--max-kl 0.2", "--min-top1 0.5"]
    assert (root.get("tests"), root.get("failures")) == ("6", "1")
    (failure,) = root.iter("failure")
    assert "KL 0.3 is 0.1 above the limit" in failure.get("message")


def test_a_broken_candidate_is_an_error_and_an_evaluation_without_gates_is_no_empty_file():
    root = parsed(candidate("a", failure="produces NaN logits"), candidate("b"))
    (error,) = root.iter("error")
    assert "produces NaN logits" in error.text
    assert (root.get("tests"), root.get("errors")) == ("2", "1")


def test_any_text_can_be_read_back():
    name = 'we<ird> & "name" \x1b[31m ünï\ud800'
    root = parsed(candidate(name, failure="NaN \x00"))
    assert root[0].get("name") == 'we<ird> & "name" �[31m ünï�'


def test_the_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "gates.xml"
    file.write_text("old")
    write_junit(report(candidate("a")), file)
    assert ElementTree.parse(file).getroot().tag == "testsuites"
    assert list(tmp_path.iterdir()) == [file]
