"""A campaign in an image, its experiments again, and a bundle by its plain apptainer command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accounts import ROOT, python_as
from conftest import Person, person

from containers import images
from containers.images import Image

sys.path.append(str(ROOT / "tests" / "jobs"))
import ended
import runs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
EDIT = [{"description": "a smaller loss", "set": {"LOSS": 5.5}}]
BROKEN = [{"description": "broken", "replace": [["train()", "train(7)(7)"]]}]
SETTINGS = """\
campaign: night
data: {folder: DATA}
budget: {tokens: 8192}
executor: {image: cpu, threads: 1}
agent: {kind: scripted, script: edits.yaml}
limits: {experiments: 3}
confirm: {runs: 0}
disk: {keep_free_mb: 1}
"""


class Site:
    """An ordinary user's lab with an image store of its own."""

    def __init__(self, someone: Person, image: Image) -> None:
        self.user, self.store, self.lab = someone.name, someone.store, someone.folder / "lab"
        self.store.mkdir()
        for path in (Path(image.path), Path(image.path).with_suffix(".json")):
            shutil.copy2(path, self.store / path.name)
        images.tag(self.store, image.sha256, "cpu")
        (self.lab / "trainer").mkdir(parents=True)
        self.write("trainer/train.py", ended.LEARNER)
        self.write("program.md", "Lower it.\n")
        self.write("edits.yaml", json.dumps(EDIT + BROKEN))
        self.write("campaign.yaml", SETTINGS.replace("DATA", str(runs.data_folder())))
        subprocess.run(["chown", "-R", someone.name, str(someone.folder)], check=True)
        for words in (
            *(("init", "-q", "-b", "main"), ("config", "user.name", "T")),
            *(("config", "user.email", "t@t"), ("add", "-A"), ("commit", "-qm", "start")),
        ):
            someone.run("git", "-C", self.lab, *words)

    def write(self, name: str, text: str) -> None:
        (self.lab / name).write_text(text)

    def __call__(self, *words: str) -> tuple[int, str]:
        """`autoresearch WORDS`: exit status, and all it printed."""
        argv = ["-m", "jobs.cli", words[0], "--config", self.lab / "campaign.yaml", *words[1:]]
        done = python_as(self.user, *argv, check=False, AUTORESEARCH_IMAGES=str(self.store))
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(cpu_image: Image) -> Iterator[Site]:
    folder = Path(f"/var/tmp/autoresearch-test-again-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    made = Site(person("apptester", folder / "someone"), cpu_image)
    status, said = made("run")
    assert status == 0, said
    yield made
    runs.remove_data()
    shutil.rmtree(folder, ignore_errors=True)


def test_commits_name_the_image_they_ran_in(site: Site, cpu_image: Image) -> None:
    status, said = site("show", "e0002", "--json")
    told = json.loads(said)
    assert (status, told["results"][0]["status"]) == (0, "ok"), said
    assert told["results"][0]["details"]["isolation"] == "apptainer"
    commit = told["experiment"]["commit"]
    message = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", str(site.lab), "log", "-1", "--format=%B", commit],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"\nContainer-Tag: cpu\nContainer-SHA256: {cpu_image.sha256}\n" in message


def test_a_keep_and_a_crash_come_again_in_the_image(site: Site) -> None:
    for name, words in (("e0002", "reproduced: identical"), ("e0003", "reproduced: it ends")):
        status, said = site("reproduce", name)
        assert (status, words in said) == (0, True), said


def test_the_bundle_runs_by_its_plain_apptainer_command(site: Site, cpu_image: Image) -> None:
    target = site.lab.parent / "bundle"
    status, said = site("bundle", "e0002", "--to", str(target))
    assert status == 0, said
    assert (target / "image.def").read_text() == cpu_image.definition
    assert "torch" in (target / "image.json").read_text()
    file = site.store / Path(cpu_image.path).name
    command = ["runuser", "-u", site.user, "--", "env", "-i", "PATH=/usr/bin:/bin"]
    done = subprocess.run([*command, str(target / "run.sh")], capture_output=True, text=True)
    assert (done.returncode, f"sha256 {cpu_image.sha256}" in done.stderr) == (2, True), done.stderr
    shutil.rmtree(next(target.glob("out-*")))
    command += [f"IMAGE={file}", str(target / "run.sh")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = target.glob("out-*/result.json")
    recorded = json.loads(site("show", "e0002", "--json")[1])["results"][0]["metric"]
    assert json.loads(found.read_text())["value"] == recorded


def test_a_moved_tag_is_told_and_a_changed_or_missing_image_refused(
    site: Site, cpu_image: Image, tmp_path: Path
) -> None:
    other = tmp_path / "other.sif"
    other.write_text("another image")
    bare = images.Image(images.sha256(other), "", 0, 0, "", {}, (), "a test")
    (site.store / "draft").write_bytes(other.read_bytes())
    images.add(site.store, site.store / "draft", bare)
    images.tag(site.store, bare.sha256, "cpu")
    status, said = site("reproduce", "e0002")
    assert (status, f"the tag cpu means sha256 {bare.sha256} now" in said) == (0, True), said

    file = site.store / Path(cpu_image.path).name
    file.chmod(0o755)
    with file.open("r+b") as image:
        image.seek(-1, 2)
        last = image.read(1)
        image.seek(-1, 2)
        image.write(bytes([last[0] ^ 1]))
    status, said = site("reproduce", "e0002")
    assert (status, f"recorded is sha256 {cpu_image.sha256}, found is" in said) == (2, True), said

    file.unlink()
    status, said = site("reproduce", "e0002")
    assert (status, "git show refs/autoresearch/night/records:image-" in said) == (2, True), said
