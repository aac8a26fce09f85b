"""Ends of runs as Slurm tells them: what the wrapper wrote a moment before, and what lasts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deciding
import pytest
from toylab import Lab

from jobs import runs, submission
from jobs.errors import Paused
from jobs.model import Run, Submission
from jobs.submission import JobState, LocalExecutor

MakeLab = Callable[..., Lab]
TOLD = {"protocol": 1, "node": "n1", "reason": "the run was cancelled from outside by SIGTERM"}


def at(second: int) -> str:
    return f"2026-01-01T00:00:{second:02d}.000Z"


class Cluster(LocalExecutor):
    """First attempts end by SIGTERM, or wait; second ones go well. Surveys are read from a list."""

    surveys: Iterator[JobState | None]
    seen: list[tuple[float, JobState | None]]
    asked: list[tuple[str, frozenset[str]]]  # attempts, and the nodes that they are not to be on
    ends = True
    cards = ("GPU-1", "GPU-1")  # of both attempts
    away: Iterator[bool] = iter(())  # whether a submission fails

    def submit(self, run: Run, name: str, run_dir: Path, *rest: Any) -> Submission:
        self.asked.append((run.id, rest[1]))
        if next(self.away, False):
            raise Paused("the controller's host goes down")
        told = {**TOLD, "status": "infrastructure", "value": None, "facts": {"run": run.id}}
        if run.attempt > 1:
            told |= {"status": "ok", "value": 1.0, "reason": "done"}
        told |= {
            "device": "0",
            "gpu_uuid": self.cards[(run.attempt - 1) % 2],
            "total_seconds": 4.0,
            "started": at(9 * run.attempt),
        }
        told |= {"ended": at(9 * run.attempt + 4)}
        if self.ends:
            (run_dir / "result.json").write_text(json.dumps(told))
        return Submission(run.id, "slurm", "7")

    def survey(self, submissions: Sequence[Submission]) -> Any:
        if not submissions:
            return {}
        state = next(self.surveys)
        self.seen.append((time.monotonic(), state))
        return state and {one.run: state for one in submissions if state != UNTOLD}


@pytest.fixture
def night(make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Lab]:
    """A lab whose baseline's surveys are these; the last one is repeated for ever."""

    def make(*states: JobState | None, ends: bool = True) -> Lab:
        def seen() -> Iterator[JobState | None]:
            yield from states
            while True:
                yield states[-1]

        monkeypatch.setattr(submission, "executor", Cluster)
        monkeypatch.setattr(submission, "require", lambda *asked: None)
        monkeypatch.setattr(Cluster, "surveys", seen(), raising=False)
        monkeypatch.setattr(Cluster, "seen", [], raising=False)
        monkeypatch.setattr(Cluster, "asked", [], raising=False)
        monkeypatch.setattr(Cluster, "ends", ends)
        return make_lab(executor={"kind": "slurm", "poll_seconds": 0.05}, limits={"experiments": 1})

    return make


RUNNING = JobState("running", node="n1", queue_s=2.0)
UNTOLD = JobState("nothing is told of it")


@pytest.mark.parametrize(
    ("reason", "excuse"),
    [
        ("PREEMPTED", {"preempted": True}),
        ("CANCELLED", {"cancelled": True}),
        ("TIMEOUT", {}),
        ("NODE_FAIL", {}),
    ],
)
def test_a_run_that_slurm_ended_is_recorded_once_slurm_says_why(
    night: Callable[..., Lab], reason: str, excuse: dict[str, bool]
) -> None:
    ended = JobState("ended", reason, node="n1", queue_s=2.0, **excuse)
    lab = night(RUNNING, None, ended)
    lab.run()
    state = lab.state
    first, second = state.results("e0001")
    assert (first.status, first.details["job_end"], first.queue_s) == (
        "infrastructure",
        reason,
        2.0,
    )
    assert excuse.items() <= first.details.items()
    assert state.record("e0001").runs[0].preempted is ("preempted" in excuse)
    assert [run.died for run in state.nodes["n1"]] == ([False] if excuse else [True, False])
    assert second.ok
    assert deciding.verify(lab.events()) == []


