"""`autoresearch doctor`: whether a campaign can start, each check with what was seen and a remedy.

`examine` looks from here, in seconds, and may send jobs that look from a node (this module, run
there as a program) and bring back what they found. Of the campaign nothing is changed; train.py,
which is asked for its attention, prepares the default corpus in the user's cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs import campaign, config, device, lab, materialise
from jobs.errors import AutoresearchError, UserError
from jobs.model import Finding, to_json
from jobs.repository import IDENTITY, Repository
from jobs.settings import Agent, Config, Data

API_S = 15.0
REPLY_S = 60.0  # attribute caches of NFS hold for up to a minute
LAG_S = 10.0
CLOCK_S = 5.0
NIGHT_H = 12.0  # a campaign without limits
TOKENS_S = 60.0  # a run with a budget of tokens
RUN_MB, RUN_FILES = 2.0, 25.0  # what a run leaves, where the campaign has none yet
WORDS = "Do what that says, then ask again"


def examine(
    settings: Config, root: Path, show: Callable[[str], None] | None = None
) -> list[Finding]:
    """What can be seen from here and, where `show` is to tell the progress of jobs, from nodes."""
    executor, directory = settings.executor, campaign.folder(settings, root)
    local, path = executor.kind == "local", None
    found = [_git(settings, root), *_storage(settings, root)]
    found += [Finding.attempt("data", lambda: _data(settings), WORDS)]
    found += [researcher(agent, root) for agent in _agents(settings)]
    if executor.image:
        found.append(Finding.attempt("image", lambda: _image(settings), WORDS))
        path = found[-1].seen if found[-1].status == "ok" else None
    if executor.image or not local:
        from containers import machine

        apptainer = machine.examine(path, executor.allow_network)
        here = "No run happens on this host; doctor --job asks a node"
        found += apptainer if local else _tolerated(apptainer, here)
    if not local:
        from slurm import trial

        found += trial.settings(executor, directory, *materialise.first_wish(settings))
        found += _nodes(settings, root, path, show) if show else []
    elif settings.task.kind == "nanochat" and (path or not executor.image):
        found += device.findings(executor, path)
    return found


def _nodes(
    settings: Config, root: Path, image: str | None, show: Callable[[str], None]
) -> list[Finding]:
    """What jobs find: one with the settings of a run, one with those of slurm/overnight.sbatch."""
    from slurm import trial

    folder, found = campaign.folder(settings, root).parent, list[Finding]()
    folder.mkdir(parents=True, exist_ok=True)
    for part, text_of in (("node", trial.run_text), ("overnight", trial.overnight_text)):
        with tempfile.TemporaryDirectory(
            prefix=".doctor-", dir=folder, ignore_cleanup_errors=True
        ) as made:
            # The image as a path: the node needs no store, as with runs.
            asked: dict[str, Any] = {"root": str(root), "part": part, "image": image}
            asked["config"] = config.to_dict(settings)
            Path(made, "asked.json").write_text(json.dumps(asked))
            text = text_of(settings.executor, Path(made), [*_python("jobs.doctor"), made])
            try:
                told = trial.run(settings.executor, text, Path(made), show)
            except AutoresearchError as error:
                told = [Finding("job", "failure", str(error), WORDS)]
        told = told if part == "node" else _tolerated(told, by_hand(root))
        found += [dataclasses.replace(f, check=f"{part}: {f.check}") for f in told]
    return found


def text(findings: Sequence[Finding]) -> str:
    """For people: a line for each check, its remedy below it, and what it comes to."""
    lines = [
        f"{f.status:8}{f.check}: {f.seen}" + (f"\n        -> {f.remedy}" if f.remedy else "")
        for f in findings
    ]
    failures = sum(finding.status == "failure" for finding in findings)
    end = f"{failures} failures: this campaign cannot start" if failures else "a campaign can start"
    return "\n".join([*lines, end])


def can_start(findings: Sequence[Finding]) -> bool:
    return all(finding.status != "failure" for finding in findings)


def by_hand(root: Path) -> str:
    """How a controller stays alive on a login node."""
    here, command = f"cd {shlex.quote(str(root))} &&", shlex.join(_python("jobs.cli"))
    run = f"{command} run >>night.log 2>&1"
    inside = shlex.quote(f"{here} {run}")
    # What was stopped, is over or needs a person stays as it is.
    killed = f'{command} status --json 2>/dev/null | grep -q \'"state": "interrupted"\''
    again = shlex.quote(f"{here} {killed} && {run}")
    return (
        f"The controller can do without on a login node: tmux new -d {inside}; or nohup sh -c "
        f"{inside} &; or, to have it restarted, a crontab line: */10 * * * * bash -lc {again}"
    )


def _python(module: str) -> list[str]:
    return [sys.executable, "-P", "-m", module]  # -P: a lab holds a folder trainer/ of its own


def _tolerated(findings: Sequence[Finding], remedy: str) -> list[Finding]:
    """A campaign can start in spite of these."""
    return [
        dataclasses.replace(f, status="warning", remedy=f"{f.remedy}. {remedy}")
        if f.status == "failure"
        else f
        for f in findings
    ]


# -- the lab --------------------------------------------------------------------------------------


def _git(settings: Config, root: Path) -> Finding:
    try:
        repository = Repository(root)
        problems = campaign.check(settings, root, repository)
    except AutoresearchError as error:
        return Finding("git", "failure", str(error), WORDS)
    if problems:
        return Finding("git", "failure", "; ".join(problems), WORDS)
    start = repository.start("HEAD")
    seen = f"{start[:10]}; experiments are committed as {repository.identity}"
    remedy = 'git config --global user.name "YOU"; git config --global user.email YOU@HOST'
    return Finding.of("git", seen, warning=(IDENTITY[1] in seen, remedy))


def _data(settings: Config) -> str:
    if settings.task.kind == "general":
        return "a task of your own has none"
    with contextlib.suppress(UserError):
        campaign.manifest(settings)
        return f"prepared in {campaign.data_folder(settings)}"
    if settings.data != Data():
        campaign.manifest(settings)
    return "the default corpus; autoresearch run prepares it"


def _image(settings: Config) -> str:
    """Path of the runs' image; only its bytes are left for `run` to check. Raises ImageError."""
    from containers import images
    from containers.seal import evaluator_sha256

    store = images.default_store(settings.executor.images)
    image = images.find(store, settings.executor.image or "")
    images.check_quick(image)
    images.check_evaluator(image, evaluator_sha256(lab.TRAINER))
    return image.path


