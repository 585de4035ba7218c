"""Gate outcomes as JUnit XML, which CI systems show: one test case per rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree as ET

from demur.report.render import clean


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One rule. `message` says what was found, whatever the status."""

    name: str
    status: Literal["pass", "fail", "too few"]
    message: str


def to_junit(suite: str, cases: Sequence[Case]) -> str:
    """The XML document.

    >>> print(to_junit("gate", [Case(name="refusal < 0.9", status="pass", message="95% of 200")]))
    <?xml version="1.0" encoding="utf-8"?>
    <testsuites tests="1" failures="0" errors="0">
      <testsuite name="gate" tests="1" failures="0" errors="0">
        <testcase classname="gate" name="refusal &lt; 0.9">
          <system-out>95% of 200</system-out>
        </testcase>
      </testsuite>
    </testsuites>
    <BLANKLINE>
    """
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(c.status != "pass" for c in cases)),
        "errors": "0",
    }
    root = ET.Element("testsuites", counts)
    group = ET.SubElement(root, "testsuite", {"name": clean(suite), **counts})
    for case in cases:
        test = ET.SubElement(group, "testcase", {"classname": clean(suite), "name": clean(case.name)})
        if case.status != "pass":
            kind = "TooFewAnswers" if case.status == "too few" else "GateFailed"
            failure = ET.SubElement(test, "failure", {"type": kind, "message": clean(case.message)})
            failure.text = clean(f"{case.name}\n{case.message}")
        else:
            ET.SubElement(test, "system-out").text = clean(case.message)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"
