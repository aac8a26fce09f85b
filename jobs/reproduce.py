"""An experiment again, from its commit: checked, run like any other, and judged."""

from __future__ import annotations

import json
import shlex
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent import constants
from jobs import (
    campaign,
    config,
    lab,
    materialise,
    names,
    report,
    rerun,
    submission,
    verdict,
)
from jobs.errors import AutoresearchError, UserError
from jobs.history import State
from jobs.lease import Holder
from jobs.model import Experiment, Result
from jobs.recorded import INSTALL, Clone, Original, budgeted, kept, original, require
from jobs.records import Record
from jobs.settings import Budget as Length
from jobs.settings import Config
from jobs.tables import value, write_whole
from jobs.text import columns
from trainer import prepare


@dataclass(frozen=True)
class Wish:
    """How a rerun is to be done, and how it shall differ from the campaign's own run."""

    times: int = 1
    executor: str | None = None
    data: Path | None = None
    image: str | None = None  # instead of the recorded one
    budget: float | None = None  # in the unit of the scale's budget
    scale: str | None = None
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def other(self) -> list[str]:
        """What it changes of the experiment itself, in words; empty for a reproduction."""
        told = {"budget": self.budget, "scale": self.scale} | dict(self.constants)
        return [f"{name} {found}" for name, found in told.items() if found is not None]

    def settings(self, one: Original, here: Config | None) -> Config:
        """Those of the original, with what is wished for.

        Raises UserError: a wish that means nothing to this experiment.
        """
        chosen = one.settings(here)
        for vain, why in (
            (
                chosen.task.kind == "general" and (self.budget or self.scale or self.data),
                "a task of your own has no --budget, --scale or --data",
            ),
            (self.image and not one.fact("Container-SHA256"), "it ran in no image: no --image"),
        ):
            if vain:
                raise UserError(f"{one.experiment.id}: {why}")
        if self.executor:
            executor = replace(chosen.executor, kind=self.executor)  # type: ignore[arg-type]
            chosen = replace(chosen, executor=executor)
        if self.scale:
            data = replace(chosen.data, scale=self.scale, folder=None)  # type: ignore[arg-type]
            chosen = replace(chosen, data=data, budget=Length())
        if self.data:
            chosen = replace(chosen, data=replace(chosen.data, folder=str(self.data)))
        if self.budget:
            kind, free = materialise.budget(chosen).kind, chosen.budget.startup_free
            if kind == "tokens" and self.budget != int(self.budget):
                raise UserError(f"--budget {self.budget:g}: tokens are whole")
            least = prepare.SCALES[chosen.data.scale].reference_batch_tokens
            if kind == "tokens" and self.budget < least:
                scale = f"scale {chosen.data.scale}"
                raise UserError(f"--budget {self.budget:g}: a batch of {scale} is {least} tokens")
            chosen = replace(chosen, budget=budgeted(kind, self.budget, free))
        if self.budget or self.scale:  # a limit in seconds was meant for the other length
            chosen = replace(chosen, run=replace(chosen.run, wall_limit=None))
        return chosen


def alongside(clone: Clone, wish: Wish, holder: Holder) -> str | None:
    """In words, what reruns here and the runs of the campaign's live controller do to each other.

    Raises UserError: they would share its GPUs, and no clock would be right.
    """
    then = config.parse(clone.state.config).executor.kind
    kind = wish.executor or (clone.here.executor.kind if clone.here else then)
    if (kind, then) != ("local", "local") or holder.process.host != socket.gethostname():
        return None
    told = f"campaign {clone.state.campaign} is run here by {holder}"
    if submission.visible_gpus():
        raise UserError(
            f"{told}: on a GPU that both use, neither's scores would count. Wait for its end; or "
            "autoresearch stop, reproduce, autoresearch run; or say --executor slurm"
        )
    return f"{told}: its runs and these slow each other down"


# -- what it runs with ----------------------------------------------------------------------------


