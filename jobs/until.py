"""`until: 07:30`: the next moment at which a clock on the wall says so."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo


def deadline(now: datetime, until: str, zone: tzinfo | None = None) -> datetime:
    """The next moment, in UTC, at which clocks in `zone` read `until`.

    A time that a clock skips when daylight saving begins counts as the same span after midnight
    (02:30 becomes 03:30); of one that it shows twice, the next one.

    Args:
        now: with a time zone.
        until: '07:30'.
        zone: None: this system's.
    """
    hour, minute = (int(part) for part in until.split(":"))
    today = now.astimezone(zone).replace(tzinfo=None)
    found = []
    for days in range(3):
        wall = (today + timedelta(days=days)).replace(
            hour=hour, minute=minute, second=0, microsecond=0
        )
        # without a zone, the system's rules of that day apply
        moments = [wall.replace(fold=fold, tzinfo=zone).astimezone(UTC) for fold in (0, 1)]
        shown = [m for m in moments if m.astimezone(zone).replace(tzinfo=None, fold=0) == wall]
        found += [moment for moment in shown or moments[:1] if moment > now]
    return min(found)
