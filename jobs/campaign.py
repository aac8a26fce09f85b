"""Opening a campaign: lease, ledger, state and the facts that every run of it shares."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs import VERSION, lab, lease, materialise, mirror, names, snapshot
from jobs.config import added, parse, to_dict
from jobs.errors import Paused, UserError, refusals_told
from jobs.history import State, fold
from jobs.ledger import Ledger, Lines
from jobs.repository import Repository
from jobs.settings import Config
from trainer import prepare


def folder(config: Config, root: Path) -> Path:
    """Where the campaign keeps what is not in git."""
    place = root / Path(config.folder).expanduser()
    return (place / names.check_name("campaign", config.campaign)).absolute()


def read(campaign_dir: Path) -> State:
    """The state of a campaign, for looking only; writes nothing.

    Raises UserError: there is no such campaign.
    """
    try:
        return snapshot.open_history(campaign_dir)[0]
    except FileNotFoundError:
        raise UserError(
            f"no campaign in {campaign_dir}: start one with `autoresearch run`, name its "
            "campaign.yaml, or get it from another clone with `autoresearch fetch REMOTE`"
        ) from None


def site(config: Config, root: Path) -> materialise.Site:
    """The facts of this campaign's runs, hashed now.

    Raises UserError: data or image are missing, with the command that makes them.
    """
    from containers.seal import evaluator_sha256

    facts: dict[str, Any] = {"evaluator_sha256": evaluator_sha256(lab.TRAINER)}
    data = None
    if config.task.kind == "nanochat":
        data = data_folder(config)
        facts["data_manifest_sha256"] = hashlib.sha256(manifest(config)).hexdigest()
    directory = folder(config, root)
    made = materialise.Site(config, directory, data, facts, caches=directory / "heads")
    if config.executor.image:
        from jobs import container

        made = container.contained(made)
    return made


def records(common: materialise.Site) -> dict[str, bytes]:
    """What git keeps beside the ledger: the data's manifest, the image's definition."""
    from jobs import container

    kept = container.records(common.image)
    if common.data is not None:
        manifest = (common.data / "manifest.json").read_bytes()
        kept[f"data-{hashlib.sha256(manifest).hexdigest()[:16]}.json"] = manifest
    return kept


def manifest(config: Config) -> bytes:
    """manifest.json of prepared data, all of whose files are there in their full size.

    Raises UserError: they are not.
    """
    data, wanted = data_folder(config), f"corpus {config.data.corpus}, scale {config.data.scale}"
    try:
        manifest = (data / "manifest.json").read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{data} holds no prepared data: run `autoresearch prepare` ({wanted})"
        ) from None
    try:
        sizes = {name: file["bytes"] for name, file in json.loads(manifest)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        sizes = {"manifest.json": -1}
    for name, size in sizes.items():
        path = data / name
        if not path.exists() or path.stat().st_size != size:
            raise UserError(
                f"the prepared data in {data} is damaged: {name} is missing or was cut short. "
                f"Delete that folder and run `autoresearch prepare` again ({wanted})"
            )
    return manifest


def data_folder(config: Config) -> Path:
    """Where campaign.yaml's data lies."""
    if config.data.folder:
        return Path(config.data.folder).expanduser().absolute()
    return prepare.default_folder(config.data.corpus, config.data.scale)


def check(config: Config, root: Path, repository: Repository) -> list[str]:
    """What keeps branches of a new campaign from beginning, a line each; the others go on.

    Raises UserError: no branch could begin. Nothing was written.
    """
    problems = []
    _require_program(repository, config, repository.start("HEAD"))
    for name, branch in config.branches.items():
        try:
            _require_program(repository, config, repository.start(branch.start or "HEAD"))
            (root / branch.program).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            problems.append(f"branch {name}: its program {branch.program} cannot be read: {why}")
        except UserError as error:
            problems.append(f"branch {name} cannot begin: {error}")
    if len(problems) == len(config.branches):
        raise UserError("; ".join(problems))
    return problems


