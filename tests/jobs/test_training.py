"""A campaign of real training: what lowers val_bpb is kept, what raises it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from agent import constants
from jobs import campaign
from tests.small_lab import lab

ROOT = Path(__file__).parents[2]
EDITS = [
    {"description": "matrices learn as fast as they can", "set": {"matrix_rate": 0.04}},
    {"description": "embeddings hardly learn", "set": {"embedding_rate": 0.006}},
]
SETTINGS = {
    "campaign": "trained",
    "agent": {"kind": "scripted", "script": "edits.yaml"},
    "branches": {"main": {"slots": 1}},
    "executor": {"slots": 2, "threads": 1},
    "budget": {"tokens": 110_000},
    "confirm": {"runs": 3},
}
UNTRAINED = 3.6  # bits per byte where every token is equally likely, at scale cpu


def test_an_edit_that_lowers_the_score_is_kept_and_one_that_raises_it_is_not(
    tmp_path: Path,
) -> None:
    shipped = (ROOT / "trainer" / "train.py").read_text()
    files = {
        # shipped but for one rate, so that there is something to find
        "trainer/train.py": constants.replace(shipped, {"matrix_rate": 0.002}, "cpu"),
        "program.md": (ROOT / "program.md").read_text(),
        "edits.yaml": json.dumps(EDITS),
    }
    root = lab(tmp_path / "lab", files, SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "run"],
        cwd=root,
        # Without a compiler: so few steps compile for longer than they train.
        env={**os.environ, "PYTHONPATH": str(ROOT), "CXX": "none"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    state = campaign.read(root / "campaigns" / "trained")
    first, lower, higher = state.experiments("main")
    assert [first.verdict, lower.verdict, higher.verdict] == ["keep", "keep", "discard"]
    assert lower.metric < first.metric
    assert higher.metric > lower.metric
    again = {
        one.id: [state.result(run) for run in one.runs if run.purpose == "confirm"]
        for one in (first, lower)
    }
    for result in [*state.results(higher.id), *again[first.id], *again[lower.id]]:
        assert result.steps >= 50
        assert result.metric < UNTRAINED - 0.5
    # on 3 fresh seeds each, every single run of the one is better than every one of the other
    assert [len(results) for results in again.values()] == [3, 3]
    assert max(r.metric for r in again[lower.id]) < min(r.metric for r in again[first.id])
