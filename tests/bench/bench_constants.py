"""Is the shipped baseline a real one? Every constant of a scale halved and doubled, refereed.

One seed screens; what gains over 2 sigma is repeated on 3 fresh seeds, and only a mean gain over
3 sigma counts as one. Sigma is the spread of the unchanged program over its seeds. Runs that have
ended are kept in WORK/runs.jsonl, keyed by the program's text, so that a bench goes on where it
was stopped; `--report` writes the table from what is there.

python -m tests.bench.bench_constants --data DATA --work WORK [--jobs 2] [--only a,b] [--report]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agent import constants
from tests.bench import train_runs
from tests.bench.results import REPOSITORY, record
from tests.bench.train_runs import Setting

sys.path.insert(0, str(REPOSITORY / "trainer"))
sys.path.insert(0, str(REPOSITORY / "tests/trainer"))

from prepare import SCALES
from programs import load_train

train, _ = load_train()

SEEDS = (1, 2, 3, 4, 5)  # of the unchanged program, for sigma
REPEATS = 3  # of its first seed
FRESH = (6, 7, 8)
SCREEN, CLAIM = 2.0, 3.0  # sigmas
# Other compute per token or per step: a gain there is no fault of the baseline. Listed with time.
EXCEPTED = ("depth", "width_per_layer", "mlp_factor", "device_batch", "total_batch")
WINDOWS = {"SSSL": "L", "L": "SSSL"}


@dataclass(frozen=True)
class Variant:
    """One constant changed. `also` are changes that it needs to be a valid program."""

    name: str
    old: Any
    new: Any
    also: tuple[tuple[str, Any], ...] = ()
    wider: bool = False  # a wider head may make the model wider: it is as wide as whole heads are

    @property
    def excepted(self) -> bool:
        return self.name in EXCEPTED or self.wider


@dataclass(frozen=True)
class Job:
    """One run: a program text, its seed, and which repetition of the two it is."""

    text: str
    seed: int
    repeat: int = 0

    @property
    def key(self) -> str:
        return f"{hashlib.sha256(self.text.encode()).hexdigest()[:16]}-s{self.seed}-r{self.repeat}"


def variants(block: Mapping[str, Any]) -> Iterator[Variant]:
    """Each number halved and doubled; decay rates of averages also in their distance from 1."""
    for name, old in block.items():
        if isinstance(old, str):
            yield Variant(name, old, WINDOWS[old])
            continue
        if name == "device_batch":  # the same step in two passes; doubled it exceeds a step
            yield Variant(name, old, old // 2)
            continue
        news = [old // 2 or 1, old * 2] if isinstance(old, int) else [old / 2, old * 2]
        if ("beta" in name or "momentum" in name) and 0.5 <= old < 1:
            news = [old / 2, 1 - (1 - old) * 2, 1 - (1 - old) / 2]  # doubled, no average is left
        for new in news:
            new = round(new, 12) if isinstance(new, float) else new
            if new not in (old, 0):
                wider = width(block | {name: new}) > width(block)
                yield Variant(name, old, new, tuple(needed(block, name, new)), wider)


def needed(block: Mapping[str, Any], name: str, new: Any) -> Iterator[tuple[str, Any]]:
    """What else must change: half a step is a pass of half the rows."""
    if name == "total_batch" and new < block["total_batch"]:
        yield "device_batch", block["device_batch"] // 2


def width(block: Mapping[str, Any]) -> int:
    """Channels of the model, as train.GPT counts them."""
    head = block["head_width"]
    return -(-block["depth"] * block["width_per_layer"] // head) * head


def idle(block: Mapping[str, Any], variant: Variant, T: int) -> bool:
    """Whether the change leaves every layer's window as it was: the same program again."""
    if variant.name not in ("short_window", "window_pattern"):
        return False
    before, after = block, dict(block) | {variant.name: variant.new}
    windows = [train.layer_windows(SimpleNamespace(**b), T) for b in (before, after)]
    return windows[0] == windows[1]


