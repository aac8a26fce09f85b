"""`autoresearch`: words in, one call of a module, words or JSON out. Heavy imports are lazy."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent import keys
from jobs.errors import AutoresearchError, LeaseHeld, Paused, UserError, refused
from jobs.names import check_name
from jobs.options import parser
from jobs.screen import Screen

COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 failed, 2 wrong use, 3 paused: a person is needed;
    4 not comparable (reproduce), 130 ended at once by Ctrl-C (run: by the second)."""
    arguments = parser().parse_args(argv)
    try:
        with keys.taken():
            return COMMANDS[arguments.command](arguments)
    except AutoresearchError as error:
        print(f"autoresearch {arguments.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `autoresearch log | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        told = refused(error.filename or "a file", "used", error)
        print(f"autoresearch {arguments.command}: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(
            f"\n{error}" if error.args else "\nleft at once; the same command goes on",
            file=sys.stderr,
        )
        return 130


def command(function: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    COMMANDS[function.__name__.removesuffix("_")] = function
    return function


# -- the campaign ---------------------------------------------------------------------------------


@command
def init(arguments: argparse.Namespace) -> int:
    from jobs import lab

    program = None
    if arguments.source is not None:
        program = _champion(arguments.source)
    folder = lab.make(arguments.folder, program)
    print(f"{folder} is a lab: edit {folder}/program.md, then cd {folder} && autoresearch run")
    return 0


def _champion(campaign_dir: Path) -> str:
    """The editable file at the best head of a campaign."""
    from jobs import campaign
    from jobs.repository import Repository

    state = campaign.read(campaign_dir)
    kept = [r for r in map(state.best, state.branches) if r and r.metric is not None]
    pick = max if state.direction == "maximise" else min
    best = pick(kept, key=lambda r: r.metric or 0.0, default=None)
    if best is None:
        raise UserError(f"the campaign in {campaign_dir} has kept nothing yet")
    if state.config["task"]["kind"] == "general":
        raise UserError(
            f"the campaign in {campaign_dir} has a task of your own, whose lab is its repository: "
            f"git clone that and git switch autoresearch/{state.campaign}/{best.branch}"
        )
    path = state.config["task"]["editable"][0]
    for place in (campaign_dir, Path.cwd()):  # `folder` may lie outside the repository
        with contextlib.suppress(UserError):
            return Repository(place).read(best.commit, path)
    raise UserError(
        f"{best.id} of the campaign in {campaign_dir} is commit {best.commit[:10]}, which is in no "
        "git repository around that folder or this one: call this inside the campaign's lab"
    )


@command
def prepare(arguments: argparse.Namespace) -> int:
    from jobs import campaign, lab

    config = _config(arguments)
    if config.task.kind == "general":
        raise UserError("a task of your own has no corpus: nothing to prepare")
    folder = campaign.data_folder(config)
    lab.prepare(config.data.corpus, config.data.scale, folder, tuple(arguments.rest))
    if not arguments.rest:  # else it may be another corpus, elsewhere; it said where itself
        print(f"{config.data.corpus} for scale {config.data.scale} lies in {folder}")
    return 0


@command
def run(arguments: argparse.Namespace) -> int:
    if arguments.campaign is not None:
        arguments.config = arguments.campaign
    if arguments.once:
        return _once(arguments)
    if arguments.train or arguments.keep or arguments.json or arguments.seed is not None:
        raise UserError("--train, --seed, --keep and --json belong to run --once (no campaign)")
    from jobs import night

    config, root = _config(arguments), _root(arguments)
    if arguments.dry_run:
        print(night.dry_run(config, root))
        return 0
    screen = Screen()
    try:
        reason = night.run(config, root, screen.say, screen.show)
    except Paused:
        _reported(arguments, screen.say)
        raise
    if reason == "interrupted":
        print("handed over; runs under way go on and are adopted: `autoresearch run` resumes")
        return 0
    _reported(arguments, screen.say)
    print(f"done: {reason}")
    return 0


def _reported(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Tables, picture and page as they are when a night ends; none of them is worth a failure."""
    from jobs import report
    from jobs.effects import effect
    from jobs.repository import Repository

    try:
        state, directory = _state(arguments)
        with effect("report.write"):
            files = report.write_all(directory, state, Repository(_root(arguments)))
        say(f"report: {files['index.html']}")
    except (OSError, AutoresearchError) as error:
        say(f"no report was written (autoresearch report tries again): {error}")


def _once(arguments: argparse.Namespace) -> int:
    from jobs import once

    config = _config(arguments) if arguments.config.exists() else _defaults()

    def say(line: str) -> None:  # standard output is the result's
        print(line, file=sys.stderr, flush=True)

    seed = 1 if arguments.seed is None else arguments.seed
    result = once.run(config, arguments.train, seed, arguments.keep, say)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        value = (
            "no score" if result["value"] is None else f"{result['metric']} {result['value']:.6f}"
        )
        print(f"{result['status']}: {value}. {result['reason']}")
    return 0 if result["status"] == "ok" else 1


@command
def doctor(arguments: argparse.Namespace) -> int:
    from jobs import doctor
    from jobs.model import Finding

    root = _root(arguments)
    try:
        config = _config(arguments) if arguments.config.exists() else _defaults()
    except UserError as error:
        findings = [Finding("settings", "failure", str(error), "Mend it, and ask again")]
    else:
        screen = Screen(sys.stderr)
        findings = doctor.examine(config, root, screen.show if arguments.job else None)
        if arguments.job:
            screen.say("")  # the progress goes
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print(doctor.text(findings))
    return 0 if doctor.can_start(findings) else 1


@command
def stop(arguments: argparse.Namespace) -> int:
    return _order(arguments, "stop")


@command
def tell(arguments: argparse.Namespace) -> int:
    return _order(arguments, "tell", branch=arguments.branch, text=arguments.text)


@command
def branch(arguments: argparse.Namespace) -> int:
    told = ("program", "slots", "start", "agent", "node", "constraint", "gpu")
    settings = {k: getattr(arguments, k) for k in told}
    settings = {k: v for k, v in settings.items() if v is not None}
    if kind := settings.pop("agent", None):
        settings["agent"] = {"kind": kind}
    return _order(arguments, arguments.order, branch=arguments.branch, settings=settings)


@command
def adopt(arguments: argparse.Namespace) -> int:
    return _order(arguments, "adopt", experiment=arguments.experiment, into=arguments.into)


def _order(arguments: argparse.Namespace, order: str, **details: Any) -> int:
    from jobs import campaign, inbox, report
    from jobs.repository import Repository

    directory, root = _directory(arguments), _root(arguments)
    state = campaign.read(directory)
    if order == "add":
        shared = (state, _config(arguments), Repository(root))
        campaign.new_branch(details["branch"], details["settings"], *shared)
    elif (named := details.get("branch", details.get("into"))) not in (None, *state.branches):
        raise UserError(f"no branch {named!r}; there are {', '.join(state.branches)}")
    elif named and state.branches[named].retired and order in ("tell", "adopt", "pause"):
        raise UserError(f"branch {named} is retired; `autoresearch branch resume {named}`")
    if order == "adopt":
        details["experiment"] = report.find(state, details["experiment"]).id
    if order == "tell":
        inbox.note(details["text"])
    holder = _holder(arguments)
    if holder is None and order == "stop":
        raise UserError(f"nothing to stop: no controller runs campaign {state.campaign}")
    inbox.send(directory, order, **details)
    if holder is None:
        print(f"{order}: left in {directory / 'inbox'}; obeyed when `autoresearch run` starts")
    else:
        print(f"{order}: left for {holder}")
    return 0


# -- looking --------------------------------------------------------------------------------------


@command
def status(arguments: argparse.Namespace) -> int:
    from jobs import report

    state, _ = _state(arguments)
    holder = _holder(arguments)
    controller = str(holder) if holder else None
    if arguments.json:
        print(json.dumps(report.summary(state, controller), indent=1))
    else:
        print(report.status_text(state, controller))
    return 0


@command
def log(arguments: argparse.Namespace) -> int:
    from jobs import report
    from jobs.model import to_json

    state, _ = _state(arguments)
    if arguments.branch is not None and arguments.branch not in state.branches:
        raise UserError(f"no branch {arguments.branch!r}; there are {', '.join(state.branches)}")
    if arguments.json:
        for record in report.chosen(state, arguments.branch, arguments.n):
            print(json.dumps(to_json(state.experiment(record.id))))
    else:
        print(report.log_text(state, arguments.branch, arguments.n), end="")
    return 0


@command
def show(arguments: argparse.Namespace) -> int:
    from jobs import report
    from jobs.model import to_json

    state, _ = _state(arguments)
    name = report.find(state, arguments.experiment).id
    if arguments.json:
        decision = state.decision(name)
        found = {
            "experiment": to_json(state.experiment(name)),
            "results": [to_json(result) for result in state.results(name)],
            "decision": decision and to_json(decision),
        }
        print(json.dumps(found, indent=1))
    else:
        print(report.show_text(state, name))
    return 0


@command
def diff(arguments: argparse.Namespace) -> int:
    from jobs import report
    from jobs.repository import Repository

    record = report.find(_state(arguments)[0], arguments.experiment)
    print(Repository(_root(arguments)).diff(record.base, record.commit), end="")
    return 0


@command
def report(arguments: argparse.Namespace) -> int:
    from jobs import report
    from jobs.repository import Repository

    state, directory = _state(arguments)
    files = report.write_all(directory, state, Repository(_root(arguments)))
    print(
        json.dumps({k: str(v) for k, v in files.items()})
        if arguments.json
        else "\n".join(str(path) for path in files.values())
    )
    return 0


@command
def clean(arguments: argparse.Namespace) -> int:
    from jobs import disk

    state, directory = _state(arguments)
    paths = disk.leftovers(directory, state)
    sizes = {str(path.relative_to(directory)): disk.size(path) for path in paths}
    if not arguments.dry_run:
        for path in paths:
            disk.remove(path)
    if arguments.json:
        print(json.dumps(sizes, indent=1))
    else:
        for name, size in sizes.items():
            print(f"{size / 2**20:8.1f} MB  {name}")
        verb = "would be" if arguments.dry_run else "are"
        print(f"{sum(sizes.values()) / 2**20:8.1f} MB {verb} free")
    return 0


@command
def demo(arguments: argparse.Namespace) -> int:
    from jobs import demo

    screen = Screen()
    chosen = arguments.folder, arguments.detuned, arguments.experiments
    return demo.run(*chosen, screen.say, screen.show)


# -- again, and elsewhere -------------------------------------------------------------------------


@command
def compare(arguments: argparse.Namespace) -> int:
    from jobs import compare

    state, _ = _state(arguments)
    print(json.dumps(compare.rows(state), indent=1) if arguments.json else compare.text(state))
    return 0


@command
def push(arguments: argparse.Namespace) -> int:
    from jobs import campaign, mirror, report
    from jobs.repository import Repository

    repository, config = Repository(_root(arguments)), _config(arguments)
    if (_directory(arguments) / "ledger.jsonl").exists():
        if not _holder(arguments):  # else records that are newer would be lost
            campaign.restore(config, _root(arguments))
        state, directory = _state(arguments)
        report.mirror_notes(repository, state)
        mirror.save_ledger(repository, config.campaign, directory / "ledger.jsonl")
    mirror.push(repository, arguments.remote, config.campaign)
    print(f"{config.campaign}: sent to {arguments.remote}")
    return 0


@command
def fetch(arguments: argparse.Namespace) -> int:
    from jobs import campaign, mirror, tables
    from jobs.repository import Repository

    config = _config(arguments)
    if holder := _holder(arguments):
        raise LeaseHeld(f"{config.campaign} is run here by {holder}. Stop that first")
    stays = mirror.fetch(Repository(_root(arguments)), arguments.remote, config.campaign)
    campaign.restore(config, _root(arguments))
    state, directory = _state(arguments)
    tables.write_tables(directory, state)
    print(f"{config.campaign}: {len(state.records)} experiments, in {directory}")
    if stays:
        print(f"autoresearch fetch: {stays}", file=sys.stderr)
    return 0


@command
def reproduce(arguments: argparse.Namespace) -> int:
    from jobs import recorded, reproduce, verdict
    from jobs.screen import Screen

    clone = _clone(arguments)
    asked = (arguments.times, arguments.executor, arguments.data, arguments.image)
    wish = reproduce.Wish(*asked, arguments.budget, arguments.scale, _numbers(arguments.set))
    if (holder := _holder(arguments)) and (slow := reproduce.alongside(clone, wish, holder)):
        print(f"autoresearch reproduce: {slow}", file=sys.stderr)
    screen = Screen(sys.stderr if arguments.json else sys.stdout)
    if arguments.all_keeps:
        branches = clone.state.branches
        named = [arguments.experiment] if arguments.experiment else list(branches)
        if unknown := set(named) - set(branches):
            raise UserError(f"--all-keeps takes a branch: {unknown.pop()!r} is none")
        records = [record for branch in named for record in clone.state.chain(branch)]
        reports = reproduce.run_each(clone, records, wish, screen.show)
    elif arguments.experiment:
        record = recorded.find(clone, arguments.experiment)
        reports = iter([reproduce.run(clone, record, wish, screen.show)])
    else:
        raise UserError("name an experiment, a commit or a branch, or say --all-keeps")
    told = []
    for one in reports:
        told.append(one)
        if not arguments.json:
            screen.say(reproduce.text(clone.state, one))
    if not told:
        raise UserError(f"nothing to run: no keep{' beside the baselines' if wish.other else ''}")
    if arguments.json:
        print(json.dumps(told, indent=1))
    found = {verdict.EXIT[one["verdict"]] for one in told}
    return 1 if 1 in found else max(found, default=0)


def _clone(arguments: argparse.Namespace) -> Any:
    from jobs.recorded import Clone
    from jobs.repository import Repository

    state, directory = _state(arguments)
    here = _config(arguments) if arguments.config.exists() else None
    return Clone(state, Repository(_root(arguments)), directory, here)


def _numbers(settings: list[str]) -> dict[str, int | float]:
    try:
        pairs = [text.split("=", 1) for text in settings]
        found = {name: int(v) if v.lstrip("-").isdigit() else float(v) for name, v in pairs}
        if all(map(math.isfinite, found.values())):
            return found
    except ValueError:
        pass
    raise UserError(f"--set {' '.join(settings)}: write NAME=NUMBER")


@command
def bundle(arguments: argparse.Namespace) -> int:
    from jobs import bundle, recorded

    clone = _clone(arguments)
    record = recorded.find(clone, arguments.experiment)
    target = arguments.to or Path(f"{clone.state.campaign}-{record.id}")
    print(f"{bundle.make(clone, record, target)}/run.sh runs it")
    return 0


@command
def image(arguments: argparse.Namespace) -> int:
    from containers import cli, images
    from jobs import config

    if arguments.store is None:  # a lab's own, where this is one
        here = Path("campaign.yaml")
        chosen = config.load(here).executor.images if here.exists() else None
        arguments.store = images.default_store(chosen)
    return cli.main(arguments)


# -- finding things -------------------------------------------------------------------------------


def _config(arguments: argparse.Namespace) -> Any:
    """campaign.yaml, or in a clone without one what is said of the campaign on the command line."""
    from jobs import config

    if arguments.named is None:
        return config.load(arguments.config)
    check_name("campaign", arguments.named)
    if not arguments.config.exists():
        return config.parse({"campaign": arguments.named})
    return dataclasses.replace(config.load(arguments.config), campaign=arguments.named)


def _defaults() -> Any:
    from jobs import config

    return config.parse({})


def _root(arguments: argparse.Namespace) -> Path:
    return Path(arguments.config).absolute().parent


def _directory(arguments: argparse.Namespace) -> Path:
    from jobs import campaign

    return campaign.folder(_config(arguments), _root(arguments))


def _holder(arguments: argparse.Namespace) -> Any:
    """Who runs the campaign here now; None: nobody."""
    from jobs import lease

    holder = lease.holder(_directory(arguments))
    gone = holder is None or holder.gone(_config(arguments).lease.stale_after)
    return None if gone else holder


def _state(arguments: argparse.Namespace) -> tuple[Any, Path]:
    from jobs import campaign

    directory = _directory(arguments)
    if not (directory / "ledger.jsonl").exists():
        with contextlib.suppress(UserError):  # neither a repository nor records: told by `read`
            campaign.restore(_config(arguments), _root(arguments))
    return campaign.read(directory), directory


if __name__ == "__main__":
    sys.exit(main())
