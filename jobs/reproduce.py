"""An experiment again, from its commit: found, checked, run like any other, and judged."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import constants
from jobs import (
    campaign,
    config,
    lab,
    ledger,
    materialise,
    mirror,
    names,
    report,
    rerun,
    submission,
    verdict,
)
from jobs.config import Config
from jobs.errors import UserError
from jobs.history import State
from jobs.model import Budget, Experiment, Result
from jobs.records import Record, RunRecord
from jobs.repository import Repository
from jobs.tables import value, write_whole


@dataclass(frozen=True)
class Wish:
    """How a rerun is to be done, and how it shall differ from the campaign's own run."""

    times: int = 1
    executor: str | None = None
    data: Path | None = None
    image: str | None = None  # instead of the recorded one
    budget: float | None = None  # in the unit of the scale's budget
    scale: str | None = None
    constants: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def other(self) -> list[str]:
        """What it changes of the experiment itself, in words; empty for a reproduction."""
        told = {"budget": self.budget, "scale": self.scale} | dict(self.constants)
        return [f"{name} {found}" for name, found in told.items() if found is not None]


@dataclass(frozen=True)
class Original:
    """An experiment as its commit and the records of its campaign tell it."""

    experiment: Experiment
    trailers: Mapping[str, str]
    config: Config  # as it was when it ran
    run: RunRecord
    result: Result  # of the run that decided it

    def fact(self, trailer: str) -> str | None:
        """A trailer of its commit; None where that says `none`."""
        told = self.trailers.get(trailer, "none")
        return None if told == "none" else told


# -- what is recorded -----------------------------------------------------------------------------


def find(state: State, repository: Repository, name: str) -> Record:
    """The experiment that a person means: id, commit, or branch (its head).

    Raises:
        UserError: none or several; a commit that is no experiment's, or whose records are absent.
    """
    try:
        return report.find(state, name.removeprefix(f"autoresearch/{state.campaign}/"))
    except UserError:
        commit = repository.objects.resolve(f"{name}^{{commit}}")
        if commit is None:
            raise
    its = repository.trailers(commit).get("Campaign")
    if its is None:
        raise UserError(f"{name} is commit {commit[:10]}, which is no experiment's: no trailers")
    if its != state.campaign:
        raise UserError(f"{name} is an experiment of campaign {its}: name that with --campaign")
    raise UserError(f"the records of commit {commit[:10]} are not here: autoresearch fetch REMOTE")


def original(state: State, repository: Repository, directory: Path, record: Record) -> Original:
    """All that is recorded of an experiment.

    Raises:
        UserError: it left no result of its own, or its commit is not in this clone.
    """
    own = [r for r in record.runs if r.purpose != "confirm" and r.status != "infrastructure"]
    if not own:
        raise UserError(f"{record.id} left no result of its own: there is nothing to compare with")
    if repository.objects.resolve(record.commit) is None:
        raise UserError(
            f"commit {record.commit[:10]} of {record.id} is not in this clone: autoresearch fetch "
            "REMOTE"
        )
    run = max(own, key=lambda r: r.n)
    settings: Mapping[str, Any] = {}
    for event in ledger.read(directory / "ledger.jsonl"):
        if event["n"] > run.n:
            break
        settings = event.get("config", settings)  # campaign_started, config_changed
    return Original(
        state.experiment(record.id),
        repository.trailers(record.commit),
        config.parse(settings),
        run,
        state.result(run),
    )


# -- what it runs with ----------------------------------------------------------------------------


def settings(one: Original, wish: Wish, here: Config | None) -> Config:
    """The recorded ones, but executor and data folder as this place's campaign.yaml says."""
    then, details = one.config, one.result.details
    executor = dataclasses.replace(
        (here or then).executor,
        image=one.fact("Container-Tag"),
        threads=details.get("threads") or materialise.threads(then),
    )
    if wish.executor:
        executor = dataclasses.replace(executor, kind=wish.executor)  # type: ignore[arg-type]
    folder = wish.data or (None if wish.scale else (here or then).data.folder)
    data = dataclasses.replace(
        then.data,
        folder=None if folder is None else str(folder),
        scale=wish.scale or details.get("scale") or then.data.scale,
    )
    free = None if wish.scale else then.budget.startup_free
    return dataclasses.replace(then, executor=executor, data=data, budget=_budget(one, wish, free))


