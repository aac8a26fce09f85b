"""The exact text of every job: what sbatch is given and how srun is called, as pure functions."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string as submitit_script

from jobs.errors import UserError
from jobs.settings import Executor as Settings

HEARTBEAT_S = 15.0  # how often a controller shows that it is there
STALE_S = 300.0  # without a heartbeat, a holder gives its nodes back
IDLE_S = 1800.0  # without a run: a proposal may take 20 minutes
END_MARGIN_S = 20.0  # of an allocation's time, beyond a run's limit: nothing is cut off at its end
STEP_START_S = 60  # a step that finds no room within is tried again elsewhere


def minutes(limit_s: float, margin_s: float) -> int:
    """Slurm's time limits are whole minutes; the budget itself is enforced by the run."""
    return max(1, math.ceil((limit_s + margin_s) / 60))


def job_folder(campaign_dir: Path, name: str) -> Path:
    """Where submitit keeps a job: apart from run folders, and never bound into a container."""
    return campaign_dir.absolute() / "submitit" / name


def check_hold(settings: Settings, limit_s: float) -> None:
    """Raises UserError: a run that may take `limit_s` fits into no allocation."""
    if limit_s + END_MARGIN_S > settings.hold_hours * 3600:
        raise UserError(
            f"a run may take {limit_s:.0f} s, which never fits into an allocation of"
            f" executor.hold_hours: {settings.hold_hours:g}; hold its nodes for longer"
        )


def per_node(settings: Settings) -> int:
    """Runs at once on each node that an allocation holds."""
    return math.ceil(settings.slots / settings.nodes)


# -- each run a job of its own --------------------------------------------------------------------


