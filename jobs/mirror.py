"""What of a campaign travels with git: notes that read as a lab notebook, records, push and fetch.

With its records a campaign can be rebuilt from git alone, in any clone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from jobs.effects import effect
from jobs.errors import AutoresearchError, Paused, UserError
from jobs.names import check_name, records_ref
from jobs.objects import FILE, TREE, Entry, Objects
from jobs.repository import BranchInUse, Move, RefMoved, Repository
from jobs.tables import write_whole
from jobs.text import lines

NOTES = "refs/notes/autoresearch"
INCOMING = "refs/autoresearch-incoming/"  # what a fetch brings, until it was compared
CHUNK = 256 << 10  # bytes of ledger in one blob: the last, growing one is stored anew each time
TRIES = 5


def note(repository: Repository, notes: Mapping[str, str]) -> None:
    """Set notes (commit -> text) of any number of commits, for git log --notes=autoresearch.

    Costs about the same for one as for a hundred, so callers may collect them. Raises Paused: git
    could not write, or others write notes without pause.
    """
    texts = {c: f"{lines(text)}\n".encode("utf-8", "replace") for c, text in notes.items()}

    def noted(old: str | None) -> str:
        blobs = {c: repository.objects.write("blob", text) for c, text in texts.items()}
        return _with_notes(repository.objects, old, blobs)

    with effect("git.notes"):
        _advance(repository, NOTES, "Notes of autoresearch", noted)


def _advance(
    repository: Repository, ref: str, message: str, change: Callable[[str | None], str]
) -> None:
    """Put a commit of the tree that `change` makes of the present one (None: none) on a ref.

    Raises Paused: git could not write, or others write there without pause.
    """
    for _ in range(TRIES):
        head = repository.objects.resolve(f"{ref}^{{commit}}")
        old = repository.tree(head) if head else None
        with effect("git.objects"), repository.writing():
            tree = change(old)
            if tree == old:
                return
            new = repository.write_commit(tree, [head] if head else [], f"{message}\n")
        try:
            repository.point(ref, new, head)
            return
        except RefMoved:
            continue  # another campaign of this clone, a push, or a person wrote meanwhile
    raise Paused(f"{ref} moved {TRIES} times while it was written", "Start again")


def _with_notes(
    objects: Objects, tree: str | None, notes: Mapping[str, str], top: bool = True
) -> str:
    """A notes tree with these blobs, by the rest of the commit's id (git reads any fan-out)."""
    entries = objects.tree(tree) if tree else {}
    below: dict[str, dict[str, str]] = {}
    for name, blob in notes.items():
        folder = entries.get(name[:2])
        if top or (folder and folder.mode == TREE):
            entries.pop(name, None)  # git itself keeps few notes flat; two would be shown as one
            below.setdefault(name[:2], {})[name[2:]] = blob
        else:
            entries[name] = Entry(FILE, blob)
    for prefix, group in below.items():
        old = entries[prefix].sha if prefix in entries else None
        entries[prefix] = Entry(TREE, _with_notes(objects, old, group, top=False))
    return objects.write_tree(entries)


def noted(repository: Repository) -> set[str]:
    """The commits that have a note."""
    head = repository.objects.resolve(f"{NOTES}^{{commit}}")
    if head is None:
        return set()
    return {path.replace("/", "") for path, _ in repository.objects.walk(repository.tree(head))}


def save_records(repository: Repository, campaign: str, records: Mapping[str, bytes]) -> None:
    """Keep these records (name or path -> bytes) beside those that are kept already.

    Raises Paused: git could not write, or others write records without pause.
    """
    _save(repository, campaign, lambda old: records)


def _save(
    repository: Repository, campaign: str, due: Callable[[str | None], Mapping[str, bytes]]
) -> None:
    def change(old: str | None) -> str:
        return repository.objects.replace_files(old, due(old))

    _advance(repository, records_ref(campaign), f"Records of campaign {campaign}", change)


