"""Runs from intent to result: hands them to the executor, finds them again, collects their ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs import materialise, outcome, policy
from jobs.effects import effect
from jobs.errors import Paused, UserError
from jobs.journal import Journal
from jobs.model import Result, to_json
from jobs.plan import Wanted
from jobs.records import OpenRun
from jobs.repository import Repository
from jobs.submission import Executor, JobState, place_of
from trainer.referee import task

LOST_AFTER_S = 60.0  # a job that Slurm does not know any more may still be writing its result
EXPLAINED_AFTER_S = 60.0  # so long a run that was ended from outside waits for Slurm's reason
STUCK_AFTER_S = 300.0  # Slurm shows reasons that last for a moment, too, while it reconsiders
LOCAL_LOST_AFTER_S = 0.5
LOCAL_SURVEY_S = 0.25
TELEMETRY_TAIL = 8192  # bytes, some lines of it
HANG_MARGIN_S = 300.0  # beyond a run's own limit, which its wrapper enforces


class Runs:
    """The runs of one campaign that have not ended."""

    def __init__(
        self,
        site: materialise.Site,
        journal: Journal,
        repository: Repository,
        executor: Executor,
        say: Callable[[str], None],
    ) -> None:
        self._site, self._journal, self._repository = site, journal, repository
        self._executor, self._say = executor, say
        self._local = site.config.executor.kind == "local"
        self._surveyed = 0.0  # monotonic time of the last survey
        self._states: dict[str, JobState] = {}
        # run id -> what holds of it -> monotonic time of the first look that saw so
        self._since: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self._freed: dict[tuple[Any, Any], str | None] = {}  # node, device -> its last run's end
        self._refused: dict[str, str] = {}  # run id -> why its executor would not take it

    def folder(self, run: OpenRun) -> Path:
        return self._site.campaign_dir / "runs" / run.folder

    # -- starting ---------------------------------------------------------------------------------

    def start(self, wanted: Wanted) -> None:
        """Record the intent, then act on it."""
        config, run = self._site.config, wanted.run
        self._journal.record(
            "run_intended",
            run=to_json(run),
            executor=config.executor.kind,
            name=f"{config.campaign}-{run.id}",
            folder=run.folder,
            purpose=wanted.purpose,
        )
        self._submit(self._journal.state.open_runs[run.id], wanted.avoid)

    def adopt(self) -> None:
        """Runs that were intended: find their jobs by name, or submit them now."""
        opened = self._journal.state.running()
        # so that the executor knows which GPUs are taken before it starts anything
        self._executor.survey([run.submission for run in opened if run.submission])
        unsure = [run for run in opened if run.submission is None]
        found = self._executor.find([run.name for run in unsure]) if unsure else {}
        for run in unsure:
            if run.name in found:
                self._journal.record("run_submitted", submission=to_json(found[run.name]))
            else:
                record = self._journal.state.record(run.run.experiment)
                avoid = policy.avoided_nodes(self._journal.state, record, run.run.seed)
                self._submit(run, avoid)
        if running := [run.run.id for run in self._journal.state.running()]:
            self._say(f"adopted {len(running)} running: {', '.join(running)}")

    def _submit(self, run: OpenRun, avoid: frozenset[str]) -> None:
        """Snapshot, task, hand over, record. Repeating any part of it is harmless."""
        site, state = self._site, self._journal.state
        if site.image is not None:
            from jobs import container  # imports spython: not for those who use no container

            container.check_before_run(site)
        experiment, folder = state.experiment(run.run.experiment), self.folder(run)
        with effect("run.folder"):
            folder.mkdir(parents=True, exist_ok=True)
            told = materialise.task(site, state, experiment, run.run, folder)
            told.save()
        editable = () if site.config.task.kind == "general" else site.config.task.editable
        place = place_of(state.branch(run.branch).settings)
        try:
            self._repository.snapshot(experiment.commit, folder / "program", editable)
        except UserError as error:  # a file that no run can be given: its experiment's own fault
            self._refused[run.run.id] = str(error)
            return
        try:
            with effect("run.submit"):
                asked = (told.wall_limit_s, avoid, place)
                submission = self._executor.submit(run.run, run.name, folder, *asked)
        except UserError as error:
            if not place:
                raise
            self._refused[run.run.id] = str(error)  # its branch's own fault: the others carry on
            return
        self._journal.record("run_submitted", submission=to_json(submission))

    def progress(self) -> str:
        """How far the runs under way are, for people: 'e0003 s1 43 % loss 3.21 | ...'."""
        return " | ".join(self._progress(run) for run in self._journal.state.running())

    def _progress(self, run: OpenRun) -> str:
        name, state = f"{run.run.experiment} s{run.run.seed}", self._states.get(run.run.id)
        if state and state.phase == "pending":
            return f"{name} pending {state.reason}".rstrip()
        try:
            with open(self.folder(run) / "telemetry.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TELEMETRY_TAIL))
                last = json.loads(file.read().split(b"\n")[-2])
            return f"{name} {last['progress']:.0%} loss {last['loss']:.3f}"
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return f"{name} starting"  # nothing logged, or not what our train.py logs

    # -- ending -----------------------------------------------------------------------------------

    def ended(self) -> list[tuple[OpenRun, Result]]:
        """The runs that have ended since: by their result.json, else by what became of the job.

        Raises Paused: a job has waited for minutes for a reason that waiting does not mend.
        """
        running = [run for run in self._journal.state.open_runs.values() if run.submission]
        results = {run.run.id: self._told(run) for run in running}
        if (missing := [r for r in running if results[r.run.id] is None]) and self._survey_due():
            results |= self._survey(missing)
        found = [(run, results[run.run.id]) for run in running]
        ended = [(run, self._with_job(run, result)) for run, result in found if result]
        refused, self._refused = self._refused, {}
        opened = [(self._journal.state.open_runs[run], why) for run, why in refused.items()]
        return ended + [(r, outcome.lost(r.run, why, JobState("absent"))) for r, why in opened]

    def _told(self, run: OpenRun) -> Result | None:
        """Its result, once nothing more is to be learned of it: the wrapper tells of SIGTERM
        before Slurm shows that the job was preempted, say, or met its time limit."""
        result, state = self._read(run), self._states.get(run.run.id)
        if result is None or self._local or result.status != "infrastructure":
            return result
        over = state is not None and state.phase in ("ended", "absent")
        return result if over or self._lasts(run, "unexplained", EXPLAINED_AFTER_S) else None

    def _lasts(self, run: OpenRun, what: str, seconds: float, holds: bool = True) -> bool:
        """Whether something was seen of a run at every look for so long."""
        since = self._since[run.run.id]
        if not holds:
            since.pop(what, None)
            return False
        return time.monotonic() - since.setdefault(what, time.monotonic()) >= seconds

    def _read(self, run: OpenRun) -> Result | None:
        if not os.path.exists(f"{self._site.campaign_dir}/runs/{run.folder}/result.json"):
            return None  # asked for every run at every look: no Path is made for that
        result = outcome.read(self.folder(run), run.run)
        if result is None or result.gpu is None:
            return result
        branch = self._journal.state.branch(run.branch)
        if wanted := place_of(branch.settings).get("gpu"):
            fits = _is_model(wanted, result.gpu)
        else:  # one model for all of a branch: its baseline's
            wanted, fits = branch.gpu, branch.gpu in (None, result.gpu)
        if fits:
            return result
        why = f"it ran on {result.gpu}, its branch wants {wanted}"
        details = {**result.details, "misplaced": True}  # no fault of its node, or of the idea
        died = dataclasses.replace(result, status="infrastructure", reason=why, metric=None)
        return dataclasses.replace(died, details=details)

    def _with_job(self, run: OpenRun, result: Result) -> Result:
        """With what its executor knows: the job, how long it and its place waited, why it ended."""
        self._since.pop(run.run.id, None)
        state = self._states.pop(run.run.id, None)
        assert run.submission is not None  # only submitted runs end
        queued = state.queue_s if state else None
        if queued is None:  # it ended before any survey: by the clocks of two hosts
            queued = outcome.gap_s(run.time, result.started)
        turnaround = self._turnaround(result)
        details = {
            **result.details,
            "executor": run.executor,
            "job": run.submission.job,
            "job_name": run.name,
        }
        if self._site.config.executor.kind == "allocation" and result.total_s is not None:
            details["allocated_s"] = result.total_s + (turnaround or 0.0)  # ours in between, too
        if result.status == "infrastructure" and state and state.phase == "ended":
            details |= {"job_end": state.reason} | outcome.excuse(state)
        return dataclasses.replace(result, queue_s=queued, turnaround_s=turnaround, details=details)

    def _turnaround(self, result: Result) -> float | None:
        """Seconds that its place was free; None for the first run there since this start."""
        # Under ConstrainDevices the device is 0 in every job.
        place = result.node, result.details.get("gpu_uuid") or result.details.get("device")
        if place[1] is None and self._site.config.executor.slots > 1:
            return None  # of several places on a node without devices, nobody knows which
        freed, self._freed[place] = self._freed.get(place), result.ended
        return outcome.gap_s(freed, result.started)

    def _survey_due(self) -> bool:
        every = LOCAL_SURVEY_S if self._local else self._site.config.executor.poll_seconds
        if time.monotonic() - self._surveyed < every:
            return False
        self._surveyed = time.monotonic()
        return True

    def _survey(self, running: list[OpenRun]) -> Mapping[str, Result | None]:
        """Results of runs whose jobs are gone without one of their own; one query for all."""
        states = self._executor.survey([run.submission for run in running if run.submission])
        if states is None:
            return {}  # a failed query is no information
        self._states |= states
        found: dict[str, Result | None] = {}
        for run in running:
            if (state := states.get(run.run.id)) is None:
                continue
            if self._lasts(run, "stuck", STUCK_AFTER_S, state.permanent):
                raise Paused(
                    f"run {run.run.id} waits for ever: {state.reason}",
                    "Mend what Slurm names (executor: in campaign.yaml), then start again",
                )
            if reason := self._lost(run, state):
                # It may have written its result between our look and the query.
                found[run.run.id] = self._read(run) or outcome.lost(run.run, reason, state)
        return found

    def _lost(self, run: OpenRun, state: JobState) -> str | None:
        """Why a run will never leave a result; None while it may."""
        gone = state.phase not in ("pending", "running")
        after_s = LOCAL_LOST_AFTER_S if self._local else LOST_AFTER_S
        if not self._lasts(run, "gone", after_s, gone):
            return self._hung(run) if state.phase == "running" else None
        return f"its job is {state.phase} without a result ({state.reason or 'no reason given'})"

    def _hung(self, run: OpenRun) -> str | None:
        claim = self.folder(run) / "claim.json"
        if not claim.exists():
            return None
        used = time.time() - claim.stat().st_mtime - HANG_MARGIN_S
        if used < 0 or used < (limit := self._limit_s(run)):
            return None
        assert run.submission is not None  # only submitted runs are surveyed
        with effect("run.cancel"):
            self._executor.cancel([run.submission])
        beyond = f"it ran {limit + HANG_MARGIN_S:.0f} s, beyond every limit"
        return f"{beyond}: its node or its wrapper hangs"

    def _limit_s(self, run: OpenRun) -> float:
        """What it was told when it was handed over; where that was damaged, what holds now."""
        try:
            return task.load(self.folder(run)).wall_limit_s
        except (OSError, ValueError, TypeError):
            return materialise.wall_limit_s(self._journal.state, self._site.config, run.branch)


def _is_model(wanted: str, name: str) -> bool:
    """Whether a type as Slurm has it ('a100_80gb', 'rtx3090') is that of a GPU as its driver names
    it ('NVIDIA A100-SXM4-80GB', 'NVIDIA GeForce RTX 3090'): each part is there."""
    between, parts = "[^a-z0-9]*", re.findall("[a-z0-9]+", wanted.lower())
    words = (f"(?<![a-z0-9]){between.join(part)}(?![0-9])" for part in parts)
    return all(re.search(word, name.lower()) for word in words)