@dataclasses.dataclass
class Open:
    """A campaign that this process may write."""

    site: materialise.Site
    repository: Repository
    ledger: Ledger
    lease: lease.Lease
    state: State


@contextlib.contextmanager
def opened(config: Config, root: Path, say: Callable[[str], None]) -> Iterator[Open]:
    """Hold the campaign's lease and ledger; a new campaign is begun, a changed one recorded.

    Raises:
        LeaseHeld: another controller runs it.
        UserError, Paused: as `site`, `Repository` and `Ledger`.
    """
    with contextlib.ExitStack() as stack, refusals_told():
        yield _open(config, root, say, stack)


def _open(
    config: Config, root: Path, say: Callable[[str], None], stack: contextlib.ExitStack
) -> Open:
    repository = Repository(root)
    programs = {branch.program for branch in config.branches.values()}
    for remark in repository.remarks(["campaign.yaml", *sorted(programs)]):
        say(remark)
    common = site(config, root)
    directory = common.campaign_dir
    if _may_be_purged(directory, os.environ):
        say(
            f"{directory} looks like scratch: where files there are purged after some weeks, set "
            "folder: in campaign.yaml to a place that lasts"
        )
    if not (directory / "ledger.jsonl").exists():
        restore(config, root)  # its folder was deleted, by a purge of scratch say, or never here
    if not (directory / "ledger.jsonl").exists():
        check(config, root, repository)
        _require_unused(config.campaign, repository)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "inbox").mkdir(exist_ok=True)
    _hide(repository, directory)
    highest = _highest_fence(directory)
    held = stack.enter_context(lease.acquire(directory, config.lease.stale_after, highest))
    ledger = Ledger(directory / "ledger.jsonl", held.fence, held.check)
    stack.callback(ledger.close)
    if ledger.torn:
        say(f"the ledger's last line was torn by a kill and is cut off: {ledger.torn[:60]!r}")
    # First of all: from here on every reader ignores what a displaced writer still appends.
    previous = held.taken_from and str(held.taken_from)
    host, pid = held.process.host, held.process.pid
    job = os.environ.get("SLURM_JOB_ID")
    ledger.append("lease_taken", host=host, pid=pid, previous=previous, job=job)
    state = _begin(snapshot.open_history(directory)[0], ledger, config, common, repository)
    return Open(export_scorer(common, repository, state), repository, ledger, held, state)


def _may_be_purged(directory: Path, environ: Mapping[str, str]) -> bool:
    """Whether a folder lies where clusters delete what was not read for some weeks."""
    scratch = environ.get("SCRATCH")
    below = scratch and directory.resolve().is_relative_to(Path(scratch).resolve())
    return bool(below) or any("scratch" in part.lower() for part in directory.resolve().parts)


def _hide(repository: Repository, directory: Path) -> None:
    """Have git ignore the campaigns' folder, if that lies in the work tree."""
    with contextlib.suppress(ValueError):
        inside = directory.parent.resolve().relative_to(repository.root.resolve())
        repository.exclude(f"/{inside}/")


def restore(config: Config, root: Path) -> None:
    """The campaign's ledger as git has it, where that knows more (or all). Raises UserError."""
    repository, directory = Repository(root), folder(config, root)
    if mirror.restore(repository, config.campaign, directory):
        _hide(repository, directory)


