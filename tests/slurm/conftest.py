"""The real test cluster, and controllers on it that are processes of an ordinary user."""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import CLUSTER, USER, Controller, jobs_below, slurm, switch, wait_for

LOCK = Path("/run/autoresearch-cluster/tests.lock")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """The cluster of `make cluster`, without accounting, and an ordinary user on it."""
    if not LOCK.parent.exists():
        pytest.fail("the test cluster is not up (make cluster)")
    try:
        pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", USER], check=True)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one test run at a time: they switch and break things
        done = subprocess.run([*CLUSTER, "status"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.fail(f"the test cluster is not up (make cluster): {done.stdout}{done.stderr}")
        switch(accounting=False)
        yield
        switch(accounting=False)


@pytest.fixture
def accounting(cluster: None) -> Iterator[None]:
    """The same cluster with slurmdbd, for one test."""
    switch(accounting=True)
    yield
    switch(accounting=False)


@pytest.fixture(autouse=True)
def no_jobs_are_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Takes `home` first, so that it is still there."""
    home = request.getfixturevalue("home") if "cluster" in request.fixturenames else None
    yield
    if home and (left := jobs_below(home)):
        slurm("scancel", *left, check=False)
        wait_for(lambda: not jobs_below(home), 150, "for jobs to end")


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the ordinary user (pytest's own are root's alone), with a space in its name."""
    folder = Path("/var/tmp") / f"autoresearch test {os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir(mode=0o755)
    shutil.chown(folder, USER, USER)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def controller(cluster: None, home: Path) -> Iterator[Callable[..., Controller]]:
    """Makes controllers in one campaign folder."""
    made: list[Controller] = []

    def make(kind: str, **options: Any) -> Controller:
        folder = home / "night"
        if not folder.exists():
            folder.mkdir()
            shutil.chown(folder, USER, USER)
        made.append(Controller(folder, kind, **options))
        return made[-1]

    yield make
    for one in made:
        one.kill()
