"""Checks a finished campaign's books as the user whose lab it is: books.py LAB CAMPAIGN."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
import toylab


def check_runs(lab: toylab.Lab, events: list[dict[str, Any]]) -> None:
    """Each run was intended once and ended once, and no payload found its folder claimed."""
    intended = Counter(
        "{experiment}-s{seed}-a{attempt}".format(**event["run"])
        for event in events
        if event["event"] == "run_intended"
    )
    ended = Counter(event["result"]["run"] for event in events if event["event"] == "run_ended")
    assert set(intended.values()) == {1}
    assert ended == intended
    for log in (lab.folder / "submitit").glob("*/*log*"):
        assert not log.is_file() or "is claimed by another" not in log.read_text(), log
    for run in ended:
        experiment, _, attempt = run.partition("-")
        assert len(list((lab.folder / "runs" / experiment / attempt).iterdir())) <= 12


if __name__ == "__main__":
    toylab._check_runs = check_runs
    toy = object.__new__(toylab.Lab)
    toy.root, toy.name = Path(sys.argv[1]), sys.argv[2]
    toy.folder = toy.root / "campaigns" / toy.name
    toylab.check_books(toy)
