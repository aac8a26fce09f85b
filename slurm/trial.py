"""What Slurm says of a campaign's settings, and a job of doctor's own: submitted and awaited."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from submitit.slurm.slurm import _make_sbatch_string as submitit_script

from jobs.errors import AutoresearchError, UserError
from jobs.model import Finding
from jobs.settings import Executor as Settings
from jobs.submission import JobState
from slurm import allocation, commands, script
from slurm.commands import Unanswered
from slurm.executor import last_line, scancel, state_of

JOB_S = 300.0  # what a job of doctor's may take
WAIT_S = 900.0  # and its queue
LATE_S = 30.0  # until the findings of a job that has ended are seen through a shared folder
LOOK_S = 0.1
LOOK_AT_QUEUE_S = 5.0
RECENT = 4  # looks at the queue that an ended job should stay in it, where there is no sacct
# What sbatch --test-only says of nodes that are down or reserved for now; a job waits for them.
_PASSING = r"down, drained or reserved|not available now|nodes are busy"
# Lines of slurm/overnight.sbatch that a job of minutes does not have.
_NIGHTS_OWN = r"#SBATCH --(job-name|time|requeue|signal|open-mode|output)\b"


def settings(
    chosen: Settings, campaign_dir: Path, limit_s: float, places: Sequence[Mapping[str, str]]
) -> list[Finding]:
    """Whether Slurm would take the campaign's jobs, and how long it remembers them.

    Args:
        limit_s: what a run may take.
        places: where its branches want to run; see jobs.submission.Place.
    """
    try:
        _require_programs(chosen)
        texts = _texts(chosen, campaign_dir, limit_s, places)
    except UserError as error:
        return [Finding("Slurm", "failure", str(error), "Do what that says, then ask again")]
    accounts = commands.has_accounting()
    found = [taken(chosen, text) for text in texts]
    return [*found, memory(accounts, _min_job_age(), chosen)]


def require(
    chosen: Settings, campaign_dir: Path, limit_s: float, places: Sequence[Mapping[str, str]]
) -> None:
    """The same in short, before a campaign begins: what one branch alone wants is its own trouble.

    Raises UserError: no job of these settings could run; in Slurm's words.
    """
    _require_programs(chosen)
    if chosen.kind == "allocation":
        places = [{}]
    refusals = []
    for text in _texts(chosen, campaign_dir, limit_s, places):
        try:
            _try(chosen, text)
            return
        except UserError as error:
            refusals.append(error)
        except AutoresearchError:
            return  # no answer, or no room for more jobs now: the runs wait for both
    if not any(re.search(_PASSING, str(error)) for error in refusals):
        raise refusals[0]


def _require_programs(chosen: Settings) -> None:
    for program in ("sbatch", "squeue", "scontrol", "srun"):
        commands.require(program, f"executor.kind: {chosen.kind}")
    if chosen.kind == "allocation":
        allocation.require_installed()


def _texts(
    chosen: Settings, campaign_dir: Path, limit_s: float, places: Sequence[Mapping[str, str]]
) -> list[str]:
    """The scripts that a campaign would submit first. Raises UserError: as `script.check_hold`."""
    if chosen.kind == "allocation":
        nodes = {place["node"] for place in places if "node" in place}
        return [script.holder_text(chosen, campaign_dir, limit_s, nodes=nodes)]
    texts = [_text(chosen, campaign_dir, "true", limit_s, place) for place in places]
    return list(dict.fromkeys(texts))


def _try(chosen: Settings, text: str) -> None:
    """Raises as `commands.sbatch` what Slurm says of a script, or for a time that it would not."""
    commands.sbatch(text, "--test-only")
    found = re.search(r"^#SBATCH --time=(\d+)$", text, re.MULTILINE)
    limit_s = None if chosen.qos else commands.time_limit_s(chosen.partition)  # a QOS may widen it
    if found and limit_s is not None and int(found[1]) * 60 > limit_s:
        raise UserError(
            f"PartitionTimeLimit: a job asks for {found[1]} minutes, executor.partition has"
            f" {limit_s / 60:g}: {commands.remedy('PartitionTimeLimit')}"
        )


def taken(chosen: Settings, text: str) -> Finding:
    """What `sbatch --test-only` says of a script."""

    def act() -> str:
        _try(chosen, text)
        return "Slurm takes a job of these settings"

    return Finding.attempt("sbatch --test-only", act, "Change that, or wait until Slurm answers")


def memory(accounts: bool, min_job_age: int | None, chosen: Settings) -> Finding:
    """How long it is known what became of a job, by sacct or by MinJobAge (seconds) alone."""
    seen = f"sacct {'works' if accounts else 'does not work'} here; MinJobAge is {min_job_age} s"
    early = not accounts and (min_job_age or 0) < RECENT * chosen.poll_seconds
    wanted = f"executor.poll_seconds: {(min_job_age or 20) / RECENT:g}"
    return Finding.of(
        "accounting", seen, warning=(early, f"Ended jobs are forgotten early: {wanted}")
    )


def _min_job_age() -> int | None:
    with contextlib.suppress(Unanswered):
        told = commands.ask(["scontrol", "show", "config"])
        if found := re.search(r"^MinJobAge\s*=\s*(\d+)", told, re.MULTILINE):
            return int(found[1])
    return None


# -- a job of doctor's own ------------------------------------------------------------------------


def run_text(chosen: Settings, folder: Path, argv: Sequence[str]) -> str:
    """The script of a job that has a run's settings and does `argv`."""
    return _text(chosen, folder, shlex.join(argv), JOB_S, {})