def checked_site(
    one: Original, wish: Wish, chosen: Config, clone: Clone, note: Callable[[str], None]
) -> materialise.Site:
    """Evaluator, data and image, each held against what the commit recorded.

    Raises UserError: one of them is missing, or another; with both hashes and what to do.
    """
    bare = replace(chosen, executor=replace(chosen.executor, image=None))
    recorded = None if wish.scale else one.fact("Data-Manifest-SHA256")
    if chosen.task.kind == "nanochat" and not _manifest(chosen).exists():
        must = f"; its manifest must have sha256 {recorded}" if recorded else ""
        how = _prepared_by(one, chosen, campaign.data_folder(chosen), clone)
        raise UserError(f"{_manifest(chosen)} is missing. Prepare that data: {how}{must}")
    made = replace(campaign.site(bare, clone.repository.root), config=chosen, caches=None)
    found = made.facts["evaluator_sha256"]
    require("evaluator", one.fact("Evaluator-SHA256"), found, INSTALL)
    if made.data is not None:
        if not wish.scale:
            how = _prepared_by(one, chosen, Path("DIR"), clone)
            found, again = made.facts["data_manifest_sha256"], f"Prepare it ({how}), say --data DIR"
            require(f"data manifest in {made.data}", recorded, found, again)
        _verify(made.data)
    sha256 = one.fact("Container-SHA256")
    if sha256 is None:
        return made
    from containers import images
    from containers.apptainer import ImageError
    from jobs import container

    store = images.default_store(chosen.executor.images)
    known = one.fact("Container-Tag") or "", one.fact("Registry-Digest")
    ref = names.records_ref(one.trailers["Campaign"])
    try:
        by = wish.image or container.recorded(store, sha256, *known, ref, note)
        return container.contained(made, by)
    except ImageError as error:
        raise UserError(str(error)) from error  # exit status 1 says that it was not reproduced


def _manifest(chosen: Config) -> Path:
    return campaign.data_folder(chosen) / "manifest.json"


def _prepared_by(one: Original, chosen: Config, folder: Path, clone: Clone) -> str:
    """The command that prepares the data of these settings as the experiment's was."""
    named = [] if clone.here else ["--campaign", one.trailers["Campaign"]]
    words = [*named, "--", "--corpus", chosen.data.corpus, "--scale", chosen.data.scale]
    name = f"data-{(one.fact('Data-Manifest-SHA256') or '')[:16]}.json"
    if shards := json.loads(kept(clone).get(name, b"{}")).get("training_shards"):
        words += ["--shards", str(shards)]
    return shlex.join(["autoresearch", "prepare", *words, "--data", str(folder)])


