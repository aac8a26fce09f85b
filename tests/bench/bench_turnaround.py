"""One Slurm job a run against steps in a held allocation: turnaround and experiments per hour.

On the test cluster (make cluster), as root: python -m tests.bench.bench_turnaround [RUNS [SECONDS]]

Runs only sleep, so that eight pretend GPUs fit on two cores; what is measured is everything between
them. "Contended": jobs of another user, each as long as a run, of which one is pending for each GPU
at any time. Both executors are measured in both situations within one call.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.model import Budget, Run
from jobs.settings import Executor
from slurm import commands
from slurm.allocation import AllocationRuns
from slurm.executor import SlurmExecutor
from tests.bench.results import record
from tests.slurm import trivial

ROOT = Path(__file__).resolve().parents[2]
GPUS, NODES = 8, 4
RUNS, SECONDS = 40, 8.0


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    length = float(sys.argv[2]) if len(sys.argv) > 2 else SECONDS
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"  # the payload's
    rows = []
    for situation in ("empty", "contended"):
        found = {}
        for kind in ("slurm", "allocation"):
            with others(length if situation == "contended" else 0.0):
                found[kind] = measure(kind, count, length)
        for kind, row in found.items():
            ratio = row["experiments/h"] / found["slurm"]["experiments/h"]
            rows.append({"cluster": situation, "executor": kind, **row, "against slurm": ratio})
    record(
        "Turnaround: a job for each run against steps in a held allocation",
        rows,
        f"{count} runs of {length:g} s (four fifths to six fifths of it) on {GPUS} pretend GPUs of"
        f" {NODES} virtual nodes, as many in flight as there are places. Turnaround: from a run's"
        " result to the next program's start in the same place, by the payload's own clock, without"
        " a container. Contended: another user keeps one job as long as a run pending for each GPU."
        " The holder's own wait in the queue is included in the experiments per hour; 'training"
        " share' is the runs' own time in the GPU seconds that were allocated to us.",
    )


def measure(kind: str, count: int, length: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        lab = Bench(Path(folder) / f"bench-{kind}", kind, length)
        began = time.time()
        lab.run(count)
        runs = sorted(lab.runs(), key=lambda run: run["start"])
        hours = (max(run["end"] for run in runs) - began) / 3600
        allocated = lab.gpu_seconds()
        gaps = turnarounds(runs)
        return {
            "turnaround, median s": statistics.median(gaps) if gaps else None,
            "turnaround, worst s": max(gaps, default=None),
            "experiments/h": count / hours,
            "GPU s allocated": allocated,
            "experiments/GPU h": count / (allocated / 3600),
            "training share": sum(run["end"] - run["start"] for run in runs) / allocated,
        }


def turnarounds(runs: list[dict[str, Any]]) -> list[float]:
    """Seconds from each run's end to the next start in the same place; runs in order of start."""
    last: dict[tuple[str, str], float] = {}
    gaps = []
    for run in runs:
        place = (run["node"], run["device"])
        if place in last:
            gaps.append(run["start"] - last[place])
        last[place] = run["end"]
    return gaps


class Bench:
    """A campaign folder and an executor, driven as the controller does."""

    def __init__(self, folder: Path, kind: str, length: float) -> None:
        folder.mkdir()
        self.folder, self.length = folder, length
        settings = Executor(
            kind=kind, slots=GPUS, nodes=NODES, cpus=1, memory="200M", margin=30.0, hold_hours=0.5
        )
        make = SlurmExecutor if kind == "slurm" else AllocationRuns
        self.executor = make(settings, folder, work=trivial.run)
        self.name = f"{folder.name}-{time.time_ns()}"

    def run(self, count: int) -> None:
        """`count` runs, as many in flight as there are GPUs; results are looked for every 20 ms."""
        flying, begun, surveyed, chance = {}, 0, 0.0, random.Random(1)
        while begun < count or flying:
            while begun < count and len(flying) < GPUS:
                begun += 1
                run = Run(f"e{begun:04d}", 1, 1, Budget("wall", self.length), "cpu")
                folder = self.folder / "runs" / run.folder
                folder.mkdir(parents=True)
                sleep = self.length * chance.uniform(0.8, 1.2)
                (folder / "work.json").write_text(json.dumps({"sleep": sleep}))
                limit = self.length + 30.0
                flying[folder] = self.executor.submit(run, f"{self.name}-{run.id}", folder, limit)
            for folder in [f for f in flying if (f / "result.json").exists()]:
                del flying[folder]
            if flying and time.monotonic() - surveyed > 1.0:
                surveyed = time.monotonic()
                self.executor.survey(list(flying.values()))
            time.sleep(0.02)
        self.executor.close()

    def runs(self) -> Iterator[dict[str, Any]]:
        for path in self.folder.glob("runs/*/*/claim.json"):
            claim = json.loads(path.read_text())
            end = json.loads(path.with_name("result.json").read_text())["time"]
            yield {**claim, "start": claim["time"], "end": end}

    def gpu_seconds(self) -> float:
        """By Slurm's own account of our jobs; a holder has all GPUs, a run's job has one."""
        time.sleep(2.0)
        jobs = {str(run["slurm_job"]) for run in self.runs()}
        each = GPUS if isinstance(self.executor, AllocationRuns) else 1
        shown = commands.ask(["squeue", "--me", "-t", "all", "-h", "-o", "%i|%M"])
        lines = [line.split("|") for line in shown.splitlines()]
        return each * sum(commands.seconds(used) or 0.0 for job, used in lines if job in jobs)


@contextmanager
def others(length: float) -> Iterator[None]:
    """Another user's jobs: as many pending at any time as there are GPUs; 0: none."""
    if not length:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_compete, args=(length, over))
    thread.start()
    time.sleep(length / 2)
    try:
        yield
    finally:
        over.set()
        thread.join()
        subprocess.run(["scancel", "--name=bench-other"], check=False)
        while commands.ask(["squeue", "-h", "--name=bench-other"]).strip():
            time.sleep(0.2)


def _compete(length: float, over: threading.Event) -> None:
    argv = ["sbatch", "--job-name=bench-other", "--uid=nobody", "--gres=gpu:1", "--mem=50M"]
    argv += ["--time=2", "--chdir=/", "--output=/dev/null", f"--wrap=sleep {length}"]
    while not over.wait(0.2):
        shown = commands.ask(["squeue", "-h", "-t", "PENDING", "--name=bench-other", "-o", "%i"])
        for _ in range(GPUS - len(shown.split())):
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
