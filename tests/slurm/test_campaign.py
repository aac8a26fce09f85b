"""Whole campaigns on the real test cluster, as an ordinary user: controller, executor and payload.

The task is the toy of tests/jobs/toylab.py; what is held is the books, whatever happened to them.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import (
    HERE,
    ROOT,
    USER,
    as_user,
    environment,
    interpreter,
    jobs_below,
    slurm,
    switch,
    wait_for,
)

sys.path.insert(0, str(ROOT / "tests" / "jobs"))
import toylab

from jobs import ledger
from jobs.history import fold

pytestmark = pytest.mark.cluster

SITE = {"cpus": 1, "memory": "200M", "margin": 60.0, "poll_seconds": 1.0, "slots": 8, "nodes": 4}


class Lab(toylab.Lab):
    """A toy lab that belongs to the ordinary user, who also runs it."""

    def __init__(self, root: Path, kind: str, *edits: Any, **settings: Any) -> None:
        executor = {"kind": kind, **SITE, **settings.pop("executor", {})}
        scripts = settings.pop("scripts", {})
        branches = {"main": {"slots": 1}}  # its edits in turn
        super().__init__(root, *edits, executor=executor, **{"branches": branches, **settings})
        self.scripts(**scripts) if scripts else None
        self.hand_over()
        self.env = environment(root)

    def hand_over(self) -> None:
        user = pwd.getpwnam(USER)
        for path in [self.root, *self.root.rglob("*")]:
            os.chown(path, user.pw_uid, user.pw_gid)

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [interpreter(), "-m", "jobs.cli", *(words or ("run",))],
            cwd=self.root,
            env={**self.env, **more},
            **as_user(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call_as_user(self, argv: list[str], **more: str) -> str:
        done = subprocess.run(
            argv,
            cwd=self.root,
            env={**self.env, **more},
            **as_user(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def check_books(self) -> None:
        self.call_as_user([interpreter(), str(HERE / "books.py"), str(self.root), self.name])

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(p.read_text()) for p in self.folder.glob("runs/*/*/result.json")]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "ledger.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.fixture
def lab(cluster: None, home: Path) -> Callable[..., Lab]:
    def make(kind: str, *edits: Any, **settings: Any) -> Lab:
        return Lab(home / f"lab-{kind}", kind, *edits, **settings)

    return make


def edits(count: int, nap: float = 0.0, branch: int = 0) -> list[dict[str, Any]]:
    """Steps that all get better, no two alike in a campaign; each takes `nap` seconds and a bit."""
    return [toylab.change(X=2.0 - n / 64 - branch / 1024, NAP=nap) for n in range(1, count + 1)]


WRONG = {
    "partition": ({"partition": "nowhere"}, "Invalid partition name specified"),
    "executor.gpus": ({"gpus": "h100:1"}, "node configuration is not available"),
    "margin, hold_hours": ({"partition": "short", "margin": 600.0}, "PartitionTimeLimit"),
    "executor.hold_hours": ({"hold_hours": 0.1}, "which never fits into an allocation"),
    "executor.kind": ({}, "there is no sbatch on this host"),
}


@pytest.mark.parametrize("kind", ["slurm", "allocation"])
@pytest.mark.parametrize("setting", WRONG)
def test_wrong_settings_are_told_in_slurms_words_and_nothing_is_half_started(
    lab, home, kind, setting
):
    executor, words = WRONG[setting]
    if (kind, setting) == ("slurm", "executor.hold_hours"):
        pytest.skip("nothing is held")
    path = {}
    if setting == "executor.kind":
        (home / "bin").mkdir()
        (home / "bin" / "git").symlink_to("/usr/bin/git")
        path = {"PATH": str(home / "bin")}
    is_refused(lab(kind, *edits(1), executor=executor), setting, words, **path)


@pytest.mark.parametrize("kind", ["slurm", "allocation"])
def test_an_account_that_is_none_is_refused_before_anything_begins(accounting, lab, kind):
    night = lab(kind, *edits(1), executor={"account": "rich"})
    is_refused(night, "executor.account", "Invalid account")


def is_refused(night: Lab, setting: str, words: str, **path: str) -> None:
    refs = ["git", "for-each-ref"]
    before = night.call_as_user(refs)
    process = night.start(**path)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert words in said
    assert setting in said
    assert not (night.root / "campaigns").exists()
    assert night.call_as_user(refs) == before
    assert not jobs_below(night.root)


def branches(count: int, each: int, nap: float = 0.0) -> dict[str, list[dict[str, Any]]]:
    return {f"b{n}": edits(each, nap, n) for n in range(1, count + 1)}


def places_at_once(results: list[dict[str, Any]]) -> int:
    """The most places (node, device) that had a run at one moment; none ever had two."""
    most = 0
    for one in results:
        running = [r for r in results if r["started"] <= one["started"] < r["ended"]]
        places = {(r["node"], r["device"]) for r in running}
        assert len(places) == len(running), running
        most = max(most, len(places))
    return most


@pytest.mark.parametrize("kind", ["slurm", "allocation"])
def test_sixteen_experiments_in_eight_places_leave_whole_books(lab, kind):
    night = lab(kind, scripts=branches(8, 2, nap=12.0))
    process = night.start()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert len(night.events("decided")) == 24  # with each branch's baseline
    assert {result["status"] for result in night.results()} == {"ok"}
    assert places_at_once(night.results()) == 8
    night.check_books()


# Between the intent of the third experiment's run and the record of its submission. What has an
# equal beside it is of make proof-cluster: a change waits for these tests.
CROSSINGS = (
    pytest.param("run.folder:before:3", marks=pytest.mark.proof),
    pytest.param("run.snapshot:before:4", marks=pytest.mark.proof),  # the first is the scorer's
    "run.snapshot:after:4",
    "run.submit:before:3",
    "run.submit:after:3",
    pytest.param("ledger.append:before:17", marks=pytest.mark.proof),
)


@pytest.mark.parametrize("kind", ["slurm", "allocation"])
@pytest.mark.parametrize("crossing", CROSSINGS)
def test_a_controller_killed_around_a_submission_loses_and_doubles_nothing(lab, kind, crossing):
    night = lab(kind, *edits(3, nap=1.0))
    process = night.start(AUTORESEARCH_KILL_AT=crossing)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said
    assert "e0003-s1-a1" in fold(ledger.read(night.folder / "ledger.jsonl")).open_runs
    process = night.start()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert len(night.events("decided")) == 4
    night.check_books()


def test_a_night_as_a_job_goes_on_across_its_requeue_and_an_outage(lab, home):
    night = lab("allocation", scripts=branches(8, 13, nap=1.0), executor={"margin": 120.0})
    as_a_job_through_requeues_and_an_outage(night, home, patience_s=240)


def as_a_job_through_requeues_and_an_outage(night: Lab, home: Path, patience_s: float) -> None:
    """A hundred experiments unattended: handed over to the next life of the same job, requeued by
    somebody else, half a minute without slurmctld."""
    shim = home / "bin" / "autoresearch"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {interpreter()} -m jobs.cli "$@"\n')
    shim.chmod(0o755)
    path = f"{shim.parent}:{night.env['PATH']}"
    script = str(ROOT / "slurm" / "overnight.sbatch")
    job = night.call_as_user(["sbatch", "--parsable", "--mem=600M", script], PATH=path).strip()

    def decided() -> int:
        return len(night.events("decided")) if (night.folder / "ledger.jsonl").exists() else 0

    def started_again() -> None:
        wait_for(lambda: "PENDING" in slurm("squeue", "-h", "-j", job, "-o", "%T"), 60)
        # not the two minutes' hold-off; but Slurm would take what starts within a second of its
        # requeue for the job whose credential was just revoked, and end it
        time.sleep(3)
        slurm("scontrol", "update", f"jobid={job}", "StartTime=now")

    wait_for(lambda: decided() >= 20, 2 * patience_s, "for the first twenty")
    slurm("scancel", "--signal=USR1", "--batch", job)  # as Slurm does ahead of the time limit
    started_again()
    wait_for(lambda: decided() >= 50, patience_s, "for the second life")
    slurm("scontrol", "requeue", job)  # as an administrator may at any moment
    started_again()
    wait_for(lambda: decided() >= 70, patience_s, "for the third life")
    os.kill(int(Path("/run/autoresearch-cluster/pid/slurmctld").read_text()), signal.SIGTERM)
    time.sleep(30)
    switch(accounting=False)
    ended = lambda: not slurm("squeue", "-h", "-j", job).strip()  # noqa: E731
    wait_for(ended, 2.5 * patience_s, "for the end")
    log = (night.root / f"autoresearch-{job}.log").read_text()
    assert "requeued" in log
    assert "start 2" in log
    assert decided() == 8 * 14, log
    lost = [e["result"] for e in night.events("run_ended") if e["result"]["status"] != "ok"]
    assert len(lost) <= 8, (
        "only steps that were just being started may be lost, by the second requeue"
    )
    assert all(event["result"]["run"].endswith(("a1", "a2")) for event in night.events("run_ended"))
    night.check_books()


@pytest.mark.parametrize("kind", ["slurm", "allocation"])
def test_a_run_that_is_cancelled_from_outside_is_tried_again(lab, kind):
    night = lab(kind, *edits(1, nap=8.0))
    process = night.start()
    folder = night.folder / "runs" / "e0002" / "s1-a1"
    wait_for(lambda: (folder / "claim.json").exists(), 60, "for the second experiment")
    time.sleep(2)
    if kind == "slurm":
        slurm("scancel", *jobs_below(night.root))
    else:
        steps = slurm("squeue", "--steps", "-h", "-u", USER, "-o", "%i %j").splitlines()
        slurm("scancel", next(s.split()[0] for s in steps if f"{night.name}-e0002" in s))
    if kind == "slurm":  # SIGTERM first; a step is killed at once
        cancelled = time.monotonic()
        wait_for(lambda: (folder / "result.json").exists(), 30, "for the payload's own account")
        assert time.monotonic() - cancelled < 4, (
            "it ended its program, and did not wait to be killed"
        )
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    results = {event["result"]["run"]: event["result"] for event in night.events("run_ended")}
    assert results["e0002-s1-a1"]["status"] == "infrastructure", results
    assert results["e0002-s1-a1"]["details"]["cancelled"], results
    assert results["e0002-s1-a2"]["status"] == "ok"
    night.check_books()