# -- disk and clock -------------------------------------------------------------------------------


def forecast(settings: Config, run_mb: float, run_files: float) -> tuple[float, float]:
    """MB and files that a campaign may come to, when a finished run leaves so much."""
    budget, slots = materialise.budget(settings), settings.executor.slots
    seconds = budget.amount if budget.kind == "wall" else TOKENS_S
    night = slots * math.ceil((settings.limits.hours or NIGHT_H) * 3600 / seconds)
    count = settings.limits.experiments or night
    held = slots * settings.run.scratch_mb + len(settings.branches) * settings.disk.cache_mb
    return count * run_mb + held, count * run_files


def room(
    free: tuple[float, float], wanted: tuple[float, float], keep_free_mb: float, where: str
) -> Finding:
    """Whether a forecast fits: MB and files."""
    seen = f"{where}: {free[0] / 1024:.1f} GB and {free[1]:.0f} files are free; a campaign may come"
    full = free[0] < keep_free_mb or free[1] < 1
    tight = free[0] - keep_free_mb < wanted[0] or free[1] < wanted[1]
    return Finding.of(
        "disk",
        f"{seen} to {wanted[0] / 1024:.1f} GB and {wanted[1]:.0f} files",
        failure=(full, "Free space (autoresearch clean), or lower disk.keep_free_mb"),
        warning=(tight, "Another `folder:`, or lower run.scratch_mb, disk.cache_mb or slots"),
    )


def quota(told: str) -> tuple[float, float]:
    """MB and files that are left by `quota -w -p` or `lfs quota -q`; infinite without limits."""
    left = [math.inf, math.inf]
    for line in told.splitlines():
        # file system, KiB used, quota, limit, grace, files used, quota, limit, grace
        words = [word.rstrip("*") for word in line.split()]
        for n, (at, unit) in enumerate(((1, 1024), (5, 1))):
            if len(words) == 9 and all(word.isdigit() for word in words[at : at + 3]):
                used, *limits = (int(word) / unit for word in words[at : at + 3])
                left[n] = min([left[n], *(limit - used for limit in limits if limit)])
    return left[0], left[1]


def _storage(settings: Config, root: Path) -> list[Finding]:
    directory = campaign.folder(settings, root)
    there = next(path for path in (directory, *directory.parents) if path.exists())
    runs = list(directory.glob("runs/*/*"))[-50:]
    sizes = [path.lstat().st_blocks / 2048 for run in runs for path in run.rglob("*")]
    one = (sum(sizes) / len(runs), len(sizes) / len(runs)) if runs else (RUN_MB, RUN_FILES)
    keep, wanted, status = settings.disk.keep_free_mb, forecast(settings, *one), os.statvfs(there)
    files = status.f_favail if status.f_files else math.inf  # btrfs counts none
    free = {str(there): (status.f_bavail * status.f_frsize / 2**20, files)}
    lustre = ["lfs", "quota", "-q", "-u", str(os.getuid()), str(there)]
    for argv in (["quota", "-w", "-p"], lustre):
        free[f"quota by {argv[0]}"] = quota(device.output(argv)[0])
    found = [room(left, wanted, keep, at) for at, left in free.items() if min(left) < math.inf]
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            stamp = os.fstat(file.fileno()).st_mtime
        return [*found, clock(stamp - time.time(), "file server")]
    except OSError as error:
        return [*found, Finding("folder", "failure", str(error), "Another `folder:`")]