def _budget(one: Original, wish: Wish, free: float | None) -> config.Budget:
    if wish.scale:
        data = dataclasses.replace(one.config.data, scale=wish.scale)
        bare = dataclasses.replace(one.config, data=data, budget=config.Budget())
        length = materialise.budget(bare)
    elif recorded := one.result.details.get("budget"):
        length = Budget(**recorded)
    else:
        length = materialise.budget(one.config)
    amount = wish.budget or length.amount
    if length.kind == "tokens":
        return config.Budget(tokens=int(amount), startup_free=free)
    return config.Budget(wall=float(amount), startup_free=free)


def checked_site(
    one: Original, wish: Wish, chosen: Config, root: Path, note: Callable[[str], None]
) -> materialise.Site:
    """Evaluator, data and image, each held against what the commit recorded.

    Raises:
        UserError: one of them is missing, or another; with both hashes and what to do.
    """
    bare = dataclasses.replace(chosen, executor=dataclasses.replace(chosen.executor, image=None))
    made = dataclasses.replace(campaign.site(bare, root), config=chosen)
    require(
        *("evaluator", one.fact("Evaluator-SHA256"), made.facts["evaluator_sha256"]),
        "Install the version of this project whose trainer/ the campaign used",
    )
    if made.data is not None:
        again = "Prepare it into an empty folder (autoresearch prepare -- --data DIR), name that"
        if not wish.scale:
            recorded, found = one.fact("Data-Manifest-SHA256"), made.facts["data_manifest_sha256"]
            require(f"data manifest in {made.data}", recorded, found, again)
        _verify(made.data)
    sha256 = one.fact("Container-SHA256")
    if sha256 is None:
        return made
    from containers.apptainer import ImageError
    from jobs import container

    known = one.fact("Container-Tag") or "", one.fact("Registry-Digest")
    kept = names.records_ref(one.trailers["Campaign"])
    try:
        by = wish.image or container.recorded(sha256, *known, kept, note)
        return container.contained(made, by)
    except ImageError as error:
        raise UserError(str(error)) from error  # exit status 1 says that it was not reproduced


