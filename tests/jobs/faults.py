"""Errors from the kernel itself, not from patched functions."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NUMBERS = {
    "x86_64": {"write": 1, "fsync": 74, "ftruncate": 77},
    "aarch64": {"write": 64, "fsync": 82, "ftruncate": 46},
}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000
_LOAD, _EQUAL, _GREATER, _RETURN = 0x20, 0x15, 0x25, 0x06
_AT_NUMBER, _AT_FIRST_ARGUMENT = 0, 16  # in struct seccomp_data


def deny(call: str, error: int) -> None:
    """Makes `call` on any file but the standard streams fail with `error` in this process.

    A seccomp filter: works for an ordinary user and cannot be taken back.
    """
    number = _NUMBERS[platform.machine()][call]
    rules = [
        (_LOAD, 0, 0, _AT_NUMBER),
        (_EQUAL, 0, 3, number),
        (_LOAD, 0, 0, _AT_FIRST_ARGUMENT),
        (_GREATER, 0, 1, 2),
        (_RETURN, 0, 0, _ERRNO | error),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(program))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    for request in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _MODE_FILTER, header)):
        if libc.prctl(*request, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {request[0]}", os.strerror)


@contextlib.contextmanager
def ordinary_user() -> Iterator[Path]:
    """Inside, this process is an ordinary user with a folder of its own (root may write all)."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(prefix="ordinary-") as name:
        if root:
            os.chown(name, 65534, 65534)
            os.setegid(65534)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)
                os.setegid(0)
