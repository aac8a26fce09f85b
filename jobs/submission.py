"""Where runs execute: the interface of executors, and the one that uses this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jobs import process
from jobs.config import Executor as Settings
from jobs.errors import UserError
from jobs.model import Run, Submission

START_GRACE_S = 15.0  # a payload that has not claimed its run folder by then never started


@dataclass(frozen=True)
class JobState:
    """What an executor knows of a job. The result itself is only ever read from result.json."""

    phase: str  # "pending", "running", "ended", "absent"
    reason: str = ""  # the executor's own words
    node: str | None = None
    permanent: bool = False  # pending for a reason that waiting does not mend
    queue_s: float | None = None
    preempted: bool = False


class Executor(Protocol):
    """Runs payloads somewhere. Names are unique for ever: '<campaign>-<run id>'."""

    def submit(
        self, run: Run, name: str, run_dir: Path, limit_s: float, avoid: frozenset[str] = ...
    ) -> Submission:
        """Hand over one run. Raises UserError for settings that are wrong, Paused for an outage."""

    def survey(self, submissions: Sequence[Submission]) -> Mapping[str, JobState] | None:
        """State by run id, by one query for all of them; None: the query failed, no information."""

    def find(self, names: Iterable[str]) -> Mapping[str, Submission]:
        """Jobs that exist under these names: how intents are reconciled after a kill."""

    def cancel(self, submissions: Sequence[Submission]) -> None: ...

    def slots(self) -> int | None:
        """Runs that fit at once, None where only the queue knows."""

    def close(self) -> None: ...


def executor(settings: Settings, campaign_dir: Path) -> Executor:
    """The executor that campaign.yaml names."""
    if settings.kind == "local":
        return LocalExecutor(settings, campaign_dir)
    if settings.kind == "slurm":
        from slurm.executor import SlurmExecutor

        return SlurmExecutor(settings, campaign_dir)
    if settings.kind == "allocation":
        from slurm.allocation import AllocationRuns

        return AllocationRuns(settings, campaign_dir)
    raise UserError(f"executor.kind: {settings.kind!r} is not one of local, slurm, allocation")


class LocalExecutor:
    """Each run a process of this machine, which outlives the controller and is adopted again.

    submitit's own local executor is not used: rebuilt after its controller was killed it reports
    'done' while the process lives, and it starts two interpreters in a row where one will do.
    """

    def __init__(self, settings: Settings, campaign_dir: Path) -> None:
        self._runs = campaign_dir / "runs"
        self._children: dict[int, subprocess.Popen] = {}
        self._devices = _visible_gpus()
        self._device_of: dict[str, str] = {}  # run id -> CUDA device

    def submit(
        self,
        run: Run,
        name: str,
        run_dir: Path,
        limit_s: float,
        avoid: frozenset[str] = frozenset(),
    ) -> Submission:
        environment = dict(os.environ, AUTORESEARCH_RUN_NAME=name)
        if self._devices:
            free = [d for d in self._devices if d not in self._device_of.values()]
            device = (free or self._devices)[0]
            self._device_of[run.id] = environment["CUDA_VISIBLE_DEVICES"] = device
        with open(run_dir / "payload.log", "ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "jobs.payload", str(run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is the controller's, not the run's
            )
        self._children[child.pid] = child
        return Submission(run.id, "local", process.identity(child.pid), os.uname().nodename)

    def survey(self, submissions: Sequence[Submission]) -> Mapping[str, JobState] | None:
        for child in list(self._children.values()):
            if child.poll() is not None:  # reaps the zombie
                del self._children[child.pid]
        node = os.uname().nodename
        states = {}
        for submission in submissions:
            running = process.alive(submission.job)
            states[submission.run] = JobState("running" if running else "ended", node=node)
            if not running:
                self._device_of.pop(submission.run, None)
        return states

    def find(self, names: Iterable[str]) -> Mapping[str, Submission]:
        """Payloads say who they are in their run folder: wait for one that may just be starting."""
        names = set(names)
        found: dict[str, Submission] = {}
        deadline = time.monotonic() + START_GRACE_S
        while missing := names - set(found):
            starting = _starting(missing)  # asked first: it may claim its folder in between
            for name in missing:
                with contextlib.suppress(FileNotFoundError):
                    found[name] = self._claimed(name)
            if not starting or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return found

    def _claimed(self, name: str) -> Submission:
        """The submission that a claim file tells of. Raises FileNotFoundError without one."""
        experiment, seed, attempt = name.split("-")[-3:]
        folder = self._runs / experiment / f"{seed}-{attempt}"
        claim = json.loads((folder / "claim.json").read_text())
        if claim.get("device"):
            self._device_of[claim["run"]] = claim["device"]
        return Submission(claim["run"], "local", claim["process"], claim["host"])

    def cancel(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            if process.alive(submission.job):
                # the payload ends its tree and writes result.json
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(submission.job.partition("@")[0]), signal.SIGTERM)

    def slots(self) -> int | None:
        return max(1, len(self._devices))

    def close(self) -> None:
        """Runs are not ended: who starts the controller again adopts them."""


def _visible_gpus() -> list[str]:
    """CUDA devices of this machine, without importing torch."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listing.stdout.split() if listing.returncode == 0 else []


def _starting(names: set[str]) -> bool:
    """Whether a payload of one of these names is a process that has not claimed its folder yet."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            for item in environ.read_bytes().split(b"\0"):
                key, _, value = item.partition(b"=")
                if key == b"AUTORESEARCH_RUN_NAME" and value.decode(errors="replace") in names:
                    return True
    return False
