"""The verdict as JUnit XML, which CI systems show: one test suite per candidate, one test case per gate."""

import re
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from quantkit.evaluation.gates import describe_failure, describe_gate
from quantkit.evaluation.report import CandidateReport, EvalReport, GateResult
from quantkit.formats.durable import write_atomically

_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def write_junit(report: EvalReport, path: str | Path) -> None:
    """Write the file, whole or not at all. Raises OSError."""
    write_atomically(Path(path), junit(report))


def junit(report: EvalReport) -> bytes:
    """The XML in UTF-8. A candidate without figures is an error, a gate that is not met a failure."""
    root = Element("testsuites", name="quantkit eval")
    for candidate in report.candidates:
        _add_suite(root, candidate, [gate for gate in report.gates if gate.candidate == candidate.path])
    _count(root)  # of the attributes that suites have, the root has but these (Jenkins' junit-10.xsd)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f"<?xml version='1.0' encoding='utf-8'?>\n{text}\n".encode()


def _add_suite(root: Element, candidate: CandidateReport, gates: list[GateResult]) -> None:
    name = _text(candidate.path)
    suite = SubElement(root, "testsuite", name=name)
    case = SubElement(suite, "testcase", classname=name, name="has figures", time="0")
    if candidate.failure is not None:
        message = _text(f"{candidate.path} {candidate.failure}")
        SubElement(case, "error", message=message, type="broken").text = message
    for gate in gates:
        case = SubElement(suite, "testcase", classname=name, name=_text(describe_gate(gate)), time="0")
        if not gate.passed:
            message = _text(describe_failure(gate))
            SubElement(case, "failure", message=message, type="gate").text = message
    _count(suite)
    suite.set("skipped", "0")


def _count(element: Element) -> None:
    for name, tag in {"tests": "testcase", "failures": "failure", "errors": "error"}.items():
        element.set(name, str(len(list(element.iter(tag)))))
    element.set("time", "0")  # readers want one; a gate takes none


def _text(text: str) -> str:
    return _NOT_XML.sub("�", text)
