"""The ledger and the state that it folds to, kept together: what is recorded is what is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import snapshot
from jobs.errors import AutoresearchError, Paused
from jobs.history import State, fold
from jobs.ledger import Ledger


class Journal:
    """Append to the ledger and fold what was appended into `state`."""

    def __init__(self, folder: Path, ledger: Ledger, state: State) -> None:
        self.folder, self.ledger, self.state = folder, ledger, state
        self._saved_at = state.events

    def record(self, event: str, /, **payload: Any) -> None:
        """One event, durable when this returns. Raises Paused, Displaced."""
        self.record_all([(event, payload)])

    def record_all(self, events: list[tuple[str, Mapping[str, Any]]]) -> None:
        """Several events at once: all of them or none."""
        self.state = fold(self.ledger.append_all(events), self.state)

    def record_pause(self, error: Paused) -> None:
        """The pause itself, where the disk that caused it can still take it."""
        try:
            self.record("paused", reason=error.reason, remedy=error.remedy)
        except AutoresearchError:
            return

    def snapshot(self, force: bool = False) -> None:
        """Save the state now and then, so that the next start need not replay everything."""
        if force or snapshot.due(self.state, self._saved_at):
            self._saved_at = self.state.events
            snapshot.save(self.folder, self.state, self.ledger.offset)
