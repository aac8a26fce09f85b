"""Executors before a Slurm that does not answer, or not as a healthy one would: by programs of its
commands' names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from submitit.core import plugins

from jobs.errors import UserError
from jobs.model import Budget, Run, Submission
from jobs.settings import Executor
from slurm import script, trial
from slurm.allocation import AllocationRuns
from slurm.executor import SlurmExecutor
from slurm.step import AllocationExecutor

Program = Callable[[str, str], None]
Kind = type[SlurmExecutor] | type[AllocationRuns]
AWAY = "echo 'Unable to contact slurm controller' >&2; exit 1"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Puts a shell script on PATH that notes its calls in tmp_path/NAME.calls."""

    def put(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\necho call >>{tmp_path}/{name}.calls\n{text}\n")
        (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    known = {**plugins.get_executors(), "allocation": AllocationExecutor}
    monkeypatch.setattr(plugins, "get_executors", lambda: known)
    for name in ("srun", "squeue", "scancel"):
        put(name, "exit 0")
    put("sbatch", AWAY)
    put("sacct", "exit 1")
    return put


@pytest.fixture
def make(
    program: Program, tmp_path: Path
) -> Iterator[Callable[[Kind], SlurmExecutor | AllocationRuns]]:
    made: list[SlurmExecutor | AllocationRuns] = []

    def one(kind: Kind) -> SlurmExecutor | AllocationRuns:
        made.append(kind(Executor(slots=4), tmp_path / "night"))
        return made[-1]

    yield one
    for executor in made:
        executor.close()


def submit(
    executor: SlurmExecutor | AllocationRuns, tmp_path: Path, number: int, **place: str
) -> Submission:
    run = Run(f"e{number:04d}", 1, 1, Budget("wall", 1), "cpu")
    return executor.submit(run, f"night-{run.id}", tmp_path / run.id, 60.0, frozenset(), place)


def calls(tmp_path: Path, name: str) -> int:
    path = tmp_path / f"{name}.calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("kind", [SlurmExecutor, AllocationRuns])
def test_after_an_sbatch_without_answer_the_others_wait_for_an_answered_query(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns],
    program: Program,
    tmp_path: Path,
    kind: Kind,
) -> None:
    executor = make(kind)
    submissions = [submit(executor, tmp_path, number) for number in range(4)]
    assert calls(tmp_path, "sbatch") == 1
    program("squeue", AWAY)
    assert executor.survey(submissions) is None
    submissions.append(submit(executor, tmp_path, 4))
    assert calls(tmp_path, "sbatch") == 1
    program("squeue", "exit 0")
    states = executor.survey(submissions)
    assert calls(tmp_path, "sbatch") == 2
    assert states is not None
    assert all("got no answer" in state.reason for state in states.values())


def row(job: int, state: str, reason: str, folder: Path) -> str:
    nodes = "n1" if state == "RUNNING" else ""
    times = "2026-01-01T00:00:00|2026-01-01T00:00:00|1:00"
    return f"{job}|{state}|{nodes}|{times}|{reason}|/|{script.holder_name(folder)}"


def test_a_holder_whose_submission_was_not_answered_is_not_asked_for_again(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns], program: Program, tmp_path: Path
) -> None:
    executor = make(AllocationRuns)
    submission = submit(executor, tmp_path, 1)
    program("squeue", f"echo '{row(7, 'PENDING', 'Priority', tmp_path / 'night')}'")
    states = executor.survey([submission])
    assert states is not None
    assert "job 7: Priority" in states[submission.run].reason
    assert calls(tmp_path, "sbatch") == 1


