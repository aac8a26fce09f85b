"""What runs leave on disk: the deciding run's is kept with its experiment, all else goes."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from toylab import SOLUTION, Lab, change, check_books

from jobs import disk
from jobs.history import fold

MakeLab = Callable[..., Lab]
LEAVES = """
import os, pathlib
scratch = pathlib.Path(os.environ["AUTORESEARCH_SCRATCH"])
told = f"X {X:g}, seed {os.environ['AUTORESEARCH_SEED']}"
(scratch / "model.safetensors").write_text(told)
(scratch / "sample.txt").write_text(told)
cache = scratch / "cache" / "inductor"
cache.mkdir(parents=True, exist_ok=True)
(cache / told).write_text(told)
"""


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    """A keep and a discard whose programs leave weights, a sample and a compile cache."""
    lab = make_lab(change(X=1), change(X=9), limits={"experiments": 3}, confirm={"runs": 1})
    lab.write("solution.py", SOLUTION + LEAVES)
    lab.git("commit", "--quiet", "--all", "--message", "it leaves files")
    lab.configure(task={**lab.settings["task"], "command": ["python", "solution.py"]})
    return lab


def left(lab: Lab) -> dict[str, str]:
    """Every file of bulk that the campaign still holds, and what is in it."""
    found = [
        path
        for name in ("model.safetensors", "sample.txt", "cache/inductor/*")
        for path in lab.folder.rglob(name)
    ]
    return {str(path.relative_to(lab.folder)): path.read_text() for path in found}


KEPT = {
    "heads/main/cache/inductor/X 1, seed 1": "X 1, seed 1",
    "heads/main/e0002/model.safetensors": "X 1, seed 1",
    "heads/main/e0002/sample.txt": "X 1, seed 1",
}


def test_the_champions_weights_sample_and_cache_stay_and_nothing_of_a_discard_or_rerun(
    lab: Lab,
) -> None:
    lab.run()
    assert left(lab) == KEPT
    assert lab.call("report")[0] == 0
    assert "X 1, seed 1" in (lab.folder / "report" / "index.html").read_text()
    check_books(lab)


# The tidying of e0001, e0002, e0003, and of the closing reruns of e0001 and e0002.
@pytest.mark.parametrize("nth", range(1, 6))
def test_a_kill_before_anything_is_tidied_and_a_clean_change_nothing_of_that(
    lab: Lab, nth: int
) -> None:
    assert lab.call(AUTORESEARCH_KILL_AT=f"run.tidy:before:{nth}")[0] == -signal.SIGKILL
    assert lab.call("clean")[0] == 0
    assert lab.call()[0] == 0
    assert left(lab) == KEPT
    check_books(lab)


def test_between_a_result_and_its_decision_nothing_of_that_run_is_cleaned_away(lab: Lab) -> None:
    lab.run()
    events = lab.events()
    decided = [n for n, event in enumerate(events) if event["event"] == "decided"]
    assert disk.needed(fold(events[: decided[1]])) == {"e0001/s1-a1", "e0002/s1-a1"}