def changed(text: str, scale: str, variant: Variant) -> str:
    """The program with a variant's constants."""
    if isinstance(variant.new, str):
        head, tail = text.split(f'    "{scale}": {{\n')
        old, new = (f'"{variant.name}": "{value}"' for value in (variant.old, variant.new))
        return head + f'    "{scale}": {{\n' + tail.replace(old, new, 1)
    return constants.replace(text, {variant.name: variant.new, **dict(variant.also)}, scale)


class Runs:
    """Runs that have ended, and the means to run more. Results by key, in WORK/runs.jsonl."""

    def __init__(self, setting: Setting, jobs: int):
        self.setting, self.jobs = setting, jobs
        self.file = setting.work / "runs.jsonl"
        self.cache = setting.work / "cache"
        self.done: dict[str, Mapping[str, Any]] = {}
        if self.file.exists():
            entries = map(json.loads, self.file.read_text().splitlines())
            self.done = {entry["key"]: entry for entry in entries}

    def ensure(self, jobs: Iterable[Job]) -> None:
        """Run what has not run, several at a time."""
        todo = [job for job in dict.fromkeys(jobs) if job.key not in self.done]
        running: list[tuple[Job, subprocess.Popen]] = []
        while todo or running:
            while todo and len(running) < self.jobs:
                job = todo.pop(0)
                cache = self.cache if self.cache.exists() else None
                running.append(
                    (job, train_runs.start(self.setting, job.key, job.text, job.seed, cache))
                )
            time.sleep(0.2)
            for job, process in running[:]:
                if process.poll() is not None:
                    running.remove((job, process))
                    self._take(job, len(todo) + len(running))

    def _take(self, job: Job, left: int) -> None:
        kept = self.setting.work / job.key / "run" / "cache"
        if kept.exists() and not self.cache.exists():
            kept.rename(self.cache)  # the first run's: that of the unchanged program
        result = train_runs.finish(self.setting, job.key)
        names = ("status", "reason", "val_bpb", "steps", "training_seconds", "tokens_per_second")
        entry = {"key": job.key, **{name: result.get(name) for name in names}}
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.done[job.key] = entry
        print(f"{job.key}: {entry['reason']}, {left} left", flush=True)

    def bpb(self, text: str, seed: int, repeat: int = 0) -> float | None:
        return self.done.get(Job(text, seed, repeat).key, {}).get("val_bpb")

    def entry(self, text: str, seed: int) -> Mapping[str, Any]:
        return self.done.get(Job(text, seed).key, {})


