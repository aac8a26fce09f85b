"""SIGKILL of the controller at every boundary between two side effects, and at random moments.

Whatever the moment, the next start goes on: each run is recorded once, what ran is adopted, every
decision follows from its own prefix of the ledger, refs agree with it, and no process is left.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import toylab
from toylab import Lab, change, check_books, ended, eventually

from jobs import effects

HANGING = "run.cancel"  # needs a run that hangs
TORN = "ledger.truncate"  # needs a ledger whose last line is torn
WORKERS = 2
pytestmark = pytest.mark.xdist_group("kills")  # they share what `killed` begins for all of them


def scenario(root: Path, boundary: str = "") -> Lab:
    """A keep, a discard, closing reruns, an order, and enough loose objects to be packed."""
    edits = [change(X=1, NAP=1.0 if boundary == HANGING else 0.2), change(X=6)]
    lab = Lab(root, *edits, limits={"experiments": 3}, confirm={"runs": 1})
    lab.configure(lease={"stale_after": 5.0})  # beats every 0.83 s
    loose_objects(lab)
    lab.folder.mkdir(parents=True)
    lab.order("tell", branch="main", text="try it")
    if boundary == TORN:
        (lab.folder / "ledger.jsonl").write_text('{"v":1,"n":0,"fence":1,"time":"2026-')
    return lab


def loose_objects(lab: Lab) -> None:
    """So many loose objects below objects/17 that git would pack."""
    texts = (f"{n}\n" for n in range(1_000_000))
    wanted = (t for t in texts if _blob_id(t).startswith("17"))
    for text, _ in zip(wanted, range(16), strict=False):
        subprocess.run(
            ["git", "hash-object", "-w", "--stdin"],
            input=text.encode(),
            cwd=lab.root,
            stdout=subprocess.DEVNULL,
            check=True,
        )


def _blob_id(text: str) -> str:
    return hashlib.sha1(f"blob {len(text)}\0{text}".encode()).hexdigest()


def hang(lab: Lab) -> None:
    """Makes the first run of e0002 look as if it had hung for hours."""
    claim = lab.folder / "runs/e0002/s1-a1/claim.json"
    eventually(claim.exists)
    os.utime(claim, (0, 0))


def check(lab: Lab, boundary: str = "") -> None:
    """Nothing lost, nothing twice, nothing started again that was running."""
    check_books(lab)
    state = lab.state
    expected = {"baseline": "keep", "X 6": "discard"}
    assert {k: v for k, v in lab.verdicts().items() if not k.startswith("X 1")} == expected
    assert [r.id for r in state.chain("main")] == ["e0001", "e0002"]
    assert state.branch("main").notes == ("try it",)
    runs = Counter((r.id, run.seed) for r in state.experiments() for run in r.runs if run.ok)
    assert runs == Counter([("e0001", 1), ("e0002", 1), ("e0003", 1), ("e0001", 2), ("e0002", 2)])
    again = [run.attempt for r in state.experiments() for run in r.runs if run.attempt > 1]
    assert again in ([], [2] if boundary == HANGING else [])


# -- at every boundary ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counter[str]]:
    """How often the undisturbed scenario crosses each boundary."""
    lab = scenario(tmp_path_factory.mktemp("counted") / "lab")
    hits = lab.root / "hits"
    status, said = lab.call(AUTORESEARCH_HITS=str(hits))
    assert status == 0, said
    check(lab)
    yield Counter(hits.read_text().split())
    toylab.remove(lab.root)


def kill_and_go_on(root: Path, crossing: str, count: int) -> tuple[Lab, int, list[str]]:
    """Kill the controller at one crossing, then start it until it ends by itself."""
    boundary = crossing.partition(":")[0]
    lab = scenario(root, boundary)
    if boundary == HANGING:
        threading.Thread(target=hang, args=(lab,)).start()
    status, said = lab.call(AUTORESEARCH_KILL_AT=f"{crossing}:{count}")
    told = [said]
    for _ in range(3):
        again, said = lab.call()
        told.append(said)
        if again == 0:
            return lab, status, told
    raise AssertionError("\n".join(told))


@pytest.fixture(scope="module")
def killed(
    request: pytest.FixtureRequest,
    counted: Counter[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[tuple[Lab, int, list[str]]]]]:
    """The scenarios of the crossings chosen, under way in a few threads."""
    chosen = [
        item.callspec.params["crossing"]
        for item in request.session.items
        if getattr(item, "originalname", "") == test_killed_at_a_boundary_it_goes_on.__name__
    ]
    folder = tmp_path_factory.mktemp("killed")
    with ThreadPoolExecutor(WORKERS) as pool:
        yield {
            crossing: pool.submit(
                kill_and_go_on,
                folder / crossing.replace(":", "-"),
                crossing,
                (counted[crossing] + 1) // 2 or 1,  # in the middle of things
            )
            for crossing in chosen
        }
    toylab.remove(folder)


@pytest.mark.parametrize("crossing", effects.CROSSINGS)
def test_killed_at_a_boundary_it_goes_on(
    killed: dict[str, Future[tuple[Lab, int, list[str]]]], crossing: str
) -> None:
    lab, status, _ = killed[crossing].result()
    assert status == -signal.SIGKILL  # else the scenario never came by: the registry is not covered
    check(lab, crossing.partition(":")[0])


@pytest.mark.proof
@pytest.mark.timeout(7200)
def test_killed_at_every_crossing_each_time_it_is_crossed_it_goes_on(
    counted: Counter[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    points = [(crossing, n) for crossing, most in counted.items() for n in range(1, most + 1)]

    def one(point: tuple[str, int]) -> None:
        lab, _, _ = kill_and_go_on(tmp_path / "{}-{}".format(*point), *point)
        check(lab)
        toylab.remove(lab.root)

    with ThreadPoolExecutor(WORKERS) as pool:
        assert list(pool.map(one, points)) == [None] * len(points)
    record_property("kills", len(points))


# -- between two things that belong together -------------------------------------------------------


@pytest.fixture(scope="module")
def two_branches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A campaign at its end: side has found what main has not."""
    lab = Lab(tmp_path_factory.mktemp("two") / "lab")
    lab.scripts(main=[change(X=1)], side=[change(Y=1)])
    assert lab.call()[0] == 0
    yield lab
    toylab.remove(lab.root)


