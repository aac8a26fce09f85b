"""Branches side by side: who tried what, what it found, and what a gain cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs import tables
from jobs.history import State
from jobs.records import Branch
from jobs.text import columns

# What `compare` shows, the first column to the left.
SHOWN = (
    *("branch", "program", "researcher", "experiments", "kept", "crashed", "first", "best", "gain"),
    *("gpu_hours", "gain_per_gpu_hour", "gain_per_dollar", "state"),
)


def rows(state: State) -> list[dict[str, Any]]:
    """One mapping a branch, in the order they were added; null where there is nothing yet.

    `gain` is over the branch's own baseline, positive is better; hours are of allocated run time,
    for each GPU of a run.
    """
    return [_row(state, branch) for branch in state.branches.values()]


def _row(state: State, branch: Branch) -> dict[str, Any]:
    first, best = branch.baseline_metric, branch.best_metric
    gain = None if first is None or best is None else abs(best - first)
    hours, dollars = branch.allocated_s / 3600 * gpus(state), branch.spent.dollars
    return {
        "branch": branch.name,
        "program": branch.settings.get("program", "program.md"),
        "researcher": _researcher(branch.settings.get("agent") or state.config.get("agent") or {}),
        "experiments": branch.experiments,
        "kept": branch.kept,
        "discarded": branch.discarded,
        "crashed": branch.crashed + branch.parked,
        "first": first,
        "best": best,
        "best_experiment": branch.best,
        "gain": gain,
        "gpu_hours": hours,
        "gain_per_gpu_hour": None if gain is None or not hours else gain / hours,
        "dollars": dollars,
        "gain_per_dollar": None if gain is None or not dollars else gain / dollars,
        "state": "retired" if branch.retired else "paused" if branch.paused else "active",
    }


def gpus(state: State) -> int:
    """Devices that a run holds: of executor.gpus ("h100:2"); locally one."""
    executor = state.config.get("executor") or {}
    count = str(executor.get("gpus") or "1").rpartition(":")[2]
    return int(count) if executor.get("kind") != "local" and count.isdecimal() else 1


def _researcher(agent: Mapping[str, Any]) -> str:
    kind = agent.get("kind", "none")
    return f"{kind}:{agent['model']}" if kind == "anthropic" and agent.get("model") else kind


def text(state: State, chosen: Sequence[str] = SHOWN) -> str:
    """The same as a table of the columns `chosen`."""
    cells = [[_cell(state, key, row[key]) for key in chosen] for row in rows(state)]
    titles = [key.replace("_", " ").replace("gpu hour", "hour") for key in chosen]
    return "\n".join(columns([titles, *cells])) if cells else ""


def _cell(state: State, key: str, value: Any) -> str:
    if key in ("first", "best", "gain"):
        return tables.value(state, value)
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