def clock(ahead_s: float, whose: str) -> Finding:
    seen = f"the {whose}'s is {abs(ahead_s):.1f} s {'ahead' if ahead_s > 0 else 'behind'}"
    remedy = "chrony or NTP on both (an administrator): ages of leases and files are misjudged"
    return Finding.of("clock", seen, warning=(abs(ahead_s) > CLOCK_S, remedy))


# -- the researcher -------------------------------------------------------------------------------


def researcher(agent: Agent, root: Path = Path()) -> Finding:
    """Whether it can be asked: a program by its name, the API by a request that costs nothing."""
    if agent.kind == "scripted":
        from agent.scripted import Scripted

        script = str(root / (agent.script or ""))
        made = dataclasses.replace(agent, script=script)
        return Finding.attempt(
            "researcher", lambda: f"{len(Scripted(made))} edits of {script}", WORDS
        )
    if agent.kind == "command":
        program = agent.argv[0] if agent.argv else str(agent.preset)
        missing = shutil.which(program) is None
        remedy = f"Put {program} on PATH, or another agent.kind"
        return Finding.of("researcher", f"the command {program}", failure=(missing, remedy))
    if agent.kind != "anthropic" or agent.provider != "anthropic":
        paid = f"anthropic by {agent.provider}, by its own credentials: not asked"
        free = f"{agent.kind} proposes, which needs no API and no key"
        return Finding("researcher", "ok", paid if agent.kind == "anthropic" else free)
    from agent import api, keys

    try:
        with api.client(agent, API_S) as client:
            client.models.retrieve(agent.model, timeout=API_S)
    except keys.KeyUnusable as error:
        remedy = "Give one, or agent.kind: sweep. A job's environment holds no key: agent.key_file"
        return Finding("API", "failure", str(error), remedy)
    except Exception as error:  # the SDK's, and those of the libraries below it
        return answered(keys.scrub(api.failure(error).reason), getattr(error, "status_code", None))
    return Finding("API", "ok", f"{client.base_url} answers, and takes the key")


def answered(said: str, status: int | None) -> Finding:
    """What a refusal means; without `status` nobody answered."""
    remedy = "See the key (agent.key_file), agent.base_url, https_proxy; or agent.kind: sweep"
    other = "See agent.model and base_url; a gateway may lack /v1/models, an outage passes"
    refused = status in (None, 401, 402, 403)
    return Finding.of("API", said, failure=(refused, remedy), warning=(True, other))


def _agents(settings: Config) -> list[Agent]:
    agents = [branch.agent for branch in settings.branches.values()]
    return [agent for n, agent in enumerate(agents) if agent not in agents[:n]]


# -- on a node ------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """What a job of doctor's does: folder/asked.json in, folder/findings.json out, by a rename."""
    from containers import machine
    from slurm import trial

    asked = json.loads((folder / "asked.json").read_text())
    settings = config.parse(asked["config"])
    executor = settings.executor
    os.chdir(asked["root"])
    seen = f"{platform.node()}: {sys.executable}, Python {platform.python_version()}"
    found = [Finding("python", "ok", seen), *_shared(folder)]
    if asked["part"] == "overnight":
        found += [researcher(agent) for agent in _agents(settings)]
        found.append(trial.taken(executor, trial.run_text(executor, folder, ["true"])))
    else:
        if path := asked["image"]:
            found += machine.examine(path, executor.allow_network)
        if settings.task.kind == "nanochat" and can_start(found) and (path or not executor.image):
            found += device.findings(executor, path)
    trial.write(folder / "findings.json", json.dumps(to_json(found)))


def _shared(folder: Path) -> list[Finding]:
    """How long a word takes to the controller and back through the shared folder, and its clock."""
    from slurm.trial import LOOK_S, write

    began, reply = time.monotonic(), folder / "reply"
    write(folder / "hello", "")
    while not reply.exists() and time.monotonic() - began < REPLY_S:
        time.sleep(LOOK_S)
    taken = time.monotonic() - began
    if not reply.exists():
        return [lag(math.inf)]
    ahead = float(reply.read_text()) + taken / 2 - time.time()
    return [lag(taken), clock(ahead, "controller's host")]


def lag(there_and_back_s: float) -> Finding:
    return Finding.of(
        "shared folder",
        f"there and back in {there_and_back_s:.1f} s",
        failure=(there_and_back_s > REPLY_S, "`folder:` must be shared by nodes and controller"),
        warning=(there_and_back_s > LAG_S, "Results are seen so late: mount it with actimeo=3"),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
