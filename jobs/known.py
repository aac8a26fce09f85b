"""Which programs were tried already: a fingerprint for each experiment, kept beside the ledger.

A fingerprint takes milliseconds of parsing, too much for thousands of them at every start. The file
may be lost at any moment: what it lacks is made again from the commits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from agent import edit
from jobs.effects import effect


class Known:
    """The programs of one campaign.

    Attributes:
        experiments: fingerprint -> the experiment that ran it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks = _read(path)  # commit -> fingerprint
        self.experiments: dict[str, str] = {}

    def add(self, experiment: str, commit: str, files: Callable[[], Mapping[str, str]]) -> None:
        """Remember an experiment's program; `files` is called where it was not fingerprinted yet.

        Raises OSError: the disk refused.
        """
        if commit not in self._marks:
            self._marks[commit] = edit.fingerprint(files())
            with effect("program.mark"), open(self._path, "a") as file:
                file.write(f"{commit} {self._marks[commit]}\n")
        self.experiments[self._marks[commit]] = experiment


def _read(path: Path) -> dict[str, str]:
    marks = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(errors="replace").splitlines():
            commit, _, mark = line.partition(" ")
            if (len(commit), len(mark)) == (40, 32):  # else torn by a kill
                marks[commit] = mark
    return marks
