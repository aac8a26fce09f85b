"""Owns the API key: where it comes from, and that it goes nowhere else."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

VARIABLES = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
_taken: dict[str, str] = {}
_LOOKS_LIKE_ONE = re.compile(r"sk-ant-[A-Za-z0-9_-]{6,}|(?i:bearer\s+[\w.~+/-]{12,}=*)")


class KeyUnusable(ValueError):
    """No key, or a key file that others can read; the message says what to do, never the key."""


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """The credentials are out of the environment while this lasts: no child inherits them."""
    _taken.update(found())
    for variable in _taken:
        os.environ.pop(variable, None)
    try:
        yield
    finally:
        os.environ.update(_taken)
        _taken.clear()


def found(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variable -> credential, of those that `environ` (None: this process) was given."""
    given = {**os.environ, **_taken} if environ is None else environ
    return {name: value for name in VARIABLES if (value := given.get(name, "").strip())}


def load(key_file: str | None, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The credentials as the SDK's arguments: api_key or auth_token.

    Raises KeyUnusable: there is none, or its file may be read by others.
    """
    if key_file:
        path = Path(key_file).expanduser()
        try:
            mode, key = path.stat().st_mode, path.read_text().strip()
        except OSError as error:
            raise KeyUnusable(
                f"agent.key_file {path} could not be read: {error.strerror}"
            ) from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyUnusable(f"agent.key_file {path} may be read by others: chmod 600 {path}")
        if not key:
            raise KeyUnusable(f"agent.key_file {path} is empty")
        return {"api_key": key}
    for variable, key in found(environ).items():
        return {"api_key" if variable == VARIABLES[0] else "auth_token": key}
    raise KeyUnusable(f"no API key: set {VARIABLES[0]} or agent.key_file")


def scrub(text: str, *secrets: str) -> str:
    """`text` without the given secrets and without anything that looks like a key."""
    for secret in secrets:
        if len(secret) >= 6:
            text = text.replace(secret, "[key]")
    return _LOOKS_LIKE_ONE.sub("[key]", text)
