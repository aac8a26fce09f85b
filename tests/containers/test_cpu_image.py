"""Real runs in the CPU image by ordinary users: program and referee each in its own container."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import accounts
import pytest
import runs
from accounts import ROOT, for_group_only, python_as
from conftest import Person, person

from containers import command, images, seal
from containers.images import Image
from trainer.referee.task import Task

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

# Prints what a program can see, as JSON, and ends without a score.
PROBE = """
import glob, json, os, socket
def refused(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.strerror
print("SEEN " + json.dumps({
    "environment": dict(os.environ),
    "network": [name for _, name in socket.if_nameindex()],
    "processes": len(glob.glob("/proc/[0-9]*")),
    "places": sorted(os.listdir("/autoresearch")),
    "homes": os.listdir("/home"),
    "temporary": os.listdir("/tmp"),
    "written": {path: refused(path + "/file") for path in (
        "/", "/opt/autoresearch/trainer", "/autoresearch/program", "/autoresearch",
        "/autoresearch/scratch", "/tmp", "/var/tmp", "/dev/shm")},
    "compiler": os.system("gcc --version > /dev/null"),
}))
"""


@pytest.fixture(scope="module", autouse=True)
def data():
    yield runs.data_folder()
    runs.remove_data()


def run(someone: Person, image: Image, program: str | Path, **values) -> dict:
    """A run by the wrapper, as that user, of a program: a file, or text that follows UNIFORM."""
    place, run_dir = someone.folder / "program", someone.folder / "run"
    for folder in (place, run_dir):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    if isinstance(program, Path):
        shutil.copy(program, place / "train.py")
    else:
        (place / "train.py").write_text(runs.UNIFORM + program)
    task = {
        "kind": "nanochat",
        "program": str(place),
        "command": ["python", "train.py"],
        "run_dir": str(run_dir),
        "data": str(runs.data_folder()),
        "wall_limit_s": 600,
        "isolation": "apptainer",
        "python": command.PYTHON,
        "trainer": command.SEALED,
        "program_argv": command.program_template(image.path),
        "referee_argv": command.referee_template(image.path),
        "threads": 1,
        "facts": {"experiment": "e0001", "run": "e0001-s1-a1"},
    }
    Task.from_json({**task, **values}).save()
    for path in (someone.folder, place, run_dir, run_dir / "task.json"):
        shutil.chown(path, someone.name)
    secrets = {
        "APPTAINERENV_LEAK": "key-1",
        "APPTAINER_BIND": "/etc:/home/leak",
        "ANTHROPIC_API_KEY": "key-2",
        "SLURM_JOB_ID": "7",
    }
    agent = {"SSH_AUTH_SOCK": "/tmp/key-3", "CUDA_VISIBLE_DEVICES": "0,3", **secrets}
    python_as(someone.name, "-m", "trainer.referee.wrapper", run_dir, **agent)
    result = json.loads((run_dir / "result.json").read_text())
    return result | {"log": (run_dir / "train.log").read_text(errors="replace")}


def test_the_image_holds_this_projects_evaluator_and_says_so(cpu_image: Image):
    images.check_evaluator(cpu_image, seal.evaluator_sha256(ROOT / "trainer"))
    assert cpu_image.labels["autoresearch.torch"].startswith("2.13.0")
    assert cpu_image.labels["autoresearch.python"].startswith("3.11.")
    assert cpu_image.labels["autoresearch.cuda"] == "none"
    names = {package.partition("=")[0] for package in cpu_image.packages}
    assert {"torch", "numpy", "pyarrow", "tiktoken", "rustbpe", "safetensors", "deb:g++"} <= names
    assert cpu_image.size < 700e6


def test_nothing_of_the_site_that_built_it_stays_inside(cpu_image: Image, someone: Person):
    script = "ls /mnt; ls /etc/pip.conf 2>/dev/null; find / -xdev -name 'torch*.whl'"
    found = someone.run(*command.plain(cpu_image.path, ["sh", "-c", script]), check=False)
    assert found.stdout == ""


def test_a_run_is_scored_by_a_referee_in_a_container_of_its_own(cpu_image: Image, someone: Person):
    result = run(someone, cpu_image, runs.HONEST)
    assert (result["status"], result["isolation"]) == ("ok", "apptainer"), result
    assert result["val_bpb"] == pytest.approx(runs.uniform_bpb(), abs=1e-6)
    left = [
        path for path in Path("/dev/shm").glob("autoresearch-*") if path.owner() == someone.name
    ]
    assert not left


def test_the_program_sees_its_own_folders_and_nothing_of_its_host(
    cpu_image: Image, someone: Person
):
    result = run(someone, cpu_image, PROBE)
    lines = [line for line in result["log"].splitlines() if line.startswith("SEEN ")]
    assert lines, result["log"]
    seen = json.loads(lines[0].removeprefix("SEEN "))
    assert seen["network"] == ["lo"]
    assert seen["processes"] <= 3  # its own, with apptainer's init
    assert seen["places"] == ["program", "scratch", "shared"]  # no data, no results
    assert seen["homes"] == []
    read_only = {path for path, error in seen["written"].items() if error}
    assert read_only == {
        *("/", "/opt/autoresearch/trainer", "/autoresearch/program", "/autoresearch")
    }
    environment = seen["environment"]
    assert environment["HOME"] == "/autoresearch/scratch"
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,3"
    assert environment["PATH"] == command.PATH
    hidden = ("key-", someone.name, "SLURM")
    own = {k: v for k, v in environment.items() if not k.startswith(("APPTAINER_", "SINGULARITY_"))}
    assert not [pair for pair in own.items() if any(word in "=".join(pair) for word in hidden)]
    assert not [name for name in environment if "LEAK" in name]
    assert seen["compiler"] == 0
    assert (result["status"], result["isolation"]) == ("crash", "apptainer")


def test_a_program_reads_what_the_site_binds_and_writes_on_the_nodes_own_disk(
    cpu_image: Image, someone: Person
):
    more, disk = someone.folder / "more", someone.folder / "disk"
    for folder in (more, disk):
        folder.mkdir()
        shutil.chown(folder, someone.name)
    (more / "word").write_text("bound")
    program = f"""
import os
print("READ", open("{more}/word").read())
try:
    open("{more}/new", "w")
except OSError as error:
    print("REFUSED", error.strerror)
open("/autoresearch/scratch/model.safetensors", "w").write("weights")
{runs.HONEST}"""
    argv = command.program_template(cpu_image.path, binds=[str(more)])
    result = run(someone, cpu_image, program, program_argv=argv, scratch=str(disk))
    assert result["status"] == "ok", result
    assert "READ bound\nREFUSED Read-only file system" in result["log"]
    assert (someone.folder / "run" / "model.safetensors").read_text() == "weights"
    assert not list(disk.iterdir())


def test_exit_status_255_is_the_programs_own_once_it_has_started(cpu_image: Image, someone: Person):
    result = run(someone, cpu_image, "import sys; sys.exit(255)")
    assert (result["status"], result["exit_code"]) == ("crash", 255)


def test_a_container_that_does_not_start_is_infrastructure(cpu_image: Image, someone: Person):
    gone = command.program_template(cpu_image.path + ".gone")
    result = run(someone, cpu_image, runs.HONEST, program_argv=gone)
    assert result["status"] == "infrastructure"
    assert "the container did not start" in result["reason"]
    assert ".gone" in result["reason"]


def test_a_kernel_that_refuses_to_take_the_network_away_is_told_with_the_setting(
    cpu_image: Image, someone: Person, monkeypatch: pytest.MonkeyPatch
):
    limit = 'echo 0 > /proc/sys/user/max_net_namespaces; exec "$@"'
    walls = ["unshare", "--user", "--map-root-user", "sh", "-c", limit, "sh"]
    plainly = accounts.run_as
    monkeypatch.setattr(
        accounts, "run_as", lambda name, argv, **more: plainly(name, [*walls, *argv], **more)
    )
    result = run(someone, cpu_image, runs.HONEST)
    assert result["status"] == "infrastructure"
    assert "executor.allow_network" in result["reason"], result["reason"]


def test_what_a_program_writes_anywhere_is_held_to_its_limit(cpu_image: Image, someone: Person):
    for place in ("/tmp", "/dev/shm", "/autoresearch/scratch"):
        fill = f"""
with open("{place}/fill", "wb", 0) as file:
    while True:
        file.write(bytes(2**20))
"""
        limits = {"memory_mb": 2048, "processes": 64, "log_mb": 4, "scratch_mb": 64}
        result = run(someone, cpu_image, fill, limits=limits)
        assert result["status"] in ("invalid", "crash"), place
        assert "64 MiB" in result["reason"] or "File too large" in result["log"], place


def test_the_projects_own_train_py_learns_in_the_image_compiled(cpu_image: Image, someone: Person):
    result = run(someone, cpu_image, ROOT / "trainer" / "train.py")
    assert result["status"] == "ok", result["log"]
    assert result["val_bpb"] < runs.uniform_bpb()


def test_a_second_user_runs_from_an_image_and_data_that_only_a_group_may_read(
    cpu_image: Image, someone: Person, reachable: Path
):
    shared = someone.folder / "group"
    shared.mkdir()
    image = dataclasses.replace(cpu_image, path=str(shutil.copy(cpu_image.path, shared)))
    data = str(shutil.copytree(runs.data_folder(), shared / "data"))
    shutil.chown(shared, someone.name)
    for_group_only("apptester2", shared)
    other = person("apptester2", reachable / "other")
    result = run(other, image, runs.HONEST, data=data)
    assert (result["status"], result["network"]) == ("ok", "none"), result
    assert result["val_bpb"] == pytest.approx(runs.uniform_bpb(), abs=1e-6)
    stranger = person("apptester3", reachable / "stranger")
    assert run(stranger, image, runs.HONEST, data=data)["status"] == "infrastructure"


def test_doctor_starts_a_container_as_a_run_has_it(cpu_image: Image, someone: Person):
    executor = {"image": cpu_image.sha256, "images": str(Path(cpu_image.path).parent)}
    settings = someone.folder / "campaign.yaml"
    settings.write_text(json.dumps({"executor": executor}))
    argv = ["doctor", "--config", settings, "--json"]
    done = python_as(someone.name, "-m", "jobs.cli", *argv, check=False)  # no repository there
    told = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert told["container"]["status"] == "ok", told["container"]
    assert "sdpa works" in told["attention"]["seen"], told["attention"]
