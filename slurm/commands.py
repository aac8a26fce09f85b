"""Talking to Slurm: commands under a time limit, answers as rows, refusals in words."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jobs.errors import AutoresearchError, UserError

TIMEOUT_S = 20.0  # the commands themselves give up on a dead slurmctld after some 9 s
SUBMIT_S = 60.0  # longer: a submission that is given up may have succeeded

# All that Slurm's commands and our jobs are given of the caller's environment: no key or token can
# slip into a job, where the program could read it. Slurm adds its own variables.
_KEPT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ"),
    *("PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "SLURM_CONF"),
)


class Unanswered(AutoresearchError):
    """Slurm gave no answer: nothing is known, and nothing may be concluded from it."""

    exit_code = 3


class Busy(AutoresearchError):
    """Slurm takes no more jobs of ours for now: the same submission is worth another try."""


@dataclass(frozen=True)
class Row:
    """What Slurm says of one job."""

    job: str
    state: str  # "RUNNING", "CANCELLED", ...
    nodes: str = ""  # "n1", "n[1-4]"
    reason: str = ""
    name: str = ""
    folder: str = ""  # its working directory: tells equal names of two campaigns apart
    queue_s: float | None = None  # from submission to start
    left_s: float | None = None  # until its time limit


def environment() -> dict[str, str]:
    """The environment of Slurm's commands and of jobs.

    Nothing of an outer job's SLURM_* and SBATCH_* (the controller may be a job itself, and they
    would become options of every job it submits), except where the cluster's configuration lies.
    """
    return {name: os.environ[name] for name in _KEPT if name in os.environ}


def require(program: str, setting: str) -> None:
    """Raises UserError where `program` is not on PATH."""
    if shutil.which(program) is None:
        raise UserError(
            f"{setting} needs Slurm, and there is no {program} on this host"
            f" ({os.uname().nodename}); log in to the cluster, load its module, or use"
            " executor.kind: local"
        )


def ask(argv: Sequence[str], stdin: str | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """Standard output of a Slurm command.

    Raises Unanswered: it failed or took too long; with its own words.
    """
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unanswered(f"{argv[0]}: {error}") from None
    if done.returncode != 0:
        raise Unanswered(f"{argv[0]}: {words(done.stderr or done.stdout)}")
    return done.stdout


def sbatch(script: str, *options: str) -> str:
    """Submit a job; its id. Raises Busy, Unanswered or UserError, as `refusal` tells them apart."""
    try:
        said = ask(["sbatch", "--parsable", *options], script, SUBMIT_S)
    except Unanswered as error:
        raise refusal(re.sub("sbatch: (error: )?", "", str(error))) from None
    return said.split(";")[0].strip()


def exclude_only(job: str, nodes: Iterable[str]) -> None:
    """A pending job may be on all nodes but these; where Slurm does not answer, it waits on."""
    with contextlib.suppress(Unanswered):
        ask(["scontrol", "update", f"jobid={job}", f"excnodelist={','.join(nodes)}"])


def words(text: str) -> str:
    """What a command complained of, as one line."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:600]


# -- what became of jobs --------------------------------------------------------------------------

_FIELDS = "%i|%T|%N|%V|%S|%L|%r|%Z|%j"  # the name last: it may hold anything


def queue() -> list[Row]:
    """All jobs of this user that slurmctld remembers, by one query whatever their number.

    Ended ones stay for MinJobAge (300 s by default). Raises Unanswered.
    """
    lines = ask(["squeue", "--me", "--all", "-t", "all", "-r", "-h", "-o", _FIELDS]).splitlines()
    rows = []
    for line in (line for line in lines if line.count("|") >= 8):
        job, state, nodes, asked, start, left, reason, folder, name = line.split("|", 8)
        waited = None if state == "PENDING" else _between(asked, start)
        rows.append(Row(job, state, nodes, reason, name, folder, waited, seconds(left)))
    return rows


