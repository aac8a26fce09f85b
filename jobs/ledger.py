"""The ledger file: one JSON object a line, appended and synced by the one writer, read by anyone.

A line is {"v": 1, "n": count from 0, "fence": writer's number, "time": UTC ISO 8601 in ms,
"mono": seconds of the writer's monotonic clock, "event": NAME, ...payload}. In memory an event has
one key more, "at": the byte offset of its line, by which `Lines` finds it again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.effects import effect
from jobs.errors import Displaced, LedgerBroken, Paused, refused

VERSION = 1
Event = dict[str, Any]

_RESERVED = frozenset({"v", "n", "fence", "time", "mono", "event", "at"})


def utc_now() -> str:
    """'2025-01-31T23:59:59.123Z'."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Tail:
    """Where reading ended: `offset` behind the last whole line, `torn` the bytes after it."""

    offset: int = 0
    torn: bytes = b""


def read(path: Path, offset: int = 0, tail: Tail | None = None) -> Iterator[Event]:
    """The events from byte `offset` (the start of a line) on; `tail` is filled in while reading.

    A last line without its newline is what a killed writer leaves: not an event, never an error.
    Raises LedgerBroken: any other line that is no event, by its number.
    """
    tail = tail if tail is not None else Tail()
    tail.offset = offset
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                tail.torn = line
                return
            yield _parse(line, path, tail.offset)
            tail.offset += len(line)


def _parse(line: bytes, path: Path, offset: int) -> Event:
    try:
        event: Event = json.loads(line.decode())  # bytes would have their encoding guessed
        newer = event["v"] > VERSION
        event["n"], event["fence"], event["event"]
    except (ValueError, KeyError, TypeError) as error:
        number = _line_number(path, offset)
        raise LedgerBroken(
            f"{path}, line {number} is no ledger event ({error}): {line[:80]!r}",
            f"Restore the file from a copy, or move it aside and keep only its first {number - 1} "
            f"lines (head -n {number - 1}) if what follows may be lost",
        ) from None
    if newer:
        raise LedgerBroken(
            f"{path}, line {_line_number(path, offset)} has version {event['v']}, written by a "
            f"newer autoresearch than this one (version {VERSION})",
            "Continue this campaign with the newer one",
        )
    event["at"] = offset
    return event


def _line_number(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        return file.read(offset).count(b"\n") + 1


class Lines:
    """Events by the byte offset of their line; safe from several threads (pread, no position)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def __call__(self, offset: int) -> Event:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        line, size = b"", 4096
        while not line.endswith(b"\n"):
            block = os.pread(self._fd, size, offset + len(line))
            if not block:
                break
            line += block[: block.find(b"\n") + 1] if b"\n" in block else block
            size *= 4
        return _parse(line, self.path, offset)

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


class Ledger:
    """The writer. `check` is called before each append and raises `Displaced` (lease.check).

    Append an event as soon as it is open, before the history is read: from then on every reader
    ignores what a displaced writer may still append.

    Attributes:
        torn: bytes of a torn last line that opening cut off (b"" for none), to be reported.
        offset: length in bytes up to the last whole line.
    """

    def __init__(self, path: Path, fence: int, check: Callable[[], None] = lambda: None) -> None:
        """Opens or creates the file, and cuts off a torn last line.

        Raises:
            Paused: the file cannot be opened or created.
            LedgerBroken: its last whole line is no event.
            Displaced: a line in it carries a higher fence.
        """
        self.path, self.fence, self.check = Path(path), fence, check
        self.torn = b""
        try:
            self._fd = self._open()
        except OSError as error:
            raise refused(self.path, "opened", error) from error
        self.offset, self._next, self._seen = 0, 0, 0
        self._catch_up()

    def append(self, event: str, /, **payload: Any) -> Event:
        """Writes one event and returns it, durable when this returns. Raises as `append_all`."""
        return self.append_all([(event, payload)])[0]

    def append_all(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Event]:
        """Writes several events with one write and one fsync; all of them or, on an error, none.

        Raises:
            Displaced: another controller holds the campaign.
            Paused: the disk refused (full, read-only, I/O error), and the file is as it was before;
                or something has cut the file.
        """
        self.check()
        if (size := os.fstat(self._fd).st_size) < self.offset:
            raise Paused(
                f"{self.path} has {size} bytes, and {self.offset} were recorded: it was cut",
                "Bring it back from a copy or from git (its records), and start again",
            )
        if size > self.offset:
            self._catch_up_late()
        made = [self._event(name, payload, i) for i, (name, payload) in enumerate(events)]
        # NaN is no JSON; a missing number is null, so that every reader of the file can parse it
        lines = [
            json.dumps(e, separators=(",", ":"), allow_nan=False).encode() + b"\n" for e in made
        ]
        with effect("ledger.append"):
            self._write(b"".join(lines))
        for event, line in zip(made, lines, strict=True):
            event["at"] = self.offset
            self.offset += len(line)
        self._next, self._seen = self._next + len(made), self.fence
        return made

    def close(self) -> None:
        """Closes the file; the ledger is durable at every moment, so this writes nothing."""
        os.close(self._fd)

    def _event(self, name: str, payload: Mapping[str, Any], ahead: int) -> Event:
        if clash := _RESERVED & payload.keys():
            raise ValueError(f"event {name!r}: the payload uses the reserved {sorted(clash)}")
        head = {"v": VERSION, "n": self._next + ahead, "fence": self.fence, "time": utc_now()}
        return {**head, "mono": round(time.monotonic(), 3), "event": name, **payload}

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        try:
            return os.open(self.path, flags)
        except FileNotFoundError:
            with effect("ledger.create"):
                fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o644)
                sync_folder(self.path.parent)  # else a power cut can lose the name with the file
            return fd

    def _catch_up(self) -> None:
        """Counts the lines that are there beyond `offset`; cuts off a torn last one."""
        tail = Tail()
        for event in read(self.path, self.offset, tail):
            if event["fence"] < self._seen:
                continue  # a displaced writer's late line: it stays, and every reader ignores it
            if event["fence"] > self.fence:
                raise Displaced(
                    f"{self.path} has a line of writer {event['fence']}; this one is writer "
                    f"{self.fence}. Another controller took the campaign over; this one stops"
                )
            self._seen, self._next = event["fence"], event["n"] + 1
        self.offset = tail.offset
        if tail.torn:
            self.torn = tail.torn
            with effect("ledger.truncate"):
                self._cut()

    def _catch_up_late(self) -> None:
        """Skips what a displaced writer appended after this one opened the file."""
        known = self._next
        self._catch_up()
        if self._next != known:  # before this writer's first line, so that readers do not ignore it
            raise Paused(
                f"{self.path} was written by a displaced controller while this one started",
                "Start again: nothing is lost, and its lines will be taken into account",
            )

    def _write(self, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
            os.fsync(self._fd)
        except OSError as error:
            # A half-written or unsynced line must not be read back as recorded later. But a disk
            # that hangs lets another controller in: then the end of the file is that one's.
            self.check()
            self._cut()
            raise refused(self.path, "appended to", error) from error

    def _cut(self) -> None:
        try:
            os.ftruncate(self._fd, self.offset)
            os.fsync(self._fd)
        except OSError:
            return  # the caller reports the first error; a torn end is cut at the next opening


def sync_folder(folder: Path) -> None:
    """Makes names created or renamed in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
