"""A whole run on a GPU: tokens/s, memory, MFU and the time around the budget; or that it was not.

python -m tests.bench.bench_gpu                    at scale small, of the standard library
python -m tests.bench.bench_gpu --data DATA        at the scale that DATA was prepared for
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

from jobs import lab
from tests.bench import train_runs
from tests.bench.results import record
from tests.bench.train_runs import Setting
from trainer import prepare

SECTION = "Whole runs on a GPU"
MEASURED = ("startup_seconds", "training_seconds", "overrun_seconds", "scoring_seconds")
MEASURED += ("total_seconds", "steps", "tokens", "tokens_per_second", "gpu_memory_mb")


def printed(log: Path) -> dict[str, str]:
    """train.py's summary block."""
    return dict(re.findall(r"^(\w+): +(\S+)$", log.read_text().split("\n---\n")[-1], flags=re.M))


def measure(setting: Setting) -> list[dict[str, Any]]:
    """One cold run, and one from the compile cache that it left."""
    rows = []
    for start in ("cold", "warm"):
        cache = setting.work / "cold" / "run" / "cache" if start == "warm" else None
        result = train_runs.run(setting, start, train_runs.TRAIN.read_text(), 1, cache)
        if result["status"] != "ok":
            raise SystemExit(f"{start}: {result['reason']}")
        told = printed(setting.work / start / "run" / "train.log")
        rows.append(
            {"scale": setting.scale, "gpu": result["gpu"], "start": start}
            | {"val_bpb": f"{result['val_bpb']:.4f}"}
            | {name: result[name] for name in MEASURED}
            | {"mfu_percent": told["mfu_percent"]}
        )
    return rows


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = prepare.default_folder("stdlib", "small")
    parser.add_argument("--data", type=train_runs.folder, default=data)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        rows = [{"scale": scale, "val_bpb": None} for scale in ("h100", "small")]
        record(SECTION, rows, "No GPU at hand when this was recorded.")
        return
    if asked.data == data:
        lab.prepare("stdlib", "small", data)
    with tempfile.TemporaryDirectory() as work:
        rows = measure(Setting(asked.data, Path(work)))
    record(SECTION, rows, "Times in seconds, memory in MiB.")


if __name__ == "__main__":
    main()