@pytest.mark.parametrize(
    "point",
    ["ledger.append:before:3", "ledger.append:after:3", "git.objects:after", "git.ref:before"],
)
def test_an_adoption_is_neither_lost_nor_done_twice(
    two_branches: Lab, tmp_path: Path, point: str
) -> None:
    subprocess.run(["cp", "-a", two_branches.root, tmp_path / "lab"], check=True)
    lab = two_branches.at(tmp_path / "lab")
    found = next(r for r in lab.state.experiments("side") if r.description == "Y 1")
    lab.order("adopt", experiment=found.id, into="main")
    assert lab.call(AUTORESEARCH_KILL_AT=point)[0] == -signal.SIGKILL
    assert lab.call()[0] == 0
    assert list(lab.verdicts()).count(f"adopted {found.id}: Y 1") == 1
    assert len(lab.state.records) == 5
    assert len(lab.events("order")) == 1
    assert lab.state.branch("main").best_metric == 0.0
    check_books(lab)


def test_a_rebase_that_was_decided_is_neither_lost_nor_done_twice(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab", change(X=1), change(Y=1, NAP=0.6), executor={"slots": 2})
    lab.configure(branches={"main": {"slots": 2}}, limits={"experiments": 3})
    fifth = "git.objects:before:5"  # after e0001, the start's records, e0002 and e0003
    assert lab.call(AUTORESEARCH_KILL_AT=fifth)[0] == -signal.SIGKILL
    assert lab.state.decision("e0003").numbers["rebase"]
    assert len(lab.state.records) == 3
    assert lab.call()[0] == 0
    assert list(lab.verdicts().values()) == ["keep", "keep", "discard", "keep"]
    assert lab.state.branch("main").best_metric == 0.0
    assert lab.call()[0] == 0
    assert len(lab.state.records) == 4
    check_books(lab)


# -- at random moments ----------------------------------------------------------------------------


def killed_at_random(root: Path, seed: int, times: int) -> None:
    """So many kills, each of a controller that holds its lease; a campaign that ends is checked,
    and the next one takes its place."""
    moments, left = random.Random(seed), times
    for number in itertools.count():
        lab = scenario(root / str(number))
        while left and kill_while_it_works(lab, moments.uniform(0, 1.5)):
            left -= 1
        status, said = lab.call()
        assert status == 0, said
        check(lab)
        if not left:
            return
        toylab.remove(lab.root)


def kill_while_it_works(lab: Lab, after: float) -> bool:
    """Start the controller and kill it `after` seconds of its lease; False: it had ended before."""
    with ended(lab.start()) as controller:
        eventually(lambda: holder(lab) == controller.pid or controller.poll() is not None)
        time.sleep(after)
        controller.send_signal(signal.SIGKILL)
        said = controller.communicate()[0]
    assert controller.returncode in (0, -signal.SIGKILL), said
    return controller.returncode != 0


def holder(lab: Lab) -> int | None:
    """The process that holds the lease of the lab's campaign."""
    try:
        lease = json.loads((lab.folder / "lease.json").read_text())
    except FileNotFoundError:
        return None
    return None if lease["released"] else lease["pid"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.proof)])
def test_killed_at_random_moments_it_goes_on(
    tmp_path: Path, kills: int, record_property: Callable[[str, object], None]
) -> None:
    killed_at_random(tmp_path, 0, kills)
    record_property("kills", kills)
