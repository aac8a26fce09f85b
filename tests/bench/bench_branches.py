"""What the controller itself costs per experiment, from 1 branch to 32 of them.

python -m tests.bench.bench_branches [--experiments N]

Commits, refs, notes, ledger, tables and run folders are real; a run is a result.json that lies
there at once, so that what is measured is all the controller's. With the test cluster (make
cluster, as root) two more passes hand every run to Slurm, too: by sbatch, and as steps by srun.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.researcher import Context
from jobs import campaign, config
from jobs.controller import Controller
from jobs.history import State
from jobs.model import Proposal, Run, Submission
from jobs.submission import JobState
from slurm import commands
from slurm.allocation import AllocationRuns
from slurm.executor import SlurmExecutor
from tests.bench.results import record
from tests.slurm.rig import slurm, wait_for
from tests.small_lab import as_repository

SLOTS = 4  # of each branch
PLACES = 8  # of the test cluster: as many steps can be in flight
SLURM = {"cpus": 1, "memory": "50M", "poll_seconds": 0.5, "setup": ["exit 0"], "nodes": 4}


def cpu_s() -> float:
    """CPU seconds of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Numbers:
    """A researcher that sets a line of a program of 700 lines to a number of its own."""

    def propose(self, state: State, branch: str, context: Context) -> Proposal:
        path, text = next(iter(context.files.items()))
        lines, place = text.splitlines(keepends=True), context.number * 9 % 700
        # of its branch, too: what another one tried already is refused
        lines[place] = f"value_{place} = {context.number}.5{branch[1:]}\n"
        text = "".join(lines)
        return Proposal(branch, context.base, {path: text}, f"try {context.number}", "numbers")


def finish(run: str, run_dir: Path) -> None:
    number = int(run[1:].partition("-")[0])
    value = 1.0 / number if number % 8 < 2 else 2.0 + number
    result = {"protocol": 1, "status": "ok", "reason": "trivial", "value": value, "node": "n1"}
    result |= {"run": run, "facts": {"run": run}, "total_seconds": 300.0, "steps": 1000}
    (run_dir / "result.json").write_text(json.dumps(result))


class Instant:
    """An executor whose runs have ended when they are submitted; a quarter of them is better."""

    def submit(self, run: Run, name: str, run_dir: Path, *_: Any) -> Submission:
        finish(run.id, run_dir)
        return Submission(run.id, "local", "none")

    def survey(self, submissions: Sequence[Submission]) -> Mapping[str, JobState]:
        return {s.run: JobState("running") for s in submissions}

    def find(self, names: Any) -> dict[str, Submission]:
        return {}

    def cancel(self, submissions: Any) -> None: ...

    def close(self) -> None: ...


class Queued(SlurmExecutor):
    """Every run is a job (which ends at once), and has a result when jobs were next asked for."""

    def survey(self, submissions: Sequence[Submission]) -> Mapping[str, JobState] | None:
        states = super().survey(submissions)
        for one in submissions:
            finish(one.run, self._campaign_dir / "runs" / one.run.replace("-", "/", 1))
        return states


class Stepped(AllocationRuns):
    """Every run is a step (which ends at once) of a held allocation, in one of its eight places."""

    def survey(self, submissions: Sequence[Submission]) -> Mapping[str, JobState] | None:
        for entry in self._table:
            if entry.launched and not self._attached(entry):  # its srun has ended
                finish(entry.run, Path(entry.run_dir))
        return super().survey(submissions)


CLUSTER = {"slurm": Queued, "allocation": Stepped}


