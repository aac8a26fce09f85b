"""Refs move whole or not at all, whatever became of the git that moves them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest
from test_repository import commit, edited, git, make_lab

from jobs import names
from jobs.refs import Transactions
from jobs.repository import ABSENT, Repository


def long_lived(lab: Path) -> list[int]:
    """Git processes that wait there to move refs."""
    me = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
    ours = [Path(f"/proc/{pid}") for pid in me.read_text().split()]
    verbs = {int(p.name): (p / "cmdline").read_bytes() for p in ours if here(p, lab)}
    return [pid for pid, words in verbs.items() if b"update-ref" in words]


def here(process: Path, folder: Path) -> bool:
    with contextlib.suppress(OSError):  # it ended meanwhile
        return (process / "cwd").resolve() == folder.resolve()
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_git_that_was_ended_between_two_moves_is_started_again(
    tmp_path: Path, number: signal.Signals
) -> None:
    repository = Repository(lab := make_lab(tmp_path / "lab"))
    one = commit(repository, repository.start(), edited(1, "a = 1"))
    two = commit(repository, one, edited(2, "a = 1"))
    ref = names.branch_ref("night", "main")
    repository.point(ref, one)
    (git_itself,) = long_lived(lab)
    os.kill(git_itself, number)
    repository.point(ref, two, one)
    assert git(lab, "rev-parse", ref).strip() == two
    repository.close()
    assert long_lived(lab) == []


def test_what_git_refuses_is_told_moves_nothing_and_hinders_nothing_after_it(
    tmp_path: Path,
) -> None:
    lab = make_lab(tmp_path / "lab")
    start = git(lab, "rev-parse", "HEAD").strip()
    moves = Transactions(lab)
    made, other = (f"update refs/autoresearch/{name} {start}" for name in ("one", "two"))
    said = moves.commit(f"{made} {ABSENT}\n{other} {start}\n")
    assert "refs/autoresearch/two" in (said or "")
    assert git(lab, "for-each-ref", "refs/autoresearch") == ""
    assert moves.commit(f"{made} {ABSENT}\n") is None
    assert git(lab, "rev-parse", "refs/autoresearch/one").strip() == start
    assert moves.close() == ""