def _verify(data: Path) -> None:
    """Raises UserError, naming the file and both hashes, where data is not as its manifest says."""
    argv = [sys.executable, str(lab.TRAINER / "prepare.py"), "--verify", "--data", str(data)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(done.stderr.strip().removeprefix("prepare: "))


def require(what: str, recorded: str | None, found: str, remedy: str) -> None:
    """Raises UserError, with both hashes, where what is here is not what was recorded."""
    if recorded != found:
        raise UserError(
            f"another {what}: recorded is sha256 {recorded}, here is sha256 {found}. {remedy}"
        )


def _changed(one: Original, wish: Wish, chosen: Config, repository: Repository) -> Experiment:
    """The experiment with the wish's constants in its program, in a commit that no ref holds."""
    if not wish.constants:
        return one.experiment
    path, base = chosen.task.editable[0], one.experiment.commit
    try:
        text = constants.replace(repository.read(base, path), wish.constants, chosen.data.scale)
    except (KeyError, SyntaxError) as error:
        raise UserError(f"--set in {path} of {one.experiment.id}: {error.args[0]}") from None
    told = f"{one.experiment.id} with {', '.join(wish.other)}"
    return dataclasses.replace(
        one.experiment, commit=repository.commit(base, {path: text}, told, {})
    )


# -- the command ----------------------------------------------------------------------------------


def run(
    state: State,
    repository: Repository,
    directory: Path,
    here: Config | None,
    record: Record,
    wish: Wish,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Rerun one experiment, and where the wish changes something its baseline beside it.

    Args:
        here: this place's campaign.yaml, if there is one.

    Returns:
        The report, as JSON; `text` puts it into words.

    Raises:
        UserError: something that the campaign used is missing, or is another.
    """
    one = original(state, repository, directory, record)
    notes: list[str] = []
    chosen = settings(one, wish, here)
    site = checked_site(one, wish, chosen, repository.root, notes.append)
    folder = _new_folder(directory / "reproductions" / record.id)
    name = f"{chosen.campaign}.again{folder.name}"  # never the name of a job of the campaign
    site = dataclasses.replace(
        site,
        config=dataclasses.replace(chosen, campaign=name),
        campaign_dir=folder,
        caches=None,
    )
    site = campaign.export_scorer(site, repository, state)
    sources = {record.id: one}
    baseline = state.branch(record.branch).baseline
    if wish.other and baseline not in (None, record.id):
        assert baseline is not None
        sources[baseline] = original(state, repository, directory, state.record(baseline))
    again = [_changed(source, wish, chosen, repository) for source in sources.values()]
    fresh = rerun.afresh(state, again, timed=not wish.other)
    wanted = [(name, s.run.seed) for name, s in sources.items() for _ in range(wish.times)]
    executor = submission.executor(site.config.executor, folder)
    against = _other_image(one, site, repository, state.campaign, notes)
    results = rerun.run_all(site, repository, executor, fresh, wanted, show)
    told = _told(state, record, one, wish, site.image is not None, results, against)
    told |= {"notes": notes, "folder": str(folder)}
    write_whole(folder / "report.json", json.dumps(told, indent=1).encode())
    return told


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    (parent / str(number)).mkdir()
    return parent / str(number)


def _other_image(
    one: Original,
    site: materialise.Site,
    repository: Repository,
    campaign_name: str,
    notes: list[str],
) -> list[str]:
    """What forbids comparing where another image is used: other packages than the recorded."""
    recorded = one.fact("Container-SHA256") or ""
    if site.image is None or site.image.sha256 == recorded:
        return []
    kept = mirror.load_records(repository, campaign_name).get(f"image-{recorded[:16]}.json", b"{}")
    before, now = set(json.loads(kept).get("packages", ())), set(site.image.packages)
    told = f"image was {recorded}, is {site.image.sha256}"
    if before == now:
        notes.append(f"{told}, built again with the same {len(now)} packages")
        return []
    differ = sorted(before ^ now)
    return [f"{told}; {len(differ)} packages differ: {', '.join(differ[:6])}"]


def _told(
    state: State,
    record: Record,
    one: Original,
    wish: Wish,
    contained: bool,
    results: Mapping[str, Sequence[Result]],
    against: list[str],
) -> dict[str, Any]:
    new = results[record.id]
    known = verdict.spread(state, one.result.metric)
    against += [why for r in new for why in verdict.differences(one.result, r, contained)]
    word, why = verdict.judge(one.result, new, known, against)
    scores = [r.metric for r in new if r.metric is not None]
    told = {
        "experiment": record.id,
        "commit": record.commit,
        "branch": record.branch,
        "description": record.description,
        "changed": wish.other,
        "original": _brief(one.result),
        "runs": [_brief(result) for result in new],
        "difference": statistics.fmean(scores) - one.result.metric
        if scores and one.result.metric is not None
        else None,
        "tolerance": known.tolerance,
        "spread": known.words,
    }
    if wish.other:
        first = [r for name, found in results.items() if name != record.id for r in found]
        told["baseline"] = [_brief(result) for result in first]
        word, why = _transfer(state, new, first)
    return told | {"verdict": word, "why": why}


def _transfer(state: State, new: Sequence[Result], first: Sequence[Result]) -> tuple[str, str]:
    """Whether the gain over the baseline is there under other conditions, too."""
    if not first or not all(r.ok for r in (*new, *first)):
        return verdict.INCOMPARABLE, "without a score of its baseline and its own no gain is known"
    means = [statistics.fmean(r.metric or 0.0 for r in found) for found in (first, new)]
    gain = means[1] - means[0] if state.direction == "maximise" else means[0] - means[1]
    word = verdict.REPRODUCED if gain > 0 else verdict.DIFFERENT
    return word, f"gain over its baseline, changed alike: {gain:+.6g}"


def _brief(result: Result) -> dict[str, Any]:
    names = ("run", "status", "reason", "metric", "node", "gpu", "training_s", "total_s")
    return {name: getattr(result, name) for name in names} | {"cpu": result.details.get("cpu")}


def text(state: State, told: Mapping[str, Any]) -> str:
    """A report in words."""
    kinds = [("then", [told["original"]]), ("again", told["runs"])]
    kinds += [("baseline", told["baseline"])] if "baseline" in told else []
    rows = [("", "status", report.metric_name(state), "time", "where")]
    for kind, results in kinds:
        for r in results:
            took = report.duration(r["total_s"]) if r["total_s"] else ""
            where = f"{r['node']}, {r['gpu'] or r['cpu'] or 'unknown processor'}"
            rows.append((kind, r["status"], value(state, r["metric"]), took, where))
    title = f"{told['experiment']}  {told['commit'][:10]}  {told['branch']}  {told['description']}"
    lines = [title, *(f"  {change}" for change in told["changed"]), *report.columns(rows)]
    if told["difference"] is not None and not told["changed"]:
        allowed = f"allowed are {told['tolerance']:.3g}, {told['spread']}"
        lines.append(f"  difference {told['difference']:+.6g}; {allowed}")
    lines += [f"  note: {note}" for note in told["notes"]]
    return "\n".join([*lines, f"{told['verdict']}: {told['why']}"])
