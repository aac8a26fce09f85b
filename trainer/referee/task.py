"""The task: all that the host-side wrapper is told about one run. Immutable, JSON, validated."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


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
    direction: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class Task:
    """One run. Paths are absolute; seconds and MiB throughout."""

    kind: Literal["nanochat", "general"]
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
    isolation: Literal["auto", "namespaces", "none", "apptainer"] = "auto"
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
        """Raises ValueError, naming the field, for anything that cannot be run."""
        task = _build(cls, data, "task")
        _check(task)
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


def _build(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be an object, not {data!r:.80}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(f"{where} has no field {unknown[0]!r}; it has {', '.join(hints)}")
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
        origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{where} must be a list of strings, not {value!r:.80}")
        return tuple(value)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where} must be one of {typing.get_args(hint)}, not {value!r:.80}")
        return value
    if hint is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{where} must be a finite number, not {value!r:.80}")
        return float(value)
    expected = dict if origin is not None else hint
    if type(value) is not expected:
        raise ValueError(f"{where} must be {expected.__name__}, not {value!r:.80}")
    return value


def _check(task: Task) -> None:
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
        if number <= 0:
            raise ValueError(f"task.{name} must be positive, not {number}")
    if task.isolation == "apptainer" and not task.program_argv:
        raise ValueError("task.program_argv: isolation 'apptainer' needs the container's command")
