"""Each run a Slurm job of its own, submitted by submitit and followed by one query for all."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit import AutoExecutor

from jobs import payload
from jobs.errors import AutoresearchError, Paused, UserError
from jobs.model import Run, Submission
from jobs.settings import Executor as Settings
from jobs.submission import ANYWHERE, JobState, Place
from slurm import commands, script
from slurm.commands import Busy, Row, Unanswered
from slurm.table import Entry, Table

PROBE_S = 600.0  # how long an answer to "does sacct work here?" is believed
FIND_S = 90.0  # a restarted controller waits so long for a Slurm that does not answer


class Sbatch:
    """Submits, or says why not.

    After an sbatch without an answer none is tried before a query was answered: it may have become
    a job all the same, and others are not made to wait for theirs.
    """

    def __init__(self) -> None:
        self.why = ""  # the last one came to nothing
        self.outage = False

    def __call__(self, submit: Callable[[], str]) -> str | None:
        """The job's id, or None: see `why`. Raises UserError."""
        if self.outage:
            return None
        try:
            job, self.why = submit(), ""
            return job
        except Busy as error:
            self.why = f"Slurm takes no more jobs for now: {error}"
        except Unanswered as error:
            self.outage, self.why = True, f"sbatch got no answer: {error}"
        return None


class SlurmExecutor:
    """Runs as jobs of their own.

    What Slurm does not take (its limit on queued jobs is reached, slurmctld does not answer) waits
    in a file and is submitted by a later `survey`: the caller sees one more pending job.
    """

    def __init__(
        self,
        settings: Settings,
        campaign_dir: Path,
        work: Callable[[str], None] = payload.run,
    ) -> None:
        """`work` is called on the node with the run's folder; it must be importable there."""
        commands.require("sbatch", "executor.kind: slurm")
        self._settings, self._campaign_dir, self._work = settings, campaign_dir, work
        (campaign_dir / "submitit").mkdir(parents=True, exist_ok=True)
        self._waiting = Table(campaign_dir / "submitit" / "waiting.json")
        self._submit = Sbatch()
        self._refused: dict[str, str] = {}  # run id -> why its branch's place is none
        self._avoiding: set[str] = set()  # jobs that are to avoid some nodes
        self._accounting: tuple[float, bool] | None = None  # when probed, and whether it works

    def submit(
        self,
        run: Run,
        name: str,
        run_dir: Path,
        limit_s: float,
        avoid: frozenset[str] = frozenset(),
        place: Place = ANYWHERE,
    ) -> Submission:
        """Hand one run to Slurm. `limit_s`: seconds that the whole run may take.

        Raises:
            UserError: Slurm refused it for a setting; with its own words, and nothing was started.
        """
        avoided = tuple(sorted(avoid))
        entry = Entry(run.id, name, str(run_dir.absolute()), limit_s, avoided, dict(place))
        if job := self._submit(functools.partial(self._sbatch, entry)):
            return Submission(run.id, "slurm", job)
        self._waiting.put(entry)
        return Submission(run.id, "slurm", name)

    def _sbatch(self, entry: Entry) -> str:
        if not entry.avoid or "node" in entry.place:
            return self._sbatch_as_asked(entry)
        try:
            job = self._sbatch_as_asked(entry)
        except UserError:  # there may be no other nodes
            return self._sbatch_as_asked(replace(entry, avoid=()))
        self._avoiding.add(job)
        return job

    def _sbatch_as_asked(self, entry: Entry) -> str:
        folder = script.job_folder(self._campaign_dir, entry.name)
        folder.mkdir(parents=True, exist_ok=True)
        parameters = script.sbatch_parameters(
            self._settings, entry.name, folder, entry.limit_s, entry.avoid, entry.place
        )
        job_executor = AutoExecutor(folder, cluster="slurm")
        job_executor.update_parameters(**{f"slurm_{k}": v for k, v in parameters.items()})
        inner: Any = job_executor._executor
        inner.parameters["wckey"] = None  # update_parameters takes None for not set
        inner._submit_command = functools.partial(_hand_over, inner)
        job: str = job_executor.submit(self._work, entry.run_dir).job_id
        return job

    # -- what became of them ----------------------------------------------------------------------

    def survey(self, submissions: Sequence[Submission]) -> Mapping[str, JobState] | None:
        """State by run id. One squeue; scontrol and sacct once each, only where jobs are missing.

        None: Slurm did not answer, which says nothing about any job; nor is anything said of those
        that scontrol or sacct were to tell of and did not.
        """
        try:
            found = commands.queue()
        except Unanswered:
            return None
        rows = {**commands.by_folder(found), **commands.by_job(found)}
        untold = self._add_ended({s.job for s in submissions if s.job.isdigit()}, rows)
        self._submit.outage = False
        self._submit_waiting(submissions, rows)
        self._let_be_anywhere(rows)
        return {s.run: self._state(s, rows) for s in submissions if s.job not in untold}

    def _add_ended(self, jobs: set[str], rows: dict[str, Row]) -> set[str]:
        """Adds those of `jobs` that squeue did not show; gives those of which nothing was told."""
        with contextlib.suppress(Unanswered):
            if missing := jobs - rows.keys():
                rows |= commands.by_job(commands.remembered(missing))
            if (missing := jobs - rows.keys()) and self._has_accounting():
                rows |= commands.by_job(commands.accounting(jobs=missing))
            return set()
        return jobs - rows.keys()

    def _state(self, submission: Submission, rows: Mapping[str, Row]) -> JobState:
        row = rows.get(submission.job) or rows.get(self._job_folder(submission.job))
        if row:
            return state_of(row, self._last_words(row))
        if self._waiting.get(submission.run):
            return JobState("pending", self._submit.why)
        if why := self._refused.get(submission.run):
            return JobState("ended", why)
        return JobState("absent", "Slurm does not know the job any more")

    def _submit_waiting(self, submissions: Sequence[Submission], rows: Mapping[str, Row]) -> None:
        """Try those again that had to wait, until one still has to."""
        wanted = {s.run for s in submissions}
        for entry in self._waiting:
            if entry.run not in wanted:
                continue
            known = self._job_folder(entry.name) in rows  # an sbatch without answer had succeeded
            try:
                if not known and self._submit(functools.partial(self._sbatch, entry)) is None:
                    break
            except UserError as error:
                if not entry.place:
                    raise
                self._refused[entry.run] = str(error)
            self._waiting.drop(entry.run)

    def _let_be_anywhere(self, rows: Mapping[str, Row]) -> None:
        """Those jobs whose nodes are away, but for the ones that they were to avoid."""
        for job in self._avoiding & rows.keys():
            if rows[job].state == "PENDING" and re.search(commands.NODES_AWAY, rows[job].reason):
                commands.exclude_only(job, self._settings.exclude)
                self._avoiding.remove(job)

    def _job_folder(self, name: str) -> str:
        return str(script.job_folder(self._campaign_dir, name))

    def _last_words(self, row: Row) -> str:
        """The end of a failed job's own log: why Python did not even start, say."""
        if row.state != "FAILED":
            return ""
        return last_line(Path(row.folder) / f"{row.job}_0_log.out")

    def _has_accounting(self) -> bool:
        if self._accounting is None or time.monotonic() - self._accounting[0] > PROBE_S:
            self._accounting = (time.monotonic(), commands.has_accounting())
        return self._accounting[1]

    # -- after a kill -----------------------------------------------------------------------------

    def find(self, names: Iterable[str]) -> Mapping[str, Submission]:
        """Submissions that exist under these names: in Slurm, in its accounts, or by their claims.

        Raises Paused: Slurm does not answer. Taking that for "not there" would run things twice.
        """
        wanted = {name: payload.run_id(name) for name in names}
        runs, jobs = self._campaign_dir / "runs", self._jobs_named(list(wanted))
        found = {name: Submission(wanted[name], "slurm", job) for name, job in jobs.items()}
        for name, run in wanted.items():
            if name not in found and self._waiting.get(run):
                found[name] = Submission(run, "slurm", name)
            # Slurm forgets ended jobs after MinJobAge; the payload said which one it was.
            elif name not in found and (job := payload.claimed(runs, run).get("slurm_job")):
                found[name] = Submission(run, "slurm", job)
        return found

    def _jobs_named(self, names: Sequence[str]) -> dict[str, str]:
        deadline = time.monotonic() + FIND_S
        while True:
            try:
                rows = commands.by_folder(commands.queue())
                gone = [name for name in names if self._job_folder(name) not in rows]
                if gone and self._has_accounting():
                    rows = {**commands.by_folder(commands.accounting(names=gone)), **rows}
                found = {name: rows.get(self._job_folder(name)) for name in names}
                return {name: row.job for name, row in found.items() if row}
            except Unanswered as error:
                if time.monotonic() > deadline:
                    raise Paused(
                        f"looking for this campaign's jobs: {error}",
                        "Start again when squeue answers; nothing was submitted meanwhile",
                    ) from None
                time.sleep(2)

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """End these runs' jobs. Where Slurm does not answer, their time limits end them."""
        self._waiting.drop(*(s.run for s in submissions))
        jobs = [s.job for s in submissions if s.job.isdigit()]
        if late := [s.job for s in submissions if not s.job.isdigit()]:
            with contextlib.suppress(Unanswered):
                rows = commands.by_folder(commands.queue())
                jobs += [row.job for n in late if (row := rows.get(self._job_folder(n)))]
        if jobs:
            scancel(jobs)

    def close(self) -> None:
        """Jobs go on: who starts the controller again finds them."""