def remembered(jobs: Iterable[str]) -> list[Row]:
    """Those of `jobs` that scontrol knows, where squeue did not. One query. Raises Unanswered."""
    wanted, rows = set(jobs), []
    for line in ask(["scontrol", "--all", "--oneliner", "show", "jobs"]).splitlines():
        found = dict(re.findall(r"(?:^|\s)(JobId|JobState|NodeList|Reason|JobName)=(\S*)", line))
        if (job := found.get("JobId")) in wanted:
            nodes = found["NodeList"].replace("(null)", "")
            rows.append(Row(job, found["JobState"], nodes, found["Reason"], found["JobName"]))
    return rows


def accounting(jobs: Iterable[str] = (), names: Iterable[str] = ()) -> list[Row]:
    """What slurmdbd recorded of jobs, by ids or by names. One query. Raises Unanswered."""
    which = (
        [f"--jobs={','.join(jobs)}"] if jobs else [f"--name={','.join(names)}", "-S", "now-7days"]
    )
    rows = []
    for line in ask(["sacct", "-n", "-P", "-X", "-o", _ACCOUNTED, *which]).splitlines():
        job, state, nodes, asked, start, reason, folder, name = line.split("|", 7)
        state = state.split()[0]  # "CANCELLED by 1000"
        rows.append(Row(job, state, nodes, reason, name, folder, _between(asked, start)))
    return rows


_ACCOUNTED = "JobIDRaw,State,NodeList,Submit,Start,Reason,WorkDir,JobName"


def has_accounting() -> bool:
    """Whether sacct works here; many sites have none, and then it fails."""
    try:
        ask(["sacct", "-n", "-X", "-P", "-S", "now", "-o", _ACCOUNTED])
    except Unanswered:
        return False
    return True


def steps() -> dict[tuple[str, str], str]:
    """Ids of this user's running steps by (job, step's name), by one query. Raises Unanswered."""
    lines = ask(["squeue", "--me", "--steps", "-h", "-o", "%i|%j"]).splitlines()
    found = (line.split("|", 1) for line in lines)
    return {(step.partition(".")[0], name): step for step, name in found}


def is_node(name: str) -> bool:
    """Whether Slurm has a node of this name; also where it does not answer."""
    with contextlib.suppress(Unanswered):
        return bool(ask(["sinfo", "--all", "-h", "-N", "-n", name, "-o", "%N"]).strip())
    return True


def time_limit_s(partition: str | None) -> float | None:
    """The longest that a job may take there; None where there is no limit, or no answer."""
    chosen = ["-p", partition] if partition else ["--all"]
    with contextlib.suppress(Unanswered):
        rows = ask(["sinfo", *chosen, "-h", "-o", "%P|%l"]).split()
        limits = [row.split("|")[1] for row in rows if partition or row.split("|")[0].endswith("*")]
        known = [seconds(limit) for limit in limits]
        if known and None not in known:
            return max(filter(None, known))
    return None


def hostnames(nodes: str) -> list[str]:
    """'n[1-2]' -> ['n1', 'n2']. Asks no daemon."""
    return ask(["scontrol", "show", "hostnames", nodes]).split() if nodes else []


@functools.lru_cache(maxsize=4096)  # ended jobs are told of again at every tick
def seconds(text: str) -> float | None:
    """'1-02:03:04' or '9:59' in seconds; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


@functools.lru_cache(maxsize=4096)
def _between(earlier: str, later: str) -> float | None:
    """Seconds between two of Slurm's local times; None where one is 'N/A' or 'Unknown'."""
    try:
        # Of local times themselves the difference is an hour off where the clocks change between.
        begin, end = (datetime.fromisoformat(text).timestamp() for text in (earlier, later))
    except ValueError:
        return None
    return max(0.0, end - begin)


# -- what refusals and reasons mean ---------------------------------------------------------------

