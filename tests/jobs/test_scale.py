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
    found = {row["what"]: row["value"] for row in bench_ledger.measure(tmp_path, experiments)}
    # not the wall's seconds: tests share their machine
    assert found["replay, CPU s"] <= replay_s
    assert found["replay, peak MB"] <= 500
    assert found["the same, CPU s"] <= 1
