"""What these tests share: the cluster, its ordinary user, and that user's controllers."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CLUSTER = ["bash", str(ROOT / "slurm" / "cluster.sh")]
USER = "researcher"


def wait_for(what: Callable[[], Any], timeout_s: float = 30.0, why: str = "") -> Any:
    """The first true value of `what()`; fails the test after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := what():
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:.0f} s in vain {why}: last saw {value!r}")
        time.sleep(0.1)


def slurm(*argv: str, check: bool = True) -> str:
    """Output of a Slurm command, as root."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert not check or done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def as_user() -> dict[str, Any]:
    """What makes a process the ordinary user's: arguments of subprocess."""
    user = pwd.getpwnam(USER)
    groups = os.getgrouplist(USER, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}


def jobs_below(folder: Path) -> list[str]:
    """Ids of the jobs that were submitted from `folder`: others may use the cluster, too."""
    lines = slurm("squeue", "-h", "-u", USER, "-o", "%i %Z").splitlines()
    return [line.split()[0] for line in lines if str(folder) in line]


def switch(accounting: bool) -> None:
    argv = [*CLUSTER, "up", *(["--accounting"] if accounting else [])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if accounting:
        slurm("sacctmgr", "-i", "add", "user", USER, "Account=lab", check=False)


@dataclass
class Counted:
    """Programs of Slurm's names that note each call and pass it on."""

    path: str  # PATH with them in front
    log: Path

    def clear(self) -> None:
        self.log.write_text("")

    def calls(self) -> list[str]:
        return self.log.read_text().split()


def count_calls(home: Path) -> Counted:
    folder, log = home / "bin", home / "calls"
    folder.mkdir()
    for name in ("squeue", "scontrol", "sacct"):
        (folder / name).write_text(
            f'#!/bin/sh\necho {name} >>"{log}"\nexec {shutil.which(name)} "$@"\n'
        )
        (folder / name).chmod(0o755)
    log.touch()
    log.chmod(0o666)
    return Counted(f"{folder}:/usr/bin:/bin", log)


class Controller:
    """An executor in a process of the ordinary user, driven by lines of JSON; see driver.py."""

    def __init__(self, folder: Path, kind: str, **options: Any) -> None:
        self.folder = folder
        settings = {"cpus": 1, "memory": "200M", "margin": 30.0, "poll_seconds": 2.0} | options.pop(
            "settings", {}
        )
        self.settings = {"kind": kind, **settings}
        self._options = options
        self.start()

    def start(self) -> None:
        first = {"folder": str(self.folder), "settings": self.settings, **self._options}
        self.process = subprocess.Popen(
            [interpreter(), str(HERE / "driver.py"), json.dumps(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **as_user(),
            env={**environment(self.folder), **self._options.get("environ", {})},
            cwd=self.folder,
        )

    def __call__(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """The value of `executor.verb(...)`; errors come as {'error': class, 'words': text}."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([verb, args, kwargs]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the driver died"
        return json.loads(line)

    def run_dir(self, run: str) -> Path:
        return self.folder / "runs" / run.replace("-", "/", 1)

    def claim(self, run: str) -> dict[str, Any] | None:
        path = self.run_dir(run) / "claim.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finished(self, run: str) -> bool:
        return (self.run_dir(run) / "result.json").exists()

    def state(self, run: str) -> dict[str, Any] | None:
        """What a survey says of one run (it asks about all)."""
        states = self("survey")
        return states and states.get(run)

    def until(self, run: str, phase: str, timeout_s: float = 60.0) -> dict[str, Any]:
        def seen() -> dict[str, Any] | None:
            state = self.state(run)
            return state if state and state["phase"] == phase else None

        return wait_for(seen, timeout_s, f"for {run} to be {phase}, {self.state(run)}")

    def kill(self) -> None:
        """SIGKILL, as a login node's out-of-memory killer would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()


def interpreter() -> str:
    """A Python that the ordinary user can start: ours, or the system's of the same version."""
    probe = subprocess.run(
        ["runuser", "-u", USER, "--", sys.executable, "-c", ""], capture_output=True, check=False
    )
    if probe.returncode == 0:
        return sys.executable
    name = f"python3.{sys.version_info[1]}"
    found = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin")
    if found is None:
        pytest.fail(f"no {name} that ordinary users can start: install it for all users")
    return found


def environment(folder: Path) -> dict[str, str]:
    """A login's environment, with this project installed (its entry points too)."""
    paths = [str(ROOT), str(HERE), sysconfig.get_path("purelib")]
    if not any(e.value.startswith("slurm.step") for e in metadata.entry_points(group="submitit")):
        paths.insert(0, str(_installed(folder)))
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": pwd.getpwnam(USER).pw_dir,
        "USER": USER,
        "LOGNAME": USER,
        "LANG": "C.UTF-8",
        "PYTHONPATH": ":".join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ANTHROPIC_API_KEY": "sk-secret-of-the-controller",
    }


def _installed(folder: Path) -> Path:
    """A folder that says what pip would have written down when installing this project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder.parent / "site" / "autoresearch_hpc-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: autoresearch-hpc\nVersion: 0\n")
    groups = project["entry-points"].items()
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for g, e in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return info.parent
