"""How long a run takes to its first step: cold, warm, and after ten realistic edits of train.py.

Cold has no compile cache. All others start from a copy of the cache that the cold run left, as
experiments do from their branch head's. Whether something was compiled is seen from the cache that
the run leaves: a new graph is a new entry.

python -m tests.bench.bench_startup --data DATA --work WORK [--repeats 3] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from agent import constants
from tests.bench import train_runs
from tests.bench.results import record
from tests.bench.train_runs import Setting

STEPS = 14  # beyond the warm-up of 11: enough for anything that compiles late
WARM_EDITS = ("a learning rate", "all rates by a schedule of cosine shape", "the initialisation")


def edits(text: str, scale: str) -> dict[str, str]:
    """Ten changes as an agent makes them, each a whole program."""
    values = constants.values(text, scale)

    def tuned(**factors: float) -> str:
        return constants.replace(text, {k: values[k] * f for k, f in factors.items()}, scale)

    def rewritten(old: str, new: str) -> str:
        if text.count(old) != 1:
            raise SystemExit(f"the bench's edit no longer fits: {text.count(old)} times {old!r}")
        return text.replace(old, new)

    return {
        "a learning rate": tuned(matrix_rate=1.5),
        "all rates by a schedule of cosine shape": rewritten(
            "return min(1.0, (1 - done) / c.warmdown)",
            "return 0.5 + 0.5 * math.cos(math.pi * done)",
        ),
        "the initialisation": tuned(matrix_scale=0.68, embedding_std=0.8),
        "a comment above the model": rewritten(
            "def norm(x):", "# An agent thinks aloud here,\n# over two lines.\n\n\ndef norm(x):"
        ),
        "two passes per step": tuned(total_batch=2),
        "Muon without NorMuon": rewritten(
            "self.equalise(orthogonalise(ahead, self.dtype))", "orthogonalise(ahead, self.dtype)"
        ),
        "the logits' cap": tuned(logit_cap=2),
        "GELU for squared ReLU": rewritten(
            "self.output(F.relu(self.hidden(x)).square())", "self.output(F.gelu(self.hidden(x)))"
        ),
        "values scaled down": rewritten(
            "y = self.attend(q, k, v, self.window)", "y = self.attend(q, k, 0.9 * v, self.window)"
        ),
        "one layer more": constants.replace(text, {"depth": int(values["depth"]) + 1}, scale),
    }


def graphs(cache: Path) -> set[str]:
    """The compiled graphs in a cache."""
    found = (cache / "inductor" / "fxgraph").glob("*/*")
    return {path.name for path in found}


class Bench:
    def __init__(self, setting: Setting):
        self.setting = setting
        self.cache = setting.work / "cache"

    def measure(self, name: str, text: str, cold: bool = False) -> dict[str, Any]:
        """One run: seconds to the end of its first step, and graphs that it had to compile."""
        cache = None if cold else self.cache
        result = train_runs.run(self.setting, "run", text, 1, cache)
        if result["status"] != "ok":
            raise SystemExit(f"{name}: {result['reason']}")
        folder = self.setting.work / "run" / "run"
        first = json.loads((folder / "telemetry.jsonl").read_text().splitlines()[0])
        before = graphs(self.cache) if cache else set()
        compiled = len(graphs(folder / "cache") - before)
        if cold:
            shutil.rmtree(self.cache, ignore_errors=True)
            shutil.move(folder / "cache", self.cache)
        print(f"{name}: {first['seconds']:.1f} s, {compiled} graphs compiled", flush=True)
        return {"seconds": first["seconds"], "compiled": compiled}

    def row(self, name: str, measure: Callable[[], dict[str, Any]], repeats: int) -> dict[str, Any]:
        runs = [measure() for _ in range(repeats)]
        return {
            "start": name,
            "seconds to first step": statistics.median(run["seconds"] for run in runs),
            "graphs compiled": max(run["compiled"] for run in runs),
        }


def report(rows: list[Mapping[str, Any]], threads: int | None, repeats: int) -> None:
    """The table and what it says."""
    seconds = [row["seconds to first step"] for row in rows]
    (cold, warm), changed = seconds[:2], seconds[2:]
    anew = [row["start"] for row in rows[2:] if row["graphs compiled"]]
    note = (
        f"From the program's start to the end of its first step, under the referee; medians of"
        f" {repeats} runs with {threads or 'all'} threads. Warm is {warm / cold:.2f} of cold; the"
        f" median over the ten edits is {statistics.median(changed):.1f} s. Edits that compiled:"
        f" {', '.join(anew) or 'none'}."
    )
    record("Start-up, cold and warm", rows, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=train_runs.folder)
    parser.add_argument("--work", required=True, type=train_runs.folder)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=1)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    text = train_runs.TRAIN.read_text()
    manifest = json.loads((asked.data / "manifest.json").read_text())
    tokens = STEPS * manifest["scale"]["reference_batch_tokens"]
    setting = Setting(asked.data, asked.work, asked.threads, tokens)
    bench, repeats = Bench(setting), asked.repeats
    starts = {"cold": text, "warm": text, **edits(text, setting.scale)}
    rows = [
        bench.row(name, partial(bench.measure, name, program, cold=name == "cold"), repeats)
        for name, program in starts.items()
    ]
    report(rows, asked.threads, repeats)
    wrong = [row["start"] for row in rows if row["start"] in WARM_EDITS and row["graphs compiled"]]
    if wrong:
        raise SystemExit(f"these edits must start warm, and compiled: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
