"""What is left of earlier experiments, also where something is not."""

from __future__ import annotations

from pathlib import Path

import toylab
from story import Story

from jobs.evidence import Evidence
from jobs.repository import Repository


def test_an_experiment_that_git_has_no_more_leaves_nothing_and_stops_nobody(tmp_path: Path) -> None:
    lab = toylab.Lab(tmp_path / "lab")
    story = Story()
    gone = story.propose(base="0" * 40)
    found = Evidence(story.state, Repository(lab.root), tmp_path, ("solution.py",))
    assert found.files(gone) == {}
    assert found.diff(gone) == ""
    assert found.log(gone, 10) == ""