@pytest.mark.parametrize("running", [True, False])
def test_a_limit_of_the_group_passes_while_the_holder_runs_that_has_the_share(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns],
    program: Program,
    tmp_path: Path,
    running: bool,
) -> None:
    """What is left of the running one is too short for the run."""
    executor, folder = make(AllocationRuns), tmp_path / "night"
    rows = [row(8, "PENDING", "AssocGrpGRES", folder)]
    rows += [row(7, "RUNNING", "None", folder)] if running else []
    program("squeue", "\n".join(f"echo '{line}'" for line in rows))
    program("scontrol", "echo n1")
    submission = submit(executor, tmp_path, 1)
    states = executor.survey([submission])
    assert states is not None
    assert "AssocGrpGRES" in states[submission.run].reason
    assert states[submission.run].permanent is not running


REFUSED = "echo 'sbatch: error: Batch job submission failed: Invalid node name specified' >&2"


@pytest.mark.parametrize("kind", [SlurmExecutor, AllocationRuns])
def test_a_node_that_slurm_refuses_later_ends_the_runs_of_its_branch_alone(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns],
    program: Program,
    tmp_path: Path,
    kind: Kind,
) -> None:
    executor = make(kind)
    submissions = [
        submit(executor, tmp_path, 1, node="nowhere9"),
        submit(executor, tmp_path, 2, node="n1"),
        submit(executor, tmp_path, 3),
    ]
    program("sbatch", f"if grep -q nowhere9; then {REFUSED}; exit 1; fi; echo 7")
    program("sinfo", """case "$*" in *"-n n1 "*) echo n1;; esac""")
    for _ in range(2):
        states = executor.survey(submissions)
    assert states is not None
    lost, *others = (states[submission.run] for submission in submissions)
    assert lost.phase == "ended"
    assert "Invalid node name specified. See executor.exclude or" in lost.reason
    assert "branches.NAME.node" in lost.reason
    assert {state.phase for state in others} <= {"pending", "absent"}
    assert calls(tmp_path, "sbatch") >= 2


def test_more_named_nodes_than_are_held_end_the_later_ones_runs(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns], program: Program, tmp_path: Path
) -> None:
    executor = make(AllocationRuns)
    submissions = [submit(executor, tmp_path, number, node=f"n{number}") for number in (1, 2)]
    why = "echo 'sbatch: error: invalid number of nodes (-N 2-1)' >&2"
    program("sbatch", f"if grep -q n1,n2; then {why}; exit 1; fi; echo 7")
    program("sinfo", "echo n1")
    states = executor.survey(submissions)
    assert states is not None
    assert [states[submission.run].phase for submission in submissions] == ["pending", "ended"]
    assert "executor.exclude or nodes" in states[submissions[1].run].reason


def test_a_refusal_that_no_node_is_the_reason_of_is_raised(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns], program: Program, tmp_path: Path
) -> None:
    executor = make(AllocationRuns)
    submissions = [submit(executor, tmp_path, 1, node="n1")]
    program("sbatch", "echo 'sbatch: error: invalid partition specified' >&2; exit 1")
    program("sinfo", "echo n1")
    with pytest.raises(UserError, match="invalid partition"):
        executor.survey(submissions)


@pytest.mark.parametrize(
    ("sbatch", "refused"),
    [
        ("exit 0", ""),
        (AWAY, ""),
        (REFUSED + "; exit 1", "Invalid node name specified"),
        (f"if grep -q n9; then {REFUSED}; exit 1; fi", ""),  # one branch's own trouble
        ("echo 'Required node not available (down, drained or reserved)' >&2; exit 1", ""),
    ],
)
def test_a_campaign_begins_unless_slurm_refuses_what_all_its_branches_want(
    program: Program, tmp_path: Path, sbatch: str, refused: str
) -> None:
    program("sbatch", sbatch)
    program("scontrol", "exit 0")
    program("sinfo", "echo 'gpu*|1-00:00:00'")
    asked = (Executor(kind="slurm"), tmp_path / "night", 60.0, [{"node": "n9"}, {}])
    if refused:
        with pytest.raises(UserError, match=refused):
            trial.require(*asked)
    else:
        trial.require(*asked)
    assert not (tmp_path / "night").exists()
