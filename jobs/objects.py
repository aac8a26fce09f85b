"""Git's objects: read through one long-lived `git cat-file`, written as durable loose files.

No index, no checkout and no process per object: the user's work tree is never involved.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import UserError
from jobs.ledger import sync_folder

TREE, FILE, EXECUTABLE, LINK, SUBMODULE = "40000", "100644", "100755", "120000", "160000"
CACHE_BYTES = 8 << 20  # the frozen files and the trees around them, read again for every snapshot


@dataclass(frozen=True)
class Entry:
    """One line of a tree: git's mode ("100644") and the object's full id."""

    mode: str
    sha: str


Tree = dict[str, Entry]


class Objects:
    """The object store of one repository. Safe to use from several threads."""

    def __init__(self, repo: Any) -> None:
        """`repo` is a GitPython Repo; its `git cat-file --batch` processes do the reading."""
        self._git = repo.git
        self._folder = Path(repo.common_dir) / "objects"
        self._lock = threading.RLock()  # GitPython's cat-file processes know no threads
        self._cache: dict[str, tuple[str, bytes]] = {}
        self._cached_bytes = 0

    def resolve(self, name: str) -> str | None:
        """The full id behind any name git understands ("HEAD", "ab12cd^{tree}"); None: unknown.

        Raises UserError: a prefix that several objects share.
        """
        if not name or any(ord(c) < 32 for c in name):
            return None
        try:
            return _text(self._ask("get_object_header", name)[0])
        except ValueError as error:
            if "ambiguous" in str(error):
                raise UserError(f"{name!r} is the beginning of several: give more digits") from None
            return None

    def read(self, sha: str) -> tuple[str, bytes]:
        """Kind ("blob", "tree", "commit") and content of an object.

        Raises UserError: this repository does not hold it.
        """
        if sha in self._cache:
            return self._cache[sha]
        try:
            _, kind, _, data = self._ask("get_object_data", sha)
        except ValueError:
            raise UserError(
                f"reading object {sha}: this repository does not hold it; fetch the commit it "
                "belongs to (autoresearch fetch, or git fetch --unshallow in a shallow clone)"
            ) from None
        self._remember(sha, _text(kind), data)
        return _text(kind), data

    def _ask(self, method: str, name: str) -> Any:
        with self._lock:
            try:
                return getattr(self._git, method)(name)
            except (BrokenPipeError, ValueError) as error:
                if isinstance(error, ValueError) and "is empty" not in str(error):
                    raise
                self._git.clear_cache()  # someone ended the cat-file process: start another
                return getattr(self._git, method)(name)

    def _remember(self, sha: str, kind: str, data: bytes) -> None:
        if len(data) > CACHE_BYTES // 32:
            return
        with self._lock:
            self._cached_bytes += len(data)
            if self._cached_bytes > CACHE_BYTES:
                self._cache.clear()
                self._cached_bytes = len(data)
            self._cache[sha] = (kind, data)

    def write(self, kind: str, data: bytes) -> str:
        """Store an object, on disk for good when this returns. Its id.

        Raises OSError: no space, no permission, a failing disk.
        """
        body = f"{kind} {len(data)}\0".encode() + data
        sha = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        folder = self._folder / sha[:2]
        try:
            os.utime(folder / sha[2:])  # as git does: what was just used survives a prune
        except FileNotFoundError:
            _write_durably(folder, sha[2:], zlib.compress(body, 1))
        except PermissionError:
            pass  # there, but another user's
        self._remember(sha, kind, data)
        return sha

    def tree(self, sha: str) -> Tree:
        """The entries of one tree, by name; names that are not UTF-8 keep their bytes."""
        kind, data = self.read(sha)
        if kind != "tree":
            raise UserError(f"{sha} is a {kind}, not a tree")
        entries, start = {}, 0
        while start < len(data):
            end = data.index(b"\0", start)
            mode, name = data[start:end].split(b" ", 1)
            entries[_text(name)] = Entry(mode.decode(), data[end + 1 : end + 21].hex())
            start = end + 21
        return entries

    def write_tree(self, entries: Mapping[str, Entry]) -> str:
        """Store a tree. Its id."""
        rows = [(name.encode("utf-8", "surrogateescape"), entry) for name, entry in entries.items()]
        # git sorts a folder as if its name ended in a slash
        rows.sort(key=lambda row: row[0] + b"/" if row[1].mode == TREE else row[0])
        return self.write(
            "tree",
            b"".join(
                entry.mode.encode() + b" " + name + b"\0" + bytes.fromhex(entry.sha)
                for name, entry in rows
            ),
        )

    def replace_files(self, tree: str | None, files: Mapping[str, bytes]) -> str:
        """The tree with these files' contents; modes stay, all else is carried over as it is.

        Raises UserError: a path that git or the tree has no place for, or that is no plain file.
        """
        entries = self.tree(tree) if tree else {}
        below: dict[str, dict[str, bytes]] = {}
        for path, data in files.items():
            name, _, rest = path.partition("/")
            if name in ("", ".", "..") or name.lower() == ".git" or "\0" in name:
                raise UserError(f"{path!r} is not a path inside the repository")
            if rest or path.endswith("/"):
                below.setdefault(name, {})[rest] = data
                continue
            mode = entries[name].mode if name in entries else FILE
            if mode in (TREE, LINK, SUBMODULE):
                raise UserError(f"{path!r} is {_WHAT[mode]} in this commit, not a file to edit")
            entries[name] = Entry(mode, self.write("blob", data))
        for name, files_below in below.items():
            mode = entries[name].mode if name in entries else TREE
            if mode != TREE:
                raise UserError(f"{name!r} is {_WHAT.get(mode, 'a file')} here, not a folder")
            old = entries[name].sha if name in entries else None
            entries[name] = Entry(TREE, self.replace_files(old, files_below))
        return self.write_tree(entries)

    def walk(self, tree: str, prefix: str = "") -> Iterator[tuple[str, Entry]]:
        """Every file, link and submodule of a tree with its path, in git's order."""
        for name, entry in self.tree(tree).items():
            if entry.mode == TREE:
                yield from self.walk(entry.sha, f"{prefix}{name}/")
            else:
                yield prefix + name, entry

    def find(self, tree: str, path: str) -> Entry | None:
        """The entry at a path of a tree, None where there is none."""
        entry = Entry(TREE, tree)
        for name in path.strip("/").split("/"):
            found = self.tree(entry.sha).get(name) if entry.mode == TREE else None
            if found is None:
                return None
            entry = found
        return entry


_WHAT = {TREE: "a folder", LINK: "a symbolic link", SUBMODULE: "a submodule"}


def _text(name: bytes | str) -> str:
    if isinstance(name, str):  # GitPython gives either, by its version
        return name
    return name.decode("utf-8", "surrogateescape")


def _write_durably(folder: Path, name: str, data: bytes) -> None:
    # git itself leaves loose objects and refs to the page cache unless core.fsync says otherwise;
    # the ledger is synced, so what it mentions has to be
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(folder.parent.stat().st_mode & 0o7777)  # core.sharedRepository's bits
        sync_folder(folder.parent)
    draft = folder / f"tmp_obj_{secrets.token_hex(6)}"  # the name that git prune sweeps up
    mode = 0o444 & folder.stat().st_mode
    try:
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    sync_folder(folder)
