"""Ordinary users with image stores and, built once for each state of the sources, a CPU image."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import accounts
import pytest
from accounts import ROOT, account, python_as, run_as

from containers import images
from containers.images import Image

# trainer/ as its modules see each other, and the real runs of its own tests.
sys.path[:0] = [str(ROOT / "trainer"), str(ROOT / "tests" / "trainer")]


@dataclass(frozen=True)
class Person:
    """An ordinary user, the image store he or she uses, and a folder of his or her own."""

    name: str
    store: Path
    folder: Path

    def image(self, *argv: str | Path, check: bool = True, **env: str):
        """`autoresearch image ...` on this user's store."""
        verb, *rest = argv
        full = ["-m", "jobs.cli", "image", verb, "--store", self.store, *rest]
        return python_as(self.name, *full, check=check, **env)

    def find(self, name: str) -> Image:
        return images.find(self.store, name)

    def run(self, *argv: str | Path, check: bool = True, **env: str):
        return run_as(self.name, argv, check, **env)


def person(name: str, folder: Path, store: Path | None = None) -> Person:
    user = pwd.getpwnam(account(name))
    folder.mkdir(parents=True)
    os.chown(folder, user.pw_uid, user.pw_gid)
    return Person(name, store or folder / "images", folder)


@pytest.fixture
def someone(reachable: Path) -> Person:
    return person("apptester", reachable / "someone")


@pytest.fixture
def reachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that every user can enter (pytest's own are root's alone)."""
    folder = Path("/var/tmp") / f"autoresearch-test-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def tiny(someone: Person) -> Path:
    """A SIF of some 50 kB with nothing but a text in it, made in a tenth of a second."""
    root = someone.folder / "root"
    someone.run("mkdir", "-p", root)
    someone.run("sh", "-c", f"echo tiny > {root}/text")
    someone.run("apptainer", "--quiet", "build", someone.folder / "tiny.sif", root)
    return someone.folder / "tiny.sif"


@pytest.fixture(scope="session")
def cpu_image() -> Image:
    return accounts.cpu_image()
