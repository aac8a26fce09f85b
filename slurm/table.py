"""Runs that an executor holds on to across a kill of the controller: one small file, one writer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A run that waits, or (in an allocation) the place it was started in."""

    run: str  # Run.id
    name: str  # its job's or step's name
    run_dir: str
    limit_s: float
    avoid: tuple[str, ...] = ()
    place: Mapping[str, str] = field(default_factory=dict)  # node, constraint, gpu: its branch's
    asked: float = field(default_factory=time.time)  # Unix time
    holder: str | None = None  # job id of the allocation
    node: str | None = None
    slot: int | None = None  # which of the node's places
    launched: float | None = None
    launches: int = 0

    @property
    def claimed(self) -> bool:
        """The payload is, or was, there."""
        return (Path(self.run_dir) / "claim.json").exists()

    @property
    def finished(self) -> bool:
        return (Path(self.run_dir) / "result.json").exists()


class Table:
    """Entries by run id, in a file that is whole at every moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            stored = json.loads(path.read_text())
        except FileNotFoundError:
            stored = []
        self._entries = {e["run"]: Entry(**{**e, "avoid": tuple(e["avoid"])}) for e in stored}

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def get(self, run: str) -> Entry | None:
        return self._entries.get(run)

    def put(self, entry: Entry) -> Entry:
        self._entries[entry.run] = entry
        self._save()
        return entry

    def drop(self, *runs: str) -> None:
        known = self._entries.keys() & set(runs)
        for run in known:
            del self._entries[run]
        if known:
            self._save()

    def _save(self) -> None:
        draft = self._path.with_suffix(".tmp")
        with open(draft, "w") as file:
            file.write(json.dumps([vars(entry) for entry in self._entries.values()]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self._path)
