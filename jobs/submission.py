"""Where runs execute: the interface of executors, and the one that uses this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from jobs import payload, process
from jobs.errors import UserError
from jobs.model import Run, Submission
from jobs.settings import Executor as Settings

CANCEL_S = 5.0  # for a payload to end by itself
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
    cancelled: bool = False  # by somebody, or its whole allocation ended: no doing of its node
    oom: bool = False  # its memory limit ended it, by the cgroup's evidence


# Where a branch wants its runs: on a node, on nodes with a feature, on a GPU model; any of them.
PLACE = ("node", "constraint", "gpu")
Place = Mapping[str, str]
ANYWHERE: Place = MappingProxyType({})


def place_of(settings: Mapping[str, Any]) -> Place:
    """Where a branch of these settings wants its runs."""
    return {k: settings[k] for k in PLACE if settings.get(k)}


class Executor(Protocol):
    """Runs payloads somewhere. Names are unique for ever: '<campaign>-<run id>'."""

    def submit(
        self,
        run: Run,
        name: str,
        run_dir: Path,
        limit_s: float,
        avoid: frozenset[str] = ...,
        place: Place = ...,
    ) -> Submission:
        """Hand over one run. Raises UserError for settings that are wrong, Paused for an outage."""

    def survey(self, submissions: Sequence[Submission]) -> Mapping[str, JobState] | None:
        """State by run id, by one query for all of them; no information where the query failed
        (None), or of a run that is left out."""

    def find(self, names: Iterable[str]) -> Mapping[str, Submission]:
        """Jobs that exist under these names: how intents are reconciled after a kill."""

    def cancel(self, submissions: Sequence[Submission]) -> None: ...

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


def require(
    settings: Settings, campaign_dir: Path, limit_s: float, places: Sequence[Place]
) -> None:
    """Raises UserError where no run of these settings could ever start; begins nothing."""
    if settings.kind != "local":
        from slurm import trial

        trial.require(settings, campaign_dir, limit_s, places)


def preview(
    settings: Settings, name: str, run_dir: Path, limit_s: float, places: Sequence[Place]
) -> str:
    """What would be handed to the machine or to Slurm for one run, letter by letter.

    `places`: where the branches want to run, the run's own first.
    """
    if settings.kind == "local":
        return f"$ {shlex.join(_payload(run_dir))}\n"
    from slurm import script

    return script.preview(settings, name, run_dir.parents[2], limit_s, places)


def _payload(run_dir: Path) -> list[str]:
    # -P: a lab may hold a folder named trainer/, which is not ours
    return [sys.executable, "-P", "-m", "jobs.payload", str(run_dir)]


class LocalExecutor:
    """Each run a process of this machine, which outlives the controller and is adopted again.

    submitit's own local executor is not used: rebuilt after its controller was killed it reports
    'done' while the process lives, and it starts two interpreters in a row where one will do.
    """

    def __init__(self, settings: Settings, campaign_dir: Path) -> None:
        self._runs = campaign_dir / "runs"
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._devices = visible_gpus()
        self._holders: dict[str, tuple[str, str]] = {}  # run id -> process, CUDA device

    def submit(
        self,
        run: Run,
        name: str,
        run_dir: Path,
        limit_s: float,
        avoid: frozenset[str] = frozenset(),
        place: Place = ANYWHERE,
    ) -> Submission:
        # A run needs no key of the model's: none is in reach of its process list.
        environment = {**os.environ, "AUTORESEARCH_RUN_NAME": name}
        device = self._free_device()
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with open(run_dir / "payload.log", "ab") as log:
            child = subprocess.Popen(
                _payload(run_dir),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is the controller's, not the run's
            )
        self._children[child.pid] = child
        job = process.identity(child.pid)
        if device is not None:
            self._holders[run.id] = (job, device)
        return Submission(run.id, "local", job, os.uname().nodename)

    def _free_device(self) -> str | None:
        """The GPU with the fewest runs on it. A run that has its result is done with its own."""
        self._holders = {
            run: (job, device)
            for run, (job, device) in self._holders.items()
            if process.alive(job) and not (self._folder(run) / "result.json").exists()
        }
        used = Counter(device for _, device in self._holders.values())
        return min(self._devices, key=lambda device: used[device], default=None)

    def survey(self, submissions: Sequence[Submission]) -> Mapping[str, JobState] | None:
        for child in list(self._children.values()):
            if child.poll() is not None:  # reaps the zombie
                del self._children[child.pid]
        node = os.uname().nodename
        states = {}
        for submission in submissions:
            # of two payloads for one run (a kill in between), the claim's is meant
            running = process.alive((self._claimed(submission.run) or submission).job)
            states[submission.run] = JobState("running" if running else "ended", node=node)
        return states

    def find(self, names: Iterable[str]) -> Mapping[str, Submission]:
        """Payloads say who they are in their run folder: wait for one that may just be starting."""
        runs = {name: payload.run_id(name) for name in names}
        found: dict[str, Submission] = {}
        deadline = time.monotonic() + START_GRACE_S
        while missing := runs.keys() - found.keys():
            # asked first: it may claim its folder in between
            starting = _starting({str(self._folder(runs[name])) for name in missing})
            claimed = {name: self._claimed(runs[name]) for name in missing}
            found |= {name: submission for name, submission in claimed.items() if submission}
            if not starting or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return found

    def _folder(self, run: str) -> Path:
        experiment, _, attempt = run.partition("-")
        return self._runs / experiment / attempt

    def _claimed(self, run: str) -> Submission | None:
        """The submission that a run folder's claim tells of, and which GPU it holds."""
        claim = payload.claimed(self._runs, run)
        if not claim:
            return None
        if claim.get("device"):
            self._holders[run] = (claim["process"], claim["device"])
        return Submission(run, "local", claim["process"], claim["host"])

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """A payload that is asked ends its tree and writes its result; one that hangs is killed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + CANCEL_S
            for submission in submissions:
                if process.alive(submission.job):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(submission.job.partition("@")[0]), number)
            while any(process.alive(s.job) for s in submissions) and time.monotonic() < deadline:
                time.sleep(0.05)

    def close(self) -> None:
        """Runs are not ended: who starts the controller again adopts them."""


def visible_gpus() -> list[str]:
    """CUDA devices of this machine, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # empty: none of them
        return [device for device in visible.split(",") if device]
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


def _starting(folders: set[str]) -> bool:
    """Whether a payload of one of these run folders is a process that has not claimed it yet."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = os.fsdecode(command.read_bytes()).split("\0")
            if "jobs.payload" in words and folders.intersection(words):
                return True
    return False
