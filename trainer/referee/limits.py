"""What a program uses while it runs: its processes, memory and disk, looked at from outside.

RLIMITs do not bind root and disturb CUDA, cgroups are not the ordinary user's: so it is polling,
cheap enough to be done ten times a second.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from dataclasses import dataclass

from . import protocol
from .task import Limits

PAGE = os.sysconf("SC_PAGE_SIZE")
LEAST_FREE = 65536  # bytes of a disk, below which it counts as full: nothing more can be recorded
MAX_FILES = 200_000  # in the scratch folder: inodes are a disk's limit too
RING_BYTES = 16 * protocol.MAX_SLOT  # four slots and the answers, and what growing leaves behind


@dataclass(frozen=True)
class Breach:
    """A limit that was exceeded: which one, and in words."""

    kind: str  # "memory", "processes", "log", "scratch", "disk"
    words: str


class Tree:
    """The processes below one, found again cheaply: a process once seen elsewhere stays there."""

    def __init__(self, root: int):
        self.root = root
        self._elsewhere: set[int] = set()
        self._looks = 0

    def look(self) -> set[int]:
        """Pids of the root and all its living descendants; the root alone without /proc."""
        try:
            there = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        except OSError:
            return {self.root}
        self._looks += 1
        if self._looks % 50 == 0:  # pids come around again
            self._elsewhere.clear()
        self._elsewhere &= there
        parents = {pid: _parent(pid) for pid in there - self._elsewhere}
        inside, queue = {self.root} & there, [self.root]
        children: dict[int, list[int]] = {}
        for pid, parent in parents.items():
            children.setdefault(parent, []).append(pid)
        while queue:
            below = children.get(queue.pop(), [])
            inside.update(below)
            queue += below
        self._elsewhere |= there - inside
        return inside


class Watch:
    """Compares a running program with its limits.

    Args:
        root: pid of the launcher.
        limits: see task.Limits.
        scratch: the folder the program may write to.
        ring: the shared file, or None; on tmpfs, so that growing it would eat memory.
    """

    def __init__(self, root: int, limits: Limits, scratch: str, ring: str | None):
        self._tree, self._limits = Tree(root), limits
        self._scratch, self._ring = scratch, ring
        self._next_disk = 0.0
        self.seen: set[int] = set()  # pids of the last look
        self.peak_mb = 0.0

    def poll(self) -> Breach | None:
        """The first limit found exceeded now."""
        pids = self.seen = self._tree.look()
        if len(pids) > self._limits.processes:
            return Breach(
                "processes", f"{len(pids)} processes, the limit is {self._limits.processes}"
            )
        used = memory_mb(pids)
        limit = self._limits.memory_mb
        if limit is not None and used > limit:
            used = exact_memory_mb(pids) or used  # forked children share: look closer
        self.peak_mb = max(self.peak_mb, used)
        if limit is not None and used > limit:
            return Breach("memory", f"{used:.0f} MiB of memory, the limit is {limit} MiB")
        start = time.monotonic()
        if start < self._next_disk:
            return None
        breach = self.disk(pids)
        now = time.monotonic()
        self._next_disk = now + 20 * (now - start)  # at most 5 % of the time
        return breach

    def disk(self, pids: frozenset[int] | set[int] = frozenset()) -> Breach | None:
        """The scratch folder's and the shared file's size now."""
        size, files = folder_size(self._scratch)
        size += deleted_size(pids, self._scratch)
        limit = self._limits.scratch_mb
        if size >= limit * 2**20:
            return Breach("scratch", f"{size >> 20} MiB written to disk, the limit is {limit} MiB")
        if files > MAX_FILES:
            return Breach("scratch", f"over {MAX_FILES} files, or folders closed or far too deep")
        with contextlib.suppress(OSError):
            disk = os.statvfs(self._scratch)
            if disk.f_blocks and disk.f_bavail * disk.f_frsize < LEAST_FREE:
                # Within its limits it may not be the one that filled the disk.
                own = size > disk.f_blocks * disk.f_frsize / 2
                words = f"the disk is full, {size >> 20} MiB of it by this run"
                return Breach("scratch" if own else "disk", words)
            if self._ring and os.stat(self._ring).st_size > RING_BYTES:
                return Breach("scratch", "the shared file was grown by the program")
        return None


def memory_mb(pids: set[int]) -> float:
    """Resident memory, what may be shared counted once: cheap, and too high for forked children."""
    own, shared = 0, 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/statm", "rb") as file:
            resident, common = map(int, file.read().split()[1:3])
            own += resident - common
            shared = max(shared, common)
    return (own + shared) * PAGE / 2**20


def exact_memory_mb(pids: set[int]) -> float:
    """Proportional memory (PSS): exact, and milliseconds a process. 0 where it may not be read."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith(b"Pss:"))
    return total / 1024


def folder_size(folder: str) -> tuple[int, int]:
    """(bytes on disk, files) below a folder. Links are not followed; it may change meanwhile.

    A folder that nobody can look into (closed, or deeper than a path is long) could hide anything:
    it counts as more files than are allowed.
    """
    size, files, queue = 0, 0, [folder]
    while queue and files <= MAX_FILES:
        try:
            with os.scandir(queue.pop()) as entries:
                for entry in entries:
                    files += 1
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        size += found.st_blocks * 512
                        if stat.S_ISDIR(found.st_mode):
                            queue.append(entry.path)
        except FileNotFoundError:
            continue
        except OSError:
            return size, MAX_FILES + 1
    return size, files


def deleted_size(pids: frozenset[int] | set[int], folder: str) -> int:
    """Bytes on the folder's disk of deleted files that are still open: they fill it too."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        device = os.stat(folder).st_dev
        for pid in pids:
            with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        file = os.stat(entry.path)
                        if file.st_nlink == 0 and file.st_dev == device:
                            found[file.st_ino] = file.st_blocks * 512
    return sum(found.values())


def oom_kills() -> int | None:
    """How often the kernel killed for memory in this process's cgroup; None where unknown."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
        for _, controllers, path in groups:
            if controllers == "":  # version 2
                name = f"/sys/fs/cgroup{path}/memory.events"
            elif "memory" in controllers.split(","):
                name = f"/sys/fs/cgroup/memory{path}/memory.oom_control"
            else:
                continue
            with contextlib.suppress(OSError), open(name) as file:
                return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    return None


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0
