"""Which process is that? Identities that survive pid reuse and reboots."""

from __future__ import annotations

import functools
import os
import subprocess
import uuid
from pathlib import Path


@functools.cache
def boot_id() -> str:
    """This boot of this machine: a pid of an earlier boot means nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: the network card's address has to do
        return f"node-{uuid.getnode():x}"


def start_time(pid: int) -> str | None:
    """When process `pid` started (clock ticks since boot on Linux), None if it is not running.

    A zombie counts as gone: it has ended, only its parent has not looked yet.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _start_time_by_ps(pid)
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command's name may hold anything, also ")"
    return None if fields[0] in "ZX" else fields[19]


def _start_time_by_ps(pid: int) -> str | None:
    """The same where there is no /proc (macOS)."""
    found = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return found.stdout.strip() or None


def identity(pid: int | None = None) -> str:
    """'<pid>@<start time>@<boot id>' of a running process (this one by default)."""
    pid = os.getpid() if pid is None else pid
    return f"{pid}@{start_time(pid)}@{boot_id()}"


def alive(job: str) -> bool:
    """Whether the process of an `identity` still runs on this machine."""
    pid, start, boot = job.split("@", 2)
    return boot == boot_id() and start_time(int(pid)) == start
