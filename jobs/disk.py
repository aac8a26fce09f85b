"""What runs leave on disk: promoted when an experiment is kept, dropped otherwise."""

from __future__ import annotations

import json
import math
import operator
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from jobs import checkout, payload
from jobs.errors import Paused
from jobs.history import State

WEIGHTS, SAMPLE = "model.safetensors", "sample.txt"
LARGEST_HEADER = 10_000_000  # bytes, of the weights' file
JOB_OVER_S = 3600.0  # a job writes into its folder for a moment after its run's result is there
CACHE = "cache"  # the compile cache that a run filled


def tidy(run_dir: Path, keep: Path | None) -> None:
    """Drop a finished run's program, weights and compile cache; `keep`: promote first, the weights
    there and the cache beside it, where the branch's next runs find it.

    Only what a baseline or a keep compiled is ever promoted: a discarded experiment must not be
    able to poison the next one's cache. Safe to repeat after a kill at any point.
    """
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, SAMPLE):
            if (run_dir / name).exists():
                os.replace(run_dir / name, keep / name)
        if (run_dir / CACHE).is_dir():
            cache, old = keep.with_name(CACHE), keep.with_name(f".{CACHE}.old")
            shutil.rmtree(old, ignore_errors=True)
            if cache.exists():
                cache.rename(old)
            (run_dir / CACHE).rename(cache)
            shutil.rmtree(old, ignore_errors=True)
    for name in (CACHE, "program", "scratch"):
        checkout.remove(run_dir / name)
    for name in (WEIGHTS, SAMPLE):
        (run_dir / name).unlink(missing_ok=True)


def keep_only(branch_dir: Path, experiments: Collection[str | None]) -> None:
    """Drop the weights of a branch's other experiments than these."""
    for path in branch_dir.glob("e[0-9]*"):
        if path.name not in experiments:
            checkout.remove(path)


def parameters(run_dir: Path) -> int | None:
    """How many numbers a run's saved weights hold; None: there are none, or no such file.

    An experiment wrote it: only the header is read, and nothing in it is believed to be there.
    """
    try:
        with open(os.open(run_dir / WEIGHTS, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                return None
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        shapes = [[operator.index(size) for size in t["shape"]] for t in header.values()]
        if any(len(shape) > 32 or not all(0 <= n < 2**40 for n in shape) for shape in shapes):
            return None
        total = sum(map(math.prod, shapes))
        return total if total < 2**63 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def require_free(folder: Path, megabytes: int) -> None:
    """Raises Paused where less than `megabytes` are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free / 2**20
    if free < megabytes:
        raise Paused(
            f"{folder}: only {free:.0f} MB are free on its disk, {megabytes} MB are to stay free",
            "Free space (autoresearch clean shows what can go) or lower disk.keep_free_mb",
        )


def needed(state: State) -> set[str]:
    """Run folders whose weights a start may promote still: what runs, what is undecided, and the
    heads, whose controller may have died between the decision and the promotion."""
    heads = {name for b in state.branches.values() for name in (b.head, b.best) if name}
    runs = [(name, r) for name in {*state.in_flight, *heads} for r in state.record(name).runs]
    waiting = {f"{name}/{run.folder}" for name, run in runs}
    return waiting | {run.folder for run in state.open_runs.values()}


def leftovers(campaign_dir: Path, state: State) -> list[Path]:
    """What `autoresearch clean` removes: bulk of runs that are not `needed`, ended jobs' logs."""
    found, spared = [], needed(state)
    for run_dir in sorted(campaign_dir.glob("runs/*/*")):
        if f"{run_dir.parent.name}/{run_dir.name}" not in spared:
            found += [run_dir / n for n in (CACHE, "program", "scratch", WEIGHTS)]
    found += sorted(campaign_dir.glob("heads/*/.cache.old"))
    found += job_folders(campaign_dir, {run.folder for run in state.open_runs.values()})
    return [path for path in found if path.exists()]


def job_folders(campaign_dir: Path, open_folders: set[str]) -> dict[Path, str]:
    """Where submitit kept scripts, logs and pickles of runs not under way, and those runs' folders
    below runs/."""
    paths = sorted(campaign_dir.glob("submitit/*-e*-s*-a*"))
    found = {path: payload.run_id(path.name).replace("-", "/", 1) for path in paths}
    return {path: run for path, run in found.items() if run not in open_folders}


def sweep_jobs(campaign_dir: Path, open_folders: set[str]) -> None:
    """Remove those whose runs told their end themselves, once the jobs are surely over."""
    for path, run in job_folders(campaign_dir, open_folders).items():
        told = (campaign_dir / "runs" / run / "result.json").exists()
        if told and time.time() - path.stat().st_mtime > JOB_OVER_S:
            checkout.remove(path)


def size(path: Path) -> int:
    """Bytes below `path`."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.lstat().st_size for p in path.rglob("*") if not p.is_symlink())


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        checkout.remove(path)
    else:
        path.unlink(missing_ok=True)