def state_of(row: Row, last_words: str = "") -> JobState:
    """A job's row in the controller's terms; a permanent reason comes with its remedy."""
    phase = commands.phase(row.state)
    reason = row.reason if phase == "pending" else row.state
    cure = commands.remedy(row.reason) if phase == "pending" else None
    if cure:
        reason = f"{row.reason}: {cure}"
    elif phase == "ended" and row.reason not in ("None", "", row.state):
        reason = f"{row.state}, {row.reason}"
    return JobState(
        phase,
        f"{reason}: {last_words}" if last_words else reason,
        node=row.nodes or None,
        permanent=cure is not None,
        queue_s=row.queue_s,
        preempted=row.state == "PREEMPTED",
        cancelled=row.state == "CANCELLED",
        oom=row.state == "OUT_OF_MEMORY",
    )


def last_line(log: Path) -> str:
    """The last words in a log, Slurm's own (on why it ended the job) if any; empty without."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").split("\n")]
    except OSError:
        return ""
    slurms = [line for line in lines if re.match(r"slurmstepd\S* error: \*\*\* (STEP|JOB) ", line)]
    return next((line[-300:] for line in reversed(slurms or lines) if line), "")


def scancel(what: Sequence[str]) -> None:
    try:
        commands.ask(["scancel", *what])
    except AutoresearchError:
        return  # ended meanwhile, or no answer: the time limit ends what this could not


def _hand_over(executor: Any, command: str) -> Any:
    """submitit's own would run sbatch in our environment, where an outer job's SBATCH_* and SLURM_*
    win over the script's options, and with no limit on its time. Raises as `commands.sbatch`.
    """
    # The script says --export=ALL, of a clean environment: with NONE, NIL or a list of names Slurm
    # would add what a login shell exports, which takes seconds and may hold the user's keys.
    text = executor._make_submission_file_text(command, "")
    job = executor.job_class(folder=executor.folder, job_id=commands.sbatch(text), tasks=[0])
    job.paths.submission_file.write_text(text)
    return job
