"""Faults of a cluster, injected for real into whole campaigns: verdicts and books hold.

What becomes of a single job or step is in test_executor.py and test_allocation.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import ROOT, USER, jobs_below, slurm, switch, wait_for
from test_campaign import Lab, branches, edits

from jobs import ledger, payload, policy
from jobs.history import State, fold

sys.path.append(str(ROOT / "tests" / "jobs"))
import small_disk

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# The other kind, and a drained cluster, are of make proof-cluster: a change waits for these tests.
# What differs between the kinds is its executor's, and tested there.
ONE_KIND = pytest.mark.parametrize(
    "kind", [pytest.param("slurm", marks=pytest.mark.proof), "allocation"]
)
DOOMED = "X 0.125"  # an edit's description


@pytest.fixture
def lab(cluster: None, home: Path) -> Callable[..., Lab]:
    return lambda kind, *edits, **settings: Lab(home / f"lab-{kind}", kind, *edits, **settings)


def environ(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def below(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from below(int(child))


def scorers(night: Lab, wanted: Callable[[dict[str, str]], bool]) -> Iterator[int]:
    """Processes that score a run of this night whose payload has an environment of this kind."""
    for folder in Path("/proc").glob("[0-9]*"):
        seen = environ(int(folder.name))
        ours = seen.get("AUTORESEARCH_RUN_NAME", "").startswith(f"{night.name}-e")
        if not ours or not wanted(seen):
            continue
        for pid in below(int(folder.name)):
            with contextlib.suppress(OSError):
                if b"score.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield pid


@contextlib.contextmanager
def killing(night: Lab, wanted: Callable[[dict[str, str]], bool]) -> Iterator[None]:
    """Meanwhile, whatever scores such a run is killed, as a failing node or a guard would."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.2):
            for pid in scorers(night, wanted):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def to_its_end(night: Lab) -> str:
    process = night.start()
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    return said


@ONE_KIND
def test_an_idea_whose_scorer_dies_wherever_it_runs_is_a_crash_and_no_nodes_fault(lab, kind):
    scripts = branches(6, 3, nap=2.0)
    scripts["b1"].append({"description": DOOMED, "set": {"X": 0.125, "NAP": 4.0}})
    night = lab(kind, scripts=scripts)

    def of_the_idea(seen: dict[str, str]) -> bool:
        if not (night.folder / "ledger.jsonl").exists():
            return False
        named = [e["experiment"] for e in night.events("proposed")]
        doomed = [e["id"] for e in named if e["description"] == DOOMED]
        return any(f"{night.name}-{name}-" in seen["AUTORESEARCH_RUN_NAME"] for name in doomed)

    with killing(night, of_the_idea):
        to_its_end(night)
    night.check_books()
    state = fold(ledger.read(night.folder / "ledger.jsonl"))
    (idea,) = [r for r in state.experiments() if r.description == DOOMED]
    assert idea.verdict == "discard"
    assert len({run.node for run in idea.runs}) == len(idea.runs) == 2
    (decision,) = [
        e["decision"] for e in night.events("decided") if e["decision"]["experiment"] == idea.id
    ]
    assert decision["reason"].startswith("crash: died on")
    assert policy.excluded_nodes(state) == frozenset()


@ONE_KIND
def test_a_node_that_fails_everything_is_excluded_after_two_experiments(lab, kind):
    night = lab(kind, scripts=branches(8, 2, nap=1.5))
    with killing(night, lambda seen: seen.get("SLURMD_NODENAME") == "n2"):
        to_its_end(night)
    night.check_books()
    state, late = State(), set()  # runs that were intended when the node was known to be bad
    for event in ledger.read(night.folder / "ledger.jsonl"):
        if event["event"] == "run_intended" and policy.excluded_nodes(state):
            late.add("{experiment}-s{seed}-a{attempt}".format(**event["run"]))
        state = fold([event], state)
    assert policy.excluded_nodes(state) == {"n2"}
    assert [r.verdict for r in state.experiments()] == ["keep"] * 24
    results = [event["result"] for event in night.events("run_ended")]
    dead = [result for result in results if result["status"] == "infrastructure"]
    assert {result["node"] for result in dead} == {"n2"}
    assert len({result["run"].partition("-")[0] for result in dead}) >= 2
    assert late
    assert not [result for result in results if result["run"] in late and result["node"] == "n2"]


