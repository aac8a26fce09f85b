"""How a long ledger behaves: replay, memory, status from a snapshot, and appends.

python -m tests.bench.bench_ledger [EXPERIMENTS]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs import history, ledger, policy
from jobs.model import Budget, Experiment, Result, Run, Submission, Usage, to_json
from tests.bench.results import record

BRANCHES = 4
EVENTS_EACH = 6


def write_ledger(path: Path, experiments: int) -> None:
    """A ledger as a campaign of `experiments` leaves it, decisions and all, without the syncing."""
    state = history.State()
    with open(path, "wb") as file:

        def put(events: list[tuple[str, dict[str, Any]]]) -> None:
            nonlocal state
            made = []
            for name, payload in events:
                head = {"v": 1, "n": state.events + len(made), "fence": 1, "time": ledger.utc_now()}
                made.append({**head, "mono": 1234.567, "event": name, **payload})
            file.write(
                b"".join(json.dumps(e, separators=(",", ":")).encode() + b"\n" for e in made)
            )
            state = history.fold([{**e, "at": 0} for e in made], state)

        put([("campaign_started", {"campaign": "bench", "config": {}})])
        put([("branch_added", {"branch": f"b{i}", "settings": {}}) for i in range(BRANCHES)])
        for i in range(experiments):
            put(_until_the_end(state, i))
            decision = policy.decide(state, history.experiment_id(i))
            put([("decided", {"decision": to_json(decision)})])


def _until_the_end(state: history.State, i: int) -> list[tuple[str, dict[str, Any]]]:
    branch = state.branch(f"b{i % BRANCHES}")
    experiment = Experiment(
        id=state.next_id,
        branch=branch.name,
        commit=f"{i:040x}",
        base=branch.head_commit or "f" * 40,
        parent=branch.head,
        description=f"Raise the matrix learning rate from 0.04 to 0.05 and warm it up ({i})",
        researcher="anthropic:claude",
        program_sha256="a" * 64,
        hypothesis="The loss curve is still steep at the end of the budget, so larger steps early "
        "in the run should be affordable and leave more of the budget for the decay phase.",
        tags=("optimiser", "matrix_lr", "up"),
        lines_added=2,
        lines_removed=2,
        usage=Usage(31000, 4000, 0, 29000, 0.21),
    )
    run = Run(experiment.id, 1, 1, Budget("wall", 300), "h100")
    ok = i < BRANCHES or i % 7 != 3
    metric = (1.2 - 0.2 * i / 1e5 if i % 10 < BRANCHES else 1.3) if ok else None
    result = Result(
        run=run.id,
        status="ok" if ok else "crash",
        reason="scored" if ok else "RuntimeError: shape mismatch",
        metric=metric,
        node=f"n{i % 8}",
        gpu="NVIDIA H100 80GB HBM3",
        steps=953,
        tokens=499646464,
        memory_mb=2311.5,
        gpu_memory_mb=45060.2,
        queue_s=0.4,
        startup_s=21.3,
        training_s=300.1,
        scoring_s=11.2,
        total_s=340.9,
        started=ledger.utc_now(),
        ended=ledger.utc_now(),
        params=50332176,
        details={f"detail_{k}": f"value {k} of run {i}" for k in range(20)},
    )
    submission = Submission(run.id, "slurm", str(100000 + i), f"n{i % 8}")
    return [
        (
            "proposal_requested",
            {"proposal": f"p{i}", "branch": branch.name, "base": experiment.base},
        ),
        (
            "proposed",
            {
                "proposal": f"p{i}",
                "experiment": to_json(experiment),
                "fingerprint": f"{i:032x}",
            },
        ),
        (
            "run_intended",
            {
                "run": to_json(run),
                "executor": "slurm",
                "name": f"bench-{run.id}",
                "folder": run.folder,
                "purpose": "screen",
            },
        ),
        ("run_submitted", {"submission": to_json(submission)}),
        ("run_ended", {"result": to_json(result)}),
    ]


_OPEN = """
import re, sys, time
from pathlib import Path
began = time.perf_counter()
from jobs import snapshot
state, tail = snapshot.open_history(Path(sys.argv[1]))
spent, cpu = time.perf_counter() - began, time.process_time()
if len(sys.argv) > 2:
    began = time.perf_counter()
    snapshot.save(Path(sys.argv[1]), state, tail.offset)
    print(time.perf_counter() - began, end=" ")
assert sum(b.experiments for b in state.branches.values()) == len(state.records)
# Not ru_maxrss: that outlives exec, and would be the memory of whoever started this.
peak_kb = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(spent, cpu, int(peak_kb) / 1024)
"""


def in_new_process(folder: Path, *more: str) -> tuple[list[float], float]:
    """Opens the history in a fresh interpreter: what it printed, and seconds from start to end."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(folder), *more],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    return [float(word) for word in done.stdout.split()], time.perf_counter() - began


def status(lab: Path) -> float:
    """Seconds of `autoresearch status` as a user would type it."""
    root = Path(__file__).parents[2]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jobs.cli", "status"],
        check=True,
        capture_output=True,
        text=True,
        cwd=lab,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert "b3" in done.stdout, done.stdout
    return time.perf_counter() - began


def measure(lab: Path, experiments: int) -> list[dict[str, Any]]:
    """Rows of the table: what was measured, its value, and what is promised at 100,000."""
    folder = lab / "campaigns" / "main"
    folder.mkdir(parents=True)
    (lab / "campaign.yaml").touch()
    path = folder / "ledger.jsonl"
    write_ledger(path, experiments)
    replay, _ = in_new_process(folder)
    saved, _ = in_new_process(folder, "save")
    opened, whole = in_new_process(folder)
    told = status(lab)
    megabytes = path.stat().st_size / 1e6
    took = appends(folder)
    snapshot_mb = (folder / "snapshot.json").stat().st_size / 1e6
    table = [
        ("experiments", experiments, ""),
        ("ledger, MB", round(megabytes, 1), ""),
        ("replay, s", round(replay[0], 2), "<= 10"),
        ("replay, CPU s", round(replay[1], 2), ""),
        ("replay, peak MB", round(replay[2]), "<= 500"),
        ("snapshot written, s", round(saved[0], 2), ""),
        ("snapshot, MB", round(snapshot_mb, 1), ""),
        ("history opened from the snapshot, s", round(opened[0], 3), ""),
        ("the same, CPU s", round(opened[1], 3), ""),
        ("the same, whole new process, s", round(whole, 3), ""),
        ("autoresearch status, s", round(told, 3), "<= 1"),
        ("append with fsync, median ms", round(took * 1000, 2), ""),
    ]
    return [dict(zip(("what", "value", "promised"), row, strict=True)) for row in table]


def appends(folder: Path, count: int = 200) -> float:
    """Median seconds of one append to the long ledger, fsync included."""
    book = ledger.Ledger(folder / "ledger.jsonl", fence=2)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        book.append("told", branch="b0", text="go on")
        times.append(time.perf_counter() - began)
    book.close()
    return sorted(times)[count // 2]


def main() -> None:
    experiments = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), experiments)
    note = f"{EVENTS_EACH} events for each experiment, {BRANCHES} branches."
    record("A long ledger", rows, note)


if __name__ == "__main__":
    main()
