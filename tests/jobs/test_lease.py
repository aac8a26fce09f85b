"""One controller at a time: refusal, take-over, displacement, and races."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import ordinary_user

from jobs import lease, ledger, process
from jobs.errors import Displaced, LeaseHeld, Paused

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from jobs import lease
from jobs.errors import LeaseHeld
try:
    with lease.acquire(Path(sys.argv[1]), float(sys.argv[2])) as held:
        print(held.fence, flush=True)
        sys.stdin.read()
except LeaseHeld as error:
    print(error, flush=True)
"""

Hold = Callable[[Path, float], "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts another controller that holds the lease until its standard input is closed."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, stale_after_s: float) -> subprocess.Popen[str]:
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), str(stale_after_s)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(other)
        return other

    yield start
    for other in started:
        other.kill()
        other.communicate()


def said(other: subprocess.Popen[str]) -> str:
    assert other.stdout
    return other.stdout.readline().strip()


def pretend(folder: Path, age_s: float = 0.0, **changes: object) -> None:
    """Rewrites lease.json as another holder would have left it `age_s` ago."""
    path = folder / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    then = time.time() - age_s
    os.utime(path, (then, then))


def test_the_first_controller_gets_number_one_and_says_who_it_is(tmp_path: Path) -> None:
    with lease.acquire(tmp_path):
        content = json.loads((tmp_path / "lease.json").read_text())
        assert content["fence"] == 1
        assert content["host"] == socket.gethostname()
        assert content["pid"] == os.getpid()
        assert content["boot_id"] == process.boot_id()
        assert content["start"] == process.start_time(os.getpid())
        assert content["heartbeat"].endswith("Z")


def test_a_second_controller_refuses_and_names_the_first(tmp_path: Path, hold: Hold) -> None:
    first = hold(tmp_path, 60)
    assert said(first) == "1"
    with pytest.raises(LeaseHeld) as refusal:
        lease.acquire(tmp_path, 60)
    words = str(refusal.value)
    assert f"process {first.pid} on {socket.gethostname()}" in words
    assert "heartbeat 0 s ago" in words
    assert "autoresearch stop" in words


def test_a_released_lease_is_taken_at_once_with_the_next_number(tmp_path: Path) -> None:
    with lease.acquire(tmp_path):
        pass
    with lease.acquire(tmp_path) as second:
        assert second.fence == 2
        assert second.taken_from is None
    assert lease.holder(tmp_path).released


def test_a_killed_controller_on_this_host_is_replaced_at_once(tmp_path: Path, hold: Hold) -> None:
    first = hold(tmp_path, 3600)
    assert said(first) == "1"
    first.kill()
    first.wait()
    with lease.acquire(tmp_path, 3600) as second:
        assert second.fence == 2
        assert second.taken_from.process.pid == first.pid


def test_a_process_number_used_again_is_not_the_controller(tmp_path: Path) -> None:
    lease.acquire(tmp_path)
    pretend(tmp_path, start="1")
    assert lease.acquire(tmp_path).fence == 2
    pretend(tmp_path, boot_id="another-boot")
    assert lease.acquire(tmp_path).fence == 3


def test_another_hosts_lease_is_taken_only_after_its_heartbeat_is_stale(tmp_path: Path) -> None:
    lease.acquire(tmp_path)
    pretend(tmp_path, age_s=50, host="far-away", pid=1)
    with pytest.raises(LeaseHeld, match=r"process 1 on far-away.*heartbeat 5\d s ago"):
        lease.acquire(tmp_path, 60)
    pretend(tmp_path, age_s=70)
    assert lease.acquire(tmp_path, 60).taken_from.process.host == "far-away"


def test_a_controller_that_hangs_is_replaced_and_stops_when_it_wakes(
    tmp_path: Path, hold: Hold
) -> None:
    first = hold(tmp_path, 1.0)
    assert said(first) == "1"
    os.kill(first.pid, signal.SIGSTOP)
    time.sleep(1.3)
    with lease.acquire(tmp_path, 1.0) as second:
        os.kill(first.pid, signal.SIGCONT)
        time.sleep(0.5)  # three of its heartbeats
        assert json.loads((tmp_path / "lease.json").read_text())["fence"] == 2
        second.check()