def _text(
    chosen: Settings, folder: Path, command: str, limit_s: float, place: Mapping[str, str]
) -> str:
    given = script.sbatch_parameters(chosen, "autoresearch-doctor", folder, limit_s, (), place)
    return submitit_script(command=command, folder=folder, **given)


def overnight_text(chosen: Settings, folder: Path, argv: Sequence[str]) -> str:
    """The script of a job that has the settings of slurm/overnight.sbatch and does `argv`."""
    own = Path(__file__).with_name("overnight.sbatch").read_text().splitlines()
    kept = [o for o in own if o.startswith("#SBATCH ") and not re.match(_NIGHTS_OWN, o)]
    options = {"partition": chosen.partition, "account": chosen.account, "qos": chosen.qos}
    options |= {"job-name": "autoresearch-doctor", "time": str(script.minutes(JOB_S, 0))}
    options |= {"output": f"{folder}/%j_0_log.out", "chdir": str(folder)}
    kept += [f"#SBATCH --{k}={shlex.quote(v)}" for k, v in options.items() if v]
    return "\n".join(["#!/bin/bash", *kept, shlex.join(argv), ""])


def run(
    chosen: Settings, text: str, folder: Path, show: Callable[[str], None], wait_s: float = WAIT_S
) -> list[Finding]:
    """Submit a job and await folder/findings.json; its hello there is answered at once.

    Raises AutoresearchError: as `commands.sbatch`.
    """
    job, began = commands.sbatch(text), time.monotonic()
    state, asked, there = JobState("pending"), -math.inf, began
    try:
        while not (folder / "findings.json").exists():
            now = time.monotonic()
            if (folder / "hello").exists() and not (folder / "reply").exists():
                write(folder / "reply", str(time.time()))
            if now - asked > min(chosen.poll_seconds, LOOK_AT_QUEUE_S):
                asked = now
                with contextlib.suppress(Unanswered):
                    state = _state(job, folder)
            if state.phase != "ended":
                there = now
            show(f"doctor's job {job}: {state.phase} ({state.reason}), {now - began:.0f} s")
            if now - there > LATE_S or now - began > wait_s or state.permanent:
                return [_without(job, state, now - began)]
            time.sleep(LOOK_S)
        return [Finding(**item) for item in json.loads((folder / "findings.json").read_text())]
    finally:
        scancel([job])


def _state(job: str, folder: Path) -> JobState:
    """Raises Unanswered."""
    row = commands.by_job(commands.queue()).get(job)
    said = last_line(folder / f"{job}_0_log.out")
    return state_of(row, said) if row else JobState("ended", f"gone from the queue: {said}")


def _without(job: str, state: JobState, waited_s: float) -> Finding:
    """What it means that a job gave no findings."""
    seen = f"job {job} is {state.phase} after {waited_s:.0f} s: {state.reason}"
    remedy = "Runs would wait so, too: try again later, or see executor.partition and constraint"
    if state.phase == "ended":
        remedy = f"Nodes must find {sys.executable}, this project and the campaign's folder: put "
        remedy += "them on a shared file system, modules and PATH into executor.setup"
    waits = state.phase == "pending" and not state.permanent
    return Finding.of("job", seen, failure=(not waits, remedy), warning=(waits, remedy))


def write(path: Path, text: str) -> None:
    """Whole or not at all, as seen from other hosts."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    draft.replace(path)
