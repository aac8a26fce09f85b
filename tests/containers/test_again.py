"""A campaign in an image, its experiments again, and a bundle by its plain apptainer command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from accounts import ROOT, python_as, run_as
from conftest import Person, person

from agent import constants
from containers import images
from containers.images import Image

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
BROKEN = ["STARTED = time.perf_counter()", "STARTED = time.perf_counter()[7]"]
EAGER = ["eager = why_not_compile(device)", 'eager = "by this edit"']
EDITS = [
    {"description": "as shipped", "set": {"embedding_rate": 0.6}},  # e0003, kept
    {"description": "slower", "set": {"embedding_rate": 0.002}},  # e0004, discarded
    {"description": "broken", "replace": [BROKEN]},  # e0005, a crash
    {"description": "eager", "replace": [EAGER]},  # e0006
]
# Baselines of two branches on one seed: how far the same run may come out apart.
SETTINGS = """\
campaign: night
data: {folder: DATA}
budget: {tokens: 81920}
executor: {image: cpu, threads: 1}
agent: {kind: scripted, script: edits.yaml}
branches: {main: {}, twin: {agent: {script: none.yaml}}}
limits: {experiments: 6}
confirm: {runs: 0}
disk: {keep_free_mb: 1}
"""


class Site:
    """An ordinary user's lab of the shipped trainer, detuned, with an image store of its own."""

    def __init__(self, someone: Person, image: Image) -> None:
        self.user, self.store, self.lab = someone.name, someone.store, someone.folder / "lab"
        self.data = someone.folder / "data"
        self.store.mkdir()
        for path in (Path(image.path), Path(image.path).with_suffix(".json")):
            shutil.copy2(path, self.store / path.name)
        images.tag(self.store, image.sha256, "cpu")
        (self.lab / "trainer").mkdir(parents=True)
        shipped = (ROOT / "trainer" / "train.py").read_text()
        detuned = constants.replace(shipped, {"embedding_rate": 0.01}, "cpu")
        self.write("trainer/train.py", detuned)
        self.write("program.md", "Lower it.\n")
        self.write("edits.yaml", json.dumps(EDITS))
        self.write("none.yaml", "[]")
        self.write("campaign.yaml", SETTINGS.replace("DATA", str(self.data)))
        subprocess.run(["chown", "-R", someone.name, str(someone.folder)], check=True)
        for words in (
            *(("init", "-q", "-b", "main"), ("config", "user.name", "T")),
            *(("config", "user.email", "t@t"), ("add", "trainer", "program.md")),
            ("commit", "-qm", "start"),
        ):
            someone.run("git", "-C", self.lab, *words)
        assert self("prepare")[0] == 0

    def write(self, name: str, text: str) -> None:
        (self.lab / name).write_text(text)

    def __call__(self, *words: str, lab: Path | None = None) -> tuple[int, str]:
        """`autoresearch WORDS`: exit status, and all it printed."""
        where = ["--config", (lab or self.lab) / "campaign.yaml"]
        argv = ["-m", "jobs.cli", words[0], *where, *words[1:]]
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


@pytest.fixture(scope="module")
def fresh(site: Site) -> Path:
    """A clone without campaign.yaml; the data moved, too, and the lab is out of reach."""
    folder = site.lab.parent
    for words in (
        ("git", "init", "--quiet", "--bare", folder / "site.git"),
        ("git", "-C", site.lab, "push", "--quiet", folder / "site.git", "main"),
        ("git", "clone", "--quiet", "--branch", "main", folder / "site.git", folder / "clone"),
    ):
        run_as(site.user, words)
    assert site("push", str(folder / "site.git"))[0] == 0
    status, said = site("fetch", "origin", "--campaign", "night", lab=folder / "clone")
    assert status == 0, said
    return folder / "clone"


@pytest.mark.parametrize(
    ("name", "verdict", "then"),
    [
        ("e0003", "keep", "ok"),
        ("e0004", "discard", "ok"),
        ("e0005", "discard", "crash"),
        ("e0006", None, "ok"),  # eager
    ],
)
def test_by_one_command_each_in_a_fresh_clone_experiments_come_again(
    site: Site, fresh: Path, name: str, verdict: str | None, then: str
) -> None:
    recorded = json.loads(site("show", name, "--json")[1])
    (old,) = recorded["results"]
    assert recorded["decision"]["verdict"] in ([verdict] if verdict else ["keep", "discard"])
    assert old["status"] == then
    elsewhere = site.data.rename(site.data.with_name("moved"))
    lab = site.lab.rename(site.lab.with_name("away"))
    try:
        words = ("--campaign", "night", "--data", str(elsewhere), "--json")
        status, said = site("reproduce", name, *words, lab=fresh)
    finally:
        elsewhere.rename(site.data)
        lab.rename(site.lab)
    assert status == 0, said
    (told,) = json.loads(said[said.index("[\n") : said.rindex("]") + 1])
    (run,) = told["runs"]
    assert (told["verdict"], run["status"]) == ("reproduced", then)
    folder = Path(told["folder"]) / "runs" / name / "s1-a1"
    made = json.loads((folder / "result.json").read_text())
    for fact in ("isolation", "threads", "seed", "budget", "cpu", "versions"):
        assert made[fact] == old["details"][fact]
    assert made["isolation"] == "apptainer"
    if then == "crash":
        assert "ends as it did" in told["why"]
        return
    assert made["steps"] >= 40
    assert "5 times the spread on one seed" in told["spread"]
    compiled = ", compiled" in (folder / "train.log").read_text()
    assert compiled == (name != "e0006")
    allowed = told["tolerance"] if compiled else 0.0
    assert abs(run["metric"] - old["metric"]) <= allowed


def test_the_bundle_runs_by_its_plain_apptainer_command(site: Site, cpu_image: Image) -> None:
    target = site.lab.parent / "bundle"
    status, said = site("bundle", "e0003", "--to", str(target))
    assert status == 0, said
    assert (target / "image.def").read_text() == cpu_image.definition
    assert "torch" in (target / "image.json").read_text()
    file = site.store / Path(cpu_image.path).name
    command = ["runuser", "-u", site.user, "--", "env", "-i", "PATH=/usr/bin:/bin"]
    done = subprocess.run([*command, str(target / "run.sh")], capture_output=True, text=True)
    assert (done.returncode, f"sha256 {cpu_image.sha256}" in done.stderr) == (2, True), done.stderr
    shutil.rmtree(next(target.glob("out-*")))
    command += [f"IMAGE={file}", f"DATA={site.data}", str(target / "run.sh")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = target.glob("out-*/result.json")
    recorded = json.loads(site("show", "e0003", "--json")[1])["results"][0]["metric"]
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
    status, said = site("reproduce", "e0005")
    assert (status, f"the tag cpu means sha256 {bare.sha256} now" in said) == (0, True), said

    file = site.store / Path(cpu_image.path).name
    file.chmod(0o755)
    with file.open("r+b") as image:
        image.seek(-1, 2)
        last = image.read(1)
        image.seek(-1, 2)
        image.write(bytes([last[0] ^ 1]))
    status, said = site("reproduce", "e0005")
    assert (status, f"recorded is sha256 {cpu_image.sha256}, found is" in said) == (2, True), said

    file.unlink()
    status, said = site("reproduce", "e0005")
    assert (status, "git show refs/autoresearch/night/records:image-" in said) == (2, True), said
