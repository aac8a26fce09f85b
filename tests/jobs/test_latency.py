"""The bench of what passes between two experiments, at a reduced count."""

from __future__ import annotations

import statistics
from pathlib import Path

from tests.bench import bench_latency


def test_little_time_passes_between_a_result_and_the_next_run(tmp_path: Path) -> None:
    found = bench_latency.measure(7, tmp_path)
    (handed_over, claimed, runs) = bench_latency.rows(found)
    assert handed_over["of"] == 6
    assert 0 < handed_over["median s"] <= claimed["median s"] <= runs["median s"]
    # several times what is promised of a quiet machine
    assert statistics.median(found["handed over"]) < 4 * bench_latency.PROMISED_S
