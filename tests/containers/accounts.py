"""Ordinary users for the tests, which run as root: real accounts, real permissions."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def account(name: str) -> str:
    """The name of an ordinary user with ranges in /etc/subuid, made if absent."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", name], check=True)
    return name


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