def sbatch_parameters(
    settings: Settings,
    name: str,
    folder: Path,
    limit_s: float,
    avoid: Iterable[str] = (),
    place: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What submitit's AutoExecutor is told, without the prefix slurm_ of its names."""
    settings, node = placed(settings, place), place.get("node")
    gpus = _gpu_option(settings, settings.gpus)
    extra: dict[str, Any] = {"export": "ALL", "no-requeue": True, "chdir": str(folder)}
    extra |= {gpus[0]: gpus[1]} if gpus else {}
    extra |= {"reservation": settings.reservation} if settings.reservation else {}
    parameters = {
        "job_name": name,
        "time": minutes(limit_s, settings.margin),
        "nodes": 1,
        "cpus_per_task": settings.cpus,
        "mem": settings.memory,
        **_where(settings, avoid, {node} if node else set()),
        "signal_delay_s": 5,  # submitit's 90 s would end short runs early
        "stderr_to_stdout": True,
        "use_srun": False,  # one process less; the run watches itself
        "setup": [f"export AUTORESEARCH_RUN_NAME={shlex.quote(name)}", *_setup(settings)],
        "additional_parameters": extra,
    }
    given = {key: value for key, value in parameters.items() if value is not None}
    return given | {"wckey": None}  # submitit's own: a site that checks such keys knows it not


def placed(settings: Settings, place: Mapping[str, str]) -> Settings:
    """The settings of a run whose branch asks for a feature or a GPU model of its own."""
    features = [f for f in (settings.constraint, place.get("constraint")) if f]
    number = settings.gpus.rpartition(":")[2]
    gpus = f"{place['gpu']}:{number}" if "gpu" in place else settings.gpus
    return dataclasses.replace(settings, constraint="&".join(features) or None, gpus=gpus)


def sbatch_text(
    settings: Settings,
    name: str,
    campaign_dir: Path,
    limit_s: float,
    avoid: Iterable[str] = (),
    place: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The script that submitit submits for a run, as `run --dry-run` prints it."""
    folder = job_folder(campaign_dir, name)
    return submitit_script(
        command=submitit_command(folder),
        folder=folder,
        **sbatch_parameters(settings, name, folder, limit_s, avoid, place),
    )


def submitit_command(folder: Path) -> str:
    return f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"


# -- steps in an allocation -----------------------------------------------------------------------


def step_argv(
    settings: Settings,
    name: str,
    campaign_dir: Path,
    limit_s: float,
    holder: str,
    node: str,
    slot: int,
) -> list[str]:
    """The srun of one run inside the job `holder`, in the place `slot` of one of its nodes."""
    folder = job_folder(campaign_dir, name)
    gpus = _gpu_option(settings, settings.gpus)
    argv = ["srun", f"--jobid={holder}", "--exact", "--nodes=1", "--ntasks=1"]
    argv += [f"--cpus-per-task={settings.cpus}", f"--nodelist={node}"]
    argv += [f"--{gpus[0]}={gpus[1]}"] if gpus else []
    argv += [f"--mem={settings.memory or 0}"]  # 0: what the job has; the first step takes none away
    argv += [f"--time={minutes(limit_s, settings.margin)}", f"--immediate={STEP_START_S}"]
    argv += [f"--job-name={name}", "--input=none", "--unbuffered"]
    # With %t the node writes the file itself: it outlives both processes of this srun.
    argv += [f"--output={folder}/step-%t.log"]
    lines = [*_setup(settings), f"exec {submitit_command(folder)}"]
    if gpus is None:  # Slurm knows of no devices: places stand for them
        lines.insert(0, f"export CUDA_VISIBLE_DEVICES={slot}")
    return [*argv, "bash", "-c", "\n".join(lines)]


def holder_name(campaign_dir: Path) -> str:
    """Name of the jobs that hold nodes for a campaign; the path tells equal names apart."""
    digest = hashlib.sha256(os.fsencode(campaign_dir.absolute())).hexdigest()[:8]
    return f"hold-{campaign_dir.name}-{digest}"


def holder_text(
    settings: Settings,
    campaign_dir: Path,
    limit_s: float,
    avoid: Iterable[str] = (),
    stale_s: float = STALE_S,
    idle_s: float = IDLE_S,
    nodes: Iterable[str] = (),
    at_least: int | None = None,
) -> str:
    """The script of a job that holds nodes, `nodes` among them, until nobody needs them.

    `at_least`: it may begin with so few nodes, where one is known to be lost.

    It compares two counters in a file that the controller rewrites: one is the heartbeat, the other
    stands still while no run is wanted. Only changes count, so no clocks are compared. Running
    steps are let finish, for as long as a run may take and squeue can be asked from a node.

    Raises UserError: as `check_hold`.
    """
    check_hold(settings, limit_s)
    count, folder = per_node(settings), campaign_dir.absolute() / "submitit"
    # The syntax `gpus` counts those of all nodes together: no range of nodes goes with it.
    fewer = at_least is not None and at_least < settings.nodes and settings.gpu_syntax != "gpus"
    options: dict[str, Any] = {
        "job-name": holder_name(campaign_dir),
        "nodes": f"{at_least}-{settings.nodes}" if fewer else settings.nodes,
        "ntasks-per-node": count,
        "cpus-per-task": settings.cpus,
        "time": math.ceil(settings.hold_hours * 60),
        "mem": _times(settings.memory, count),
        **_where(settings, avoid, set(nodes)),
        "reservation": settings.reservation,
        "output": folder / "holder-%j.log",
        "export": "ALL",
    }
    total = count * settings.nodes if settings.gpu_syntax == "gpus" else count
    if gpus := _gpu_option(settings, _times_gpus(settings.gpus, total)):
        options[gpus[0]] = gpus[1]
    lines = [f"#SBATCH --{k}={shlex.quote(str(v))}" for k, v in options.items() if v is not None]
    # --no-kill: a node that dies takes only its own runs.
    lines = ["#!/bin/bash", *lines, "#SBATCH --no-requeue", "#SBATCH --no-kill"]
    beat, grace = shlex.quote(str(folder / "heartbeat")), math.ceil(limit_s + settings.margin)
    watch = _WATCH.format(
        beat=beat, stale=stale_s, idle=idle_s, grace=grace, poll=settings.poll_seconds
    )
    return "\n".join(lines) + watch


_WATCH = """

beat= busy= alive=0 used=0
while sleep {poll:g}; do
  read -r b w 2>/dev/null <{beat} || b=$beat w=$busy
  [ "$b" = "$beat" ] || {{ beat=$b alive=$SECONDS; }}
  [ "$w" = "$busy" ] || {{ busy=$w used=$SECONDS; }}
  if [ $((SECONDS - alive)) -gt {stale:.0f} ]; then
    why="no heartbeat of the controller for {stale:.0f} s" over=$((SECONDS - alive - {stale:.0f}))
  elif [ $((SECONDS - used)) -gt {idle:.0f} ]; then
    why="nothing to run for {idle:.0f} s" over=$((SECONDS - used - {idle:.0f}))
  else
    continue
  fi
  [ "$over" -lt {grace} ] || break
  steps=$(squeue --steps -h -j "$SLURM_JOB_ID" -o %i) || continue
  grep -qE '\\.[0-9]+$' <<<"$steps" || break
done
echo "giving the nodes back: $why"
"""


# -- what a dry run shows -------------------------------------------------------------------------


def preview(
    settings: Settings,
    name: str,
    campaign_dir: Path,
    limit_s: float,
    places: Sequence[Mapping[str, str]],
) -> str:
    """All that would be handed to Slurm for one run, letter by letter.

    `places`: where the branches want to run, the run's own first.
    """
    asked = (settings, name, campaign_dir, limit_s)
    if settings.kind == "slurm":
        return f"$ sbatch --parsable\n{sbatch_text(*asked, place=places[0])}"
    step = shlex.join(step_argv(*asked, "HOLDER", places[0].get("node", "NODE"), 0))
    nodes = {place["node"] for place in places if "node" in place}
    holder = holder_text(settings, campaign_dir, limit_s, nodes=nodes)
    return f"$ sbatch --parsable\n{holder}\nand in it, as job HOLDER:\n$ {step}\n"


# -- options ---------------------------------------------------------------------------------------


def _setup(settings: Settings) -> list[str]:
    """The site's lines before a run. With the minimal environment, `module` has to be defined."""
    if not settings.setup:
        return []
    return ["type module >/dev/null 2>&1 || . /etc/profile", *settings.setup]


def _where(settings: Settings, avoid: Iterable[str], nodes: set[str]) -> dict[str, str | None]:
    """Options that say where a job may run: on `nodes` if any are given, on none of `avoid`."""
    excluded = {*settings.exclude, *avoid} - nodes
    return {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "nodelist": ",".join(sorted(nodes)) or None,
        "exclude": ",".join(sorted(excluded)) or None,
    }


def _gpu_option(settings: Settings, gpus: str) -> tuple[str, str] | None:
    if settings.gpu_syntax == "none":
        return None
    return settings.gpu_syntax, f"gpu:{gpus}" if settings.gpu_syntax == "gres" else gpus


def _times_gpus(gpus: str, count: int) -> str:
    """('h100:1', 4) -> 'h100:4'."""
    model, colon, number = gpus.rpartition(":")
    return f"{model}{colon}{int(number) * count}"


def _times(memory: str | None, count: int) -> str | None:
    """('32G', 4) -> '128G'."""
    if memory is None:
        return None
    number = memory.rstrip("KMGTkmgtBb")
    return f"{int(number) * count}{memory[len(number) :]}"
