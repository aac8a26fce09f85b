"""The right to write: one controller per campaign, by lease.json, without locks (NFS, login nodes).

Fencing numbers only grow. Whoever creates `lease-<number>.claim` by link(2), which is atomic on NFS
too, holds that number; lease.json, replaced by rename, is the holder's heartbeat. Ages compare file
times of one server, never two hosts' clocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from jobs import process
from jobs.effects import effect
from jobs.errors import Displaced, LeaseHeld, Paused, refused
from jobs.ledger import utc_now

STALE_AFTER_S = 120.0


@dataclass(frozen=True)
class Process:
    """A controller's process, where it cannot be taken for another one with its number."""

    host: str
    boot_id: str
    pid: int
    start: str  # as jobs.process.start_time


def this_process() -> Process:
    """The caller."""
    pid = os.getpid()
    return Process(socket.gethostname(), process.boot_id(), pid, process.start_time(pid) or "")


def dead(holder: Process) -> bool:
    """Whether it certainly ended; False also when that cannot be seen from here (another host)."""
    if holder.host != socket.gethostname():
        return False
    return not process.alive(f"{holder.pid}@{holder.start}@{holder.boot_id}")


@dataclass(frozen=True)
class Holder:
    """What a lease file says, and how long ago its file was written."""

    process: Process
    fence: int
    started: str  # UTC
    released: bool
    age_s: float

    def gone(self, stale_after_s: float) -> bool:
        """Whether the campaign may be taken from it."""
        return self.released or dead(self.process) or self.age_s > stale_after_s

    def __str__(self) -> str:
        who = self.process
        return (
            f"process {who.pid} on {who.host}, running since {self.started}, "
            f"heartbeat {self.age_s:.0f} s ago"
        )