def load_records(repository: Repository, campaign: str) -> dict[str, bytes]:
    """All records of a campaign. Raises UserError: this clone holds none."""
    head = repository.objects.resolve(f"{records_ref(campaign)}^{{commit}}")
    if head is None:
        raise UserError(
            f"this clone holds no records of campaign {campaign!r}; it has {_known(repository)}. "
            "Get them with autoresearch fetch REMOTE"
        )
    files = repository.objects.walk(repository.tree(head))
    return {path: repository.objects.read(entry.sha)[1] for path, entry in files}


def save_ledger(
    repository: Repository, campaign: str, ledger: Path, others: Mapping[str, bytes] | None = None
) -> None:
    """Keep the ledger's whole lines, in chunks, and other records with it; reads only what is not
    kept yet.

    Its writer and `autoresearch push` may do so at once. A line that a kill tore is cut off when
    its writer starts again: kept, it would be a history that nobody has.
    """

    def due(old: str | None) -> dict[str, bytes]:
        kept = old and repository.objects.find(old, "ledger")
        number = max(0, len(repository.objects.tree(kept.sha)) - 1) if kept else 0
        records = dict(others or {})
        with open(ledger, "rb") as file:
            end = _end_of_lines(file)
            for start in range(number * CHUNK, end, CHUNK):  # the last one may have been half full
                file.seek(start)
                records[f"ledger/{start // CHUNK:06}"] = file.read(min(CHUNK, end - start))
        return records

    _save(repository, campaign, due)


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends, in bytes."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - CHUNK)
        file.seek(start)
        if found := file.read(position - start).rfind(b"\n") + 1:
            return start + found
        position = start
    return 0


def load_ledger(repository: Repository, campaign: str) -> bytes:
    """The campaign's ledger.jsonl as it was when it was last kept. Raises as `load_records`."""
    records = load_records(repository, campaign)
    return b"".join(records[name] for name in sorted(records) if name.startswith("ledger/"))


def restore(repository: Repository, campaign: str, folder: Path) -> bool:
    """Bring the ledger in a campaign's folder up to the one kept in git; whether that was needed.

    Raises UserError: the campaign went on both here and elsewhere.
    """
    if repository.objects.resolve(records_ref(campaign)) is None:
        return False
    kept, path = load_ledger(repository, campaign), folder / "ledger.jsonl"
    old = path.read_bytes() if path.exists() else b""
    if old.startswith(kept):
        return False
    if not kept.startswith(old):
        raise UserError(
            f"campaign {campaign} went on both here and elsewhere: {path} and the records that "
            "were fetched differ. One clone may run it: move this folder away to see the other's"
        )
    if path.exists():
        write_whole(path, kept)
        return True
    draft = path.with_name(f"{path.name}.restored-{os.getpid()}")
    write_whole(draft, kept)
    try:
        os.link(draft, path)  # never over the one that another start has just brought back
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def push(repository: Repository, remote: str, campaign: str) -> None:
    """Send a campaign's branches, attempts, records and the notes to a remote (name or URL).

    Raises:
        UserError: an odd remote, or nothing to send.
        AutoresearchError: git's own words; nothing there is ever overwritten.
    """
    _check(remote, campaign)
    if not repository.refs(f"refs/autoresearch/{campaign}"):
        raise UserError(f"no campaign {campaign!r} in this clone; it has {_known(repository)}")
    specs = [f"{ref}:{ref}" for ref in _refs(campaign)]
    if repository.objects.resolve(NOTES):
        specs.append(f"{NOTES}:{NOTES}")
    _transfer(repository, remote, ["push", "-q", "--recurse-submodules=no"], specs)


