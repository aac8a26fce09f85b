"""From a run folder to a Result: result.json, validated, or what the executor knew in its place."""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jobs.model import Result, Run
from jobs.submission import JobState

PROTOCOL = 1
LARGEST = 1 << 20  # bytes of a result.json
# Result's name -> result.json's; the rest of result.json stays under Result.details.
NUMBERS = {
    "steps": "steps",
    "tokens": "tokens",
    "memory_mb": "peak_memory_mb",
    "gpu_memory_mb": "gpu_memory_mb",
    "startup_s": "startup_seconds",
    "training_s": "training_seconds",
    "scoring_s": "scoring_seconds",
    "total_s": "total_seconds",
}
TEXTS = ("node", "gpu", "started", "ended")


def read(run_dir: Path, run: Run) -> Result | None:
    """The result that the wrapper left, or None while there is none.

    A file that is not what PROTOCOL.md says is told as infrastructure trouble: only the wrapper
    can write there, so it is the wrapper (or its version) that is wrong, never the idea.
    """
    path = run_dir / "result.json"
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(LARGEST))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return _broken(run, f"{path} cannot be read: {error}")
    try:
        return _result(run, found)
    except (KeyError, TypeError, ValueError) as error:
        return _broken(run, f"{path} is not what PROTOCOL.md says: {type(error).__name__}: {error}")


def lost(run: Run, reason: str, state: JobState) -> Result:
    """The result of a run that left none."""
    return Result(
        run.id,
        "oom" if state.oom else "infrastructure",
        reason,
        node=state.node,
        details=excuse(state),
    )


def excuse(state: JobState) -> dict[str, bool]:
    """Of a run that was ended from outside: what takes the blame from its node."""
    told = {"preempted": state.preempted, "cancelled": state.cancelled}
    return {name: True for name, holds in told.items() if holds}


def gap_s(earlier: str | None, later: str | None) -> float | None:
    """Seconds between two UTC times; None where one is unknown, or the second not the later one."""
    try:
        span = datetime.fromisoformat(later or "") - datetime.fromisoformat(earlier or "")
    except (ValueError, TypeError):
        return None
    return span.total_seconds() if span >= timedelta() else None


def _broken(run: Run, reason: str) -> Result:
    return Result(run.id, "infrastructure", reason)


def _result(run: Run, found: dict[str, Any]) -> Result:
    if found["protocol"] != PROTOCOL:
        raise ValueError(f"protocol {found['protocol']!r}, this controller speaks {PROTOCOL}")
    told = found["facts"]["run"] if "facts" in found else run.id
    if told != run.id:
        raise ValueError(f"it belongs to run {told!r}")
    value = found["value"]
    if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
        raise ValueError(f"value {value!r} is no finite number")
    status = found["status"]
    if status == "ok" and value is None:
        raise ValueError("status ok without a value")
    known = {*NUMBERS.values(), *TEXTS, "status", "reason", "value", "run", "facts"}
    facts: dict[str, Any] = {name: _number(found, key) for name, key in NUMBERS.items()}
    facts |= {name: None if found.get(name) is None else str(found[name])[:200] for name in TEXTS}
    return Result(
        run=run.id,
        status=str(status),
        reason=str(found["reason"])[:500],
        metric=float(value) if value is not None and status == "ok" else None,
        **facts,
        details={k: v for k, v in found.items() if k not in known and v is not None},
    )


def _number(found: dict[str, Any], key: str) -> Any:
    value = found.get(key)
    if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
        raise ValueError(f"{key} {value!r} is no finite number")
    return value