def _highest_fence(directory: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return snapshot.open_history(directory)[0].fence
    return 0


def _begin(
    state: State, ledger: Ledger, config: Config, common: materialise.Site, repository: Repository
) -> State:
    """The first events of a new campaign, or what has changed since the last start."""
    settings = to_dict(config)
    events: list[tuple[str, dict[str, Any]]] = []
    if not state.campaign:
        start = repository.start("HEAD")
        _require_program(repository, config, start)
        payload = {"campaign": config.campaign, "config": settings, "start_commit": start}
        events.append(("campaign_started", payload | dict(common.facts) | {"version": VERSION}))
    else:
        _require_same_facts(state, common)
        _require_same_measure(state, config)
        if state.config != settings:
            events.append(("config_changed", {"config": settings}))
    for name in config.branches:
        chosen = _branch_settings(name, state, config, repository)
        if name not in state.branches or chosen != state.branches[name].settings:
            events.append(("branch_added", {"branch": name, "settings": chosen}))
    if not events:
        return state
    return fold(ledger.append_all(events), state, state.source or Lines(ledger.path))


def _branch_settings(
    name: str, state: State, config: Config, repository: Repository
) -> dict[str, Any]:
    """What campaign.yaml says now. Where a branch starts is settled by its first keep."""
    branch, known = config.branches[name], state.branches.get(name)
    if known is not None and known.head is not None:
        start = known.settings["start_commit"]
    else:
        start = _start(branch.start, config, repository)
    return to_dict(branch) | {"start_commit": start}


def new_branch(
    name: str,
    settings: Mapping[str, Any],
    state: State,
    config: Config,
    repository: Repository,
) -> dict[str, Any]:
    """What is recorded of a branch that is added to a campaign.

    Raises UserError: it exists, a setting is wrong, or nothing can start where it is to start.
    """
    names.check_name("branch", name)
    if name in state.branches:
        raise UserError(f"branch {name} exists already")
    branch = added(config, name, settings).branches[name]
    start = repository.start(branch.start or "HEAD")
    _require_program(repository, config, start)
    return to_dict(branch) | {"start_commit": start}


def _start(ref: str | None, config: Config, repository: Repository) -> str | None:
    """The commit that a branch starts from; None: it is told, and paused, beside the others."""
    try:
        start = repository.start(ref or "HEAD")
        _require_program(repository, config, start)
        return start
    except UserError:
        if ref is None or len(config.branches) == 1:
            raise
        return None


def _require_program(repository: Repository, config: Config, commit: str) -> None:
    for path in config.task.editable:
        repository.read(commit, path)  # raises UserError: not in the commit, no text


def _require_same_facts(state: State, common: materialise.Site) -> None:
    """A score by another referee, data set or image is no successor of the earlier ones."""
    for name in ("evaluator_sha256", "data_manifest_sha256", "container_sha256"):
        told = name.removesuffix("_sha256").replace("_", " ")
        _require_same(told, state.start.get(name), common.facts.get(name))


def _require_same_measure(state: State, config: Config) -> None:
    """A score by another metric or after another time is none, either."""
    then = parse(state.config)
    for name in ("metric", "direction", "scorer"):
        _require_same(f"task.{name}", getattr(then.task, name), getattr(config.task, name))
    _require_same("the budget", materialise.budget(then), materialise.budget(config))


def _require_same(name: str, before: object, now: object) -> None:
    if before != now:
        raise Paused(
            f"{name} changed since this campaign began: it was {before}, it is {now}; scores "
            "would not compare",
            "Restore it, or begin another campaign (campaign: NAME in campaign.yaml)",
        )


def _require_unused(campaign: str, repository: Repository) -> None:
    """Raises UserError: git has experiments of that name, and no records to go on from."""
    if refs := repository.refs(f"refs/autoresearch/{campaign}"):
        raise UserError(
            f"this repository has {len(refs)} refs of a campaign {campaign} and no records of it: "
            f"get those (autoresearch fetch REMOTE --campaign {campaign}), or choose another name "
            "(campaign: NAME in campaign.yaml)"
        )


def export_scorer(
    common: materialise.Site, repository: Repository, state: State
) -> materialise.Site:
    """General tasks: the scorer's files of the start commit, out of every experiment's reach."""
    scorer = common.config.task.scorer
    if common.config.task.kind != "general" or scorer is None:
        return common
    target = common.campaign_dir / "scorer"
    repository.snapshot(state.start["start_commit"], target, scorer.files)
    return dataclasses.replace(common, scorer_files=target)
