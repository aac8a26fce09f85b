"""Whole campaigns through the test server: the real controller, local runs, and a faulty API."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from server import KEY, Reply, Server, edit, last_result, step, submit, text_of, use

from agent import constants
from jobs.history import fold
from tests.small_lab import lab

ROOT = Path(__file__).parents[2]
SECRET = {"ANTHROPIC_API_KEY": KEY}
FAULTS = ("529", "429", "mid-stream-error", "clean-drop", "chunked-drop", "max-tokens", "prose")


def a_third(call: int) -> str | None:
    """A fault at every third call, each kind in its turn."""
    return FAULTS[call // 3 % len(FAULTS)] if call % 3 == 1 else None


def run(folder: Path, timeout: float, **environ: str) -> str:
    """`autoresearch run` in the lab, with the key in its environment, and nowhere else."""
    controller = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ, **SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with watched_for_key(controller.pid) as seen:
            said = controller.communicate(timeout=timeout)[0]
    finally:
        controller.kill()
    assert controller.returncode == 0, said
    assert KEY not in said
    assert seen["looks"] > 10
    assert seen["processes of runs"] > 10  # the watch does see them
    assert seen["keys"] == 0
    return said


@contextlib.contextmanager
def watched_for_key(controller: int) -> Iterator[Counter[str]]:
    """Counts what `look_for_key` sees meanwhile."""
    seen: Counter[str] = Counter()
    over = threading.Event()
    watch = threading.Thread(target=look_for_key, args=(controller, seen, over))
    watch.start()
    try:
        yield seen
    finally:
        over.set()
        watch.join()


def look_for_key(controller: int, seen: Counter[str], over: threading.Event) -> None:
    """Until `over`, look into every process: neither command line nor environment holds the key,
    the environment of the controller's own process apart."""
    while not over.wait(0.1):
        seen["looks"] += 1
        with contextlib.suppress(OSError):
            named = Path(f"/proc/{controller}/cmdline").read_bytes()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words, around = ((process / n).read_bytes() for n in ("cmdline", "environ"))
                seen["processes of runs"] += b"AUTORESEARCH_RUN_NAME" in around
                # a fork of it that has not become another program yet, too
                own = int(process.name) == controller or words in (b"", named)
                seen["keys"] += KEY.encode() in (words if own else words + around)


def events(folder: Path) -> list[dict[str, Any]]:
    lines = next(folder.glob("campaigns/*/ledger.jsonl")).read_text().splitlines()
    return [json.loads(line) for line in lines]