class Bench:
    """The three stages over one program text."""

    def __init__(self, runs: Runs, text: str, only: tuple[str, ...] = ()):
        self.runs, self.text, self.scale = runs, text, runs.setting.scale
        block = shipped_block(text, self.scale)
        T = SCALES[self.scale].max_seq_len
        wanted = [v for v in variants(block) if not only or v.name in only]
        self.variants = [v for v in wanted if not idle(block, v, T)]

    def baseline(self) -> None:
        first = [Job(self.text, SEEDS[0])]
        self.runs.ensure(first)  # alone: its compile cache serves all others
        repeats = [Job(self.text, SEEDS[0], repeat) for repeat in range(1, REPEATS)]
        self.runs.ensure([Job(self.text, seed) for seed in SEEDS] + repeats)

    def sigma(self) -> float:
        values = [self.runs.bpb(self.text, seed) for seed in SEEDS]
        return statistics.stdev(value for value in values if value is not None)

    def screen(self) -> None:
        self.runs.ensure(Job(changed(self.text, self.scale, v), SEEDS[0]) for v in self.variants)

    def confirm(self) -> None:
        found = [v for v in self.variants if not v.excepted and self.is_candidate(v)]
        texts = [changed(self.text, self.scale, v) for v in found]
        texts = [self.text, *texts] if texts else []
        self.runs.ensure(Job(text, seed) for seed in FRESH for text in texts)

    def is_candidate(self, variant: Variant) -> bool:
        gain = self.gain(variant, SEEDS[:1])
        return gain is not None and gain > SCREEN * self.sigma()

    def gain(self, variant: Variant, seeds: tuple[int, ...]) -> float | None:
        """Mean of how much lower val_bpb is than the unchanged program's on the same seeds."""
        text = changed(self.text, self.scale, variant)
        pairs = [(self.runs.bpb(self.text, seed), self.runs.bpb(text, seed)) for seed in seeds]
        if any(value is None for pair in pairs for value in pair):
            return None
        return statistics.mean(old - new for old, new in pairs)

    def row(self, variant: Variant) -> dict[str, Any]:
        entry = self.runs.entry(changed(self.text, self.scale, variant), SEEDS[0])
        gain, fresh = self.gain(variant, SEEDS[:1]), self.gain(variant, FRESH)
        return {
            "constant": variant.name,
            "shipped": str(variant.old),
            "tried": ", ".join([str(variant.new), *(f"{k} {v}" for k, v in variant.also)]),
            "val_bpb": f"{entry['val_bpb']:.4f}" if gain is not None else entry.get("reason"),
            "gain": f"{gain:+.4f}" if gain is not None else "",
            "in sigmas": f"{gain / self.sigma():+.1f}" if gain is not None else "",
            "on 3 fresh seeds": f"{fresh:+.4f}" if fresh is not None else "",
            "seconds": f"{entry['training_seconds']:.0f}" if gain is not None else "",
            "verdict": self.verdict(variant, gain, fresh) if entry else None,
        }

    def verdict(self, variant: Variant, gain: float | None, fresh: float | None) -> str:
        if gain is None:
            return "fails"
        if variant.excepted:
            return "excepted"
        if not self.is_candidate(variant):
            return "no gain"
        if fresh is None:
            return "to be repeated"
        return "GAINS" if fresh > CLAIM * self.sigma() else "no gain"

    def report(self) -> None:
        values = [self.runs.bpb(self.text, seed) for seed in SEEDS]
        again = [self.runs.bpb(self.text, SEEDS[0], repeat) for repeat in range(REPEATS)]
        known, same = ([v for v in some if v is not None] for some in (values, again))
        rows = [self.row(variant) for variant in self.variants]
        gaining = [row for row in rows if row["verdict"] == "GAINS"]
        note = (
            f"Unchanged: val_bpb {statistics.mean(known):.4f} over seeds {list(SEEDS)}, sd"
            f" {self.sigma():.4f} ({', '.join(f'{v:.4f}' for v in known)}); seed {SEEDS[0]} run"
            f" {len(same)} times spreads {max(same) - min(same):.1e}. Gains are against the same"
            f" seed; over {SCREEN:g} sd they are repeated on seeds {list(FRESH)} and count from a"
            f" mean of {CLAIM:g} sd. {len(gaining)} of {len(rows)} changes gain."
        )
        record(f"Constants of the {self.scale} scale, halved and doubled", rows, note)


def shipped_block(text: str, scale: str) -> dict[str, Any]:
    """The scale's constants, strings included."""
    import ast

    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONSTANTS":
            return ast.literal_eval(node.value)[scale]
    raise SystemExit("no CONSTANTS in the program")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=train_runs.folder)
    parser.add_argument("--work", required=True, type=train_runs.folder)
    parser.add_argument("--train", type=Path, default=train_runs.TRAIN)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--tokens", type=int, help="a smaller budget, for a rehearsal")
    parser.add_argument("--only", default="", help="constants, separated by commas")
    parser.add_argument("--report", action="store_true", help="run nothing, write the table")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    setting = Setting(asked.data, asked.work, asked.threads, asked.tokens)
    only = tuple(filter(None, asked.only.split(",")))
    bench = Bench(Runs(setting, asked.jobs), asked.train.read_text(), only)
    if not asked.report:
        bench.baseline()
        bench.screen()
        bench.confirm()
    bench.report()


if __name__ == "__main__":
    main()
