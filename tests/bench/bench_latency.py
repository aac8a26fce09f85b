"""What passes between two experiments on one machine: from a result to the next program's start.

python -m tests.bench.bench_latency [EXPERIMENTS]

The proposal is ready (a script), the task a general one, one slot. A program's own start (its
payload's interpreter, its walls) is told apart from what the controller takes: decision, commit,
snapshot and their durable records.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.bench.results import REPOSITORY, record

sys.path.insert(0, str(REPOSITORY / "tests/jobs"))

from toylab import Lab, change

PROMISED_S = 0.3


def measure(experiments: int, folder: Path) -> dict[str, list[float]]:
    """Seconds after a result.json lies there, at three moments, for each experiment but the first.

    Returns:
        "handed over" (the payload's process exists), "claimed" (its interpreter runs our code),
        "program runs" (the program was exec'd inside its walls).
    """
    edits = [change(X=2 + i / 100) for i in range(1, experiments)]
    lab = Lab(folder / "lab", *edits, limits={"experiments": experiments})
    lab.configure(task=lab.settings["task"] | {"command": ["python", "solution.py"]})
    lab.run()
    submitted = {e["submission"]["run"]: e["time"] for e in lab.events("run_submitted")}
    found: dict[str, list[float]] = {"handed over": [], "claimed": [], "program runs": []}
    runs = [lab.folder / "runs" / r.id / "s1-a1" for r in lab.state.experiments()]
    for before, after in itertools.pairwise(runs):
        there = (before / "result.json").stat().st_ctime  # it is renamed to its place
        result = json.loads((after / "result.json").read_text())
        moments = (
            _seconds(submitted[f"{after.parent.name}-{after.name}"]),
            (after / "claim.json").stat().st_mtime,
            _seconds(result["started"]) + result["exec_seconds"],
        )
        for times, moment in zip(found.values(), moments, strict=True):
            times.append(moment - there)
    return found


def _seconds(utc: str) -> float:
    return datetime.fromisoformat(utc).timestamp()


def rows(found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A line for each moment; the promise is about what the controller takes."""
    table = []
    for name, times in found.items():
        promised = f"<= {PROMISED_S}" if name == "handed over" else ""
        table.append(
            {
                "from a result to the next": name,
                "median s": round(statistics.median(times), 3),
                "90 % s": round(statistics.quantiles(times, n=10)[-1], 3),
                "worst s": round(max(times), 3),
                "of": len(times),
                "promised median": promised,
            }
        )
    return table


def main() -> None:
    experiments = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as folder:
        found = measure(experiments, Path(folder))
    record(
        "Between two experiments",
        rows(found),
        "One slot of this machine, the proposal ready. Handed over: decided, committed, recorded, "
        "snapshot made, and the payload's process there. What follows is a program's own start.",
    )


if __name__ == "__main__":
    main()
