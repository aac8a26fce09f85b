"""The sweep's TPE against random search: paired campaigns of real training on the CPU scale.

    python -m tests.bench.bench_sweep [PAIRS] [TRIALS] [FOLDER]

FOLDER keeps the campaigns: called again with it, the bench goes on where it was ended. Pair n gives
both samplers the search seed n, the same program and the same budget; runs are eager and
single-threaded, two campaigns at a time. The program is the shipped one at half its width: so it
trains nearly twice the steps in the three seconds. Reported honestly, also where TPE loses.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent import constants
from jobs import lab
from jobs.history import fold
from tests.bench.results import REPOSITORY, record

NARROW = {"width_per_layer": 32, "head_width": 32, "value_gate_channels": 32}
TOKENS = 15 * 2048  # about 3 s of training on one core (10,000 tokens a second)


def campaign(folder: Path, sampler: str, seed: int, trials: int) -> tuple[float, float]:
    """(baseline, best) val_bpb of one campaign."""
    home = folder / f"{sampler}-{seed}"
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CXX": "none", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jobs.cli"]
    settings = {
        "campaign": "bench",
        "budget": {"tokens": TOKENS},
        "agent": {"kind": "sweep", "sampler": sampler, "seed": seed},
        "executor": {"slots": 1, "threads": 1},
        "limits": {"experiments": trials + 1},
        "confirm": {"runs": 0},
    }
    if not home.exists():
        draft = home.with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        shipped = (REPOSITORY / lab.PROGRAM).read_text()
        lab.make(draft, constants.replace(shipped, NARROW, "cpu"))
        (draft / "campaign.yaml").write_text(json.dumps(settings))
        draft.rename(home)
    subprocess.run([*command, "run"], cwd=home, check=True, env=environ, capture_output=True)
    ledger = home / "campaigns" / "bench" / "ledger.jsonl"
    branch = fold(json.loads(line) for line in ledger.read_text().splitlines()).branch("main")
    assert branch.baseline_metric is not None
    assert branch.best_metric is not None
    return branch.baseline_metric, branch.best_metric


def main(pairs: int = 5, trials: int = 40, folder: str = "") -> None:
    rows = []
    with tempfile.TemporaryDirectory() as passing, ThreadPoolExecutor(2) as pool:
        place = Path(folder or passing).absolute()
        place.mkdir(exist_ok=True)
        asked = {
            (sampler, seed): pool.submit(campaign, place, sampler, seed, trials)
            for seed in range(pairs)
            for sampler in ("tpe", "random")
        }
        for seed in range(pairs):
            baseline, tpe = asked["tpe", seed].result()
            _, drawn = asked["random", seed].result()
            rows.append({"pair": seed, "baseline": baseline, "TPE": tpe, "random": drawn})
            print(rows[-1], flush=True)
    wins = sum(row["TPE"] < row["random"] for row in rows)
    medians = [statistics.median(row[key] for row in rows) for key in ("TPE", "random")]
    record(
        "Sweep: TPE against random search",
        rows,
        f"{trials} trials each: TPE wins {wins} of {pairs}; median of the best val_bpb "
        f"{medians[0]:.4f} (TPE), {medians[1]:.4f} (random). Half the shipped width, "
        f"{TOKENS} tokens.",
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:4])
