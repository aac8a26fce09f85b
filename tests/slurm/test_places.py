"""Branches of one campaign, each on its own node, through ten kills of their controller."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import interpreter, slurm
from test_campaign import Lab, edits

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def nodes(cluster: None) -> list[str]:
    return sorted(set(slurm("sinfo", "-h", "-N", "-o", "%N").split()))[:4]


def autoresearch(night: Lab, *words: str) -> str:
    return night.call_as_user([interpreter(), "-m", "jobs.cli", *words])


def decided(night: Lab) -> int:
    return len(night.events("decided")) if (night.folder / "ledger.jsonl").exists() else 0


def killed(night: Lab, times: int) -> Iterator[int]:
    """Start the controller, kill it after some more decisions; yields how often that was done."""
    for count in range(1, times + 1):
        process, before = night.start(), decided(night)
        deadline = time.monotonic() + 60
        while decided(night) < before + 3 and process.poll() is None:
            assert time.monotonic() < deadline, "nothing was decided"
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        yield count


def test_four_branches_on_four_nodes_through_ten_kills(home: Path, nodes: list[str]) -> None:
    scripts = {f"b{n}": edits(9, nap=1.0, branch=n) for n in range(1, 5)}
    night = Lab(home / "lab", "slurm", scripts=scripts, executor={"slots": 8})
    branches = night.settings["branches"]
    for (name, branch), node in zip(branches.items(), nodes, strict=True):
        night.write(f"{name}.md", f"Lower the loss, as {name}.\n")
        branch |= {"program": f"{name}.md", "node": node, "slots": 2}
    night.configure(branches=branches)
    for count in killed(night, 10):
        if count == 1:
            autoresearch(night, "branch", "pause", "b1")
        if count == 2:
            autoresearch(night, "tell", "b2", "smaller steps")
            autoresearch(night, "branch", "add", "b5", "--agent", "sweep", "--node", nodes[0])
        if count == 4:
            autoresearch(night, "branch", "resume", "b1")
            autoresearch(night, "branch", "retire", "b3")
    night.configure(limits={"experiments": 48})
    said, _ = (process := night.start()).communicate(timeout=240)
    assert process.returncode == 0, said
    assert decided(night) >= 40
    night.check_books()

    places = {name: branch["node"] for name, branch in branches.items()} | {"b5": nodes[0]}
    for result in night.results():
        assert result["node"] == places[result["facts"]["branch"]], result
    told = {row["branch"]: row for row in json.loads(autoresearch(night, "compare", "--json"))}
    assert [told[name]["state"] for name in ("b1", "b3")] == ["active", "retired"]
    assert told["b5"]["researcher"] == "sweep"
    assert all(told[name]["gain"] > 0 for name in ("b1", "b2", "b4"))
    assert [event["text"] for event in night.events("told")] == ["smaller steps"]
    again = autoresearch(night, "reproduce", "b2", "--executor", "slurm")
    assert "reproduced: identical" in again


def test_a_node_that_does_not_exist_pauses_its_branch_alone(home: Path, nodes: list[str]) -> None:
    night = Lab(home / "lab", "slurm", scripts={"lost": [], "main": edits(2)})
    branches = night.settings["branches"]
    branches["lost"]["node"] = "nowhere9"
    night.configure(branches=branches)
    said, _ = (process := night.start()).communicate(timeout=120)
    assert process.returncode == 0, said
    assert "lost is paused: its baseline e0001 has no score" in said
    state = json.loads(autoresearch(night, "status", "--json"))
    assert state["branches"]["lost"]["paused"]
    assert state["branches"]["main"]["kept"] == 3
