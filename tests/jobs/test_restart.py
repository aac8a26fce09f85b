"""Killed at any boundary between lease, ledger and snapshot, the next start finds all in order."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import effects, lease, ledger, snapshot

ROOT = Path(__file__).parents[2]
START = """
import sys, time
from pathlib import Path
from jobs import lease, ledger, snapshot
folder = Path(sys.argv[1])
with lease.acquire(folder, 0.3) as held:
    book = ledger.Ledger(folder / "ledger.jsonl", held.fence, held.check)
    book.append("lease_taken", pid=held.process.pid)
    state, tail = snapshot.open_history(folder)
    book.append_all([("branch_added", {"branch": f"b{held.fence}"}), ("resumed", {})])
    state, tail = snapshot.open_history(folder)
    snapshot.save(folder, state, tail.offset)
    time.sleep(0.2)
"""
OURS = ("lease.take", "lease.beat", "lease.release", "ledger.create", "ledger.append",
        "ledger.truncate", "snapshot.write")  # fmt: skip


def start(folder: Path, **environment: str) -> int:
    command = [sys.executable, "-c", START, str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def test_the_start_crosses_every_boundary_of_ours(tmp_path: Path) -> None:
    hits = tmp_path / "hits"
    assert start(tmp_path, AUTORESEARCH_HITS=str(hits)) == 0
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(b"{torn")
    assert start(tmp_path, AUTORESEARCH_HITS=str(hits)) == 0
    expected = {crossing for crossing in effects.CROSSINGS if crossing.startswith(OURS)}
    assert set(hits.read_text().split()) == expected


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("boundary", [*OURS, "ledger.append:2"])
def test_after_a_kill_the_next_start_goes_on(tmp_path: Path, boundary: str, side: str) -> None:
    name, _, count = boundary.partition(":")
    if name == "ledger.truncate":
        assert start(tmp_path) == 0
        with open(tmp_path / "ledger.jsonl", "ab") as file:
            file.write(b"{torn")
    point = f"{name}:{side}:{count or 1}"
    assert start(tmp_path, AUTORESEARCH_KILL_AT=point) == -signal.SIGKILL
    before = lease.holder(tmp_path)
    assert start(tmp_path) == 0
    after = lease.holder(tmp_path)
    assert after is not None
    assert after.released
    assert after.fence > (before.fence if before else 0)
    state, tail = snapshot.open_history(tmp_path)
    assert f"b{after.fence}" in state.branches
    assert tail.torn == b""
    assert [e["n"] for e in ledger.read(tmp_path / "ledger.jsonl")] == list(range(state.events))
    assert snapshot.load(tmp_path) is not None
