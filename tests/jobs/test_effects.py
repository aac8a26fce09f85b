"""Boundaries: each can be killed at, each crossing can be listed, and no name is unknown."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import effects

ROOT = Path(__file__).parents[2]
CODE = """
from jobs.effects import effect
for i in range(3):
    with effect("ledger.append"):
        print(i, flush=True)
    try:
        with effect("git.ref"):
            raise OSError("refused")
    except OSError:
        pass
"""


def crossing(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("point", "printed"),
    [
        ("ledger.append", ""),
        ("ledger.append:before", ""),
        ("ledger.append:after", "0\n"),
        ("ledger.append:3", "0\n1\n"),
        ("ledger.append:after:2", "0\n1\n"),
        ("git.ref:2", "0\n1\n"),
    ],
)
def test_the_process_is_killed_at_the_named_crossing(point: str, printed: str) -> None:
    done = crossing(AUTORESEARCH_KILL_AT=point)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, printed)


def test_crossings_are_listed_in_order_and_a_failed_effect_has_no_after(tmp_path: Path) -> None:
    hits = tmp_path / "hits"
    assert crossing(AUTORESEARCH_HITS=str(hits)).returncode == 0
    once = ["ledger.append:before", "ledger.append:after", "git.ref:before"]
    assert hits.read_text().split() == once * 3
    assert set(once) < set(effects.CROSSINGS)


def test_the_crossing_that_kills_is_listed_too(tmp_path: Path) -> None:
    hits = tmp_path / "hits"
    crossing(AUTORESEARCH_HITS=str(hits), AUTORESEARCH_KILL_AT="ledger.append:after")
    assert hits.read_text().split()[-1] == "ledger.append:after"


@pytest.mark.parametrize("point", ["ledger", "ledger.append:during", "git.ref:x", "git.ref:1:2"])
def test_a_point_that_could_never_be_hit_is_refused(point: str) -> None:
    done = crossing(AUTORESEARCH_KILL_AT=point)
    assert done.returncode == 1
    assert "is no boundary; use NAME" in done.stderr


def test_an_effect_must_be_registered() -> None:
    with pytest.raises(ValueError, match="not registered"):
        effects.effect("coffee.make")
