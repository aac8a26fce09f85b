"""The git repository of a lab: commits, refs and snapshots; never its checkout, index or branch.

An experiment is a commit built from objects alone, held by refs/autoresearch/<campaign>/<id>; the
head of a branch is refs/heads/autoresearch/<campaign>/<branch>. What travels with git beside them
(notes, records, push and fetch) is in jobs/mirror.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # a missing git is told below, in words
import git

from jobs import checkout
from jobs.effects import effect
from jobs.errors import AutoresearchError, Paused, UserError, refusals_told
from jobs.names import commit_message
from jobs.objects import LINK, SUBMODULE, TREE, Entry, Objects
from jobs.refs import SYNCED, Transactions, plain_words
from jobs.text import one_line

IDENTITY = ("autoresearch", "autoresearch@localhost")  # where git knows no user.name, user.email
ABSENT = "0" * 40
OLDEST_GIT = (2, 27)  # June 2020: transactions of update-ref
PACK_FROM = 3000  # loose objects; git's own gc --auto starts at 6700

Move = tuple[str, str, str | None]  # ref, new commit, commit it is at now (None: it is not there)

# Set by git for hooks and aliases: they would turn our git to another repository or index.
_CALLERS = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_NAMESPACE"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_PREFIX"),
)


class RefMoved(AutoresearchError):
    """A ref is neither where it was expected nor where it is to go: somebody else moved it."""


class BranchInUse(AutoresearchError):
    """A branch is checked out by the user: moving it would turn their status upside down."""


class Repository:
    """One lab's repository. Reads and `pack` may be called from any thread, the rest from one.

    Attributes:
        root: its work tree.
        objects: its object store.
    """

    def __init__(self, path: Path | str) -> None:
        """Open the repository that holds `path`.

        Raises UserError: no git program, no repository, a kind of repository this cannot serve.
        """
        for name in _CALLERS:
            os.environ.pop(name, None)
        self._repo = _open(Path(path))
        self.root = Path(self._repo.working_tree_dir or path)
        self._refs = Transactions(self.root)
        self.objects = Objects(self._repo)
        config = self._repo.config_reader()
        self._user = tuple(str(config.get_value("user", k, default="")) for k in ("name", "email"))
        self._partial = bool(config.get_value("extensions", "partialclone", default=""))

    def close(self) -> None:
        """End the long-lived git processes; they are started again when needed."""
        self._refs.close()
        self._repo.close()

    def run(self, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        """Run git in the work tree: exit status, standard output, standard error on one line."""
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.root,
            env=plain_words(),
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
            check=False,
        )
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        return done.returncode, out, one_line(err) or f"exit status {done.returncode}"

    def git(self, *arguments: str) -> str:
        """What git prints, run in the work tree. Raises Paused, in git's words, if it fails."""
        status, out, err = self.run(*arguments)
        if status != 0:
            verb = next(word for word in arguments if word[0] != "-" and "=" not in word)
            raise Paused(f"git {verb} in {self.root} failed: {err}", _remedy(err))
        return out

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Turns what the disk refuses inside into Paused, in words."""
        return refusals_told(Path(self._repo.common_dir) / "objects", "written")

    def remarks(self, apart: Iterable[str] = ()) -> list[str]:
        """What a person should know about this repository before a campaign, a sentence each.

        Args:
            apart: paths whose uncommitted changes are seen all the same.
        """
        said = []
        if (Path(self._repo.common_dir) / "shallow").exists():
            said.append(
                "shallow clone: experiments work, history before its edge cannot be reproduced or "
                "pushed everywhere (git fetch --unshallow completes it)"
            )
        if self._partial:
            said.append("partial clone: objects that are missing are fetched from its remote")
        if self._repo.head.is_detached:
            said.append("detached HEAD: experiments start from the commit it is at")
        # status would refresh the user's index file on the way
        others = [".", *(f":(exclude){path}" for path in apart)]
        asked = ("status", "--porcelain", "--untracked-files=no", "--", *others)
        status = self.git("--no-optional-locks", *asked)
        if status:
            said.append(
                f"{len(status.splitlines())} uncommitted changes: experiments start from the last "
                "commit and do not see them"
            )
        if (self.root / ".gitmodules").exists():
            said.append("submodules: experiments carry them over unchanged and run without them")
        return said

    def exclude(self, pattern: str) -> None:
        """Have git ignore `pattern` in this clone (.git/info/exclude), once."""
        path = Path(self._repo.common_dir) / "info" / "exclude"
        with refusals_told(path, "written"):
            old = path.read_text(errors="surrogateescape") if path.exists() else ""
            if pattern in old.splitlines():
                return
            path.parent.mkdir(exist_ok=True)
            with effect("git.exclude"), open(path, "a") as file:
                file.write(f"{pattern}\n" if old.endswith("\n") or not old else f"\n{pattern}\n")

    # Commits

    def start(self, ref: str = "HEAD") -> str:
        """The commit behind a branch, tag, ref or (abbreviated) id.

        Raises UserError: nothing is committed yet, no such commit, an ambiguous prefix.
        """
        if sha := self.objects.resolve(f"{ref}^{{commit}}"):
            return sha
        self.objects.resolve(ref)  # says so if it is ambiguous
        if ref == "HEAD":
            raise UserError(
                f"{self.root} has no commit yet: git add what experiments start from, git commit"
            )
        raise UserError(f"no commit {ref!r} in {self.root}: see git branch --all and git log")

    def tree(self, commit: str) -> str:
        """The id of a commit's tree."""
        kind, data = self.objects.read(commit)
        if kind != "commit":
            raise UserError(f"{commit} is a {kind}, not a commit")
        return data[5:45].decode()

    def read(self, commit: str, path: str) -> str:
        """The text of one file of a commit, line ends untouched.

        Raises UserError: no such file there, or not UTF-8 text.
        """
        entry = self.objects.find(self.tree(commit), path)
        if entry is None or entry.mode in (TREE, LINK, SUBMODULE):
            raise UserError(f"commit {commit[:10]} has no file {path!r}")
        try:
            return self.objects.read(entry.sha)[1].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path!r} in commit {commit[:10]} is not UTF-8: {error}") from None

    def commit(
        self,
        base: str,
        files: Mapping[str, str],
        message: str,
        trailers: Mapping[str, str | None],
        when: float | None = None,
    ) -> str:
        """A commit on `base` with these files' new texts, referenced by nothing yet. Its id.

        The same arguments give the same commit. `when` is in seconds since 1970 (None: now).

        Raises:
            UserError: `base` is not here, or a path is no file that could be edited.
            Paused: the object store cannot be written.
        """
        texts = {path: text.encode("utf-8", "replace") for path, text in files.items()}
        base = self.start(base)
        with effect("git.objects"), self.writing():
            tree = self.tree(base)
            if texts:
                tree = self.objects.replace_files(tree, texts)
            return self.write_commit(tree, [base], commit_message(message, trailers), when)

    def write_commit(
        self, tree: str, parents: Iterable[str], message: str, when: float | None = None
    ) -> str:
        """Store a commit of the user (or of the project, where git knows no user). Its id."""
        stamp = f"{self.identity} {int(time.time() if when is None else when)} +0000"
        rows = [f"tree {tree}", *(f"parent {parent}" for parent in parents)]
        rows += [f"author {stamp}", f"committer {stamp}", "", message]
        return self.objects.write("commit", "\n".join(rows).encode("utf-8", "replace"))

    @property
    def identity(self) -> str:
        """'Name <mail>' of the user, or the project's own where git knows none."""
        name = os.environ.get("GIT_AUTHOR_NAME") or self._user[0] or IDENTITY[0]
        email = os.environ.get("GIT_AUTHOR_EMAIL") or self._user[1] or IDENTITY[1]
        name, email = (re.sub(r"[<>\x00-\x1f]", "", part).strip() for part in (name, email))
        return f"{name} <{email}>"

    def trailers(self, commit: str) -> dict[str, str]:
        """The trailers of a commit; empty for one that is no experiment's."""
        written = self.objects.read(self.start(commit))[1].decode("utf-8", "replace")
        last = written.rstrip("\n").rpartition("\n\n")[2]
        found = re.findall(r"^([A-Za-z0-9-]+): (.*)$", last, re.MULTILINE)
        return dict(found) if any(key == "Campaign" for key, _ in found) else {}

    # Refs

    def point(self, ref: str, new: str, old: str | None = None) -> None:
        """Move a ref from `old` (None: it does not exist) to `new`; again is harmless.

        A branch that only lags behind `old` on its own line (it was in use when it was to move)
        or that is gone is brought up to `new`.

        Raises:
            RefMoved: it is somewhere else; nothing was changed.
            BranchInUse: a branch that is checked out here or in a linked work tree.
            Paused: git could not write.
        """
        self.point_all([(ref, new, old)])

    def point_all(self, moves: Sequence[Move]) -> None:
        """`point` for many refs by one process; should one fail, each is tried by itself.

        Raises as `point` does: BranchInUse only where nothing worse befell another.
        """
        if not moves:
            return
        used = (
            self._checked_out() if any(ref.startswith("refs/heads/") for ref, _, _ in moves) else {}
        )
        if not any(ref in used for ref, _, _ in moves) and self._swap(moves) is None:
            return
        now = self.refs(*(ref for ref, _, _ in moves))
        troubles = []
        for move in moves:
            try:
                self._point_one(move, now.get(move[0]), used)
            except AutoresearchError as error:
                troubles.append(error)
        if troubles:
            raise min(troubles, key=lambda trouble: isinstance(trouble, BranchInUse))

    def _point_one(self, move: Move, now: str | None, used: Mapping[str, str]) -> None:
        ref, new, old = move
        if now == new:
            return
        if ref in used:
            raise BranchInUse(
                f"{_short(ref)} is checked out in {used[ref]} and stays at {now and now[:10]} "
                f"until another branch is (git switch); it is to be at {new[:10]}"
            )
        if now not in (None, old) and not (old and self.leads_to(now, old)):
            raise RefMoved(
                f"moving {_short(ref)} from {old and old[:10]} to {new[:10]}: it is at {now[:10]}, "
                f"moved by something else. If that may be lost: git update-ref {ref} {new}"
            )
        if trouble := self._swap([(ref, new, now)]):
            raise Paused(
                f"git could not move {_short(ref)} to {new[:10]}: {trouble}", _remedy(trouble)
            )

    def _swap(self, moves: Sequence[Move]) -> str | None:
        """Compare and swap all of them or none. What git says where it could not."""
        kinds = {
            "git.branch" if ref.startswith("refs/heads/") else "git.ref" for ref, _, _ in moves
        }
        lines = "".join(f"update {ref} {new} {old or ABSENT}\n" for ref, new, old in moves)
        with effect(min(kinds)):
            return self._refs.commit(lines)

    def refs(self, *patterns: str) -> dict[str, str]:
        """Refs and their commits: of these names, and below them ("refs/autoresearch/night")."""
        out = self.git("for-each-ref", "--format=%(refname) %(objectname)", *patterns)
        return dict(line.split(" ") for line in out.splitlines())

    def restore(self, refs: Mapping[str, str]) -> list[str]:
        """Make refs agree with the ledger (after a kill, a lost disk). What could not be mended."""
        now = self.refs("refs/autoresearch", "refs/heads/autoresearch")
        wrong = {ref: sha for ref, sha in refs.items() if now.get(ref) != sha}
        gone = {ref: sha for ref, sha in wrong.items() if self.objects.resolve(sha) is None}
        trouble = [f"{_short(ref)}: its commit {sha} was pruned" for ref, sha in gone.items()]
        self.point_all([(r, s, None) for r, s in wrong.items() if r not in now and r not in gone])
        for ref, sha in wrong.items():
            if ref in now and ref not in gone:
                try:
                    self.point(ref, sha, sha)
                except (RefMoved, BranchInUse) as error:
                    trouble.append(str(error))
        return trouble

    def leads_to(self, ancestor: str, commit: str) -> bool:
        """Whether `commit` is `ancestor` or descends from it."""
        return self.run("merge-base", "--is-ancestor", ancestor, commit)[0] == 0

    def _checked_out(self) -> dict[str, str]:
        """Branches that are checked out, with the folder: this clone's and linked work trees'."""
        common = Path(self._repo.common_dir)
        heads = {common / "HEAD": str(common.parent)}
        for place in common.glob("worktrees/*/gitdir"):
            heads[place.with_name("HEAD")] = str(Path(place.read_text().strip()).parent)
        found = {}
        for head, folder in heads.items():
            kind, _, ref = head.read_text(errors="replace").strip().partition(": ")
            if kind == "ref":
                found[ref] = folder
        return found

    def pack(self, least: int = PACK_FROM) -> bool:
        """Pack loose objects and refs, so that git stays quick at 10,000 experiments.

        The user's own packs stay as they are and nothing is dropped, whether something refers to it
        or not. May run in a thread of its own. False: fewer than `least` loose objects. Raises
        Paused: git could not write.
        """
        folder = Path(self._repo.common_dir) / "objects"
        sample = folder / "17"  # ids are even: git gc --auto estimates from this folder, too
        if least > 0 and (not sample.exists() or len(list(sample.iterdir())) * 256 < least):
            return False
        with effect("git.pack"):
            # not git repack: that would walk the user's whole history
            loose = "".join(
                f"{p.parent.name}{p.name}\n" for p in folder.glob(f"{_HEX * 2}/{_HEX}*")
            )
            name = str(folder / "pack" / "autoresearch")
            pack = ("-c", "pack.threads=1", "pack-objects", "-q", "--incremental", name)
            status, _, err = self.run(*SYNCED, *pack, stdin=loose) if loose else (0, "", "")
            if status != 0:
                raise Paused(f"git pack-objects in {self.root} failed: {err}", _remedy(err))
            self.git("prune-packed", "-q")
            self.git(*SYNCED, "pack-refs", "--all")
        return True

    # Files

    def snapshot(self, commit: str, folder: Path, paths: Iterable[str] = ()) -> None:
        """The files of a commit (all, or those below `paths`) in `folder`, read-only.

        The folder appears whole or not at all. One that is there already is compared byte by byte
        and made again where it differs. Submodules become empty folders, as git archive has them.

        Raises:
            UserError: a path that is not in the commit, a link that leaves the tree.
            Paused: the disk refused.
        """
        files = self._files(commit, tuple(paths))
        with effect("run.snapshot"), refusals_told(folder, "written"):
            checkout.materialise(self.objects, files, folder)

    def _files(self, commit: str, paths: Sequence[str]) -> dict[str, Entry]:
        tree = self.tree(commit)
        if not paths:
            return dict(self.objects.walk(tree))
        files: dict[str, Entry] = {}
        for path in paths:
            entry = self.objects.find(tree, path)
            if entry is None:
                raise UserError(f"commit {commit[:10]} has no {path!r}")
            path = path.strip("/")
            below = (
                self.objects.walk(entry.sha, path + "/") if entry.mode == TREE else [(path, entry)]
            )
            files.update(below)
        return files

    def diff(self, a: str, b: str, paths: Iterable[str] = ()) -> str:
        """A unified diff from commit `a` to commit `b`, without colours or the user's drivers."""
        return self.git(*_DIFF, "-p", a, b, "--", *paths)

    def merge_file(self, base: str, ours: str, theirs: str) -> str | None:
        """Three texts merged by lines; None where the two sides touch the same lines."""
        with tempfile.TemporaryDirectory() as folder:
            names = []
            for name, text in (("ours", ours), ("base", base), ("theirs", theirs)):
                (Path(folder) / name).write_bytes(text.encode("utf-8", "surrogateescape"))
                names.append(f"{folder}/{name}")
            status, merged, err = self.run("merge-file", "-p", "-q", *names)
        if status > 127:  # below: the number of conflicts
            raise Paused(f"git merge-file failed: {err}", _remedy(err))
        return merged if status == 0 else None