def attempts(night: Lab, experiment: str) -> list[dict[str, Any]]:
    """Results of an experiment's runs, as the ledger has them."""
    results = [event["result"] for event in night.events("run_ended")]
    return [result for result in results if result["run"].startswith(f"{experiment}-")]


def first_run(night: Lab) -> None:
    """Wait until the first edit's run is under way."""
    wait_for((night.folder / "runs/e0002/s1-a1/claim.json").exists, 90, "for the second run")


def first_attempt(seen: dict[str, str]) -> bool:
    return payload.run_id(seen["AUTORESEARCH_RUN_NAME"]) == "e0002-s1-a1"


def dies_once_on_n1(night: Lab) -> None:
    """Its edit's first attempt is killed, and the second one is where the first was."""
    with killing(night, first_attempt):
        to_its_end(night)
    night.check_books()
    results = attempts(night, "e0002")
    assert [result["status"] for result in results] == ["infrastructure", "ok"]
    assert [result["node"] for result in results] == ["n1", "n1"]


@ONE_KIND
def test_on_a_single_node_a_run_that_dies_is_tried_there_again(lab, kind):
    single = {"exclude": ["n2", "n3", "n4"], "nodes": 1, "slots": 2}
    dies_once_on_n1(lab(kind, *edits(1, nap=2.0), executor=single))


@pytest.mark.proof
def test_while_all_other_nodes_are_down_a_run_that_dies_is_tried_there_again(lab):
    slurm("scontrol", "update", "nodename=n[2-4]", "state=drain", "reason=test")
    try:
        dies_once_on_n1(lab("slurm", *edits(1, nap=2.0)))
    finally:
        slurm("scontrol", "update", "nodename=n[2-4]", "state=resume")


@ONE_KIND
def test_when_all_is_cancelled_at_once_each_run_is_tried_again_and_no_node_is_blamed(lab, kind):
    night = lab(kind, scripts=branches(8, 1, nap=20.0))
    process = night.start()

    def under_way() -> bool:
        claims = {p.parts[-3] for p in night.folder.glob("runs/*/s1-a1/claim.json")}
        return len([name for name in claims if name > "e0008"]) >= 4

    wait_for(under_way, 120, "for some edits to run")
    slurm("scancel", *jobs_below(night.root))
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    night.check_books()
    state = fold(ledger.read(night.folder / "ledger.jsonl"))
    assert [r.verdict for r in state.experiments()] == ["keep"] * 16
    results = [event["result"] for event in night.events("run_ended")]
    dead = [result for result in results if result["status"] == "infrastructure"]
    assert len(dead) >= 4
    assert all(result["details"]["cancelled"] for result in dead), dead
    assert not any(run.died for runs in state.nodes.values() for run in runs)


@ONE_KIND
def test_a_run_that_slurm_ends_at_its_time_limit_is_tried_again(lab, kind):
    night = lab(kind, *edits(1, nap=100.0))
    process = night.start()
    first_run(night)
    if kind == "slurm":
        (job,) = (j for j in jobs_below(night.root) if "e0002" in slurm("squeue", "-hj", j, "-o%j"))
        slurm("scontrol", "update", f"jobid={job}", "timelimit=1")
    else:
        steps = slurm("squeue", "--steps", "-h", "-u", USER, "-o", "%i %j").splitlines()
        step = next(line.split()[0] for line in steps if f"{night.name}-e0002" in line)
        slurm("scontrol", "update", f"stepid={step}", "timelimit=1")
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    first, second = attempts(night, "e0002")
    assert first["status"] == "infrastructure"
    assert ("TIMEOUT" if kind == "slurm" else "TIME LIMIT") in first["details"]["job_end"]
    assert second["status"] == "ok"
    night.check_books()


