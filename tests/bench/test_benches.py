"""Every measurement at a reduced count, so that none rots between two nights of `make proof`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import campaign, config, lab
from tests.bench import (
    bench_attention,
    bench_branches,
    bench_constants,
    bench_demo,
    bench_feed,
    bench_gpu,
    bench_referee,
    bench_repository,
    bench_startup,
    bench_sweep,
    bench_turnaround,
    results,
    train_runs,
)

HERE = Path(__file__).parent
STEP = 2048  # tokens


@pytest.fixture(scope="module")
def data() -> Path:
    """The corpus that ships, as campaigns prepare it."""
    settings = config.parse({"campaign": "bench"}).data
    folder = campaign.data_folder(config.parse({"campaign": "bench"}))
    lab.prepare(settings.corpus, settings.scale, folder)
    return folder


@pytest.mark.parametrize("bench", sorted(path.stem for path in HERE.glob("bench_*.py")))
def test_each_is_found_whole_by_a_process_of_its_own(bench: str) -> None:
    argv = [sys.executable, "-c", f"import tests.bench.{bench}"]
    subprocess.run(argv, cwd=results.REPOSITORY, check=True, timeout=60)


def test_attention() -> None:
    rows = bench_attention.rows_of((1, 32, 1, 16), 8, bench_attention.train.pick_device(), None)
    assert all(row["largest error"] < 1e-2 for row in rows if row["ms"] is not None)
    assert any(row["ms"] for row in rows)


def test_branches(tmp_path: Path) -> None:
    row = bench_branches.measure(tmp_path / "lab", 2, 10)
    assert row["experiments"] >= 10
    assert row[bench_branches.COST] > 0
    assert all(row["CPU ms"] > 0 for row in bench_branches.doing_nothing(2))


def test_constants() -> None:
    shipped = train_runs.TRAIN.read_text()
    block = bench_constants.shipped_block(shipped, "cpu")
    tried = list(bench_constants.variants(block))
    assert {variant.name for variant in tried} == set(block)
    for variant in tried:
        assert bench_constants.changed(shipped, "cpu", variant) != shipped


def test_demo() -> None:
    lines = [
        "on fresh seeds (3 each):",
        "  first e0001  1.9016 +- 0.0362   baseline",
        "  best  e0009  1.7937 +- 0.0409   matrix_rate 0.04",
        "  gain 0.1079 val_bpb (the campaign's own seed said 0.1000)",
        "  shipped  1.8461 +- 0.0158",
        "  detuning cost 0.0555; the campaign recovered 194% of it",
    ]
    assert bench_demo.told("\n".join(lines)) == {
        "shipped": "1.8461 +- 0.0158",
        "first": "1.9016 +- 0.0362",
        "best": "1.7937 +- 0.0409",
        "said": f"{lines[3].strip()}; {lines[5].strip()}",
    }


def test_feed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_feed, "SECONDS", 0.1)
    assert bench_feed.measured("ours", data, 8, 256) > 0


def test_referee(tmp_path: Path, data: Path) -> None:
    (tmp_path / "program").mkdir()
    assert all(row["median ms"] > 0 for row in bench_referee.starts(tmp_path, data))


def test_repository(tmp_path: Path) -> None:
    rows: list[dict] = []
    bench_repository.measure(tmp_path, 20, True, rows)
    assert [row["repository"] for row in rows[1:]] == [
        "20 attempts, packed as they come",
        "  and after git gc --prune=now",
    ]


def test_startup_and_gpu(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = train_runs.TRAIN.read_text()
    tried = bench_startup.edits(shipped, "cpu")
    assert set(bench_startup.WARM_EDITS) <= set(tried)
    assert shipped not in tried.values()
    monkeypatch.setenv("CXX", "none")  # so few steps compile for longer than they train
    setting = train_runs.Setting(data, tmp_path, threads=1, tokens=12 * STEP, wall_limit_s=300.0)
    assert bench_startup.Bench(setting).measure("cold", shipped, cold=True)["seconds"] > 0
    assert "mfu_percent" in bench_gpu.printed(tmp_path / "run" / "run" / "train.log")


def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr(bench_sweep, "TOKENS", 12 * STEP)
    monkeypatch.setattr(bench_sweep, "ENDED", tmp_path / "sweep.json")
    monkeypatch.setattr(bench_sweep, "SAMPLERS", {"random": "random"})
    (row,) = bench_sweep.measure(1, 0, tmp_path)
    assert row["best"] == row["baseline"] < 3.6  # of the baseline alone
    assert bench_sweep.measure(1, 0, tmp_path / "not needed") == [row]
    (other,) = bench_sweep.measure(1, 1, tmp_path / "other")  # beside it, not in its place
    assert json.loads(bench_sweep.ENDED.read_text()) == [row, other]


@pytest.mark.cluster
def test_turnaround(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(results.REPOSITORY))
    row = bench_turnaround.measure("allocation", 10, 1.0)
    assert row["experiments/h"] > 0
    assert 0 < row["training share"] < 1


def test_a_section_is_replaced_in_place_and_the_others_stay(tmp_path: Path) -> None:
    book = tmp_path / "RESULTS.md"
    for section, value in (("One", 1.23456), ("Two", None), ("One", 2.0)):
        results.record(section, [{"a": "x|y", "b": value}], "As seen.", book)
    head, one, two = book.read_text().split("\n## ")
    assert head.startswith("# Results")
    assert one.startswith("One\n")
    assert "| x\\|y | 2 |" in one
    assert "1.235" not in one
    assert "| x\\|y | not run |" in two


def test_a_section_is_old_once_the_code_has_gone_on(tmp_path: Path) -> None:
    book = tmp_path / "RESULTS.md"
    results.record("Now", [], path=book)
    book.write_text(book.read_text() + "\n## Never\n\n*commit 0000000, some machine*\n")
    assert results.stale(book) == ["Never"]
