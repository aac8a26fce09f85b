"""Ordinary users with image stores and, built once for each state of the sources, a CPU image."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from accounts import ROOT, account, python_as, run_as

from containers import build, images, seal
from containers.images import Image

# trainer/ as its modules see each other, and the real runs of its own tests.
sys.path[:0] = [str(ROOT / "trainer"), str(ROOT / "tests" / "trainer")]

# Outlives the test run, so that the minutes of a build are spent once for each recipe.
CACHE = Path(os.environ.get("AUTORESEARCH_TEST_IMAGES", "/var/tmp/autoresearch-test-images"))


@dataclass(frozen=True)
class Person:
    """An ordinary user, the image store he or she uses, and a folder of his or her own."""

    name: str
    store: Path
    folder: Path

    def image(self, *argv: str | Path, check: bool = True, **env: str):
        """`autoresearch image ...` on this user's store."""
        verb, *rest = argv
        full = ["-m", "containers.cli", "image", verb, "--store", self.store, *rest]
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


def site_options() -> list[str]:
    """`image build` options for the machine's own package index, from pip's variables."""
    options = ["--set", f"TORCH_INDEX={os.environ.get('PIP_EXTRA_INDEX_URL', '')}"]
    if certificates := os.environ.get("PIP_CERT"):
        options += ["--ca-bundle", certificates]
    if wheels := os.environ.get("PIP_FIND_LINKS"):
        options += ["--wheels", wheels]
    return options


@pytest.fixture(scope="session")
def cpu_image() -> Image:
    """cpu.def with the trainer as it is now, built by an ordinary user: minutes, the first time;
    one minute when only trainer/ has changed since."""
    arguments = dict(o.split("=", 1) for o in site_options() if o.startswith("TORCH_INDEX"))
    wanted = build.Recipe(build.HERE / "cpu.def", arguments=arguments).sha256
    evaluator = seal.evaluator_sha256(ROOT / "trainer")
    known = [i for i in images.every(CACHE) if i.definition_sha256 == wanted]
    for image in known:
        if image.labels["autoresearch.evaluator.sha256"] == evaluator:
            return image
    owner = account("apptester")
    CACHE.mkdir(exist_ok=True)
    shutil.chown(CACHE, owner)
    argv = ["reseal", known[-1].sha256] if known else ["build", "cpu", *site_options()]
    options = ["--tag", "cpu", "--store", CACHE, "--json"]
    built = python_as(owner, "-m", "containers.cli", "image", *argv, *options)
    for old in images.every(CACHE)[:-3]:  # half a gigabyte each
        for ending in (".sif", ".json", ".log"):
            Path(old.path).with_suffix(ending).unlink(missing_ok=True)
    return images.find(CACHE, json.loads(built.stdout)["sha256"])