def _verify(data: Path) -> None:
    """Raises UserError, naming the file and both hashes, where data is not as its manifest says."""
    argv = [sys.executable, str(lab.TRAINER / "prepare.py"), "--verify", "--data", str(data)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(done.stderr.strip().removeprefix("prepare: "))


def _changed(one: Original, wish: Wish, chosen: Config, clone: Clone) -> Experiment:
    """The experiment with the wish's constants in its program, in a commit that no ref holds."""
    path, base = chosen.task.editable[0], one.experiment.commit
    if not wish.constants:
        return one.experiment
    try:
        text = clone.repository.read(base, path)
        text = constants.replace(text, wish.constants, chosen.data.scale)
    except (KeyError, SyntaxError) as error:
        raise UserError(f"--set in {path} of {one.experiment.id}: {error.args[0]}") from None
    told = f"{one.experiment.id} with {', '.join(wish.other)}"
    commit = clone.repository.commit(base, {path: text}, told, {})
    return replace(one.experiment, commit=commit)


def _other_image(one: Original, site: materialise.Site, clone: Clone) -> tuple[str, bool]:
    """In words, where another image is used; and whether its packages are the recorded ones."""
    recorded = one.fact("Container-SHA256") or ""
    if site.image is None or site.image.sha256 == recorded:
        return "", True
    then = json.loads(kept(clone).get(f"image-{recorded[:16]}.json", b"{}"))
    differ = sorted(set(then.get("packages", ())) ^ set(site.image.packages))
    told = f"image was {recorded}, is {site.image.sha256}: {len(differ)} packages differ"
    return told + "".join(f", {name}" for name in differ[:6]), not differ


# -- the command ----------------------------------------------------------------------------------


Beside = dict[tuple[str, str], list[Result]]  # what baselines gave, by their id and settings


def run_each(
    clone: Clone, records: Iterable[Record], wish: Wish, show: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Reports of several experiments; one that cannot be run has `failed`, and the rest goes on."""
    beside: Beside = {}
    for record in records:
        if wish.other and record.parent is None:
            continue  # a baseline runs beside the others, and has no gain of its own
        try:
            yield run(clone, record, wish, show, beside)
        except (AutoresearchError, OSError) as error:
            yield _head(record, wish) | {"verdict": verdict.FAILED, "why": str(error)}


def run(
    clone: Clone,
    record: Record,
    wish: Wish,
    show: Callable[[str], None],
    beside: Beside | None = None,
) -> dict[str, Any]:
    """Rerun one experiment, and where the wish changes something its baseline beside it.

    Args:
        beside: baselines that ran already for others; what is run here is added.

    Returns:
        The report, as JSON; `text` puts it into words.

    Raises:
        UserError: something that the campaign used is missing, or is another.
    """
    one = original(clone, record)
    notes: list[str] = []
    chosen = wish.settings(one, clone.here)
    site = checked_site(one, wish, chosen, clone, notes.append)
    image, alike = _other_image(one, site, clone)
    notes += [image] if image else []
    folder = _new_folder(clone.directory / "reproductions" / record.id)
    site = replace(site, campaign_dir=folder)
    new, baseline = _rerun(clone, one, wish, site, show, {} if beside is None else beside)
    told = _head(record, wish) | {
        "original": _brief(one.result),
        "runs": [_brief(result) for result in new],
        "baseline": [_brief(result) for result in baseline],
        "notes": notes,
        "folder": str(folder),
    }
    told |= _judged(clone.state, one.result, new, site.image is not None, [] if alike else [image])
    if wish.other:
        contained = site.image is not None
        noise = verdict.spread(clone.state, one.result, contained, seeds=True)
        word, why = verdict.transfer(clone.state.direction, new, baseline, noise, contained)
        told |= {"verdict": word, "why": why, "tolerance": noise.tolerance, "spread": noise.words}
    write_whole(folder / "report.json", json.dumps(told, indent=1).encode())
    return told


def _head(record: Record, wish: Wish) -> dict[str, Any]:
    told = ("commit", "branch", "description")
    facts = {name: getattr(record, name) for name in told}
    return {"experiment": record.id} | facts | {"changed": wish.other}


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    (parent / str(number)).mkdir()
    return parent / str(number)


def _rerun(
    clone: Clone,
    one: Original,
    wish: Wish,
    site: materialise.Site,
    show: Callable[[str], None],
    beside: Beside,
) -> tuple[list[Result], list[Result]]:
    """Results of the experiment, and of its baseline where the wish changes something."""
    chosen, name = site.config, one.experiment.id
    job = f"{chosen.campaign}.again{site.campaign_dir.name}"  # no job of the campaign is named so
    sources = {name: one}
    baseline = clone.state.branch(one.experiment.branch).baseline
    key = baseline or "", json.dumps(config.to_dict(chosen))
    if wish.other and baseline is not None and baseline != name and key not in beside:
        sources[baseline] = original(clone, clone.state.record(baseline))
    again = [_changed(source, wish, chosen, clone) for source in sources.values()]
    state = rerun.afresh(clone.state, again, timed=not wish.other, kind=chosen.executor.kind)
    wanted = [(each, source.run.seed) for each, source in sources.items()] * wish.times
    chosen = replace(chosen, executor=rerun.enough(chosen.executor, len(wanted)), campaign=job)
    site = campaign.export_scorer(replace(site, config=chosen), clone.repository, clone.state)
    executor = submission.executor(chosen.executor, site.campaign_dir)
    results = rerun.run_all(site, clone.repository, executor, state, wanted, show)
    if baseline in sources and baseline != name:
        beside[key] = results[baseline]
    return results[name], beside.get(key, [])


def _judged(
    state: State, old: Result, new: Sequence[Result], contained: bool, against: list[str]
) -> dict[str, Any]:
    known = verdict.spread(state, old, contained)
    reasons = [why for result in new for why in verdict.differences(old, result, contained)]
    word, why = verdict.judge(old, new, known, [*against, *reasons])
    scores = [r.metric for r in new if r.metric is not None]
    both = scores and old.metric is not None
    return {
        "difference": statistics.fmean(scores) - old.metric if both else None,  # type: ignore
        "tolerance": known.tolerance,
        "spread": known.words,
        "verdict": word,
        "why": why,
    }


def _brief(result: Result) -> dict[str, Any]:
    told = ("run", "status", "reason", "metric", "node", "gpu", "training_s", "total_s")
    return {name: getattr(result, name) for name in told} | {"cpu": result.details.get("cpu")}


def text(state: State, told: Mapping[str, Any]) -> str:
    """A report in words."""
    title = f"{told['experiment']}  {told['commit'][:10]}  {told['branch']}  {told['description']}"
    closing = f"{told['verdict']}: {told['why']}"
    if told["verdict"] == verdict.FAILED:
        return f"{title}\n{closing}"
    rows = [("", "status", report.metric_name(state), "time", "where")]
    for kind, results in (
        *(("then", [told["original"]]), ("again", told["runs"])),
        ("baseline", told["baseline"]),
    ):
        for r in results:
            took = report.duration(r["total_s"]) if r["total_s"] else ""
            where = f"{r['node']}, {r['gpu'] or r['cpu'] or 'unknown processor'}"
            rows.append((kind, r["status"], value(state, r["metric"]), took, where))
    lines = [title, *(f"  {change}" for change in told["changed"]), *columns(rows)]
    if told["difference"] is not None and not told["changed"]:
        allowed = f"allowed are {told['tolerance']:.3g}, {told['spread']}"
        lines.append(f"  difference {told['difference']:+.6g}; {allowed}")
    lines += [f"  note: {note}" for note in told["notes"]]
    return "\n".join([*lines, closing])