def fetch(repository: Repository, remote: str, campaign: str) -> str | None:
    """Get a campaign's branches, attempts, records and the notes from a remote (name or URL).

    Notes of both sides are merged; where both have one for a commit, this clone's stays. What has
    gone further here than there stays, too.

    Returns:
        In words, which branch stays where it is since it is checked out here; all else came.

    Raises:
        UserError: an odd remote, or no such campaign there.
        AutoresearchError: git's own words; or the campaign went on both here and there, and then
            nothing here has changed.
    """
    _check(remote, campaign)
    _forget_incoming(repository)  # of a fetch that was killed
    wanted = (*_refs(campaign), f"{NOTES}*")
    specs = [f"+{ref}:{INCOMING}{ref.removeprefix('refs/')}" for ref in wanted]
    # --no-prune: with remote.<name>.prune set, git would delete the attempts not sent there yet
    command = ["fetch", "-q", "--no-tags", "--no-prune", "--no-recurse-submodules"]
    try:
        _transfer(repository, remote, command, specs)
        refs = repository.refs(INCOMING.rstrip("/"))
        came = {f"refs/{ref.removeprefix(INCOMING)}": commit for ref, commit in refs.items()}
        if not any(ref.startswith(f"refs/autoresearch/{campaign}/") for ref in came):
            raise UserError(f"{remote} has no campaign {campaign!r}")
        notes = [came.pop(ref) for ref in list(came) if ref.startswith(NOTES)]
        stays = None
        try:
            repository.point_all(_moves(repository, campaign, came))
        except BranchInUse as error:  # the user's checkout; the next fetch or start moves it
            stays = str(error)
        if notes:
            _merge_notes(repository)
        return stays
    finally:
        _forget_incoming(repository)


def _moves(repository: Repository, campaign: str, came: Mapping[str, str]) -> list[Move]:
    """Refs that are not here yet, or that lag behind on the same line."""
    here = repository.refs(*(ref.removesuffix("/*") for ref in _refs(campaign)))
    moves: list[Move] = []
    for ref, there in came.items():
        now = here.get(ref)
        if now is None or (now != there and repository.leads_to(now, there)):
            moves.append((ref, there, now))
        elif now != there and not repository.leads_to(there, now):
            raise AutoresearchError(
                f"campaign {campaign} went on both here and elsewhere: {ref} is {now} here and "
                f"{there} there, and neither leads to the other. Nothing was changed. One clone "
                "may run it: to see the other's, fetch into another clone"
            )
    return moves


def _merge_notes(repository: Repository) -> None:
    name, _, email = repository.identity.partition(" <")
    who = ["-c", f"user.name={name}", "-c", f"user.email={email.rstrip('>')}"]
    incoming = f"{INCOMING}{NOTES.removeprefix('refs/')}"
    repository.git(*who, "notes", "--ref", NOTES, "merge", "-q", "-s", "ours", incoming)


def _forget_incoming(repository: Repository) -> None:
    if found := repository.refs(INCOMING.rstrip("/")):
        lines = "".join(f"delete {ref}\n" for ref in found)
        repository.run("update-ref", "--stdin", stdin=lines)


def _refs(campaign: str) -> tuple[str, str]:
    return f"refs/heads/autoresearch/{campaign}/*", f"refs/autoresearch/{campaign}/*"


def _check(remote: str, campaign: str) -> None:
    check_name("campaign", campaign)
    if not remote or remote.startswith("-"):
        raise UserError(f"{remote!r} is no remote: give its name (git remote -v) or its URL")


def campaigns(repository: Repository) -> list[str]:
    """The campaigns that this clone holds something of."""
    return sorted({ref.split("/")[2] for ref in repository.refs("refs/autoresearch")})


def _known(repository: Repository) -> str:
    return ", ".join(campaigns(repository)) or "none"


def _transfer(repository: Repository, remote: str, command: list[str], specs: list[str]) -> None:
    status, _, said = repository.run(*command, "--", remote, *specs)
    if status != 0:
        ahead = "non-fast-forward" in said or "fetch first" in said
        hint = f". The other side has more: autoresearch fetch {remote} first" if ahead else ""
        if "not appear to be a git repository" in said or "not found" in said:
            hint = ". Name a remote (git remote -v; git remote add NAME URL), or give a URL"
        failed = f"git {command[0]} {remote} failed: {said}{hint}"
        raise AutoresearchError(re.sub(r"//[^/@\s]+@", "//", failed))  # passwords in URLs
