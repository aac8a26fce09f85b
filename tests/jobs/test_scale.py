"""A hundred thousand experiments: replayed in seconds, opened at once, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import bench_ledger


@pytest.mark.parametrize(
    ("experiments", "replay_s"),
    [(2_000, 3), pytest.param(100_000, 10, marks=pytest.mark.proof, id="100000")],
)
def test_a_long_ledger_is_replayed_and_opened_within_its_promise(
    tmp_path: Path, experiments: int, replay_s: float
) -> None:
    bench_ledger.write_ledger(tmp_path / "ledger.jsonl", experiments)
    (_, cpu_s, peak_mb), _ = bench_ledger.in_new_process(tmp_path)
    assert cpu_s <= replay_s  # not the wall's seconds: tests share their machine
    assert peak_mb <= 500
    bench_ledger.in_new_process(tmp_path, "save")
    (_, cpu_s, _), _ = bench_ledger.in_new_process(tmp_path)
    assert cpu_s <= 1