def test_where_slurm_gives_no_reason_the_wrappers_is_recorded_after_a_while(
    night: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "EXPLAINED_AFTER_S", 0.5)
    lab = night(RUNNING)
    lab.run()
    first, second = lab.state.results("e0001")
    assert first.reason == TOLD["reason"]
    assert second.ok


@pytest.mark.parametrize(("kind", "allocated"), [("slurm", 8.0), ("allocation", 13.0)])
def test_what_a_place_waited_for_its_next_run_is_recorded(
    night: Callable[..., Lab], kind: str, allocated: float
) -> None:
    lab = night(JobState("ended", "FAILED", queue_s=2.0))
    lab.configure(executor=lab.settings["executor"] | {"kind": kind})
    lab.run()
    first, second = lab.state.results("e0001")
    assert (first.turnaround_s, second.turnaround_s) == (None, 5.0)
    assert (first.queue_s, second.queue_s) == (2.0, None)  # it began before it was wanted
    assert lab.state.allocated_s == allocated
    assert lab.call("report")[0] == 0
    said = (lab.folder / "report" / "index.html").read_text()
    assert "In the median 2.0 s in the queue, 5.0 s from a run's end to the next." in said


def test_the_place_of_a_run_is_its_gpu_where_each_job_counts_its_own(
    night: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "cards", ("GPU-1", "GPU-2"))
    lab = night(JobState("ended", "FAILED", queue_s=2.0))
    lab.run()
    assert [result.turnaround_s for result in lab.state.results("e0001")] == [None, None]


def test_a_retry_intended_before_a_kill_still_avoids_the_node_that_it_died_on(
    night: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "away", iter([False, True]))
    lab = night(JobState("ended", "FAILED", node="n1"))
    with pytest.raises(Paused):
        lab.run()
    assert "e0001-s1-a2" in lab.state.open_runs
    lab.run()
    tries = [("e0001-s1-a1", frozenset[str]()), *[("e0001-s1-a2", frozenset({"n1"}))] * 2]
    assert Cluster.asked == tries


def test_a_run_of_which_nothing_is_told_is_not_lost(
    night: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LOST_AFTER_S", 0.0)
    lab = night(RUNNING, UNTOLD, UNTOLD, JobState("ended", "NODE_FAIL"), ends=False)
    lab.run()
    first = lab.state.results("e0001")[0]
    assert "NODE_FAIL" in first.reason


STUCK = JobState("pending", "AssocGrpGRES: used up", permanent=True)


def test_only_a_lasting_reason_that_stood_all_the_time_pauses(
    night: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "STUCK_AFTER_S", 1.0)
    lab = night(*[STUCK] * 2, JobState("pending", "Priority"), STUCK, None, STUCK, ends=False)
    with pytest.raises(Paused, match="AssocGrpGRES: used up"):
        lab.run()
    times = [moment for moment, _ in Cluster.seen]
    assert times[-1] - times[3] >= 1.0
    assert times[-2] - times[3] < 1.0


def test_the_folders_of_jobs_that_are_over_go_and_what_may_say_why_stays(
    night: Callable[..., Lab],
) -> None:
    lab = night(JobState("ended", "FAILED"))
    names = ("e0001-s1-a1", "e0001-s1-a2", "e0009-s1-a1")
    jobs = {name: lab.folder / "submitit" / f"{lab.name}-{name}" for name in names}
    for name, folder in jobs.items():
        folder.mkdir(parents=True)
        (folder / "7_0_log.out").write_text("why")
        if name != "e0001-s1-a2":
            os.utime(folder, (0, 0))
    lab.run()
    left = [folder.name for folder in jobs.values() if folder.exists()]
    assert left == [f"{lab.name}-e0001-s1-a2", f"{lab.name}-e0009-s1-a1"]  # young; without a result
    assert lab.call("clean")[0] == 0
    assert list((lab.folder / "submitit").iterdir()) == []
