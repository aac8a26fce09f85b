"""Nights of the shipped trainer on the test cluster: each run a job or step, each in its image.

Every run trains for 50 optimiser steps and more, and must end far below the untrained model.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rig import ROOT, interpreter, wait_for
from test_campaign import (
    Lab,
    as_a_job_through_requeues_and_an_outage,
    places_at_once,
    toylab,
)

sys.path += [str(ROOT / "tests" / "containers"), str(ROOT / "tests" / "agent")]
import accounts
import server
import watched
from test_api_night import IDEAS, a_third, holds_key, tunes, watched_for_key

from containers import images
from containers.images import Image
from tests.bench.results import record

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(5400)]
STEPS = 60
UNTRAINED = 3.0  # bits per byte of a model that has learned nothing, and less
MOVED = ["matrix_rate", "embedding_rate", "head_rate", "weight_decay", "warmdown"]
SWEEP = {"kind": "sweep", "constants": MOVED}


class TrainerLab(Lab):
    """The user's lab of nanochat's task, in the CPU image, with a budget of a few seconds."""

    def __init__(
        self,
        root: Path,
        kind: str,
        image: Image,
        branches: int,
        each: int,
        agent: Mapping[str, Any] = SWEEP,
    ) -> None:
        super().__init__(root, kind)
        for name in ("train.py", "prepare.py"):
            self.write(f"trainer/{name}", (ROOT / "trainer" / name).read_text())
        self.hand_over()
        self.call_as_user(["git", "add", "trainer"])
        self.call_as_user(["git", "commit", "--quiet", "--message=the trainer"], **toylab.WHO)
        names = [f"b{n}" for n in range(1, branches + 1)]
        self.settings.pop("task")
        self.configure(
            budget={"tokens": STEPS * 2048},
            agent=dict(agent),
            branches={name: {"program": "program.md", "slots": 1} for name in names},
            executor={
                **self.settings["executor"],
                "image": image.sha256,
                "threads": 1,
                "memory": "900M",
                # Without a compiler: so few steps compile for longer than they train.
                "setup": ["export CXX=none"],
            },
            limits={"experiments": branches * (each + 1)},
        )
        self.hand_over()
        self.env["AUTORESEARCH_IMAGES"] = str(Path(image.path).parent)
        self.call_as_user([interpreter(), "-m", "jobs.cli", "prepare"])

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(exist_ok=True)
        super().write(name, text)


@pytest.fixture(scope="session")
def image() -> Image:
    return accounts.cpu_image()


@pytest.fixture
def lab(cluster: None, home: Path, image: Image) -> Callable[..., TrainerLab]:
    def make(kind: str, **settings: Any) -> TrainerLab:
        return TrainerLab(home / f"lab-{kind}", kind, image, **settings)

    return make


def check(night: TrainerLab, experiments: int) -> list[dict[str, Any]]:
    """Whole books, and results of real training in containers. The results that are ok."""
    night.check_books()
    assert len(night.events("decided")) == experiments
    good = [result for result in night.results() if result["status"] == "ok"]
    assert len(good) >= 0.9 * experiments
    for result in good:
        assert result["isolation"] == "apptainer"
        assert result["steps"] >= 50
        assert result["value"] < UNTRAINED - 0.5
    return good


# Of make proof-cluster: a change waits for these tests, and they have sixteen short runs in eight
# places and a night of trainings below.
@pytest.mark.proof
@pytest.mark.parametrize("kind", ["slurm", "allocation"])
def test_sixteen_trainings_in_eight_places_at_once(lab, kind):
    night = lab(kind, branches=8, each=1)
    process = night.start()
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    good = check(night, 16)
    assert places_at_once(good) == 8


def flip(file: Path) -> None:
    """Change the last bit of a file."""
    file.chmod(0o755)
    with file.open("r+b") as content:
        content.seek(-1, os.SEEK_END)
        last = content.read(1)
        content.seek(-1, os.SEEK_END)
        content.write(bytes([last[0] ^ 1]))


def test_an_image_changed_by_a_byte_pauses_the_night_which_goes_on_once_it_is_back(image, home):
    store = home / "images"
    store.mkdir()
    for path in Path(image.path).parent.glob(f"{Path(image.path).stem}.*"):
        shutil.copy2(path, store / path.name)
    mine = images.find(store, image.sha256)
    night = TrainerLab(home / "lab", "slurm", mine, branches=1, each=2)
    process = night.start()
    wait_for((night.folder / "runs/e0002/s1-a1/claim.json").exists, 900, "for the second run")
    flip(Path(mine.path))
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 3, said
    assert f"recorded is sha256 {image.sha256}, found is" in said
    flip(Path(mine.path))
    said, _ = (process := night.start()).communicate(timeout=900)
    assert process.returncode == 0, said
    check(night, 3)


@pytest.mark.proof
def test_a_night_of_trainings_as_a_job_through_requeues_and_an_outage(lab, home):
    night, begun = lab("allocation", branches=8, each=13), time.monotonic()
    with watched.controllers(night.folder) as used:
        as_a_job_through_requeues_and_an_outage(night, home, patience_s=1200)
    minutes = (time.monotonic() - begun) / 60
    check(night, 8 * 14)
    ended = [event["result"] for event in night.events("run_ended")]
    good = [result for result in ended if result["status"] == "ok"]
    cpu_s, seconds, peaks = zip(*used.values(), strict=True)
    row = {
        "experiments": len(night.events("decided")),
        "minutes": minutes,
        "lives": len(used),
        "tries lost": len(ended) - len(good),
        **between(good, night),
        "controller, % of a core": 100 * sum(cpu_s) / sum(seconds),
        "controller, peak MB": max(peaks),
    }
    record(
        "A night of the trainer on the test cluster",
        [row],
        "The controller as a job, runs as steps of a held allocation, each in its image, 60 steps"
        " of training; one hand-over, one requeue by another, 30 s without slurmctld. All 8 places"
        " share two cores. Slurm is asked every second, against 15 to 30 s on a site.",
    )


@pytest.mark.proof
def test_a_place_of_trainings_on_a_machine_with_a_core_to_spare(lab):
    night = lab("allocation", branches=1, each=8)
    said, _ = (process := night.start()).communicate(timeout=1800)
    assert process.returncode == 0, said
    check(night, 9)
    good = [event["result"] for event in night.events("run_ended")]
    record(
        "Between two trainings in one place of an allocation",
        [{"experiments": len(good), **between(good, night)}],
        "As the night above, but one place: of the two cores one is free for Slurm, the controller"
        " and the start of the next run. Promised: the first two columns together within a second"
        " of the third.",
    )


def between(good: list[dict[str, Any]], night: TrainerLab) -> dict[str, float]:
    """From a run's end to the next program's start in the same place."""
    return {
        "place free between runs, median s": median(good, "turnaround_s"),
        "then to the program, median s": median([r["details"] for r in good], "exec_seconds"),
        "a container by itself, median s": a_container(night),
    }


def median(found: list[Mapping[str, Any]], key: str) -> float:
    return statistics.median(one[key] for one in found if one[key] is not None)


def a_container(night: TrainerLab) -> float:
    """Median seconds of a container of the night's image around nothing, on a quiet machine."""
    image = night.settings["executor"]["image"]
    path = images.find(Path(night.env["AUTORESEARCH_IMAGES"]), image).path
    argv = ["apptainer", "--quiet", "exec", "--containall", "--cleanenv", "--no-home"]
    argv += ["--net", "--network", "none", path, "true"]

    def once() -> float:
        begun = time.monotonic()
        night.call_as_user(argv)
        return time.monotonic() - begun

    return statistics.median(once() for _ in range(5))


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["slurm", "allocation"])
def test_a_model_behind_a_faulty_api_drives_twenty_trainings(lab, kind):
    with server.Server(tunes, a_third) as api:
        agent = {"kind": "anthropic", "base_url": api.url, "outage_patience": 60}
        night = lab(kind, branches=1, each=20, agent=agent)
        night.env["ANTHROPIC_API_KEY"] = server.KEY
        process = night.start()
        with watched_for_key(process.pid) as seen:
            said, _ = process.communicate(timeout=3600)
    assert process.returncode == 0, said
    assert seen["keys"] == 0
    assert holds_key(night.root) == []
    check(night, 21)
    told = [event["experiment"]["description"] for event in night.events("proposed")]
    assert told[1:] == [f"{name} to {value}" for name, value in IDEAS]
    best, values = 9.0, {r["facts"]["experiment"]: r["value"] for r in night.results()}
    for event in night.events("decided"):
        decision = event["decision"]
        value = values[decision["experiment"]]
        assert decision["verdict"] == ("keep" if value < best else "discard")
        best = min(best, value)