def test_a_run_that_is_preempted_is_tried_again_and_blames_no_node(lab):
    night = lab("slurm", *edits(1, nap=10.0), executor={"gpus": "2"})
    process = night.start()
    first_run(night)
    node = slurm("squeue", "-h", "-o", "%N", "-j", *jobs_below(night.root)).strip()
    slurm("sbatch", "-p", "urgent", "-w", node, "--gres=gpu:2", "--mem=100M", "-o", "/dev/null",
          f"--uid={USER}", "--wrap", "sleep 20")  # fmt: skip
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    first, second = attempts(night, "e0002")
    assert (first["status"], first["details"]["job_end"]) == ("infrastructure", "PREEMPTED")
    assert first["details"]["preempted"]
    assert second["status"] == "ok"
    state = fold(ledger.read(night.folder / "ledger.jsonl"))
    assert not any(run.died for runs in state.nodes.values() for run in runs)
    night.check_books()


def above(pid: int) -> Iterator[int]:
    """Those that a process descends from."""
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


def end_node(node: str) -> None:
    """Its slurmd, and all that runs there for this project, as when the power fails."""
    runs = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    runs = [p for p in runs if environ(p).get("SLURMD_NODENAME") == node]
    starters = {p for run in runs for p in above(run)}
    steps = [p for p in starters if Path(f"/proc/{p}/comm").read_text() == "slurmstepd\n"]
    daemon = int(Path(f"/run/autoresearch-cluster/pid/slurmd-{node}").read_text())
    for pid in (daemon, *steps, *runs):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@ONE_KIND
def test_runs_of_a_node_that_dies_are_run_on_the_others(lab, kind):
    night = lab(kind, scripts=branches(8, 1, nap=25.0))
    process = night.start()
    node = "n4"  # not the first one: with it the holder's own script would end

    def of_an_edit(seen: dict[str, str]) -> bool:
        edit = payload.run_id(seen["AUTORESEARCH_RUN_NAME"]) > "e0009"
        return edit and seen.get("SLURMD_NODENAME") == node

    wait_for(lambda: list(scorers(night, of_an_edit)), 200, "for a run there")
    try:
        end_node(node)
        said, _ = process.communicate(timeout=500)
    finally:
        switch(accounting=False)
    assert process.returncode == 0, said
    night.check_books()
    state = fold(ledger.read(night.folder / "ledger.jsonl"))
    assert [r.verdict for r in state.experiments()] == ["keep"] * 16
    results = [event["result"] for event in night.events("run_ended")]
    dead = [result for result in results if result["status"] != "ok"]
    assert dead
    assert {result["node"] for result in dead} == {node}
    assert kind == "allocation" or all("NODE_FAIL" in result["reason"] for result in dead)


@pytest.fixture
def small(home: Path, cluster: None) -> Iterator[Path]:
    """The campaigns of a lab to be, on a disk of their own."""
    disk = home / "lab-slurm" / "campaigns"
    disk.mkdir(parents=True)
    size = f"size={small_disk.SIZE_MB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_fills_up_pauses_and_loses_nothing(small, lab):
    night = lab("slurm", *edits(3, nap=3.0))
    process = night.start()
    wait_for((night.folder / "runs/e0002/s1-a1/claim.json").exists, 60, "for the second run")
    filler = small_disk.fill(small, leave_kb=12)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 3, said
    assert "Traceback" not in said
    assert "No space left" in said or "MB are free on its disk" in said
    recorded = (night.folder / "ledger.jsonl").read_bytes()
    filler.unlink()
    to_its_end(night)
    whole = recorded[: recorded.rfind(b"\n") + 1]
    assert (night.folder / "ledger.jsonl").read_bytes().startswith(whole)
    assert len(night.events("decided")) == 4
    night.check_books()
