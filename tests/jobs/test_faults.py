"""Disks that refuse, controllers that compete: a pause in words (exit status 3), nothing lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toylab
from toylab import Lab, change, check_books, ended, eventually

from jobs import ledger, process

MakeLab = Callable[..., Lab]
HERE = Path(__file__).parent


# -- disks ----------------------------------------------------------------------------------------


def test_a_torn_last_line_is_told_cut_off_and_gone_on_from(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 1})
    lab.run()
    whole = (lab.folder / "ledger.jsonl").read_bytes()
    with open(lab.folder / "ledger.jsonl", "ab") as file:
        file.write(b'{"v":1,"n":8,"fence":1,"time":"2026-11-')
    lab.configure(limits={"experiments": 2})
    lab.run()
    assert any("last line was torn by a kill and is cut off" in line for line in lab.lines)
    assert (lab.folder / "ledger.jsonl").read_bytes().startswith(whole)
    check_books(lab)


@pytest.mark.parametrize("left_kb", [0, 12, 60, 300])
def test_a_full_disk_pauses_in_words_and_loses_nothing(tmp_path: Path, left_kb: int) -> None:
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, HERE / "small_disk.py", tmp_path, str(left_kb)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr


FAILING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from faults import deny
from jobs import config, night
from jobs.errors import AutoresearchError

def say(line):
    print(line, flush=True)
    if line.startswith("e0001"):
        deny(sys.argv[2], int(sys.argv[3]))

try:
    night.run(config.load(Path("campaign.yaml")), Path.cwd(), say)
except AutoresearchError as error:
    print(error, flush=True)
    os._exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("fsync", 5, "Input/output error"),
        ("fsync", 28, "No space left on device"),
        ("write", 5, "Input/output error"),
        ("write", 122, "Disk quota exceeded"),
    ],
)
def test_a_failing_disk_pauses_in_words_and_loses_nothing(
    make_lab: MakeLab, call: str, error: int, words: str
) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 2})
    done = subprocess.run(
        [sys.executable, "-P", "-c", FAILING, HERE, call, str(error)],
        cwd=lab.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert words in done.stdout
    assert "Traceback" not in done.stderr
    recorded = (lab.folder / "ledger.jsonl").read_bytes()
    lab.run()
    assert (lab.folder / "ledger.jsonl").read_bytes().startswith(recorded)
    assert lab.verdicts() == {"baseline": "keep", "X 1": "keep"}
    check_books(lab)


# -- permissions ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template() -> Iterator[Lab]:
    """A lab of an ordinary user with one experiment done; root, who may write all, becomes one."""
    folder = Path(tempfile.mkdtemp(prefix="autoresearch-"))
    folder.chmod(0o755)
    lab = Lab(folder / "lab", change(X=1), limits={"experiments": 1})
    lab.belong_to(65534)
    assert lab.call()[0] == 0
    lab.configure(limits={"experiments": 2})
    yield lab
    toylab.remove(folder)


REFUSING = {  # what may not be written -> what is said of it
    "campaigns/{name}/ledger.jsonl": "ledger.jsonl could not be opened: Permission denied",
    "campaigns/{name}": "Permission denied",
    "campaigns/{name}/runs": "runs/e0002",
    "campaigns/{name}/inbox": "inbox",
    "campaigns/{name}/results.tsv": "results.tsv",
    ".git/objects": ".git/objects",
    ".git/refs/autoresearch/{name}": "could not move refs/autoresearch/",
    ".git/refs/heads/autoresearch/{name}": "could not move autoresearch/",
}


@pytest.mark.parametrize("path", REFUSING)
def test_what_may_not_be_written_pauses_in_words_and_is_gone_on_from(
    template: Lab, path: str
) -> None:
    toylab.remove(template.root.parent / "copy")
    subprocess.run(["cp", "-a", template.root, template.root.parent / "copy"], check=True)
    lab = template.at(template.root.parent / "copy")
    if path.endswith("inbox"):
        lab.order("tell", branch="main", text="hello")
    target = lab.root / path.format(name=lab.name)
    below = target.rglob("*") if path == ".git/objects" else ()
    refusing = [target, *(p for p in below if p.is_dir())]
    lab.belong_to(lab.uid)
    for one in refusing:
        one.chmod(0o555 if one.is_dir() else 0o444)
    before = (lab.folder / "ledger.jsonl").read_bytes()
    status, said = lab.call()
    assert status == 3, said
    assert REFUSING[path] in said
    assert "Traceback" not in said
    assert (lab.folder / "ledger.jsonl").read_bytes().startswith(before)
    for one in refusing:
        one.chmod(0o755 if one.is_dir() else 0o644)
    status, said = lab.call()
    assert status == 0, said
    lab.belong_to(None)
    assert lab.verdicts() == {"baseline": "keep", "X 1": "keep"}
    check_books(lab)


# -- two controllers ------------------------------------------------------------------------------


def test_a_second_controller_is_refused_and_told_of_the_first(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1, NAP=600), limits={"experiments": 2})
    with ended(lab.start()) as first:
        eventually((lab.folder / "runs/e0002/s1-a1/claim.json").exists)
        status, said = lab.call()
        assert status == 1
        assert f"process {first.pid} on {socket.gethostname()}, running since 20" in said
        assert "heartbeat" in said
        assert "s ago" in said
        shown = json.loads(lab.call("status", "--json")[1])
        assert shown["state"] == "running"
        assert str(first.pid) in shown["controller"]
        assert first.poll() is None
    for pid in lab.strays():
        os.kill(pid, signal.SIGKILL)


def test_a_controller_that_hung_is_displaced_and_stops_before_its_next_line(
    make_lab: MakeLab,
) -> None:
    lab = make_lab(change(X=1, NAP=1), change(X=6), limits={"experiments": 3})
    with ended(lab.start()) as first:
        eventually((lab.folder / "runs/e0002/s1-a1/claim.json").exists)
        first.send_signal(signal.SIGSTOP)
        os.utime(lab.folder / "lease.json", (0, 0))  # its heartbeat is hours old
        lab.run()
        assert "adopted 1 running: e0002-s1-a1" in lab.lines
        first.send_signal(signal.SIGCONT)
        said, _ = first.communicate(timeout=60)
        assert first.returncode == 1
    assert "was displaced by process" in said
    assert "Traceback" not in said
    fences = [event["fence"] for event in ledger.read(lab.folder / "ledger.jsonl")]
    assert fences == sorted(fences)
    assert lab.events("lease_taken")
    check_books(lab)


def test_a_dead_controllers_campaign_is_taken_over_at_once(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1, NAP=1), limits={"experiments": 2})
    with ended(lab.start()) as first:
        eventually((lab.folder / "runs/e0002/s1-a1/claim.json").exists)
    assert not process.alive(process.identity(first.pid))
    lab.run()
    assert "adopted 1 running: e0002-s1-a1" in lab.lines
    assert str(first.pid) in lab.events("lease_taken")[-1]["previous"]
    check_books(lab)