def test_the_displaced_writer_stops_before_its_next_append(tmp_path: Path) -> None:
    first = lease.acquire(tmp_path)
    book = ledger.Ledger(tmp_path / "ledger.jsonl", first.fence, first.check)
    book.append("told", text="mine")
    pretend(tmp_path, age_s=3600)
    second = lease.acquire(tmp_path, 60)
    with pytest.raises(Displaced, match=rf"displaced by process {os.getpid()} on .*writer 2"):
        book.append("told", text="too late")
    assert [event["text"] for event in ledger.read(book.path)] == ["mine"]
    first.release()  # says nothing: the campaign is another's
    second.check()
    assert not lease.holder(tmp_path).released


def test_a_late_heartbeat_of_the_displaced_does_not_hide_the_new_number(tmp_path: Path) -> None:
    first = lease.acquire(tmp_path)
    old = (tmp_path / "lease.json").read_text()
    pretend(tmp_path, age_s=3600)
    second = lease.acquire(tmp_path, 60)
    (tmp_path / "late").write_text(old)
    (tmp_path / "late").replace(tmp_path / "lease.json")  # a check cannot be atomic with a rename
    with pytest.raises(Displaced):
        first.check()
    second.check()
    second.beat()
    assert lease.holder(tmp_path).fence == 2


def test_a_heartbeat_goes_on_while_the_lease_is_held(tmp_path: Path) -> None:
    with lease.acquire(tmp_path, 0.3):
        before = (tmp_path / "lease.json").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / "lease.json").stat().st_mtime_ns > before
        with pytest.raises(LeaseHeld):
            lease.acquire(tmp_path, 0.3)


def test_of_many_that_start_at_once_exactly_one_runs(tmp_path: Path, hold: Hold) -> None:
    others = [hold(tmp_path, 60) for _ in range(6)]
    with ThreadPoolExecutor(len(others)) as pool:
        answers = list(pool.map(said, others))
    assert answers.count("1") == 1
    assert sum("another controller" in answer for answer in answers) == 5


def test_of_many_that_take_over_at_once_exactly_one_runs(tmp_path: Path, hold: Hold) -> None:
    lease.acquire(tmp_path)
    pretend(tmp_path, age_s=3600, host="far-away")
    others = [hold(tmp_path, 60) for _ in range(6)]
    with ThreadPoolExecutor(len(others)) as pool:
        answers = list(pool.map(said, others))
    assert answers.count("2") == 1
    assert sum("another controller" in answer for answer in answers) == 5


def test_dying_between_claim_and_lease_costs_a_number_and_nothing_else(tmp_path: Path) -> None:
    lease.acquire(tmp_path)
    pretend(tmp_path, age_s=3600, host="far-away")
    content = json.loads((tmp_path / "lease.json").read_text())
    (tmp_path / "lease-2.claim").write_text(json.dumps(content | {"fence": 2}))
    with pytest.raises(LeaseHeld):
        lease.acquire(tmp_path, 60)  # its claim is fresh: it may be just about to go on
    os.utime(tmp_path / "lease-2.claim", (0, 0))
    third = lease.acquire(tmp_path, 60)
    assert third.fence == 3
    assert sorted(p.name for p in tmp_path.glob("*lease*")) == ["lease-3.claim", "lease.json"]


def test_numbers_go_on_above_the_ledgers(tmp_path: Path) -> None:
    assert lease.acquire(tmp_path, above=41).fence == 42  # lease.json was deleted by hand


def test_a_lease_that_says_nothing_pauses_in_words(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text("")
    with pytest.raises(Paused, match=r"lease\.json is no lease.*delete that file"):
        lease.acquire(tmp_path)


def test_a_folder_that_may_not_be_written_pauses_in_words() -> None:
    with ordinary_user() as folder:
        folder.chmod(0o555)
        with pytest.raises(Paused, match=r"could not be taken: Permission denied"):
            lease.acquire(folder)
        folder.chmod(0o755)


def test_looking_at_the_holder_writes_nothing(tmp_path: Path) -> None:
    assert lease.holder(tmp_path) is None
    with lease.acquire(tmp_path):
        before = sorted(os.listdir(tmp_path))
        assert lease.holder(tmp_path).fence == 1
        assert sorted(os.listdir(tmp_path)) == before