def measure(root: Path, branches: int, experiments: int, kind: str = "local") -> dict[str, Any]:
    """One campaign; CPU milliseconds of each experiment."""
    root.mkdir()
    (root / "solution.py").write_text("".join(f"value_{i} = {i}  # a line\n" for i in range(700)))
    (root / "score.py").write_text("")
    (root / "program.md").write_text("Find a number.\n")
    as_repository(root)
    scorer = {"command": ["python", "score.py"], "files": ["score.py"]}
    task = {"kind": "general", "editable": ["solution.py"], "command": [], "metric": "loss"}
    settings = config.parse(
        {
            "campaign": "bench",
            "task": {**task, "scorer": scorer},
            "executor": {
                "kind": kind,
                "slots": min(branches * SLOTS, PLACES)
                if kind == "allocation"
                else branches * SLOTS,
                **(SLURM if kind in CLUSTER else {}),
            },
            "branches": {f"b{i:02}": {"slots": SLOTS} for i in range(branches)},
            "limits": {"experiments": experiments},
            "confirm": {"runs": 0},
        }
    )
    before = cpu_s()
    with campaign.opened(settings, root, lambda line: None) as opened:
        make = CLUSTER.get(kind)
        executor = make(settings.executor, opened.site.campaign_dir) if make else Instant()
        controller = Controller(
            opened, executor, lambda name: Numbers(), lambda name: None, lambda line: None
        )
        reason = controller.run()
        assert "experiments done" in reason, reason
        opened.repository.close()  # its cat-file processes are counted from now on
    state = controller.journal.state
    each = (cpu_s() - before) / len(state.records) * 1000
    kept = sum(branch.kept for branch in state.branches.values())
    carried = sum(bool(state.experiment(r.id).rebased_from) for r in state.experiments())
    row = {
        "branches": branches,
        "slots": settings.executor.slots,
        "experiments": len(state.records),
        "kept": kept,
        "rebased": carried,
        "CPU ms per experiment": each,
    }
    print(kind, row, flush=True)
    return row


def doing_nothing(times: int = 50) -> list[dict[str, Any]]:
    """CPU milliseconds of the commands that no controller can do without, when they do nothing."""
    rows = [doing("git --version", ["git", "--version"], times)]
    try:
        commands.queue()
    except (commands.Unanswered, FileNotFoundError):
        return rows
    rows.append(doing("squeue", ["squeue", "--noheader"], times))
    rows.append(doing("sbatch --test-only", ["sbatch", "--test-only", "--wrap=true"], times))
    sleeper = ["sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 300"]
    job = slurm(*sleeper).strip()
    try:
        wait_for(
            lambda: "RUNNING" in slurm("squeue", "--format=%T", "--jobs", job), 60, "for a job"
        )
        step = ["srun", f"--jobid={job}", "--overlap", "--ntasks=1", "true"]
        rows.append(doing("srun of a step", step, times))
    finally:
        slurm("scancel", job)
    return rows


def doing(name: str, argv: list[str], times: int) -> dict[str, Any]:
    before = cpu_s()
    for _ in range(times):
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
    return {"command": name, "CPU ms": (cpu_s() - before) / times * 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=1600)
    parser.add_argument("--jobs", type=int, default=500, help="experiments of a pass with Slurm")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        passes = [[measure(Path(place) / str(n), n, asked.experiments) for n in (1, 4, 32)]]
        passes += [with_slurm(Path(place), kind, asked.jobs) for kind in CLUSTER]
    record("Branches: commands that do nothing", doing_nothing(), "CPU of one, mean of 50.")
    ratios = [found[-1][COST] / found[0][COST] for found in passes if found[0][COST]]
    record(
        "Branches: what the controller costs",
        [row for found in passes for row in found],
        "CPU of the controller and of the git, sbatch, srun and squeue processes that it starts, "
        "by experiment; the runs are instant and not counted. From 1 to 32 branches "
        f"{', '.join(f'x{ratio:.2f}' for ratio in ratios)}. Promised: at most 25 ms, and x1.3.",
    )


COST = "CPU ms per experiment"


def with_slurm(place: Path, kind: str, experiments: int) -> list[dict[str, Any]]:
    """The same with a job or step for each run; "not run" where there is no Slurm."""
    told = [{"executor": kind, "branches": n} for n in (1, 32)]
    if shutil.which("sbatch") is None:
        return [row | {COST: None} for row in told]
    try:
        rows = []
        for n in (1, 32):
            rows.append(measure(place / f"{kind}-{n}", n, experiments, kind))
            left = [row.job for row in commands.queue() if str(place) in row.folder]
            subprocess.run(["scancel", *left], check=False)
        return [a | b for a, b in zip(told, rows, strict=True)]
    except commands.Unanswered:
        return [row | {COST: None} for row in told]


if __name__ == "__main__":
    main()
