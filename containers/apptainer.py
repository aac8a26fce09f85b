"""The one place that imports spython, and the only one that starts apptainer to make an image.

spython runs a program named `singularity`, discards build's and pull's return codes, returns a
stale image if one lies at the target, and prints what it should return. So: the target is always
a fresh path, success is the file's existence, and the words are caught where spython prints them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import AutoresearchError


class ImageError(AutoresearchError):
    """Something about an image: what was attempted, what was seen, what to do."""


def build(definition: Path, target: Path, options: Sequence[str], log: Path) -> None:
    """Build `target` (must not exist) from a definition file; everything said goes to `log`.

    Raises:
        ImageError: no apptainer, or the build failed; the message ends with the log's last lines.
    """
    with _recorded(log):
        _client().build(
            recipe=str(definition), image=str(target), sudo=False, options=list(options)
        )
    _expect(target, f"Building {definition.name}", log)


def pull(uri: str, target: Path, log: Path) -> None:
    """Pull `uri` (oras, docker, library, https) to `target`, which must not exist.

    Raises ImageError: no apptainer, or nothing came.
    """
    client = _client()
    from spython.utils import ScopedEnvVar

    # The cache would keep a second copy of the image in the home's quota.
    with _recorded(log), ScopedEnvVar("APPTAINER_DISABLE_CACHE", "true"):
        client.pull(uri, name=str(target))
    _expect(target, f"Pulling {uri}", log)


def inspect(image: Path) -> dict[str, Any]:
    """{'labels': {name: text}, 'definition': text} as the image itself tells.

    Raises ImageError: not an image that apptainer can read.
    """
    found = _client(quiet=True).inspect(str(image))
    if "attributes" not in found:
        raise ImageError(f"Inspecting {image} failed: {' '.join(found['message']).strip()}")
    attributes = found["attributes"]
    return {
        "labels": {name: str(text) for name, text in (attributes.get("labels") or {}).items()},
        "definition": attributes.get("deffile") or "",
    }


def run(argv: Sequence[str], what: str) -> str:
    """Standard output of a command line made by `command`.

    Raises ImageError: it failed; the message says `what` was attempted and holds its last words.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ImageError(f"{what} failed: there is no program {argv[0]!r} on PATH") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[-2000:]
        raise ImageError(f"{what} failed (exit status {done.returncode}): {words}")
    return done.stdout


def _client(quiet: bool = False) -> Any:
    if not shutil.which("singularity"):
        raise ImageError(
            "spython runs apptainer by the name 'singularity', and there is no such program on "
            "PATH. Load the site's apptainer module, or make the link beside apptainer: "
            'ln -s apptainer "$(dirname "$(command -v apptainer)")/singularity"'
        )
    from spython.main import get_client

    return get_client(quiet=quiet)


def _expect(target: Path, what: str, log: Path) -> None:
    if not target.exists():
        # spython prints every error twice: of equal lines the last one is told.
        lines = log.read_text(errors="replace").splitlines()
        words = "\n".join(reversed(list(dict.fromkeys(reversed(lines)))[:25]))
        raise ImageError(f"{what} failed. All of its output is in {log}; it ends with:\n{words}")


@contextlib.contextmanager
def _recorded(log: Path) -> Iterator[None]:
    """Everything on standard output goes to `log`: the child's own, and what spython prints."""
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
