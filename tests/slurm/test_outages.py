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
        made.append(kind(Executor(slots=4, exclude=("bad1",)), tmp_path / "night"))
        return made[-1]

    yield one
    for executor in made:
        executor.close()


def submit(
    executor: SlurmExecutor | AllocationRuns,
    tmp_path: Path,
    number: int,
    avoid: frozenset[str] = frozenset(),
    **place: str,
) -> Submission:
    run = Run(f"e{number:04d}", 1, 1, Budget("wall", 1), "cpu")
    return executor.submit(run, f"night-{run.id}", tmp_path / run.id, 60.0, avoid, place)


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


def row(job: int, state: str, reason: str, folder: Path, left: str = "1:00") -> str:
    nodes = "" if state == "PENDING" else "n1"
    times = f"2026-01-01T00:00:00|2026-01-01T00:00:00|{left}"
    return f"{job}|{state}|{nodes}|{times}|{reason}|/|{script.holder_name(folder)}"


def hold_n1(program: Program, tmp_path: Path) -> str:
    """One node is held, as job 7, in which steps can start: what squeue says of it."""
    program("scontrol", "echo n1")
    program("srun", "exec sleep 30")
    said = f"echo '{row(7, 'RUNNING', 'None', tmp_path / 'night', '1:00:00')}'"
    program("squeue", said)
    return said


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


NONE_LEFT = """if grep -q -e --exclude=bad1,n1; then
  echo 'sbatch: error: Requested node configuration is not available' >&2
  exit 1
fi
echo 9"""


def test_a_job_that_is_to_avoid_all_nodes_there_are_is_submitted_without_that(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns], program: Program, tmp_path: Path
) -> None:
    program("sbatch", NONE_LEFT)
    submission = submit(make(SlurmExecutor), tmp_path, 1, frozenset({"n1"}))
    assert submission.job == "9"
    assert calls(tmp_path, "sbatch") == 2


@pytest.mark.parametrize("held", [True, False])
def test_a_run_that_is_to_avoid_all_nodes_there_are_starts_on_those_that_are_held(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns],
    program: Program,
    tmp_path: Path,
    held: bool,
) -> None:
    program("sbatch", NONE_LEFT)
    holder = hold_n1(program, tmp_path)
    program("squeue", holder if held else "exit 0")
    executor = make(AllocationRuns)
    submission = submit(executor, tmp_path, 1, frozenset({"n1"}))
    if not held:  # then such nodes are asked for
        assert calls(tmp_path, "sbatch") == 2
        program("squeue", holder.replace("7|", "9|"))
        executor.survey([submission])
    states = executor.survey([submission])
    assert states is not None
    assert states[submission.run].phase == "running"
    assert states[submission.run].node == "n1"


def test_a_run_that_fits_on_no_held_node_waits_for_others_and_not_for_its_neighbours(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns], program: Program, tmp_path: Path
) -> None:
    hold_n1(program, tmp_path)
    executor = make(AllocationRuns)
    submissions = [submit(executor, tmp_path, 1)]
    assert calls(tmp_path, "sbatch") == 0
    submissions.append(submit(executor, tmp_path, 2, frozenset({"n1"})))  # Slurm is away
    program("sbatch", "cat >>$0.scripts; echo 9")
    executor.survey(submissions)
    assert "--exclude=bad1,n1\n" in (tmp_path / "sbatch.scripts").read_text()


DOWN = "ReqNodeNotAvail, UnavailableNodes:n[2-4]"


def test_a_run_that_is_to_avoid_the_nodes_held_waits_some_minutes_for_others(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns],
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = hold_n1(program, tmp_path)
    program("squeue", f"{held}; echo '{row(9, 'PENDING', DOWN, tmp_path / 'night')}'")
    executor = make(AllocationRuns)
    submission = submit(executor, tmp_path, 1, frozenset({"n1"}))
    phases = []
    for patience in (300.0, 0.0):
        monkeypatch.setattr(AllocationRuns, "elsewhere_s", patience)
        states = executor.survey([submission])
        assert states is not None
        phases.append(states[submission.run].phase)
    assert phases == ["pending", "running"]


def test_a_job_that_is_to_avoid_all_nodes_but_those_that_are_down_is_let_go_anywhere(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns], program: Program, tmp_path: Path
) -> None:
    program("sbatch", "echo 9")
    program("scontrol", "echo $* >>$0.words")
    executor = make(SlurmExecutor)
    submission = submit(executor, tmp_path, 1, frozenset({"n1"}))
    for reason in ("Resources", DOWN, DOWN):
        program("squeue", f"echo '{row(9, 'PENDING', reason, tmp_path)}'")
        executor.survey([submission])
    assert (tmp_path / "scontrol.words").read_text() == "update jobid=9 excnodelist=bad1\n"


@pytest.mark.parametrize(
    ("state", "excused"), [("CANCELLED", True), ("TIMEOUT", True), ("NODE_FAIL", False)]
)
def test_a_run_whose_whole_allocation_ended_blames_its_node_only_if_that_was_lost(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns],
    program: Program,
    tmp_path: Path,
    state: str,
    excused: bool,
) -> None:
    hold_n1(program, tmp_path)
    program("srun", "exit 0")
    executor = make(AllocationRuns)
    submission = submit(executor, tmp_path, 1)
    (tmp_path / submission.run).mkdir()
    (tmp_path / submission.run / "claim.json").touch()
    program("squeue", f"echo '{row(7, state, 'None', tmp_path / 'night')}'")
    states = executor.survey([submission])
    assert states is not None
    ended = states[submission.run]
    assert (ended.phase, ended.node, ended.cancelled) == ("ended", "n1", excused)


def test_of_jobs_that_slurm_does_not_tell_of_nothing_is_said_and_the_others_are_known(
    make: Callable[[Kind], SlurmExecutor | AllocationRuns], program: Program, tmp_path: Path
) -> None:
    executor = make(SlurmExecutor)
    program("sbatch", "echo 7")
    submissions = [submit(executor, tmp_path, 1)]
    program("sbatch", "echo 8")
    submissions.append(submit(executor, tmp_path, 2))
    program("squeue", f"echo '{row(7, 'RUNNING', 'None', tmp_path)}'")
    program("scontrol", AWAY)
    states = executor.survey(submissions)
    assert states is not None
    assert {run: state.phase for run, state in states.items()} == {"e0001-s1-a1": "running"}
    program("scontrol", "exit 0")
    program("sacct", "case $* in *--jobs*) exit 1;; esac")  # works, but for this question
    states = executor.survey(submissions)
    assert states is not None
    assert list(states) == ["e0001-s1-a1"]


def test_nodes_that_are_held_for_less_than_a_run_are_refused_before_anything_begins(
    program: Program, tmp_path: Path
) -> None:
    program("scontrol", "exit 0")
    asked = (Executor(kind="allocation", hold_hours=0.1), tmp_path / "night", 350.0, [{}])
    with pytest.raises(UserError, match=r"executor\.hold_hours: 0\.1"):
        trial.require(*asked)
    (finding,) = trial.settings(*asked)
    assert (finding.status, "executor.hold_hours" in finding.seen) == ("failure", True)
    assert calls(tmp_path, "sbatch") == 0


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
