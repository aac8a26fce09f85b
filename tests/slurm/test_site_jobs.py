"""Images and data made by jobs of the test cluster, as an ordinary user, in that user's lab."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rig import ROOT, interpreter, slurm, wait_for
from test_campaign import Lab

sys.path.append(str(ROOT / "tests" / "containers"))
import small

from containers import images

pytestmark = pytest.mark.cluster


class SiteLab(Lab):
    """A lab with an image store of its group's, and `autoresearch` on the user's PATH."""

    def __init__(self, home: Path) -> None:
        super().__init__(home / "lab", "slurm", executor={"images": str(home / "images")})
        shim = home / "bin" / "autoresearch"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {interpreter()} -m jobs.cli "$@"\n')
        shim.chmod(0o755)
        self.env["PATH"] = f"{shim.parent}:{self.env['PATH']}"

    def submit(self, script: str, *words: str) -> str:
        """Submit slurm/SCRIPT.sbatch as its head says, wait for its end; what it printed."""
        argv = ["sbatch", "--parsable", "--mem=900M", "--cpus-per-task=1"]
        job = self.call_as_user([*argv, str(ROOT / "slurm" / f"{script}.sbatch"), *words]).strip()
        ended = lambda: not slurm("squeue", "-h", "-j", job).strip()  # noqa: E731
        wait_for(ended, 240, f"for job {job}")
        return (self.root / f"autoresearch-{script}-{job}.log").read_text()


@pytest.fixture
def lab(cluster: None, home: Path) -> SiteLab:
    return SiteLab(home)


def test_an_image_is_built_by_a_job_into_the_store_of_the_lab(lab: SiteLab, home: Path) -> None:
    def call(*words: str) -> str:
        return lab.call_as_user(list(words))

    root = small.make_root(lab.root, call)
    said = lab.submit("image", str(small.write(root)), "--tag", "small", "--set", "WORD=hi")
    assert images.tags(home / "images"), said
    assert 'echo "hi" > /word' in images.find(home / "images", "small").definition


def test_data_is_prepared_by_a_job(lab: SiteLab, home: Path) -> None:
    texts = home / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number:03d}.txt").write_text((ROOT / "PROTOCOL.md").read_text() * 2)
    data = home / "lab" / "data"
    del lab.settings["task"]
    lab.configure(data={"corpus": f"dir:{texts}", "folder": str(data)})
    said = lab.submit("data")
    assert (data / "manifest.json").exists(), said
