"""The files of a commit put into a folder: whole or not at all, read-only, never outside it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from jobs.errors import UserError
from jobs.objects import EXECUTABLE, LINK, SUBMODULE, Entry, Objects


def materialise(objects: Objects, files: Mapping[str, Entry], folder: Path) -> None:
    """Make `folder` hold exactly these files (path -> entry), replacing what differs.

    A folder that is there already is compared byte by byte: an earlier program may have written
    into it, and a power cut may have torn it.

    Raises:
        UserError: a link that leaves the tree, a name that would.
        OSError: the disk refused.
    """
    if folder.exists() and _holds(folder, files):
        return
    draft = folder.with_name(f".{folder.name}.new")
    remove(draft)
    draft.mkdir(parents=True)
    try:
        _write(objects, files, draft)
    except BaseException:
        remove(draft)
        raise
    remove(folder)
    draft.rename(folder)


def remove(folder: Path) -> None:
    """rmtree that also takes read-only folders, as `materialise` makes them; none is fine, too."""

    def retry(function: Callable[[str], object], path: str, error: object) -> None:
        os.chmod(os.path.dirname(path), 0o700)
        if os.path.isdir(path) and not os.path.islink(path):
            os.chmod(path, 0o700)
        function(path)

    if folder.exists():
        shutil.rmtree(folder, onerror=retry)


def _write(objects: Objects, files: Mapping[str, Entry], folder: Path) -> None:
    links = {path: entry for path, entry in files.items() if entry.mode == LINK}
    folders = {folder}
    for path, entry in files.items():
        target = folder.joinpath(*_parts(path))
        if target.parent not in folders:
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.update(p for p in target.parents if p.is_relative_to(folder))
        if entry.mode == SUBMODULE:
            target.mkdir(exist_ok=True)  # as git archive has it
            folders.add(target)
        elif entry.mode != LINK:
            _write_file(target, objects.read(entry.sha)[1], entry.mode)
    for path, entry in links.items():  # last: no file is ever written through one
        os.symlink(objects.read(entry.sha)[1], os.fsencode(folder / path))
    for path in links:
        _refuse_leaving(folder, path)
    for made in folders:
        made.chmod(0o555)


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    if any(part in ("", ".", "..") or part.lower() == ".git" for part in parts):
        raise UserError(f"the commit holds the path {path!r}, which git itself would not check out")
    return parts


def _write_file(target: Path, data: bytes, mode: str) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
    with open(os.open(target, flags, 0o600), "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o555 if mode == EXECUTABLE else 0o444)


def _refuse_leaving(folder: Path, path: str) -> None:
    # resolved by the file system, because links may lead through each other
    target = os.readlink(folder / path)
    inside = os.path.realpath(folder)
    led = os.path.realpath(folder / path)
    if os.path.isabs(target) or not (led == inside or led.startswith(inside + os.sep)):
        raise UserError(
            f"{path!r} is a symbolic link to {target!r}, outside the commit's own files: replace "
            "it by what it points to and commit that"
        )


def _holds(folder: Path, files: Mapping[str, Entry]) -> bool:
    found: set[str] = set()
    for place, names, others in os.walk(folder):
        below = os.path.relpath(place, folder) + "/" if place != str(folder) else ""
        found.update(below + name for name in others)
        found.update(below + name for name in names if os.path.islink(os.path.join(place, name)))
    expected = {path for path, entry in files.items() if entry.mode != SUBMODULE}
    return found == expected and all(_blob_id(folder / p) == files[p].sha for p in expected)


def _blob_id(path: Path) -> str:
    data = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
    head = f"blob {len(data)}\0".encode()
    return hashlib.sha1(head + data, usedforsecurity=False).hexdigest()