# Slurm's words -> the settings of campaign.yaml they speak of.
_SETTINGS = (
    (r"invalid partition|partition name", "partition"),
    (r"account/partition|invalid account", "account (or partition)"),
    (r"not permitted to use this partition|access/permission", "partition or account"),
    (r"invalid qos|qos specification", "qos"),
    (r"invalid feature|constraint", "constraint"),
    (r"reservation", "reservation"),
    (r"gres|gpus?\b|tres", "gpu_syntax or gpus"),
    (r"node name|number of nodes", "exclude or nodes, or branches.NAME.node,"),
    (r"invalid --time|time limit|MaxWall", "margin, hold_hours or the budget"),
    (r"memory|--mem\b", "memory"),
    (r"cpu|more processors", "cpus"),
    (r"node configuration is not available|node count", "gpus, cpus, memory, nodes or constraint"),
    (r"(Assoc|QOS)\w+", "qos or account"),
)
_BUSY = r"MaxSubmit|GrpSubmit|MaxJobs|too many jobs|Slurm temporarily unable"
# The same sentence for every limit of an account or a QOS; the line before it may name which.
_POLICY = r"\bJob violates accounting/QOS policy\b.*"
_OUTAGE = (
    r"contact slurm controller|socket timed out|zero bytes|connection (refused|reset|timed)"
    r"|munge|i/o error|timed out|resource temporarily|unexpected message|in standby"
)


def refusal(said: str) -> AutoresearchError:
    """The error for what sbatch said: Unanswered (an outage), Busy, or UserError."""
    told = re.sub(_POLICY, "", said)
    unnamed = told != said and not re.search(r"(Assoc|QOS)\w+", told)
    if unnamed or re.search(_BUSY, told, re.IGNORECASE):
        return Busy(said)
    if re.search(_OUTAGE, told, re.IGNORECASE):
        return Unanswered(said)
    found = next((s for pattern, s in _SETTINGS if re.search(pattern, told, re.IGNORECASE)), None)
    place = f"executor.{found}" if found else "the executor's settings"
    return UserError(
        f"Slurm refused the job: {said}. See {place} in campaign.yaml; nothing was started"
    )


# Reasons of pending jobs that waiting does not mend, and what does.
_PERMANENT = (
    (r"Assoc(Grp|Max).*(Jobs|Submit)", None),  # passes as jobs end
    (r"QOS.*PerUser|QOS.*(Jobs|Submit)", None),
    (r"AssocGrp|QOSGrp", "the account's share is used up: ask for more, or set executor.account"),
    (r"ReqNodeNotAvail", "nodes it needs are down or reserved: see sinfo -R, executor.constraint"),
    (r"PartitionTimeLimit|MaxWall", "shorten executor.margin, hold_hours or the budget"),
    (
        r"PartitionNodeLimit|PartitionConfig",
        "more than executor.partition has: time (executor.margin, hold_hours, the budget), nodes,"
        " gpus, cpus or memory",
    ),
    (r"PartitionDown|PartitionInactive", "executor.partition is closed: wait or use another"),
    (r"JobHeld", "scontrol release lets it go"),
    (r"BadConstraints", "no node fits executor.constraint, gpus, cpus and memory together"),
    (r"(Account|QOS)NotAllowed|Invalid(Account|QOS)", "see executor.account, qos and partition"),
    (r"PerJob|PerNode", "it asks for more than executor.qos or account allows a job"),
    (r"DependencyNeverSatisfied|ReservationDeleted", "see executor.reservation"),
    (
        r"launch failed requeued held",
        "a node could not start it: see sinfo -R, then scontrol release",
    ),
)


# Those of jobs whose nodes are there, and down or reserved; with other nodes they might start.
NODES_AWAY = "ReqNodeNotAvail|DOWN, DRAINED"


def remedy(reason: str) -> str | None:
    """What to do about a pending job's reason; None where it passes by itself."""
    return next((cure for pattern, cure in _PERMANENT if re.search(pattern, reason)), None)


_PENDING = frozenset(
    ["PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING"]
)
# COMPLETING still counts as running: its processes may be about to write the result.
_RUNNING = frozenset(
    ["RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"]
)


def phase(state: str) -> str:
    """'pending', 'running' or 'ended' for one of Slurm's job states."""
    if state in _PENDING:
        return "pending"
    return "running" if state in _RUNNING else "ended"


def by_job(rows: Iterable[Row]) -> Mapping[str, Row]:
    return {row.job: row for row in rows}


def by_folder(rows: Iterable[Row]) -> Mapping[str, Row]:
    """The latest job of each working directory; each run has one of its own."""
    return {row.folder: row for row in sorted(rows, key=lambda row: row.job.zfill(12))}