class Lease:
    """A held lease: `with lease:` beats inside from a thread and releases at the end.

    Attributes:
        fence: the number that every ledger line of this controller carries.
        taken_from: who held the campaign before, where it was taken over without a release.
    """

    def __init__(self, folder: Path, fence: int, stale_after_s: float, taken_from: Holder | None):
        self.folder, self.fence, self.stale_after_s = folder, fence, stale_after_s
        self.taken_from = taken_from
        self.process, self.started = this_process(), utc_now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def check(self) -> None:
        """Call before each append.

        Raises Displaced: a higher number is held by another controller.
        """
        # The claim is asked for as well: a displaced holder's late heartbeat can hide a newer
        # lease.json until that one beats again.
        for path in (self.folder / "lease.json", _claim(self.folder, self.fence + 1)):
            found = _load(path, time.time())
            if found and found.fence > self.fence:
                raise Displaced(
                    f"This controller (process {self.process.pid} on {self.process.host}, writer "
                    f"{self.fence}) was displaced by {found} (writer "
                    f"{found.fence}). It stops without writing; the other one adopts its runs"
                )

    def beat(self, released: bool = False) -> None:
        """Renews lease.json. Raises Displaced as `check`, OSError when the disk refuses."""
        self.check()
        with effect("lease.release" if released else "lease.beat"):
            os.replace(self._write(released), self.folder / "lease.json")

    def release(self) -> None:
        """Stops beating and says that the campaign is free; silent when it is another's already."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(Displaced, OSError):
            self.beat(released=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.release()

    def _beat_on(self) -> None:
        while not self._stop.wait(self.stale_after_s / 6):
            try:
                self.beat()
            except Displaced:
                return  # the next append's check stops the controller
            except (OSError, Paused):
                continue  # what is wrong with the disk pauses the campaign at its next append

    def _write(self, released: bool = False) -> Path:
        who = self.process
        path = self.folder / f".lease-{self.fence}-{who.host}-{who.pid}"
        content = {
            **asdict(who),
            "fence": self.fence,
            "started": self.started,
            "heartbeat": utc_now(),
            "released": released,
        }
        with open(path, "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        return path

    def _take(self) -> bool:
        """Claims the number; False when another was faster."""
        with effect("lease.take"):
            written = self._write()
            try:
                os.link(written, _claim(self.folder, self.fence))
            except FileExistsError:
                os.unlink(written)
                return False
            if any(other.fence > self.fence for other in _holders(self.folder, 0.0)):
                os.unlink(written)  # the numbers went on while this process slept
                os.unlink(_claim(self.folder, self.fence))
                return False
            os.replace(written, self.folder / "lease.json")
        for path in [*self.folder.glob("lease-*.claim"), *self.folder.glob(".lease-*")]:
            if _number(path) < self.fence:
                path.unlink(missing_ok=True)
        return True


def acquire(folder: Path, stale_after_s: float = STALE_AFTER_S, above: int = 0) -> Lease:
    """Takes the campaign in `folder` with a number higher than any before and than `above`.

    Args:
        stale_after_s: a heartbeat older than this, in seconds, is taken for a dead controller; one
            of this host whose process is gone is taken over at once.
        above: highest fence seen in the ledger.

    Raises:
        LeaseHeld: another controller is at work.
        Paused: the folder cannot be written, or a lease file in it cannot be judged.
    """
    try:
        for _ in range(8):  # each round is lost only to another controller that moved in between
            lease = Lease(folder, *_next_number(folder, stale_after_s, above))
            if lease._take():
                return lease
    except OSError as error:
        raise refused(f"The lease of {folder}", "taken", error) from error
    raise LeaseHeld(f"Several controllers want {folder} at once; start just one of them")


def _next_number(
    folder: Path, stale_after_s: float, above: int
) -> tuple[int, float, Holder | None]:
    holders = _holders(folder, _server_now(folder))
    for holder in holders:
        if not holder.gone(stale_after_s):
            raise LeaseHeld(
                f"This campaign is run by another controller: {holder} ({folder}). Stop that one "
                f"first (autoresearch stop), or wait: after {stale_after_s:.0f} s without a "
                "heartbeat it is taken over"
            )
    last = holders[-1] if holders else None
    fence = max(above, last.fence if last else 0) + 1
    return fence, stale_after_s, last if last and not last.released else None


def holder(folder: Path) -> Holder | None:
    """Who holds (or last held) the campaign in `folder`, for `status`; writes nothing."""
    holders = _holders(folder, time.time())
    return holders[-1] if holders else None


def _holders(folder: Path, now: float) -> list[Holder]:
    """lease.json's and those of claims above it, by number."""
    current = _load(folder / "lease.json", now)
    found = [current] if current else []
    for path in sorted(folder.glob("lease-*.claim"), key=_number):
        claim = _load(path, now)
        if claim and _number(path) > (found[0].fence if found else 0):
            found.append(claim)
    return found


def _load(path: Path, now: float) -> Holder | None:
    """What a lease file says; None when absent."""
    try:
        with open(path) as file:  # open, then fstat: NFS revalidates a file when it is opened
            text, written = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    try:
        data = json.loads(text)
        who = Process(*(data[key] for key in ("host", "boot_id", "pid", "start")))
        age_s = max(0.0, now - written)
        return Holder(who, int(data["fence"]), data["started"], data["released"], age_s)
    except (ValueError, KeyError, TypeError) as error:
        raise Paused(
            f"{path} is no lease ({type(error).__name__}: {error})",
            "Make sure that no controller of this campaign runs, then delete that file",
        ) from error


def _server_now(folder: Path) -> float:
    """The present by the clock that stamps files in `folder`."""
    with open(folder / ".clock", "w") as file:
        file.write("x")  # a write, since an empty file's time may come from this host's cache
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def _claim(folder: Path, fence: int) -> Path:
    return folder / f"lease-{fence}.claim"


def _number(path: Path) -> int:
    """5 of lease-5.claim and of .lease-5-host-123."""
    text = path.stem.split("lease-")[1].split("-")[0]
    return int(text) if text.isdigit() else 0
