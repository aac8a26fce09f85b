"""The boundaries: one function that each side effect goes through, so that tests can kill there.

    with effect("ledger.append"):
        os.write(...)

AUTORESEARCH_KILL_AT="ledger.append:before" (or ":after", with ":3" for the third crossing) sends
SIGKILL to this process there. AUTORESEARCH_HITS=FILE appends the name of every crossing. Both are
read once, when this module is imported; without them an effect costs a fraction of a microsecond.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from types import TracebackType

# Every act of the controller that outlives it. A name that is not here is refused.
BOUNDARIES: tuple[str, ...] = (
    "lease.take",  # lease.json claimed or taken over
    "lease.beat",
    "lease.release",
    "ledger.create",
    "ledger.append",
    "ledger.truncate",  # a torn last line is cut off
    "snapshot.write",
    "inbox.take",  # an order's file is removed once it is in the ledger
    "git.exclude",  # the campaigns' folder in .git/info/exclude
    "git.objects",  # blobs, trees and a commit, unreferenced: of an experiment, notes, records
    "git.ref",  # refs/autoresearch/<campaign>/<experiment>
    "git.branch",  # compare-and-swap of autoresearch/<campaign>/<branch>
    "git.notes",  # notes from their objects to their ref
    "git.pack",
    "run.snapshot",  # the commit's files put where the run finds them
    "run.folder",  # the run's folder and task.json
    "run.submit",
    "run.cancel",
    "run.tidy",  # weights and compile cache promoted or deleted
    "report.write",  # results.tsv, results.parquet, progress.png, the page
)

# What AUTORESEARCH_HITS can list: each boundary from both sides.
CROSSINGS: tuple[str, ...] = tuple(
    f"{name}:{side}" for name in BOUNDARIES for side in ("before", "after")
)

_KNOWN = frozenset(BOUNDARIES)


def _kill_point(text: str) -> tuple[str, int]:
    """("ledger.append:before", 3) of "ledger.append:before:3"; bare names mean before, first."""
    name, _, rest = text.partition(":")
    parts = rest.split(":") if rest else []
    side = parts.pop(0) if parts and parts[0] in ("before", "after") else "before"
    if name not in _KNOWN or len(parts) > 1 or not all(part.isdigit() for part in parts):
        raise ValueError(
            f"AUTORESEARCH_KILL_AT={text!r} is no boundary; use NAME[:before|:after][:N] with NAME "
            f"one of {', '.join(BOUNDARIES)}"
        )
    return f"{name}:{side}", int(parts[0]) if parts else 1


_HITS = os.environ.get("AUTORESEARCH_HITS")
_KILL = os.environ.get("AUTORESEARCH_KILL_AT")
_KILL_POINT = _kill_point(_KILL) if _KILL else None
_ARMED = bool(_HITS or _KILL_POINT)
_COUNTS: Counter[str] = Counter()
_LOCK = threading.Lock()  # the heartbeat crosses boundaries from its own thread


class effect:
    """Context around one side effect; `name` is one of BOUNDARIES.

    Raises ValueError: a name that is not in the registry.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        if name not in _KNOWN:
            raise ValueError(f"effect({name!r}) is not registered in jobs.effects.BOUNDARIES")
        self.name = name

    def __enter__(self) -> None:
        if _ARMED:
            _cross(f"{self.name}:before")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if _ARMED and kind is None:
            _cross(f"{self.name}:after")


def _cross(crossing: str) -> None:
    with _LOCK:
        _COUNTS[crossing] += 1
        if _HITS:
            fd = os.open(_HITS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(fd, f"{crossing}\n".encode())
            finally:
                os.close(fd)
        if (crossing, _COUNTS[crossing]) == _KILL_POINT:
            os.kill(os.getpid(), signal.SIGKILL)
