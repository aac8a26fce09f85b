"""What the referee costs a run: waiting for batches, its processor time, and the wrapper's start.

The real train.py at scale cpu on the standard library, once cold and once with the compile cache
that the first run left; then batches alone, asked for back to back and with work between them.

python -m tests.bench.bench_referee [--data DIR] [--tokens N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.results import record
from trainer.referee import wrapper
from trainer.referee.task import Budget, Task

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "trainer"))


def run(folder: Path, name: str, data: Path, **task: Any) -> dict[str, Any]:
    """One run of the program in `folder`/program, in a run folder of its own."""
    run_dir = folder / name
    run_dir.mkdir()
    settings = {"kind": "nanochat", "program": str(folder / "program"), "data": str(data)}
    settings |= {"command": ("python", "train.py"), "run_dir": str(run_dir), "wall_limit_s": 1800}
    result = wrapper.run(Task(**settings | task))
    if result["status"] != "ok" and "exec" not in name:
        sys.exit(f"{name} ended as {result['status']}: {result['reason']}\n{run_dir}")
    return result


def training(folder: Path, data: Path, tokens: int) -> list[dict[str, Any]]:
    """The shipped program, cold and warm."""
    (folder / "program").mkdir()
    shutil.copy(ROOT / "trainer" / "train.py", folder / "program")
    rows, cache = [], None
    for name in ("cold", "warm"):
        found = run(folder, name, data, budget=Budget("tokens", tokens), cache=cache, threads=1)
        cache = str(folder / name / "cache")
        processor = found["program_cpu_seconds"] + found["referee_cpu_seconds"]
        rows.append(
            {
                "caches": name,
                "start-up s": found["startup_seconds"],
                "training s": found["training_seconds"],
                "waiting in next(), % of training": 100
                * found["waiting_seconds"]
                / found["training_seconds"],
                "referee's CPU s": found["referee_cpu_seconds"],
                "% of the run's": 100 * found["referee_cpu_seconds"] / processor,
                "val_bpb": found["value"],
            }
        )
    return rows


def batches(data: Path) -> list[dict[str, Any]]:
    """Microseconds in next(): the median and the worst of a hundred."""
    from referee.client import Session

    os.environ |= {"AUTORESEARCH_DATA": str(data)}
    rows = []
    for count, between in ((8, 0.0), (8, 0.02), (1024, 0.0), (1024, 0.05)):
        session = Session.open()
        session.next(count, session.max_seq_len)
        times = []
        for _ in range(300):
            time.sleep(between)
            start = time.perf_counter()
            shown, _ = session.next(count, session.max_seq_len)
            times.append((time.perf_counter() - start) * 1e6)
            shown.sum()
        session.close()
        times.sort()
        rows.append(
            {
                "batch": f"{count} x {session.max_seq_len}",
                "work between": f"{between * 1e3:g} ms",
                "median us": statistics.median(times),
                "99th of 100 us": times[-3],
            }
        )
    return rows


def starts(folder: Path, data: Path) -> list[dict[str, Any]]:
    """Milliseconds from wrapper.run to the program's own first instruction."""
    (folder / "program" / "train.py").write_text("")
    rows = []
    for isolation in ("namespaces", "none"):
        times = [
            1e3 * run(folder, f"exec-{isolation}-{i}", data, isolation=isolation)["exec_seconds"]
            for i in range(11)
        ]
        rows.append(
            {"isolation": isolation, "median ms": statistics.median(times), "worst ms": max(times)}
        )
    return rows


def main() -> None:
    import prepare

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=prepare.default_folder("stdlib", "cpu"))
    parser.add_argument("--tokens", type=int, default=400 * 2048)
    asked = parser.parse_args()
    load = f"Load average at the start: {os.getloadavg()[0]:.1f}."
    with tempfile.TemporaryDirectory(prefix="autoresearch-bench-") as name:
        folder = Path(name)
        shares = training(folder, asked.data, asked.tokens)
        note = f"train.py at scale cpu, {asked.tokens:,} tokens, one thread. {load}"
        record("Referee: its share of a run", shares, note)
        record("Referee: time in next()", batches(asked.data), load)
        record("Referee: start of a program", starts(folder, asked.data), load)


if __name__ == "__main__":
    main()
