"""The sweep's TPE against random search: paired campaigns of real training on the CPU scale.

    python -m tests.bench.bench_sweep [PAIRS] [TRIALS]

Pair n gives both samplers the search seed n, the same program and the same budget; runs are eager
and single-threaded, two campaigns at a time. Reported honestly, also where TPE loses.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.history import fold
from tests.bench.results import REPOSITORY, record

TOKENS = 20 * 2048  # about 3 s of training on one idle core


def campaign(folder: Path, sampler: str, seed: int, trials: int) -> tuple[float, float]:
    """(baseline, best) val_bpb of one campaign."""
    lab = folder / f"{sampler}-{seed}"
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CXX": "none", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jobs.cli"]
    subprocess.run([*command, "init", str(lab)], check=True, env=environ, capture_output=True)
    settings = {
        "campaign": "bench",
        "budget": {"tokens": TOKENS},
        "agent": {"kind": "sweep", "sampler": sampler, "seed": seed},
        "executor": {"slots": 1, "threads": 1},
        "limits": {"experiments": trials + 1},
        "confirm": {"runs": 0},
    }
    (lab / "campaign.yaml").write_text(json.dumps(settings))
    subprocess.run([*command, "run"], cwd=lab, check=True, env=environ, capture_output=True)
    ledger = lab / "campaigns" / "bench" / "ledger.jsonl"
    branch = fold(json.loads(line) for line in ledger.read_text().splitlines()).branch("main")
    assert branch.baseline_metric is not None
    assert branch.best_metric is not None
    return branch.baseline_metric, branch.best_metric


def main(pairs: int = 5, trials: int = 40) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        for seed in range(pairs):
            asked = {
                s: pool.submit(campaign, Path(name), s, seed, trials) for s in ("tpe", "random")
            }
            baseline, tpe = asked["tpe"].result()
            _, drawn = asked["random"].result()
            rows.append({"pair": seed, "baseline": baseline, "TPE": tpe, "random": drawn})
            print(rows[-1], flush=True)
    wins = sum(row["TPE"] < row["random"] for row in rows)
    medians = [statistics.median(row[key] for row in rows) for key in ("TPE", "random")]
    record(
        "Sweep: TPE against random search",
        rows,
        f"{trials} trials each: TPE wins {wins} of {pairs}; median of the best val_bpb "
        f"{medians[0]:.4f} (TPE), {medians[1]:.4f} (random).",
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
