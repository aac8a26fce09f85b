"""results.tsv and results.parquet: exact, in upstream's form, and the same however written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import history, ledger, tables
from jobs.tables import Tables, write_parquet, write_tables
from tests.jobs.nights import Night, long_night


def rows(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().removesuffix("\n").split("\n")]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.tsv")}


def test_the_table_has_upstreams_columns_and_no_zero_for_a_crash(tmp_path: Path) -> None:
    night = Night()
    night.try_("baseline", 0.9979)
    night.try_("no score\tbut a\ntab \x1b[31m and more", None, gpu_memory_mb=None)
    night.try_("worse", 1.25, gpu_memory_mb=None, memory_mb=2048.0)
    night.try_("out of memory", None, status="oom", reason="CUDA out of memory")
    night.propose("still running")
    write_tables(tmp_path, night.state)
    commits = [r.commit[:7] for r in night.state.experiments()]
    assert rows(tmp_path / "results.tsv") == [
        ["commit", "val_bpb", "memory_gb", "status", "description"],
        [commits[0], "0.997900", "44.0", "keep", "baseline"],
        [commits[1], "", "", "crash", "no score but a tab [31m and more"],
        [commits[2], "1.250000", "2.0", "discard", "worse"],
        [commits[3], "", "44.0", "crash", "out of memory"],
    ]


def test_a_general_tasks_metric_names_its_column(tmp_path: Path) -> None:
    night = Night(task={"kind": "general", "metric": "seconds", "direction": "minimise"})
    night.try_("baseline", 1.25e-05)
    write_tables(tmp_path, night.state)
    assert rows(tmp_path / "results.tsv")[0][1] == "seconds"
    assert rows(tmp_path / "results.tsv")[1][1] == "1.25e-05"


def test_a_new_row_reads_the_results_of_its_own_experiment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = long_night(100)
    kept = Tables(tmp_path)
    kept.update(night.state)
    read: list[Any] = []
    result = history.State.result

    def counted(state: history.State, run: Any) -> Any:
        read.append(run)
        return result(state, run)

    monkeypatch.setattr(history.State, "result", counted)
    night.try_("one more", 0.9)
    read.clear()
    kept.update(night.state)
    assert len(read) <= 2  # once for each of the two tables it stands in
    assert "one more" in (tmp_path / "results.tsv").read_text().splitlines()[-1]


def test_appended_row_by_row_it_is_byte_for_byte_the_full_rewrite(tmp_path: Path) -> None:
    """Proposed in one order, decided in another, on two branches; written at odd moments."""
    night, dice = Night("main", "other"), random.Random(1)
    for branch in ("main", "other"):
        night.try_("baseline", 1.0, branch)
    table, open_ones = Tables(tmp_path / "kept up"), []
    for i in range(120):
        open_ones.append(night.propose(f"idea {i}", dice.choice(["main", "other"])))
        while open_ones and dice.random() < 0.55:
            name = open_ones.pop(dice.randrange(len(open_ones)))
            night.run(name, None if dice.random() < 0.2 else dice.uniform(0.9, 1.1))
            night.decide(name)
        if dice.random() < 0.4:
            table.update(night.state)
        if dice.random() < 0.1:
            table = Tables(tmp_path / "kept up")  # a new controller
    table.update(night.state)
    table.update(night.state)
    write_tables(tmp_path / "anew", night.state)
    assert all_bytes(tmp_path / "kept up") == all_bytes(tmp_path / "anew")
    assert set(all_bytes(tmp_path / "anew")) == {
        "results.tsv",
        "branches/main/results.tsv",
        "branches/other/results.tsv",
    }
    count = len(tables.settled(night.state))
    assert len(rows(tmp_path / "anew" / "results.tsv")) == count + 1


@pytest.mark.parametrize("harm", ["torn", "emptied", "deleted", "edited", "too long", "foreign"])
def test_a_table_that_was_harmed_is_written_anew(tmp_path: Path, harm: str) -> None:
    night = long_night(20)
    kept_up = Tables(tmp_path)
    kept_up.update(night.state)
    path = tmp_path / "results.tsv"
    good = path.read_bytes()
    harmed = {
        "torn": good[:-9],
        "emptied": b"",
        "deleted": None,
        "edited": good[:-2] + b"!\n",
        "too long": good + b"x\t\t\t\t\n",
        "foreign": b"something else\n",
    }[harm]
    path.unlink() if harmed is None else path.write_bytes(harmed)
    if harm != "edited":  # same size: only a new start looks at the content
        night.try_("one more", 1.5)
        kept_up.update(night.state)
        good += path.read_bytes()[len(good) :]
        assert path.read_bytes().splitlines()[-1].endswith(b"one more")
    write_tables(tmp_path, night.state)
    assert path.read_bytes() == good


def test_closing_reruns_change_no_row_of_the_table_but_show_in_parquet(tmp_path: Path) -> None:
    night = long_night(30)
    write_tables(tmp_path, night.state)
    before = all_bytes(tmp_path)
    assert write_parquet(tmp_path / "results.parquet", night.state).num_rows == 31
    best = night.state.branch("main").best
    assert best
    for seed in (2, 3):
        night.run(best, 0.99, seed=seed, gpu_memory_mb=99999.0)
    night.try_("another", None)
    table = write_parquet(tmp_path / "results.parquet", night.state)
    row = next(r for r in table.to_pylist() if r["experiment"] == best)
    assert row["runs"] == 3
    assert row["total_s"] == 3 * 340.0
    assert [(r["seed"], r["purpose"]) for r in row["run_details"]] == [
        (1, "screen"),
        (2, "confirm"),
        (3, "confirm"),
    ]
    again = write_parquet(tmp_path / "new.parquet", night.state)
    assert pq.read_table(tmp_path / "results.parquet").equals(again)
    write_tables(tmp_path, night.state)
    assert all(all_bytes(tmp_path)[name].startswith(data) for name, data in before.items())


def test_parquet_is_typed_and_null_where_nothing_is_known(tmp_path: Path) -> None:
    night = Night()
    night.try_("baseline", 1.0, details={"gpu_uuid": "GPU-1", "versions": {"torch": "2.11"}})
    night.try_("a crash", None, training_s=None, total_s=None, gpu_memory_mb=None, ended=None)
    table = write_parquet(tmp_path / "results.parquet", night.state)
    assert pq.read_table(tmp_path / "results.parquet").schema.equals(tables.schema())
    first, second = table.to_pylist()
    assert (first["metric"], first["status"], first["rule"]) == (1.0, "keep", "greedy 1")
    assert json.loads(first["run_details"][0]["details"])["gpu_uuid"] == "GPU-1"
    assert first["proposed_at"].isoformat().startswith("2025-01-31T")
    assert first["decided_at"] > first["proposed_at"]
    for name in ("metric", "gain", "memory_mb", "gpu_memory_mb", "training_s", "total_s", "steps"):
        assert second[name] is None
    assert second["dollars"] == 0.25
    assert second["verdict"] == "discard"
    assert second["status"] == "crash"


@pytest.mark.parametrize("old", [b"", b"PAR1 nonsense", None])
def test_a_parquet_file_that_cannot_be_read_is_written_anew(
    tmp_path: Path, old: bytes | None
) -> None:
    path = tmp_path / "results.parquet"
    if old is not None:
        path.write_bytes(old)
    else:  # of another campaign of this name, deleted since
        write_parquet(path, long_night(10, seed=2).state)
    night = Night()
    night.try_("baseline", 1.0)
    other = night.propose("another commit", commit="c" * 40)
    night.run(other, 0.5)
    night.decide(other)
    said = write_parquet(path, night.state).column("description").to_pylist()
    assert said == ["baseline", "another commit"]
    assert [p.name for p in tmp_path.iterdir()] == ["results.parquet"]


def test_tables_of_a_state_read_from_a_ledger_are_the_same(tmp_path: Path) -> None:
    night = long_night(25)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(json.dumps(e).encode() + b"\n" for e in night.events))
    state = history.fold(ledger.read(path), source=ledger.Lines(path))
    for name, source in (("memory", night.state), ("disk", state)):
        write_tables(tmp_path / name, source)
        write_parquet(tmp_path / name / "results.parquet", source)
    assert all_bytes(tmp_path / "memory") == all_bytes(tmp_path / "disk")
    one, other = (pq.read_table(tmp_path / n / "results.parquet") for n in ("memory", "disk"))
    assert one.equals(other)
