"""What a controller takes of its login node while it works, through all its lives."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
EVERY_S = 1.0


@contextmanager
def controllers(campaign_dir: Path) -> Iterator[dict[int, tuple[float, float, float]]]:
    """Fills in, by process: CPU seconds with its ended children's, seconds seen, peak MB."""
    seen: dict[int, tuple[float, float, float]] = {}
    over, first = threading.Event(), dict[int, tuple[float, float]]()

    def look() -> None:
        while not over.wait(EVERY_S):
            with suppress(OSError, ValueError, StopIteration):  # none yet, or between two lives
                pid = json.loads((campaign_dir / "lease.json").read_text())["pid"]
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                peak = next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM"))
                cpu, now = sum(map(int, fields[11:15])) / TICKS, time.monotonic()
                begun = first.setdefault(pid, (cpu, now))  # starting up is not working
                seen[pid] = cpu - begun[0], now - begun[1], peak

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
