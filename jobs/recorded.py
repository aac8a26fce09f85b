"""What a clone knows of an experiment: its commit, its records, the settings it ran with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import config, ledger, materialise, mirror, report
from jobs.errors import UserError
from jobs.history import State
from jobs.model import Budget, Experiment, Result
from jobs.records import Record, RunRecord
from jobs.repository import Repository
from jobs.settings import Budget as Length
from jobs.settings import Config


@dataclass(frozen=True)
class Clone:
    """A campaign as this clone holds it."""

    state: State
    repository: Repository
    directory: Path  # of the campaign
    here: Config | None = None  # this place's campaign.yaml, if there is one


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

    def settings(self, here: Config | None = None) -> Config:
        """What it ran with; executor and data folder as campaign.yaml has them `here`."""
        then, details = self.config, self.result.details
        executor = dataclasses.replace(
            (here or then).executor,
            image=self.fact("Container-Tag"),
            threads=details.get("threads") or materialise.threads(then),
        )
        data = dataclasses.replace(then.data, folder=(here or then).data.folder)
        length = Budget(**details["budget"]) if details.get("budget") else materialise.budget(then)
        budget = budgeted(length.kind, length.amount, then.budget.startup_free)
        return dataclasses.replace(then, executor=executor, data=data, budget=budget)


def kept(clone: Clone) -> dict[str, bytes]:
    """The campaign's records in git (name -> bytes); none where they were never copied there."""
    try:
        return mirror.load_records(clone.repository, clone.state.campaign)
    except UserError:
        return {}


def budgeted(kind: str, amount: float, free_s: float | None) -> Length:
    """The setting that gives this budget."""
    if kind == "tokens":
        return Length(tokens=int(amount), startup_free=free_s)
    return Length(wall=float(amount), startup_free=free_s)


def find(clone: Clone, name: str) -> Record:
    """The experiment that a person means: id, commit, or branch (its head).

    Raises UserError: none or several; a commit that is no experiment's, or whose records are
    absent.
    """
    campaign = clone.state.campaign
    try:
        return report.find(clone.state, name.removeprefix(f"autoresearch/{campaign}/"))
    except UserError:
        commit = clone.repository.objects.resolve(f"{name}^{{commit}}")
        if commit is None:
            raise
    its = clone.repository.trailers(commit).get("Campaign")
    if its is None:
        raise UserError(f"{name} is commit {commit[:10]}, which is no experiment's: no trailers")
    if its != campaign:
        raise UserError(f"{name} is an experiment of campaign {its}: name that with --campaign")
    raise UserError(f"the records of commit {commit[:10]} are not here: autoresearch fetch REMOTE")


def original(clone: Clone, record: Record) -> Original:
    """All that is recorded of an experiment.

    Raises UserError: it left no result of its own, or its commit is not in this clone.
    """
    own = [r for r in record.runs if r.purpose != "confirm" and r.status != "infrastructure"]
    if not own:
        raise UserError(f"{record.id} left no result of its own: there is nothing to compare with")
    if clone.repository.objects.resolve(record.commit) is None:
        missing = f"commit {record.commit[:10]} of {record.id} is not in this clone"
        raise UserError(f"{missing}: autoresearch fetch REMOTE")
    run = max(own, key=lambda r: r.n)
    settings: Mapping[str, Any] = {}
    for event in ledger.read(clone.directory / "ledger.jsonl"):
        if event["n"] > run.n:
            break
        settings = event.get("config", settings)  # campaign_started, config_changed
    return Original(
        clone.state.experiment(record.id),
        clone.repository.trailers(record.commit),
        config.parse(settings),
        run,
        clone.state.result(run),
    )


def require(what: str, recorded: str | None, found: str, remedy: str) -> None:
    """Raises UserError, with both hashes, where what is here is not what was recorded."""
    if recorded != found:
        raise UserError(
            f"another {what}: recorded is sha256 {recorded}, here is sha256 {found}. {remedy}"
        )


INSTALL = "Install the version of this project whose trainer/ the campaign used"