# plumbing: diff.noprefix, diff.external and their like are the user's, not ours
_DIFF = ("--literal-pathspecs", "diff-tree", "-r", "--no-renames", "--no-ext-diff", "--no-textconv")
_HEX = "[0-9a-f]"


def _open(path: Path) -> git.Repo:
    try:
        version = git.Git().version_info
    except git.GitCommandNotFound:
        raise UserError("git is not on PATH: install it (Debian: apt-get install git)") from None
    if version < OLDEST_GIT:
        raise UserError(
            f"git {'.'.join(map(str, version))} is too old, 2.27 or newer is needed: update it, or "
            "load a newer one (module avail git)"
        )
    if os.path.expandvars(path) != str(path):
        raise UserError(f"{path} holds a $ that git's library takes for a variable: rename it")
    try:
        repo = git.Repo(path, search_parent_directories=True, expand_vars=False)
    except (git.InvalidGitRepositoryError, git.NoSuchPathError):
        raise UserError(
            f"{path} is not in a git repository: autoresearch init makes a lab, or run git init, "
            "git add and git commit there"
        ) from None
    status, _, err = repo.git.execute(
        ["git", "rev-parse", "--git-dir"], with_extended_output=True, with_exceptions=False
    )
    if status != 0:  # mostly "dubious ownership", with the command that allows it
        raise UserError(f"git refuses {path}: {one_line(err)}")
    config = repo.config_reader("repository")
    unusual = [
        config.get_value("extensions", key, default="") for key in ("objectformat", "refstorage")
    ]
    if unusual[0] not in ("", "sha1") or unusual[1] not in ("", "files"):
        raise UserError(
            f"{path} keeps its objects or refs in a format that is not served ({unusual}): clone "
            "it into one made by git init --object-format=sha1 --ref-format=files"
        )
    if repo.bare or repo.working_tree_dir is None:
        raise UserError(f"{path} is a bare repository: clone it and start in the clone")
    return repo


def _short(ref: str) -> str:
    return ref.removeprefix("refs/heads/")


def _remedy(trouble: str) -> str:
    known = {
        "No space": "Free space on this disk (autoresearch clean), then start again",
        "quota": "Free space within your quota (autoresearch clean), then start again",
        "Read-only": "Remount the file system or move the repository, then start again",
        ".lock': File exists": "If no git runs there, delete that .lock file, then start again",
        "ermission": "Give yourself write permission below .git, then start again",
        "unable to create": "Give yourself write permission below .git, then start again",
        "cannot create": "A branch or ref stands in the way: rename it (git branch -m)",
    }
    for sign, remedy in known.items():
        if sign in trouble:
            return remedy
    return "Mend that, then start again: everything recorded before is intact"
