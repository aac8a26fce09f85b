"""A hundred thousand experiments: replayed in seconds, opened at once, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import bench_ledger


@pytest.mark.parametrize(
    "experiments", [2_000, pytest.param(100_000, marks=pytest.mark.proof, id="100000")]
)
def test_a_long_ledger_is_replayed_and_opened_within_its_promise(
    tmp_path: Path, experiments: int
) -> None:
    share = experiments / 100_000
    bench_ledger.write_ledger(tmp_path / "ledger.jsonl", experiments)
    (_, cpu_s, peak_mb), _ = bench_ledger.in_new_process(tmp_path)
    assert cpu_s <= 1 + 9 * share
    assert peak_mb <= 50 + 450 * share
    bench_ledger.in_new_process(tmp_path, "save")
    (_, cpu_s, _), _ = bench_ledger.in_new_process(tmp_path)
    assert cpu_s <= 1
