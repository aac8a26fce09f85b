"""From an experiment and a run to what the node is told: a task. Pure."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.history import State
from jobs.model import Budget, Experiment, Run
from jobs.settings import Config
from jobs.submission import Place, place_of
from trainer import prepare
from trainer.referee.task import Budget as TaskBudget
from trainer.referee.task import Limits, Scorer, Task

SCORING_S = 600.0  # evaluation, its compilation included, before any baseline was timed
SCORING_FACTOR = 5.0  # of the baseline's median; bounds what could be learned while scoring
LEAST_SCORING_S = 60.0
FIRST_CEILING_S = 3600.0  # wall time of a token budget before any baseline was timed
CEILING_FACTOR = 3.0  # of the baseline's median training time
ENDING_S = 30.0  # saving weights, taking them over, writing result.json


@dataclass(frozen=True)
class Site:
    """What all runs of a campaign have in common."""

    config: Config
    campaign_dir: Path  # absolute
    data: Path | None
    facts: Mapping[str, Any]  # hashes of the start: evaluator, data manifest, container
    image: Any = None  # containers.images.Image, where runs are in containers
    program_argv: tuple[str, ...] = ()  # what a container puts before train.py's command
    referee_argv: tuple[str, ...] = ()
    python: str | None = None  # interpreter and sealed trainer/ of the runs; None: the host's own
    trainer: Path | None = None
    scorer_files: Path | None = None  # general: exported from the campaign's start commit
    caches: Path | None = None  # holds <branch>/cache, promoted by baselines and keeps


def budget(config: Config) -> Budget:
    """The budget of every run: campaign.yaml's, or the scale's."""
    if config.budget.tokens is not None:
        return Budget("tokens", config.budget.tokens)
    if config.budget.wall is not None:
        return Budget("wall", config.budget.wall)
    scale = prepare.SCALES[config.data.scale]
    return Budget(scale.budget_kind, scale.budget_amount)  # type: ignore[arg-type]


def startup_free_s(config: Config) -> float:
    """Seconds of start-up and warm-up that cost nothing."""
    return config.budget.startup_free or prepare.SCALES[config.data.scale].startup_free_s


def feed_ceiling_s(state: State, config: Config, branch: str) -> float | None:
    """Token budgets: wall time that closes the feed, from the branch's baseline."""
    if budget(config).kind == "wall":
        return None
    usual = _usual(state, branch, "training_s")
    if usual is None:
        return FIRST_CEILING_S
    # A small floor: on a busy laptop three times a few seconds can pass without anybody's fault.
    return max(30.0, CEILING_FACTOR * usual)


def scoring_limit_s(state: State, branch: str) -> float:
    """How long scoring may take, from the branch's baseline."""
    usual = _usual(state, branch, "scoring_s")
    if usual is None:
        return SCORING_S
    return min(SCORING_S, max(LEAST_SCORING_S, SCORING_FACTOR * usual))


def _usual(state: State, branch: str, name: str) -> float | None:
    """The median of a time of the baseline's good runs; None before there is one."""
    baseline = state.branches[branch].baseline if branch in state.branches else None
    results = state.results(baseline) if baseline else []
    times = [getattr(r, name) for r in results if r.ok and getattr(r, name)]
    return statistics.median(times) if times else None


def wall_limit_s(state: State, config: Config, branch: str) -> float:
    """What a whole run may take before it is ended, in seconds of wall time."""
    if config.run.wall_limit:
        return config.run.wall_limit
    ceiling = feed_ceiling_s(state, config, branch)
    training = budget(config).amount if ceiling is None else ceiling
    if config.task.kind == "general":
        return training + SCORING_S + ENDING_S
    overrun, scoring = max(1.0, 0.01 * training), scoring_limit_s(state, branch)
    return startup_free_s(config) + training + overrun + scoring + ENDING_S


def first_wish(config: Config) -> tuple[float, list[Place]]:
    """What the first runs ask of an executor: seconds of wall time, and their branches' places."""
    places = [place_of(vars(branch)) for branch in config.branches.values()]
    return wall_limit_s(State(), config, ""), places


def task(site: Site, state: State, experiment: Experiment, run: Run, run_dir: Path) -> Task:
    """All that the wrapper on the node needs to know; paths are absolute."""
    config = site.config
    general = config.task.kind == "general"
    limit = wall_limit_s(state, config, experiment.branch)
    cache = site.caches and site.caches / experiment.branch / "cache"
    scorer = None
    if general and config.task.scorer:
        scorer = Scorer(
            config.task.scorer.command,
            str(site.scorer_files),
            config.task.metric,
        )
    return Task(
        kind=config.task.kind,
        program=str(run_dir / "program"),
        command=config.task.command,
        run_dir=str(run_dir),
        wall_limit_s=limit,
        python=site.python or config.executor.python,
        trainer=None if site.trainer is None else str(site.trainer),
        data=None if site.data is None else str(site.data),
        scale=None if general else run.scale,
        seed=run.seed,
        budget=TaskBudget(run.budget.kind, run.budget.amount),
        startup_free_s=None if general else startup_free_s(config),
        feed_ceiling_s=feed_ceiling_s(state, config, experiment.branch),
        scoring_limit_s=min(
            SCORING_S if general else scoring_limit_s(state, experiment.branch), limit
        ),
        limits=Limits(
            config.run.memory_mb, config.run.processes, config.run.log_mb, config.run.scratch_mb
        ),
        isolation="apptainer" if site.program_argv else config.executor.isolation,
        program_argv=site.program_argv,
        referee_argv=site.referee_argv,
        readable=config.executor.binds,
        scratch=config.executor.scratch,
        threads=threads(config),
        cache=str(cache) if cache and cache.exists() else None,
        cache_mb=config.disk.cache_mb,
        scorer=scorer,
        facts={
            **site.facts,
            "campaign": config.campaign,
            "experiment": experiment.id,
            "branch": experiment.branch,
            "commit": experiment.commit,
            "run": run.id,
        },
    )


def threads(config: Config) -> int:
    """CPU threads of a run: as configured, a job's cores, or this machine's share of a slot."""
    if config.executor.threads:
        return config.executor.threads
    if config.executor.kind != "local":
        return config.executor.cpus
    linux = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(1, cpus // config.executor.slots)


def trailers(site: Site, experiment: Mapping[str, str | None]) -> dict[str, str | None]:
    """The facts known before a run, for the commit's message; git adds `none` where one lacks."""
    facts = site.facts
    return {
        "Campaign": site.config.campaign,
        "Container-Tag": facts.get("container_tag"),
        "Container-SHA256": facts.get("container_sha256"),
        "Registry-Digest": facts.get("registry_digest"),
        "Data-Manifest-SHA256": facts.get("data_manifest_sha256"),
        "Evaluator-SHA256": facts.get("evaluator_sha256"),
        **experiment,
    }
