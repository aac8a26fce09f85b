"""What git costs per experiment, and what 10,000 attempts cost the user's git.

python -m tests.bench.bench_repository [--experiments N]
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jobs import mirror, names
from jobs.repository import Repository
from tests.bench.results import record
from tests.small_lab import as_repository

PROGRAM = "trainer/train.py"
NOTE_EVERY = 50  # experiments, as the controller does


def cpu_s() -> float:
    """CPU seconds of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def make_lab(folder: Path) -> Path:
    """A repository with a program of 700 lines and a hundred files around it."""
    (folder / "trainer").mkdir(parents=True)
    lines = [
        f"value_{i} = {i}  # some setting of the model, or a line of code\n" for i in range(700)
    ]
    (folder / PROGRAM).write_text("".join(lines))
    for i in range(100):
        (folder / "trainer" / f"frozen_{i}.py").write_text(f"x = {i}\n" * 100)
    return as_repository(folder)


class Costs:
    """CPU and wall seconds by act, over the acts done."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        cpu, wall = cpu_s(), time.perf_counter()
        yield
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu_s() - cpu
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall


def campaign(repository: Repository, count: int, costs: Costs, packing: bool) -> None:
    """`count` attempts, every fifth kept, noted in groups."""
    head, previous = repository.start(), None
    text = repository.read(head, PROGRAM)
    pending: dict[str, str] = {}
    for i in range(count):
        files = {PROGRAM: text.replace(f"value_{i % 700} = ", f"value_{i % 700} = {i} + ", 1)}
        trailers = {"Campaign": "bench", "Branch": "main", "Experiment": f"e{i:05}"}
        with costs.of("commit"):
            sha = repository.commit(head, files, "try", trailers, i)
        with costs.of("attempt's ref"):
            repository.point(names.attempt_ref("bench", f"e{i:05}"), sha)
        pending[sha] = f"2.1847 -> 2.{i:05}, discard\nseed: 1\nnode: n1\n" + "fact: value\n" * 15
        if i % 5 == 0:
            with costs.of("branch (a fifth)"):
                repository.point(names.branch_ref("bench", "main"), sha, previous)
            head, previous, text = sha, sha, files[PROGRAM]
        if len(pending) == NOTE_EVERY:
            with costs.of("notes"):
                mirror.note(repository, pending)
            pending = {}
        if packing and i % 100 == 99:
            with costs.of("pack"):
                repository.pack()


def users_git(folder: Path) -> dict[str, float]:
    """Milliseconds of the commands a user types, best of 10."""
    commands = {
        "git status": ["status"],
        "git log -20": ["log", "--decorate", "--oneline", "-20"],
        "git for-each-ref": ["for-each-ref"],
        "git branch": ["branch", "--list"],
        "git commit": ["commit", "-q", "--allow-empty", "-m", "x"],
    }
    found = {}
    for name, command in commands.items():
        times = []
        for _ in range(10):
            start = time.perf_counter()
            subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        found[name] = min(times) * 1000
    return found


def measure(place: Path, count: int, packing: bool, rows: list[dict]) -> Costs:
    """One campaign in a repository of its own; appends what the user's git takes after it."""
    lab = make_lab(place / f"lab-{packing}")
    if not packing:  # else the user's first commit starts a gc of 80,000 objects in the background
        subprocess.run(["git", "-C", str(lab), "config", "gc.auto", "0"], check=True)
    if not rows:
        rows.append({"repository": "before the campaign", **users_git(lab)})
    repository, costs = Repository(lab), Costs()
    before = cpu_s()
    campaign(repository, count, costs, packing)
    repository.close()  # its cat-file processes are counted from now on
    costs.cpu["all, with git cat-file"] = cpu_s() - before
    costs.wall["all, with git cat-file"] = sum(costs.wall.values())
    with costs.of("snapshot of 101 files"):
        repository.snapshot(repository.start(), place / f"snapshot-{packing}")
    files = [p for p in (lab / ".git").rglob("*") if p.is_file()]
    facts = {
        "CPU ms per experiment": costs.cpu["all, with git cat-file"] / count * 1000,
        "MB": sum(p.stat().st_size for p in files) / 2**20,
        "files": len(files),
    }
    name = f"{count} attempts, " + ("packed as they come" if packing else "never packed")
    rows.append({"repository": name, **users_git(lab), **facts})
    start = time.perf_counter()
    repository.git("gc", "-q", "--prune=now")
    facts = {"gc s": time.perf_counter() - start}
    assert len(repository.refs("refs/autoresearch/bench")) == count
    repository.git("fsck", "--connectivity-only", "--strict")
    rows.append({"repository": "  and after git gc --prune=now", **users_git(lab), **facts})
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=10_000)
    count = parser.parse_args().experiments
    rows: list[dict] = []
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        measure(Path(place), count, False, rows)
        costs = measure(Path(place), count, True, rows)
    record(
        "Git: what an experiment costs the controller",
        [
            {
                "act": name,
                "CPU ms per experiment": costs.cpu[name] / each * 1000,
                "wall ms per experiment": costs.wall[name] / each * 1000,
            }
            for name in costs.cpu
            for each in [1 if name.startswith("snapshot") else count]
        ],
        f"{count} experiments on a program of 700 lines, a fifth kept, notes in groups of "
        f"{NOTE_EVERY}; children counted. On tmpfs: on a disk "
        "each new object waits for two fsyncs more. The budget is 10 ms of CPU in all.",
    )
    record(
        "Git: what 10,000 attempts cost its user",
        rows,
        "Milliseconds of commands typed in the lab, best of 10.",
    )


if __name__ == "__main__":
    main()
