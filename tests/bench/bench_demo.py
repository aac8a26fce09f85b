"""`make demo` and `make demo-detuned` as a newcomer has them: a fresh clone, an empty environment.

python -m tests.bench.bench_demo [TARGET ...]

Of the caller's settings only pip's and uv's own are passed on; the time includes the installation.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.results import REPOSITORY, record

TARGETS = ("demo", "demo-detuned")
PROMISED_MIN = 15  # of `make demo`, on two cores


def environment(home: Path) -> dict[str, str]:
    """An empty environment with an empty home, and where packages come from."""
    kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_"))}
    if (settings := Path.home() / ".config/pip/pip.conf").exists():
        kept.setdefault("PIP_CONFIG_FILE", str(settings))
    return {"PATH": os.environ["PATH"], "HOME": str(home), **kept}


def measure(target: str, place: Path) -> dict[str, Any]:
    """One demonstration to its end; `place` is an empty folder. Raises where it fails."""
    (home := place / "home").mkdir()
    clone = place / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
    begun = time.monotonic()
    done = subprocess.run(
        ["make", target], cwd=clone, env=environment(home), check=True, stdout=subprocess.PIPE
    )
    return {
        "command": f"make {target}",
        "minutes": (time.monotonic() - begun) / 60,
        **told(done.stdout.decode()),
    }


def told(text: str) -> dict[str, str]:
    """Of its closing words: first and best on fresh seeds, and what it makes of them."""
    _, _, closing = text.rpartition("on fresh seeds (")
    found = {
        name: match[1]
        for name in ("shipped", "first", "best")
        if (match := re.search(rf"^ +{name} +(?:e\d+ +)?(\S+ \+- \S+)", closing, flags=re.M))
    }
    words = ("gain", "no gain", "detuning", "nothing better", "nothing was scored")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(words)]
    return {**found, "said": "; ".join(lines)}


def main(targets: tuple[str, ...]) -> None:
    rows = []
    for target in targets:
        with tempfile.TemporaryDirectory(prefix="bench-demo-") as place:
            rows.append(measure(target, Path(place)))
    record(
        "The demonstrations, from a fresh clone in an empty environment",
        rows,
        "Three fresh seeds each, mean and standard deviation of val_bpb. Minutes include the"
        f" installation; promised: make demo within {PROMISED_MIN} on two cores, and half of what"
        " detuning cost recovered.",
    )


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or TARGETS)
