"""The sweep's TPE against random search: paired campaigns of real training on the CPU scale.

    python -m tests.bench.bench_sweep [PAIRS] [TRIALS]

Pair n gives both samplers the search seed n, the same program and the same budget; runs are eager
and single-threaded, two campaigns at a time. The program is the shipped one at half its width: so
it trains nearly twice the steps in the three seconds. Reported honestly, also where TPE loses.

A campaign takes a quarter of an hour: what ended is kept in sweep.json beside this file, and not
run again while program and sampler stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agent import constants
from jobs import lab
from jobs.history import fold
from tests.bench.results import REPOSITORY, record

ENDED = Path(__file__).with_name("sweep.json")
SAMPLERS = {"tpe": "TPE", "random": "random"}  # and their columns
NARROW = {"width_per_layer": 32, "head_width": 32, "value_gate_channels": 32}
TOKENS = 15 * 2048  # about 3 s of training on one core (10,000 tokens a second)


def program() -> str:
    return constants.replace((REPOSITORY / lab.PROGRAM).read_text(), NARROW, "cpu")


def campaign(folder: Path, sampler: str, seed: int, trials: int) -> tuple[float, float]:
    """(baseline, best) val_bpb of one campaign."""
    home = folder / f"{sampler}-{seed}"
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CXX": "none", "OMP_NUM_THREADS": "1"}
    settings = {
        "campaign": "bench",
        "budget": {"tokens": TOKENS},
        "agent": {"kind": "sweep", "sampler": sampler, "seed": seed},
        "executor": {"slots": 1, "threads": 1},
        "limits": {"experiments": trials + 1},
        "confirm": {"runs": 0},
    }
    lab.make(home, program())
    (home / "campaign.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "jobs.cli", "run"]
    subprocess.run(command, cwd=home, check=True, env=environ, capture_output=True)
    ledger = home / "campaigns" / "bench" / "ledger.jsonl"
    branch = fold(json.loads(line) for line in ledger.read_text().splitlines()).branch("main")
    assert branch.baseline_metric is not None
    assert branch.best_metric is not None
    return branch.baseline_metric, branch.best_metric


def depends(trials: int) -> dict[str, Any]:
    """What a campaign's outcome follows from, beside its sampler and seed."""
    sweep = (REPOSITORY / "agent" / "sweep.py").read_text()
    parts = [program(), repr(constants.find(program(), "cpu")), sweep]
    sha256 = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return {"trials": trials, "tokens": TOKENS, "code_sha256": sha256}


def measure(pairs: int, trials: int, folder: Path) -> list[dict[str, Any]]:
    """The campaigns of these pairs; what is not in sweep.json yet is run, and written there."""
    same, rows = depends(trials), json.loads(ENDED.read_text()) if ENDED.exists() else []
    every = [same | {"sampler": name, "seed": seed} for seed in range(pairs) for name in SAMPLERS]
    missing = [one for one in every if not any(one.items() <= row.items() for row in rows)]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda o: campaign(folder, o["sampler"], o["seed"], trials), missing)
        for one, (baseline, best) in zip(missing, found, strict=True):
            rows.append(one | {"baseline": baseline, "best": best})
            print(rows[-1], flush=True)
            draft = ENDED.with_suffix(".tmp")
            draft.write_text(json.dumps(rows, indent=1) + "\n")
            draft.replace(ENDED)
    return [row for row in rows if any(one.items() <= row.items() for one in every)]


def main(pairs: int = 5, trials: int = 40) -> None:
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(pairs, trials, Path(folder))
    rows: list[dict[str, Any]] = [{"pair": seed} for seed in range(pairs)]
    for one in measured:
        rows[one["seed"]] |= {"baseline": one["baseline"], SAMPLERS[one["sampler"]]: one["best"]}
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
    main(*map(int, sys.argv[1:3]))
