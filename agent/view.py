"""Owns how agent/ reads the folded ledger: small questions, and one place to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.history import State
    from jobs.records import Record

MODEL = "model"  # the tag of what a language model proposed


@dataclass(frozen=True)
class Trial:
    """An experiment as a point that a search learns from."""

    id: str
    metric: float | None  # None: it did not end well, or has not ended
    running: bool


def trials(state: State, branch: str) -> Iterator[Trial]:
    """The branch's experiments, oldest first."""
    for record in state.experiments(branch):
        ok = record.status == "ok" and record.metric is not None
        undecided = record.verdict in (None, "measure")
        yield Trial(record.id, record.metric if ok else None, undecided and not ok)


def baseline(state: State, branch: str) -> str | None:
    """The experiment that measured the branch's start, once it was kept."""
    found = state.branches.get(branch)
    return found.baseline if found else None


def crashed(state: State, branch: str, base: str, attempts: int) -> str | None:
    """The newest crash of a model's idea on `base` that may go back to its author, or None.

    A repair carries the tag "repair:<experiment>"; a chain of them is `attempts` long at most.
    """
    recent = state.recent(12, branch)
    repairs = {tag.removeprefix("repair:"): r for r in recent for tag in r.tags if ":" in tag}
    for record in reversed(recent):
        ours = record.status == "crash" and record.verdict == "discard" and MODEL in record.tags
        if ours and record.base == base and record.id not in repairs:
            return record.id if _repaired(state, record) < attempts else None
    return None


def _repaired(state: State, record: Record) -> int:
    for tag in record.tags:
        if tag.startswith("repair:"):
            return 1 + _repaired(state, state.record(tag.removeprefix("repair:")))
    return 0
