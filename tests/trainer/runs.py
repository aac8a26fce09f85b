"""Real runs for tests: tiny data, small programs that talk to a real referee, a real wrapper."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import prepare
from corpora import Source
from referee.task import Task
from rows import RowStream

REPO = Path(__file__).resolve().parents[2]
T = 64
VOCAB = 400
SCALE = prepare.Scale("cpu", T, VOCAB, 2**12, 2**9, "tokens", 2**14, startup_free_s=60)
USER = 54321  # an ordinary user, who needs no entry anywhere

# A model of sorts: every token is equally likely. Its val_bpb is known in advance.
UNIFORM = """
import numpy as np
from referee.client import Session
session = Session.open()
def train(rows=8, length=64):
    while session.progress < 1:
        session.next(rows, length)
def evaluate(loss=np.log(400), batch=8):
    for rows, answer in session.score(batch):
        answer(np.full((len(rows), 64), loss, np.float32))
    return session.val_bpb
"""
HONEST = "train()\nprint('val_bpb:', evaluate())\n"


@functools.cache
def data_folder() -> Path:
    """A prepared data folder of Python's json and email packages, readable by everybody."""
    base = Path(tempfile.mkdtemp(prefix="autoresearch-test-"))
    base.chmod(0o755)
    texts = base / "texts"
    texts.mkdir()
    library = Path(os.__file__).parent
    source = "".join(
        p.read_text() for d in ("json", "email") for p in sorted((library / d).glob("*.py"))
    )
    for i in range(60):
        (texts / f"{i:03d}.txt").write_text(source[i * 2000 : (i + 1) * 2000])
    prepare.prepare(Source(f"dir:{texts}"), SCALE, base / "data")
    return base / "data"


def reachable(folder: Path) -> Path:
    """Let an ordinary user reach a folder of pytest's, which are closed."""
    for place in (folder, *folder.parents):
        if not place.stat().st_mode & 0o001:
            place.chmod(0o755)
    return folder


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """(size, time of change in ns) of every file below the folders, by path."""
    found = {}
    for path in itertools.chain.from_iterable(folder.rglob("*") for folder in folders):
        stat = path.lstat()
        found[str(path)] = stat.st_size, stat.st_mtime_ns
    return found


def remove_data() -> None:
    if data_folder.cache_info().currsize:
        shutil.rmtree(data_folder().parent)
        data_folder.cache_clear()


def uniform_bpb() -> float:
    """The score of a model that finds every token equally likely."""
    import math

    from rows import token_bytes

    stream = RowStream(data_folder(), "val", T)
    rows, _, _ = stream.take(min(SCALE.eval_tokens // T, stream.rows), 0)
    lengths = token_bytes(data_folder())[0][rows[:, 1:]]
    return (lengths > 0).sum() * math.log(VOCAB) / (math.log(2) * lengths.sum())


@dataclass
class Started:
    """A wrapper at work."""

    process: subprocess.Popen
    run_dir: Path
    marker: str  # in the environment of every process of its program
    before: dict[str, tuple[int, int]]  # listing of what the run may not change

    def pids(self, word: str = "") -> list[int]:
        """Living processes of the program whose command line holds `word`."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                marked = self.marker.encode() in (entry / "environ").read_bytes()
                if marked and word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found

    def wait_for(self, what, limit: float = 20.0):
        """The first true value of what()."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if value := what():
                return value
            assert self.process.poll() is None, self.result()
            time.sleep(0.01)
        raise AssertionError(f"waited {limit} s in vain; {self.log()}")

    def log(self) -> str:
        path = self.run_dir / "train.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def result(self) -> dict:
        """result.json, after the wrapper has ended; asserts that nothing is left, nor changed."""
        self.process.wait(60)
        assert self.pids() == []
        shm = [name for name in os.listdir("/dev/shm") if f"-{self.process.pid}." in name]
        assert shm == []
        found = json.loads((self.run_dir / "result.json").read_text())
        assert {path.name for path in self.run_dir.iterdir()} <= KNOWN_FILES
        assert listing(self.run_dir.parent / "program", data_folder()) == self.before
        return found


KNOWN_FILES = {"task.json", "claim.json", "train.log", "referee.log", "telemetry.jsonl"}
KNOWN_FILES |= {"score.json", "model.safetensors", "cache", "result.json"}
KNOWN_FILES |= {"scorer.log", "scorer.out", "sample.txt"}


def start(
    folder: Path,
    program: str,
    user: int | None = None,
    *,
    prelude: str = UNIFORM,
    files: Mapping[str, str] = MappingProxyType({}),
    through: Sequence[str] = (),
    **task,
) -> Started:
    """Write a program (after its prelude) and its task below `folder`, and start a wrapper on it.

    Args:
        user: run all of it as that user (needs root).
        files: more of the experiment's snapshot, by name.
        through: what stands in front of the wrapper's command.
    """
    marker = f"test-{uuid.uuid4().hex}"
    place, run_dir = folder / "program", folder / "run"
    place.mkdir()
    run_dir.mkdir()
    for name, text in {"train.py": prelude + textwrap.dedent(program), **files}.items():
        (place / name).write_text(text)
    values = {
        "kind": "nanochat",
        "program": str(place),
        "command": ["python", "train.py"],
        "run_dir": str(run_dir),
        "data": str(data_folder()),
        "wall_limit_s": 60,
        "device": marker,
        "limits": {"memory_mb": 2048, "processes": 64, "log_mb": 4, "scratch_mb": 64},
        "facts": {"experiment": "e0001", "run": "e0001-s1-a1"},
    }
    Task.from_json(values | task).save()
    argv = [sys.executable, "-m", "trainer.referee.wrapper", str(run_dir)]
    if user is not None:
        for path in (folder, place, run_dir):
            os.chown(path, user, user)
        argv = as_user(user, argv)
    before = listing(place, data_folder())
    process = subprocess.Popen([*through, *argv], cwd=REPO, stdout=subprocess.DEVNULL)
    return Started(process, run_dir, marker, before)


def run(folder: Path, program: str, user: int | None = None, **task) -> dict:
    """Start a run, wait for it, and return its result with its log under "log"."""
    started = start(folder, program, user, **task)
    result = started.result()
    return result | {"log": started.log()}


def as_user(user: int, argv: list[str]) -> list[str]:
    """The command as an ordinary user. Python may live in root's closed home: then, in a mount
    namespace of its own, a home that holds nothing else takes its place."""
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    base = Path(sys.base_prefix)
    closed = [p for p in reversed(base.parents) if p.stat().st_mode & 0o005 != 0o005]
    if not closed:
        return [*become, *argv]
    script = (
        'd=$(mktemp -d) && mount --rbind "$1" "$d" && mount -t tmpfs -o mode=755 none "$2" &&'
        ' mkdir -p "$1" && mount --move "$d" "$1" && rmdir "$d"; shift 2; exec "$@"'
    )
    return [
        "unshare", "--mount", "sh", "-c", script, "sh", str(base), str(closed[0]), *become, *argv
    ]  # fmt: skip
