"""Branches of one campaign, each on its own node, through ten kills of their controller."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import interpreter, slurm
from test_campaign import Lab, edits
from test_trainer import TrainerLab, check, image

from containers.images import Image
from tests.bench.results import record

__all__ = ["image"]  # a fixture
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def nodes(cluster: None) -> list[str]:
    return sorted(set(slurm("sinfo", "-h", "-N", "-o", "%N").split()))[:4]


def autoresearch(night: Lab, *words: str) -> str:
    return night.call_as_user([interpreter(), "-m", "jobs.cli", *words])


def decided(night: Lab) -> int:
    return len(night.events("decided")) if (night.folder / "ledger.jsonl").exists() else 0


def killed(night: Lab, times: int, patience_s: float) -> Iterator[int]:
    """Start the controller, kill it after some more decisions; yields how often that was done."""
    for count in range(1, times + 1):
        process, before = night.start(), decided(night)
        deadline = time.monotonic() + patience_s
        while decided(night) < before + 3 and process.poll() is None:
            assert time.monotonic() < deadline, "nothing was decided"
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        yield count


def through_ten_kills(night: Lab, nodes: list[str], patience_s: float) -> None:
    """Four branches with programs and nodes of their own; `patience_s`: for some decisions."""
    branches = night.settings["branches"]
    for number, (name, node) in enumerate(zip(branches, nodes, strict=True)):
        night.write(f"{name}.md", f"Lower the loss, as {name}.\n")
        branches[name] = {"agent": {"seed": number}} | branches[name]
        branches[name] |= {"program": f"{name}.md", "node": node, "slots": 2}
    night.configure(branches=branches, limits={})
    night.hand_over()
    for count in killed(night, 10, patience_s):
        if count == 1:
            autoresearch(night, "branch", "pause", "b1")
        if count == 2:
            autoresearch(night, "tell", "b2", "smaller steps")
            autoresearch(night, "branch", "add", "b5", "--agent", "sweep", "--node", nodes[0])
        if count == 4:
            autoresearch(night, "branch", "resume", "b1")
            autoresearch(night, "branch", "retire", "b3")
    night.configure(limits={"experiments": 48})
    said, _ = (process := night.start()).communicate(timeout=4 * patience_s)
    assert process.returncode == 0, said
    assert decided(night) >= 40
    night.check_books()

    places = {name: branch["node"] for name, branch in branches.items()} | {"b5": nodes[0]}
    for result in night.results():
        assert result["node"] == places[result["facts"]["branch"]], result
    told = {row["branch"]: row for row in json.loads(autoresearch(night, "compare", "--json"))}
    assert [told[name]["state"] for name in ("b1", "b3")] == ["active", "retired"]
    assert [told[name]["program"] for name in branches] == [f"{name}.md" for name in branches]
    assert told["b5"]["researcher"] == "sweep"
    assert [event["text"] for event in night.events("told")] == ["smaller steps"]
    assert asked(night, "b1", "branch_paused", "branch_resumed") == []
    assert asked(night, "b3", "branch_retired") == []


def asked(night: Lab, branch: str, since: str, until: str = "") -> list[Any]:
    """What was begun on a branch between two events of it (to the ledger's end)."""
    lines = (night.folder / "ledger.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if branch in (event.get("branch"),
              (event.get("experiment") or {}).get("branch"))]  # fmt: skip
    kinds = [event["event"] for event in events]
    between = events[kinds.index(since) : kinds.index(until) if until else None]
    # what was asked for before may still be answered
    return [
        e for e in between if e["event"] == "proposal_requested" or e.get("proposal", 1) is None
    ]


def test_four_branches_on_four_nodes_through_ten_kills(home: Path, nodes: list[str]) -> None:
    scripts = {f"b{n}": edits(9, nap=1.0, branch=n) for n in range(1, 5)}
    night = Lab(home / "lab", "slurm", scripts=scripts, executor={"slots": 8})
    through_ten_kills(night, nodes, patience_s=150)
    told = {row["branch"]: row for row in json.loads(autoresearch(night, "compare", "--json"))}
    assert all(told[name]["gain"] > 0 for name in ("b1", "b2", "b4"))
    again = autoresearch(night, "reproduce", "b2", "--executor", "slurm")
    assert "reproduced: identical" in again


@pytest.mark.proof
@pytest.mark.timeout(5400)
def test_four_branches_of_trainings_through_ten_kills(
    home: Path, nodes: list[str], image: Image
) -> None:
    night = TrainerLab(home / "lab", "slurm", image, branches=4, each=9)
    begun = time.monotonic()
    through_ten_kills(night, nodes, patience_s=600)
    minutes = (time.monotonic() - begun) / 60
    good = check(night, decided(night))
    gpus = {(result["node"], result["device"]) for result in good}
    assert len(gpus) == 8
    again = autoresearch(night, "reproduce", "b2", "--executor", "slurm")
    assert "reproduced" in again
    ended = [event["result"]["status"] for event in night.events("run_ended")]
    row = {"experiments": decided(night), "GPUs": len(gpus), "kills": 10, "minutes": minutes}
    row |= {"tries": len(ended), "tries lost": ended.count("infrastructure")}
    record(
        "Four branches of the trainer on four nodes, through ten kills",
        [row | {"best of b2 again": again.splitlines()[-1]}],
        "One branch paused, one retired, one added, one told something on the way; a job for each"
        " run, each in its image. All 8 places share two cores.",
    )


def test_an_allocation_holds_the_nodes_that_branches_name(home: Path, nodes: list[str]) -> None:
    scripts = {f"b{n}": edits(2, branch=n) for n in (1, 2)}
    executor = {"nodes": 2, "slots": 2}
    night = Lab(home / "lab", "allocation", scripts=scripts, executor=executor)
    branches = night.settings["branches"]
    places = {"b1": nodes[3], "b2": nodes[1]}
    night.configure(branches={k: branch | {"node": places[k]} for k, branch in branches.items()})
    said, _ = (process := night.start()).communicate(timeout=120)
    assert process.returncode == 0, said
    found = {(result["facts"]["branch"], result["node"]) for result in night.results()}
    assert found == set(places.items())
    assert decided(night) == 6
    night.check_books()
    assert "reproduced: identical" in autoresearch(night, "reproduce", "b1")  # by a node alone


@pytest.mark.parametrize("kind", ["slurm", "allocation"])
def test_a_node_that_does_not_exist_pauses_its_branch_alone(
    home: Path, nodes: list[str], kind: str
) -> None:
    scripts = {"main": edits(2), "lost": []}
    night = Lab(home / "lab", kind, scripts=scripts, executor={"nodes": 1, "slots": 2})
    branches = night.settings["branches"]
    branches["lost"]["node"] = "nowhere9"
    night.configure(branches=branches)
    said, _ = (process := night.start()).communicate(timeout=300)
    assert process.returncode == 0, said
    assert re.search(r"lost is paused: its baseline e000\d has no score", said)
    assert "Invalid node name" in said
    state = json.loads(autoresearch(night, "status", "--json"))
    assert state["branches"]["lost"]["paused"]
    assert state["branches"]["main"]["kept"] == 3
