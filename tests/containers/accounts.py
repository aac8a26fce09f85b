"""Ordinary users for the tests, which run as root: real accounts, real permissions; their image."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from containers import build, images, seal
from containers.images import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Outlives the test run, so that the minutes of a build are spent once for each recipe.
CACHE = Path(os.environ.get("AUTORESEARCH_TEST_IMAGES", "/var/tmp/autoresearch-test-images"))


def account(name: str) -> str:
    """The name of an ordinary user with ranges in /etc/subuid, made if absent."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", name], check=True)
    return name


def for_group_only(name: str, folder: Path) -> None:
    """Let a group, of which that user is made a member, read the folder, and nobody else."""
    account(name)
    for argv in (
        ("groupadd", "--force", "apptesters"),
        ("usermod", "-aG", "apptesters", name),
        ("chgrp", "-R", "apptesters", folder),
        ("chmod", "-R", "g+rX,g-w,o-rwx", folder),
    ):
        subprocess.run([str(word) for word in argv], check=True)


def run_as(
    name: str, argv: Sequence[str | Path], check: bool = True, **env: str
) -> subprocess.CompletedProcess:
    """Run as that user, in a login's environment and `env`. Output is captured as text."""
    user = pwd.getpwnam(name)
    login = {"HOME": user.pw_dir, "USER": name, "LOGNAME": name, "LANG": "C.UTF-8"}
    login["PATH"] = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    done = subprocess.run(
        list(map(str, argv)),
        env={**login, **env},
        cwd="/",
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=os.getgrouplist(name, user.pw_gid),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{argv} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def python_as(name: str, *argv: str | Path, **options) -> subprocess.CompletedProcess:
    """Run `python ARGV` with this project and its dependencies, as that user."""
    interpreter = sys.executable
    if run_as(name, ["test", "-x", os.path.realpath(interpreter)], check=False).returncode:
        # Root's own interpreter, in root's home: the system's of the same version will do.
        interpreter = shutil.which(f"python3.{sys.version_info[1]}", path="/usr/bin:/bin")
    packages = sysconfig.get_path("purelib")
    env = {"PYTHONPATH": f"{ROOT}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"}
    return run_as(name, [interpreter, *argv], **{**env, **options})


def site_options() -> list[str]:
    """`image build` options for the machine's own package index, from pip's variables."""
    options = ["--set", f"TORCH_INDEX={os.environ.get('PIP_EXTRA_INDEX_URL', '')}"]
    if certificates := os.environ.get("PIP_CERT"):
        options += ["--ca-bundle", certificates]
    if wheels := os.environ.get("PIP_FIND_LINKS"):
        options += ["--wheels", wheels]
    return options


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
    again = [HERE / "reseal.def", "--set", f"FROM={known[-1].path}"] if known else []
    argv = again or ["cpu", *site_options()]
    options = ["--tag", "cpu", "--store", CACHE, "--json"]
    built = python_as(owner, "-m", "jobs.cli", "image", "build", *argv, *options)
    for old in images.every(CACHE)[:-3]:  # half a gigabyte each
        for ending in (".sif", ".json", ".log"):
            Path(old.path).with_suffix(ending).unlink(missing_ok=True)
    return images.find(CACHE, json.loads(built.stdout)["sha256"])
