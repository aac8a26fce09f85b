"""The kill storms: SIGKILL of the controller at every crossing of every boundary, and at random.

python -m tests.bench.bench_kill

They are tests (tests/jobs/test_kill.py, marked proof); this writes down that they passed, and when.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.bench.results import REPOSITORY, record

TESTS = "tests/jobs/test_kill.py"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.xml"
        argv = [sys.executable, "-m", "pytest", "-m", "proof or not proof", TESTS]
        done = subprocess.run([*argv, f"--junitxml={report}"], cwd=REPOSITORY, check=False)
        cases = [
            {"scenario": case.get("name"), "kills": kills.get("value"), "passed": len(case) == 1}
            for case in ElementTree.parse(report).iter("testcase")
            for kills in case.iterfind("properties/property[@name='kills']")
        ]
    record("Kill storms", cases, "Kills of a controller at work; every campaign's books agreed.")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
