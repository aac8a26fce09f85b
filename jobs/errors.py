"""The errors that end a command: each says what was attempted, what was seen and what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


class AutoresearchError(Exception):
    """Something failed and the command ends with `exit_code`; printed without a traceback."""

    exit_code = 1


class UserError(AutoresearchError):
    """Wrong use or wrong settings: nothing was started."""

    exit_code = 2


class ConfigError(UserError):
    """campaign.yaml is wrong; the message names every wrong value by its path."""


class Paused(AutoresearchError):
    """The infrastructure stopped the campaign; nothing recorded is lost and a person is needed.

    Args:
        reason: what was attempted and what was seen, one line.
        remedy: what to do before `autoresearch run` is called again, one line.
    """

    exit_code = 3

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}. {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class LedgerBroken(Paused):
    """A ledger that cannot be what one writer wrote: read no further, guess nothing."""


class LeaseHeld(AutoresearchError):
    """Another controller runs this campaign; the message names its host, process and age."""


class Displaced(AutoresearchError):
    """Another controller took the campaign over: this one must not write any more."""


_REMEDIES = {
    errno.ENOSPC: "Free space on this disk (autoresearch clean)",
    errno.EDQUOT: "Free space within your quota (autoresearch clean)",
    errno.EROFS: "The file system is read-only: remount it or move the campaign folder",
    errno.EACCES: "Give yourself write permission to the file and its folder",
    errno.EPERM: "Give yourself write permission to the file and its folder",
    errno.EIO: "The disk or file server fails: see the system's log before going on",
}


def refused(path: Path | str, act: str, error: OSError) -> Paused:
    """What the system refused, as a pause: `path` could not be `act` ("opened")."""
    remedy = _REMEDIES.get(error.errno or 0, "Mend that")
    return Paused(
        f"{path} could not be {act}: {error.strerror} ({errno.errorcode.get(error.errno or 0)})",
        f"{remedy}, then start again: everything recorded before is intact",
    )


@contextlib.contextmanager
def refusals_told(path: Path | str = "a file or a process", act: str = "used") -> Iterator[None]:
    """Turns what the system refuses inside into Paused, in words; `path` where it names none."""
    try:
        yield
    except OSError as error:
        raise refused(error.filename or path, act, error) from error
