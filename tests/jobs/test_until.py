"""The next moment at which clocks read a time, also where they are put forward or back."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from jobs.until import deadline

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("now", "until", "expected"),
    [
        # an ordinary night: 07:30 in winter is 06:30 UTC
        ("2025-01-10T22:00:00+01:00", "07:30", "2025-01-11T06:30:00+00:00"),
        ("2025-01-10T07:29:00+01:00", "07:30", "2025-01-10T06:30:00+00:00"),
        ("2025-01-10T07:30:00+01:00", "07:30", "2025-01-11T06:30:00+00:00"),
        # the nights in which clocks go forward (one hour less) and back (one more)
        ("2025-03-29T22:00:00+01:00", "07:30", "2025-03-30T05:30:00+00:00"),
        ("2025-10-25T22:00:00+02:00", "07:30", "2025-10-26T06:30:00+00:00"),
        # a time that does not exist that night, and one that comes twice
        ("2025-03-29T22:00:00+01:00", "02:30", "2025-03-30T01:30:00+00:00"),
        ("2025-10-25T22:00:00+02:00", "02:30", "2025-10-26T00:30:00+00:00"),
        ("2025-10-26T02:40:00+02:00", "02:30", "2025-10-26T01:30:00+00:00"),
    ],
)
def test_until_is_the_next_time_that_clocks_read_it(now: str, until: str, expected: str) -> None:
    moment = deadline(datetime.fromisoformat(now), until, BERLIN)
    assert moment.isoformat() == expected
    assert moment.tzinfo is UTC


def test_without_a_zone_the_systems_own_rules_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        now = datetime.fromisoformat("2025-03-29T22:00:00+01:00")
        assert deadline(now, "07:30") == deadline(now, "07:30", BERLIN)
    finally:
        monkeypatch.undo()
        time.tzset()
