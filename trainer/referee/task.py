"""The task: all that the host-side wrapper is told about one run. Immutable, JSON, validated."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["nanochat", "general"]
Isolation = Literal["auto", "namespaces", "none", "apptainer"]


@dataclass(frozen=True)
class Budget:
    """`amount` wall seconds or tokens of training."""

    kind: Literal["wall", "tokens"]
    amount: float


@dataclass(frozen=True)
class Limits:
    """What a program may use; beyond it the run ends. None: not limited."""

    memory_mb: int | None = None  # host memory of the whole tree
    processes: int = 512
    log_mb: int = 64  # what it may print; the log keeps its head and its tail
    scratch_mb: int = 8192  # its scratch folder, and (at most 1024) its /dev/shm


@dataclass(frozen=True)
class Scorer:
    """How a general task is scored: files of the campaign's start commit, never the experiment's.

    `command` runs in `files_dir` and prints, as the last line of its standard output, one JSON
    object with a finite number under `metric`. $AUTORESEARCH_PROGRAM and $AUTORESEARCH_OUTPUT name
    the experiment's snapshot and what its command left in its scratch folder.
    """

    command: tuple[str, ...]
    files_dir: str
    metric: str


@dataclass(frozen=True)
class Task:
    """One run. Paths are absolute; seconds and MiB throughout."""

    kind: Kind
    program: str  # the experiment's snapshot: read-only, and the working directory
    command: tuple[str, ...]  # "python" in first place is `python`
    run_dir: str
    wall_limit_s: float  # of the whole run, whatever its budget
    python: str | None = None  # None: the interpreter that runs the wrapper
    trainer: str | None = None  # the sealed trainer/ folder; None: the one this file is in
    data: str | None = None  # nanochat: data folder of corpus and scale
    scale: str | None = None  # None: the data folder's
    seed: int = 1
    budget: Budget | None = None  # None: the scale's
    startup_free_s: float | None = None  # None: the scale's
    feed_ceiling_s: float | None = None  # token budgets: wall time that closes the feed
    scoring_limit_s: float = 600.0
    limits: Limits = field(default_factory=Limits)
    isolation: Isolation = "auto"
    # "apptainer": what stands in front of each side's command. See sandbox.contained.
    program_argv: tuple[str, ...] = ()
    referee_argv: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()  # more folders that the program may read
    threads: int | None = None  # OMP_NUM_THREADS and its kin
    device: str | None = None  # CUDA_VISIBLE_DEVICES
    cache: str | None = None  # compile cache of which the run gets a copy
    cache_mb: int = 1024  # a larger cache is not kept
    scratch: str | None = None  # where to make its scratch folder, "$X" of the node; None: run_dir
    scorer: Scorer | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # copied into result.json

    def to_json(self) -> dict[str, Any]:
        """The plain JSON object that `from_json` reads."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """What `to_json` gave. Raises ValueError, naming the field, for what cannot be run."""
        parts = (("budget", Budget), ("limits", Limits), ("scorer", Scorer))
        try:
            task = _made(cls, data)
            made = {n: _made(kind, data[n]) for n, kind in parts if data.get(n) is not None}
            task = dataclasses.replace(task, **made)
            _check(task)
        except TypeError as error:
            raise ValueError(f"task: {error}") from None
        return task

    def save(self) -> Path:
        """Write run_dir/task.json, whole or not at all."""
        path = Path(self.run_dir) / "task.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.to_json(), indent=1))
        draft.rename(path)
        return path


def load(run_dir: str | os.PathLike[str]) -> Task:
    """The task in a run folder. Raises OSError or ValueError."""
    return Task.from_json(json.loads((Path(run_dir) / "task.json").read_text()))


def _made(kind: type, data: Any) -> Any:
    """A value of `kind` from its JSON object. Raises TypeError where the fields are others."""
    made = kind(**data)
    lists = {name: tuple(value) for name, value in vars(made).items() if isinstance(value, list)}
    return dataclasses.replace(made, **lists)


def _check(task: Task) -> None:
    for name, known in (("kind", Kind), ("isolation", Isolation)):
        if getattr(task, name) not in get_args(known):
            raise ValueError(f"task.{name} must be one of {get_args(known)}")
    for name in ("program", "run_dir"):
        if not os.path.isabs(getattr(task, name)):
            raise ValueError(f"task.{name} must be an absolute path, not {getattr(task, name)!r}")
    if task.kind == "nanochat" and not task.data:
        raise ValueError("task.data: a nanochat run needs its data folder")
    if task.kind == "general" and task.scorer is None:
        raise ValueError("task.scorer: a general task needs one")
    if task.kind == "nanochat" and not task.command:
        raise ValueError("task.command is empty")
    positive = {"wall_limit_s": task.wall_limit_s, "scoring_limit_s": task.scoring_limit_s}
    if task.budget:
        positive["budget.amount"] = task.budget.amount
    for name, number in positive.items():
        if not 0 < number < math.inf:  # nor NaN
            raise ValueError(f"task.{name} must be positive and finite, not {number}")
    if task.isolation == "apptainer" and not task.program_argv:
        raise ValueError("task.program_argv: isolation 'apptainer' needs the container's command")