def holds_key(folder: Path) -> list[Path]:
    """Files anywhere in the lab, git's own among them, in which the key can be read."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = [path for path in files if KEY.encode() in path.read_bytes()]
    argv = ["git", "-c", "safe.directory=*", "cat-file", "--batch-all-objects", "--batch"]
    objects = subprocess.run(argv, cwd=folder, capture_output=True, check=True).stdout
    assert b"Campaign: " in objects  # they are unpacked, and the commits are among them
    return found + [folder / ".git/objects"] * (KEY.encode() in objects)


SCORE = """\
import json, os, runpy
x = runpy.run_path(os.environ["AUTORESEARCH_PROGRAM"] + "/shape.py")["x"]
print(json.dumps({"distance": abs(x - 3.0)}))
"""


def descends(request: dict[str, Any]) -> Reply:
    """Plans from the history alone: a step down the slope, half as far after each loss."""
    opening = request["messages"][0]["content"][0]["text"]
    assert "# History" in opening
    if step(request) == 0:
        latest = re.findall(r"^(e\d+) (?:keep|discard)", opening, flags=re.M)[-1]
        return Reply((use("read_experiment", experiment=latest, what="diff"),))
    losses = int(re.search(r"(\d+) decided since the last keep", opening).group(1))
    x = float(re.search(r"^x = (\S+)", request["system"][1]["text"], flags=re.M).group(1))
    if step(request) == 1:
        new = {"old_str": f"x = {x}", "new_str": f"x = {round(x - 2.0 / 2**losses, 6)}"}
        return Reply((edit(command="str_replace", path="shape.py", **new),))
    return Reply((submit(f"a step from {x} after {losses} losses", "x", "down"),))


def look_for_x(folder: Path, server: Server, experiments: int, patience: float) -> Path:
    """A campaign of so many experiments that looks for the best x; its lab."""
    task = {
        "kind": "general",
        "editable": ["shape.py"],
        "command": ["python", "shape.py"],
        "scorer": {"command": ["python", "score.py"], "files": ["score.py"]},
        "metric": "distance",
    }
    agent = {"kind": "anthropic", "base_url": server.url, "outage_patience": patience}
    settings = {"task": task, "agent": agent, "limits": {"experiments": experiments}}
    settings |= {"confirm": {"runs": 0}, "budget": {"wall": 10}}
    files = {"shape.py": "x = 12.0\n", "score.py": SCORE, "program.md": "# Find the x\n"}
    run(lab(folder, files, settings), timeout=120)
    return folder


def test_twenty_experiments_by_a_faulty_api_keep_what_is_better_and_nothing_else(tmp_path):
    with Server(descends, a_third) as server:
        folder = look_for_x(tmp_path / "lab", server, 21, patience=30)
    told = events(folder)
    state = fold(told)
    records = list(state.experiments("main"))
    assert len(records) == 21
    assert len({record.commit for record in records}) == 21
    best = records[0].metric
    for record in records[1:]:
        assert record.status == "ok"
        better = record.metric < best
        assert record.verdict == ("keep" if better else "discard"), record
        best = min(best, record.metric)
    assert best < 0.1
    assert state.spent.dollars >= server.dollars > 0
    assert not state.requests
    openings = [text_of(c.request) for c in server.calls if step(c.request) == 0]
    # The sweep stands in while the API is away; whatever was decided before the model's last
    # proposal was in one of its requests.
    last = max(i for i, record in enumerate(records) if "model" in record.tags)
    assert last >= 5
    for record in records[:last]:
        assert any(f"{record.id} {record.verdict}" in text for text in openings)
    diffs = [last_result(c.request) for c in server.calls if step(c.request) == 1]
    assert any("+x = " in diff for diff in diffs)
    assert not any("# trainer/prepare.py" in text for text in openings)  # it is no nanochat
    assert holds_key(folder) == []


def test_an_outage_idles_a_slot_for_the_patience_once_and_no_longer(tmp_path):
    patience = 6.0
    with Server(descends, lambda call: "529" if call >= 6 else None) as server:
        folder = look_for_x(tmp_path / "lab", server, 12, patience)
    told = events(folder)
    ended, began = (
        [datetime.fromisoformat(e["time"]) for e in told if e["event"] == event]
        for event in ("run_ended", "run_intended")
    )
    idle = sorted(
        (after - before).total_seconds() for before, after in zip(ended, began[1:], strict=False)
    )
    assert len(idle) == 11
    assert patience - 1 < idle[-1] < patience + 10  # the model is waited for, and then replaced
    assert idle[-2] < patience / 2
    experiments = [e["experiment"] for e in told if e["event"] == "proposed"]
    assert [e["researcher"] for e in experiments].count("sweep") == 9


IDEAS = [
    ("matrix_rate", 0.08),
    ("warmdown", 0.9),
    ("embedding_rate", 0.02),
    ("head_rate", 0.02),
    ("matrix_rate", 0.002),
    ("muon_beta2", 0.9),
    ("rotary_base", 1000),
    ("scalar_rate", 0.2),
    ("weight_decay", 0.05),
    ("momentum_steps", 30),
    ("matrix_rate", 0.12),
    ("embedding_rate", 1.2),
    ("head_rate", 0.008),
    ("adam_beta2", 0.9),
    ("warmdown", 0.75),
    ("logit_cap", 30.0),
    ("injection_scale", 0.3),
    ("adam_beta1", 0.9),
    ("momentum_start", 0.7),
    ("matrix_scale", 0.7),
]


def tunes(request: dict[str, Any]) -> Reply:
    """Tries the first idea that the history does not show, on the program that it was shown."""
    told = request["messages"][0]["content"][0]["text"]
    name, value = next((n, v) for n, v in IDEAS if f": {n} to {v}" not in told)
    if step(request) == 1:
        return Reply((submit(f"{name} to {value}", name),))
    text = re.search(r"<data>\n(.*)\n</data>", request["system"][1]["text"], flags=re.S).group(1)
    changed = constants.replace(text, {name: value}, "cpu") + "\n"
    return Reply((edit(command="create", path="trainer/train.py", file_text=changed),))


@pytest.mark.parametrize(
    "count", [1, pytest.param(20, marks=[pytest.mark.proof, pytest.mark.timeout(5400)])]
)
def test_a_night_of_real_training_by_a_faulty_api(tmp_path, count):
    files = {
        "trainer/train.py": (ROOT / "trainer" / "train.py").read_text(),
        "program.md": (ROOT / "program.md").read_text(),
    }
    with Server(tunes, a_third) as server:
        agent = {"kind": "anthropic", "base_url": server.url, "outage_patience": 60}
        settings = {"agent": agent, "limits": {"experiments": count + 1}, "confirm": {"runs": 0}}
        settings["executor"] = {"threads": 1}
        folder = lab(tmp_path / "lab", files, {**settings, "budget": {"tokens": 110_000}})
        # Without a compiler the program runs eagerly: 80 steps compile for longer than they train.
        run(folder, timeout=250 * (count + 1), CXX="none")
    told = events(folder)
    state = fold(told)
    records = list(state.experiments("main"))
    assert len(records) == count + 1
    best = None
    for record in records:
        result = state.result(record.runs[0])
        assert result.ok, result
        assert result.steps >= 50
        assert result.metric < 3.6 - 0.5  # where every token is equally likely it is 3.6
        assert record.verdict == ("keep" if best is None or record.metric < best else "discard")
        best = record.metric if best is None else min(best, record.metric)
    wanted = [f"{name} to {value}" for name, value in IDEAS[:count]]
    assert [record.description for record in records[1:]] == wanted
    assert state.spent.dollars >= server.dollars
    assert holds_key(folder) == []
