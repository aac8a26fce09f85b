"""What earlier experiments left behind, for researchers and people to read: files, diffs, logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jobs.errors import AutoresearchError, UserError
from jobs.history import State
from jobs.repository import Repository

LONGEST_TAIL = 256 * 1024  # bytes of a log that are looked at


class Evidence:
    """Read-only views of a campaign's experiments, as agent.researcher.Records asks for them."""

    def __init__(
        self, state: State, repository: Repository, runs: Path, editable: tuple[str, ...]
    ) -> None:
        self._state, self._repository, self._runs = state, repository, runs
        self._editable = editable

    def files(self, experiment: str) -> Mapping[str, str]:
        commit = self._state.record(experiment).commit
        try:
            return {path: self._repository.read(commit, path) for path in self._editable}
        except UserError:  # git has it no more (somebody's gc): one that nobody can look at
            return {}

    def diff(self, experiment: str) -> str:
        record = self._state.record(experiment)
        try:
            return self._repository.diff(record.base, record.commit, self._editable)
        except AutoresearchError:
            return ""

    def log(self, experiment: str, lines: int) -> str:
        return self._tail(experiment, "train.log", lines)

    def telemetry(self, experiment: str, lines: int) -> str:
        return self._tail(experiment, "telemetry.jsonl", lines)

    def _tail(self, experiment: str, name: str, lines: int) -> str:
        runs = self._state.record(experiment).runs
        if not runs:
            return ""
        last = max(runs, key=lambda r: r.n)
        return tail(self._runs / experiment / last.folder / name, lines)


def tail(path: Path, lines: int) -> str:
    """The last lines of a file that may be long, or broken, or not there."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LONGEST_TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
