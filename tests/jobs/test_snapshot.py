"""The snapshot: a fast way to the same state, and never to another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from story import Story

from jobs import ledger, snapshot
from jobs.history import State

RECORDED = Path(__file__).parent / "ledgers" / "v1.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(RECORDED, tmp_path / "ledger.jsonl")
    return tmp_path


def test_a_history_opened_from_a_snapshot_is_the_one_that_was_replayed(folder: Path) -> None:
    replayed, tail = snapshot.open_history(folder)
    snapshot.save(folder, replayed, tail.offset)
    assert snapshot.load(folder) is not None
    opened, _ = snapshot.open_history(folder)
    assert opened == replayed
    assert opened.experiment("e0003") == replayed.experiment("e0003")


@pytest.mark.parametrize("events", [1, 20, 60, 100])
def test_the_rest_of_the_ledger_is_folded_on_top(folder: Path, events: int) -> None:
    whole, _ = snapshot.open_history(folder)
    path = folder / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:events]))
    part, tail = snapshot.open_history(folder)
    snapshot.save(folder, part, tail.offset)
    path.write_bytes(b"".join(lines))
    assert snapshot.load(folder) is not None
    assert snapshot.open_history(folder)[0] == whole


def test_a_snapshot_of_another_ledger_is_refused(folder: Path) -> None:
    state, tail = snapshot.open_history(folder)
    snapshot.save(folder, state, tail.offset)
    path = folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b"2.1847", b"2.1848"))
    assert snapshot.load(folder) is None
    assert snapshot.open_history(folder)[0].branch("main").baseline_metric == 2.1848


def test_a_snapshot_beyond_its_ledgers_end_is_refused(folder: Path) -> None:
    state, tail = snapshot.open_history(folder)
    snapshot.save(folder, state, tail.offset)
    path = folder / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert snapshot.load(folder) is None
    assert snapshot.open_history(folder)[0].events < state.events


def test_a_damaged_or_foreign_snapshot_is_ignored(folder: Path) -> None:
    state, tail = snapshot.open_history(folder)
    snapshot.save(folder, state, tail.offset)
    path = folder / "snapshot.json"
    whole = path.read_bytes()
    header = json.loads(whole.partition(b"\n")[0])
    newer = json.dumps(header | {"v": 99}).encode() + whole[whole.index(b"\n") :]
    for content in (b"", b"{}", whole[:-5], whole.replace(b"keep", b"kept"), newer, b"[]\n"):
        path.write_bytes(content)
        assert snapshot.load(folder) is None
        assert snapshot.open_history(folder)[0] == state


def test_a_torn_last_line_is_reported_and_left_for_the_writer(folder: Path) -> None:
    with open(folder / "ledger.jsonl", "ab") as file:
        file.write(b'{"v":1')
    state, tail = snapshot.open_history(folder)
    assert tail.torn == b'{"v":1'
    snapshot.save(folder, state, tail.offset)
    assert snapshot.open_history(folder)[0] == state


def test_no_ledger_is_said_by_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        snapshot.open_history(tmp_path)


def test_what_is_in_flight_survives_a_snapshot(tmp_path: Path) -> None:
    story = Story()
    story.put("proposal_requested", proposal="p1", branch="main", base="start", slot=0)
    story.submit(story.intend(story.propose()))
    with open(tmp_path / "ledger.jsonl", "w") as file:
        file.writelines(json.dumps(event) + "\n" for event in story.events)
    state, tail = snapshot.open_history(tmp_path)
    snapshot.save(tmp_path, state, tail.offset)
    opened, _ = snapshot.open_history(tmp_path)
    assert opened.open_runs == state.open_runs
    assert opened.running()[0].submission == story.state.running()[0].submission
    assert opened.requests == story.state.requests
    assert opened.in_flight == ("e0001",)


def test_a_snapshot_is_due_when_the_next_start_would_feel_the_rest() -> None:
    assert not snapshot.due(State(events=999), 0)
    assert snapshot.due(State(events=1000), 0)
    assert not snapshot.due(State(events=600_000), 590_000)
    assert snapshot.due(State(events=612_000), 600_000 - 1000)


def test_a_ledger_grown_by_its_writer_opens_from_the_old_snapshot(folder: Path) -> None:
    state, tail = snapshot.open_history(folder)
    snapshot.save(folder, state, tail.offset)
    ledger.Ledger(folder / "ledger.jsonl", 3).append("told", branch="main", text="go on")
    assert snapshot.load(folder) is not None
    assert snapshot.open_history(folder)[0].branch("main").notes == ("go on",)
