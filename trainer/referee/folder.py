"""The folder that the referee and train.py share: made private, found again when its owner died.

Its name carries its owner (pid and start time), so that a later run can sweep what a SIGKILL left,
without reading anything that a program could have written.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from . import protocol

PREFIX = "autoresearch-"


def place() -> Path:
    """Where shared folders live: memory, where the system has such a file system."""
    if os.access("/dev/shm", os.W_OK):
        return Path("/dev/shm")
    import tempfile  # slow to import, and hardly ever needed

    return Path(tempfile.gettempdir())


def make() -> Path:
    """A new folder of mode 0700 with an unguessable name, holding an empty shared file."""
    folder = owned(place())
    folder.mkdir(mode=0o700)
    os.close(os.open(folder / protocol.RING_NAME, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    return folder


def owned(where: Path, prefix: str = PREFIX) -> Path:
    """The path of a folder there that `sweep` takes for this process's; it is not made."""
    pid = os.getpid()
    return where / f"{prefix}{pid}.{start_ticks(pid) or 0}-{os.urandom(8).hex()}"


def sweep(where: Path | None = None, prefix: str = PREFIX) -> list[str]:
    """Remove this user's folders there (None: the shared ones) whose owner is dead: their names.

    Folders of other machines must have another prefix: their owners seem dead here.
    """
    swept = []
    for entry in os.scandir(where or place()):
        match = re.fullmatch(re.escape(prefix) + r"(\d+)\.(\d+)-[0-9a-f]{16}", entry.name)
        if not match or not entry.is_dir(follow_symlinks=False):
            continue
        pid, ticks = int(match[1]), int(match[2])
        try:
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
        except FileNotFoundError:  # its own run has just removed it
            continue
        if (start_ticks(pid) or 0) != ticks if os.path.isdir("/proc/self") else not _alive(pid):
            shutil.rmtree(entry.path, ignore_errors=True)
            swept.append(entry.name)
    return swept


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is no such process.

    With the pid it names a process for as long as the machine is up: pids are used again.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
