"""Runs of program texts under a real referee, for the benches of the trainer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "trainer" / "train.py"


@dataclass(frozen=True)
class Setting:
    """What all runs of a bench have in common."""

    data: Path  # a prepared data folder
    work: Path  # where run folders are made
    threads: int | None = None
    tokens: int | None = None  # budget; None: the scale's
    wall_limit_s: float = 3600.0

    @property
    def scale(self) -> str:
        return json.loads((self.data / "manifest.json").read_text())["scale"]["name"]


def start(
    setting: Setting, name: str, text: str, seed: int, cache: Path | None = None
) -> subprocess.Popen:
    """Start a run of the program `text` in work/name, with a copy of a compile cache."""
    folder = setting.work / name
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("program", "run"):
        (folder / part).mkdir(parents=True)
    (folder / "program" / "train.py").write_text(text)
    task: dict[str, Any] = {
        "kind": "nanochat",
        "program": str(folder / "program"),
        "command": ["python", "train.py"],
        "run_dir": str(folder / "run"),
        "data": str(setting.data),
        "seed": seed,
        "wall_limit_s": setting.wall_limit_s,
        "threads": setting.threads,
        "cache": str(cache) if cache else None,
    }
    if setting.tokens is not None:
        task["budget"] = {"kind": "tokens", "amount": setting.tokens}
    (folder / "run" / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "trainer.referee.wrapper", str(folder / "run")]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def finish(setting: Setting, name: str, keep: bool = False) -> Mapping[str, Any]:
    """The result of a run that has ended, its last log line under "log"; its folder is removed."""
    folder = setting.work / name / "run"
    result = json.loads((folder / "result.json").read_text())
    log = folder / "train.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    result["log"] = lines[-1] if lines else ""
    if not keep:
        shutil.rmtree(setting.work / name)
    return result


def run(
    setting: Setting, name: str, text: str, seed: int, cache: Path | None = None
) -> Mapping[str, Any]:
    """Start, wait and finish; the run's folder stays."""
    start(setting, name, text, seed, cache).wait()
    return finish(setting, name, keep=True)


def folder(path: str) -> Path:
    """A command line's folder, absolute: tasks need it."""
    return Path(os.path.abspath(path))
