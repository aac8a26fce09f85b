"""Moves refs in transactions of one long-lived `git update-ref`: a start costs more than a move."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from jobs.text import one_line

# git's defaults leave refs to the page cache, and give up after 0.1 s where NFS is slow
SYNCED = (
    *("-c", "core.fsync=all"),
    *("-c", "core.filesRefLockTimeout=5000", "-c", "core.packedRefsTimeout=20000"),
)


class Transactions:
    """For one thread. Between two of them git holds no lock; it ends when this process does."""

    def __init__(self, root: Path) -> None:
        """Args: root: a folder of the work tree."""
        self._root = root
        self._git: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def commit(self, lines: str) -> str | None:
        """Carry out lines of `update-ref --stdin`, all or none. What git says where it did not.

        Where git itself was ended, they may have been carried out or not: ask where the refs are.
        """
        process = self._git = self._git or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"start\n{lines}prepare\ncommit\n".encode())
            process.stdin.flush()
            if all(process.stdout.readline().split() == [v, b"ok"] for v in _ANSWERS):
                return None
        return self.close() or "it was ended"

    def close(self) -> str:
        """End the process, if there is one; what it said last."""
        process, said = self._git, self._said
        self._git = self._said = None
        if process is None or said is None:
            return ""
        process.communicate()
        with said:
            said.seek(0)
            return one_line(said.read().decode("utf-8", "replace"))

    def _started(self) -> subprocess.Popen[bytes]:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe would fill up unread
        return subprocess.Popen(
            ["git", *SYNCED, "update-ref", "-m", "autoresearch", "--stdin"],
            cwd=self._root,
            env=plain_words(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C is the controller's to hear
        )


_ANSWERS = (b"start:", b"prepare:", b"commit:")


def plain_words() -> dict[str, str]:
    """The environment of a git whose words are read."""
    return {**os.environ, "LC_ALL": "C", "LANGUAGE": "C"}
