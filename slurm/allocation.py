"""Runs as steps of a job that holds nodes for the night: queue wait is paid once, not per run."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from submitit.core import plugins

from jobs import payload
from jobs.errors import UserError
from jobs.model import Run, Submission
from jobs.settings import Executor as Settings
from jobs.submission import ANYWHERE, JobState, Place
from slurm import commands, script
from slurm.commands import Row, Unanswered
from slurm.executor import Sbatch, last_line, scancel, state_of
from slurm.step import AllocationExecutor, StepJob
from slurm.table import Entry, Table

ELSEWHERE_S = 300.0  # a run that is to avoid all nodes held waits so long for others
LAUNCHES = 5  # of one run's step; more than one only where srun could not start it
CLOSE_S = 10.0  # a controller that leaves its job waits so long for steps to begin
# In srun's words. After slurmctld was restarted, places stay taken for up to a minute.
NO_ROOM_YET = "Memory required|busy|contact slurm controller|confirm allocation|timed out"
NODE_LOST = "node not available|down, drained|Node .*(fail|down)"
# By somebody: of any other cause Slurm says DUE TO what.
STEP_CANCELLED = r"STEP \S+ ON \S+ CANCELLED AT \S+ \*\*\*"
STARTING_S = 90.0  # a step that neither srun nor Slurm nor a claim shows by then never began


@dataclass(frozen=True)
class Holder:
    """A job that holds nodes, as Slurm last showed it."""

    row: Row
    nodes: tuple[str, ...]
    seen: float  # monotonic time
    # It has lost a node. Slurm (22.05) then never gives back what steps had that ran at that time,
    # on the other nodes too: new steps would find no room there.
    shrunk: bool = False

    @property
    def running(self) -> bool:
        return self.row.state == "RUNNING"

    @property
    def left_s(self) -> float:
        """Seconds until its time limit. By Slurm's countdown: no two clocks are compared."""
        left = float("inf") if self.row.left_s is None else self.row.left_s
        return left - (time.monotonic() - self.seen)


def require_installed() -> None:
    """Raises UserError where submitit cannot find our plugin."""
    if AllocationExecutor.name() not in plugins.get_executors():
        raise UserError(
            "executor.kind: allocation needs this project installed, not only on the path"
            " (submitit finds it by entry points): pip install -e ."
        )


class AllocationRuns:
    """Executor `allocation`.

    A holder is asked for when the first run is wanted, and the next one ahead of its end. A run
    gets a (node, place) pair of its own, is started there if its whole limit still fits, and waits
    in a file otherwise. Holders end by themselves; see `script.holder_text`.
    """

    stale_s = script.STALE_S
    idle_s = script.IDLE_S
    heartbeat_s = script.HEARTBEAT_S
    elsewhere_s = ELSEWHERE_S

    def __init__(
        self,
        settings: Settings,
        campaign_dir: Path,
        work: Callable[[str], None] = payload.run,
    ) -> None:
        """`work` is called on the node with the run's folder; it must be importable there."""
        commands.require("srun", "executor.kind: allocation")
        require_installed()
        self._settings, self._campaign_dir, self._work = settings, campaign_dir, work
        self._folder = campaign_dir / "submitit"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._table = Table(self._folder / "allocation.json")
        self._name = script.holder_name(campaign_dir)
        self._sruns: dict[
            str, subprocess.Popen[bytes]
        ] = {}  # run id -> srun started by this process
        self._known: set[str] = set()  # runs that this controller has submitted or asked about
        self._holders: list[Holder] | None = None  # newest last; None: never asked
        self._names: dict[str, tuple[str, ...]] = {}  # node list -> nodes
        self._sizes: dict[str, int] = {}  # holder -> the most nodes that it was seen with
        self._submit = Sbatch()
        self._refused: dict[str, str] = {}  # run id -> why its branch's node cannot be held
        self._in_a_job = "SLURM_JOB_ID" in os.environ  # the controller itself
        self._closed = threading.Event()
        self._beat: threading.Thread | None = None

    # -- starting runs ----------------------------------------------------------------------------

    def submit(
        self,
        run: Run,
        name: str,
        run_dir: Path,
        limit_s: float,
        avoid: frozenset[str] = frozenset(),
        place: Place = ANYWHERE,
    ) -> Submission:
        """Start one run in a free place, or keep it for the next `survey` that finds one.

        Raises UserError: Slurm refused the holder for a setting, with its own words; or as
        `script.check_hold`.
        """
        avoided = tuple(sorted(avoid))
        entry = Entry(run.id, name, str(run_dir.absolute()), limit_s, avoided, dict(place))
        script.check_hold(self._settings, limit_s)
        self._table.put(entry)
        self._known.add(run.id)
        self._keep_beating()
        try:
            with contextlib.suppress(Unanswered):
                if self._holders is None:
                    self._look()
                self._start_waiting({run.id})
        except UserError:
            self._table.drop(run.id)
            raise
        return Submission(run.id, "allocation", name)

    def _start_waiting(self, runs: Iterable[str]) -> None:
        """Start those of `runs` that fit somewhere now; see to it that the others will.

        Raises UserError.
        """
        self._let_be_anywhere(runs, self.elsewhere_s)
        waiting = [e for e in self._table if e.run in runs and e.launched is None]
        for entry in waiting:
            if place := self._free_place(entry):
                self._launch(entry, *place)
        active = [e for e in self._table if e.run in runs and not e.finished]
        if not (lacking := self._lacking(active)):
            return
        avoid = set.intersection(*(set(entry.avoid) for entry in lacking))
        try:
            self._ask_for_holder(active, avoid)
        except UserError:
            if not avoid:
                raise
            # There are no other nodes: what is held will do, or else what can be held.
            if self._let_be_anywhere(runs, 0.0):
                self._start_waiting(runs)
            else:
                self._ask_for_holder(active)

    def _let_be_anywhere(self, runs: Iterable[str], after_s: float) -> bool:
        """Those that have waited so long for others than the nodes held. Whether there was one."""
        waiting = [e for e in self._table if e.run in runs and e.launched is None]
        bound = [e for e in waiting if not self._has_node(e) and time.time() - e.asked >= after_s]
        found = [free for e in bound if self._has_node(free := replace(e, avoid=()))]
        for free in found:
            self._table.put(free)
        return bool(found)

    def _free_place(self, entry: Entry) -> tuple[str, str, int] | None:
        """(holder, node, place) for a run: a pair that no other has, in the newest holder."""
        taken = {(e.holder, e.node, e.slot) for e in self._table if e.launched and not e.finished}
        for holder in reversed(self._holders or []):
            if not self._fits(holder, entry):
                continue
            for slot in range(script.per_node(self._settings)):
                for node in _usable(holder, entry):  # spread over the nodes first
                    if (holder.row.job, node, slot) not in taken:
                        return holder.row.job, node, slot
        return None

    def _fits(self, holder: Holder, entry: Entry, ahead_s: float = script.END_MARGIN_S) -> bool:
        """Whether the run could go through in this holder, were a place free for it."""
        usable = holder.running and not holder.shrunk and bool(_usable(holder, entry))
        return usable and holder.left_s >= entry.limit_s + ahead_s

    def _launch(self, entry: Entry, holder: str, node: str, slot: int) -> None:
        entry = self._table.put(
            replace(
                entry,
                holder=holder,
                node=node,
                slot=slot,
                launched=time.time(),
                launches=entry.launches + 1,
            )
        )
        folder = script.job_folder(self._campaign_dir, entry.name)
        folder.mkdir(parents=True, exist_ok=True)
        env = {**commands.environment(), "AUTORESEARCH_RUN_NAME": entry.name}
        executor = AllocationExecutor(folder)
        executor._throttling = 0.0  # submitit spares slurmctld 0.2 s; a step costs it little
        argv = script.step_argv(
            self._settings, entry.name, self._campaign_dir, entry.limit_s, holder, node, slot
        )
        # submitit reads '_' in an id as "member of a job array"
        executor.update_parameters(job_id=entry.name.replace("_", "-"), argv=argv, env=env)
        job = cast(StepJob, executor.submit(self._work, entry.run_dir))
        self._sruns[entry.run] = job.process

    # -- holders ----------------------------------------------------------------------------------

    def _look(self) -> list[Row]:
        """Ask Slurm for this user's jobs, and take note of the holders. Raises Unanswered."""
        rows = commands.queue()
        seen = time.monotonic()
        ours = sorted((r for r in rows if r.name == self._name), key=lambda row: int(row.job))
        alive = [r for r in ours if commands.phase(r.state) != "ended" and r.state != "COMPLETING"]
        self._holders = [self._holder(row, seen) for row in alive]
        return rows

    def _holder(self, row: Row, seen: float) -> Holder:
        nodes = self._nodes(row)
        most = self._sizes[row.job] = max(self._sizes.get(row.job, 0), len(nodes))
        return Holder(row, nodes, seen, shrunk=row.state == "RUNNING" and len(nodes) < most)

    def _nodes(self, row: Row) -> tuple[str, ...]:
        if row.state != "RUNNING":
            return ()
        if row.nodes not in self._names:
            self._names[row.nodes] = tuple(commands.hostnames(row.nodes))
        return self._names[row.nodes]

    def _lacking(self, active: Sequence[Entry]) -> list[Entry]:
        """Those for which no holder will last until the next could be had, and none is coming."""
        if self._holders is None:
            return []  # nothing is known: ask for nothing
        if any(not holder.running for holder in self._holders):
            return []
        ahead = min(900.0, self._settings.hold_hours * 900)  # at most a quarter of its time
        return [e for e in active if not self._has_node(e, ahead)]

    def _has_node(self, entry: Entry, ahead_s: float = script.END_MARGIN_S) -> bool:
        return any(self._fits(holder, entry, ahead_s) for holder in self._holders or [])

    def _ask_for_holder(self, active: Sequence[Entry], avoid: Iterable[str] = ()) -> None:
        limit = max(entry.limit_s for entry in active)
        nodes = {entry.place["node"] for entry in active if "node" in entry.place}
        shrunk = [len(holder.nodes) for holder in self._holders or [] if holder.shrunk]
        text = script.holder_text(
            self._settings,
            self._campaign_dir,
            limit,
            avoid,
            self.stale_s,
            self.idle_s,
            nodes,
            min([self._settings.nodes, *shrunk]),
        )
        if job := self._submit(functools.partial(commands.sbatch, text)):
            row = Row(job, "PENDING", name=self._name)
            self._holders = [*(self._holders or []), Holder(row, (), time.monotonic())]

    def _let_go(self, runs: Iterable[str], error: UserError) -> None:
        """Of runs whose branches' own nodes are why Slurm refused a holder; the others wait on.

        Raises `error` where no such node is.
        """
        named = [e for e in self._table if e.run in runs and not e.finished and "node" in e.place]
        held = {entry.place["node"] for entry in named if entry.launched}
        dropped = []
        for entry in named:
            nodes = held | {entry.place["node"]}
            if len(nodes) <= self._settings.nodes and commands.is_node(entry.place["node"]):
                held = nodes
            elif not entry.launched:
                dropped.append(entry.run)
        if not dropped:
            raise error
        self._refused |= dict.fromkeys(dropped, str(error))
        self._table.drop(*dropped)

    def _give_back_spares(self) -> None:
        """A holder has done its part once a newer one runs, or it has shrunk (the nodes that it
        still has are wanted by the next one), and its last step has ended."""
        running = [holder for holder in self._holders or [] if holder.running]
        used = {e.holder for e in self._table if e.launched and not e.finished}
        done = [holder for holder in running if holder.shrunk or holder is not running[-1]]
        if spare := [holder.row.job for holder in done if holder.row.job not in used]:
            scancel(spare)

    # -- what became of runs ----------------------------------------------------------------------

    def survey(self, submissions: Sequence[Submission]) -> Mapping[str, JobState] | None:
        """State by run id: one squeue, and one of steps where a run's srun is not our child.

        None: Slurm did not answer, which says nothing about any run. Raises UserError.
        """
        self._keep_beating()
        wanted = {s.run for s in submissions}
        try:
            jobs = commands.by_job(self._look())
            steps = commands.steps() if self._strangers() else {}
        except Unanswered:
            return None
        self._submit.outage = False
        self._forget(wanted, steps)
        self._detach()
        for entry in self._table:
            if entry.launched is not None:
                self._relaunch_unless_begun(entry, steps)
        try:
            self._start_waiting(wanted)
        except UserError as error:
            self._let_go(wanted, error)
        self._give_back_spares()
        return {s.run: self._state(s.run, jobs, steps) for s in submissions}

    def _forget(self, wanted: set[str], steps: Mapping[tuple[str, str], str]) -> None:
        """Runs that the controller has done with, once their steps are over.

        Not those that an earlier controller started and this one has yet to `find`.
        """
        over = [e for e in self._table if not self._lives(e, steps)]
        done = [e.run for e in over if e.run not in wanted and (e.finished or e.run in self._known)]
        self._table.drop(*done)
        for run in done:
            self._sruns.pop(run, None)
        self._known |= wanted

    def _strangers(self) -> list[Entry]:
        """Started runs that no living srun of ours speaks for: something was killed."""
        started = (e for e in self._table if e.launched and not e.finished)
        return [entry for entry in started if not self._attached(entry)]

    def _attached(self, entry: Entry) -> bool:
        srun = self._sruns.get(entry.run)
        return srun is not None and srun.poll() is None

    def _lives(self, entry: Entry, steps: Mapping[tuple[str, str], str]) -> bool:
        """Whether its srun or Slurm shows it. Of a node that died under its holder, Slurm (22.05)
        goes on to list the steps."""
        holders = [h for h in self._holders or [] if h.row.job == entry.holder]
        lost = any(h.running and entry.node not in h.nodes for h in holders)
        return not lost and (self._attached(entry) or _key(entry) in steps)

    def _begun(self, entry: Entry) -> bool:
        """Whether the step's task ever ran: then it is not for us to start it again."""
        return entry.claimed or self._step_log(entry).exists()

    def _step_log(self, entry: Entry) -> Path:
        return script.job_folder(self._campaign_dir, entry.name) / "step-0.log"

    def _srun_log(self, entry: Entry) -> Path:
        return self._step_log(entry).with_name("srun.log")

    def _detach(self) -> None:
        """Where the controller is a job: take the sruns away from steps that have begun.

        When that job is requeued or ends, Slurm sends SIGTERM to all of its processes, on which an
        srun ends its step. Killed first, and both of its processes at once, it leaves the step
        alone. Not done elsewhere: a step without srun takes 2.3 s longer to give up its GPU.
        """
        for entry in self._table if self._in_a_job else ():
            if self._attached(entry) and entry.claimed:
                with contextlib.suppress(ProcessLookupError):
                    for number in (signal.SIGSTOP, signal.SIGKILL):
                        os.killpg(self._sruns[entry.run].pid, number)

    def _relaunch_unless_begun(self, entry: Entry, steps: Mapping[tuple[str, str], str]) -> None:
        """Back to waiting for a run whose step never came to be: no room, an outage, a kill."""
        srun = self._sruns.get(entry.run)
        failed = srun is not None and (srun.poll() or 0) > 0
        young = time.time() - (entry.launched or 0) < STARTING_S
        if self._lives(entry, steps) or self._begun(entry):
            return
        if (failed or not young) and entry.launches < LAUNCHES:
            self._sruns.pop(entry.run, None)
            said = last_line(self._srun_log(entry))
            # Slurm knows before the controller does that a node of the allocation is lost.
            lost = (entry.node,) if re.search(NODE_LOST, said) and entry.node else ()
            launches = entry.launches - bool(re.search(NO_ROOM_YET, said))
            waiting = replace(entry, holder=None, node=None, slot=None, launched=None)
            self._table.put(replace(waiting, avoid=(*entry.avoid, *lost), launches=launches))

    def _state(
        self, run: str, jobs: Mapping[str, Row], steps: Mapping[tuple[str, str], str]
    ) -> JobState:
        entry = self._table.get(run)
        if entry is None and run in self._refused:
            return JobState("ended", self._refused[run])
        if entry is None:
            return JobState("absent", "no such step is known")
        if entry.launched is None:
            return self._why_waiting(entry)
        state = JobState("running", node=entry.node, queue_s=entry.launched - entry.asked)
        holder, begun = jobs.get(entry.holder or ""), self._begun(entry)
        if self._lives(entry, steps):
            return state if begun else replace(state, reason="starting")
        if not begun and time.time() - entry.launched < STARTING_S:
            return replace(state, reason="starting")
        if holder and holder.state == "RUNNING":
            ending = self._ending(entry)
            cancelled = bool(re.search(STEP_CANCELLED, ending))
            return replace(state, phase="ended", reason=f"its step {ending}", cancelled=cancelled)
        if holder and commands.phase(holder.state) == "running":  # why, is not known before it ends
            return replace(state, reason="its allocation is ending")
        became = f"{holder.state}, {holder.reason}" if holder else "unknown to Slurm"
        reason = f"its allocation, job {entry.holder}, is {became}"
        preempted = holder is not None and holder.state == "PREEMPTED"
        # By --no-kill only the loss of the last node ends it as NODE_FAIL.
        cancelled = not preempted and (holder is None or holder.state != "NODE_FAIL")
        ended = replace(state, phase="ended", reason=reason)
        return replace(ended, preempted=preempted, cancelled=cancelled)

    def _ending(self, entry: Entry) -> str:
        srun = self._sruns.get(entry.run)
        code = srun.poll() if srun else None
        said = last_line((self._step_log if self._begun(entry) else self._srun_log)(entry))
        ended = "ended" if code is None else f"ended with {code}"
        return f"{ended} ({said})" if said else ended

    def _why_waiting(self, entry: Entry) -> JobState:
        """Pending: in the words of the holder that it waits for."""
        holders = self._holders or []
        if pending := [holder.row for holder in holders if not holder.running]:
            row, why = pending[-1], state_of(replace(pending[-1], state="PENDING"))
            # One that runs may hold the very share that the next one waits for.
            permanent = why.permanent and not any(holder.running for holder in holders)
            reason = f"waits for its allocation, job {row.job}: {why.reason or 'submitted'}"
            return JobState("pending", reason, permanent=permanent)
        if self._submit.why:
            return JobState("pending", f"no allocation: {self._submit.why}")
        if not self._has_node(entry):
            why_not = "no allocation has time or nodes for it; the next is asked for"
            return JobState("pending", why_not)
        said = last_line(self._srun_log(entry))
        return JobState("pending", f"waits for a place{said and f' ({said})'}")

    # -- after a kill, and at the end -----------------------------------------------------------

    def find(self, names: Iterable[str]) -> Mapping[str, Submission]:
        """Runs in this executor's table, which is written before anything is started."""
        known = {entry.name for entry in self._table}
        return {n: Submission(payload.run_id(n), "allocation", n) for n in names if n in known}

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """End these runs. Where Slurm does not answer, their time limits end them."""
        entries = [e for s in submissions if (e := self._table.get(s.run))]
        steps: Mapping[tuple[str, str], str] = {}
        with contextlib.suppress(Unanswered):
            steps = commands.steps()
        if ids := [steps[_key(e)] for e in entries if _key(e) in steps]:
            scancel(ids)
        for entry in entries:
            if entry.launched is None:
                self._table.drop(entry.run)
            elif _key(entry) not in steps and self._attached(entry):
                self._sruns[entry.run].terminate()  # it still waits for its step

    def close(self) -> None:
        """Give the nodes back if nothing runs there; else for the next controller to find.

        Without one, the holder sees no heartbeat any more and ends after its last step.
        """
        self._closed.set()
        deadline = time.monotonic() + CLOSE_S
        while self._in_a_job and any(map(self._attached, self._table)):
            self._detach()
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if any(entry.launched and not entry.finished for entry in self._table):
            return
        with contextlib.suppress(Unanswered):
            self._look()
        if holders := [holder.row.job for holder in self._holders or []]:
            scancel(holders)

    # -- heartbeat --------------------------------------------------------------------------------

    def _keep_beating(self) -> None:
        if self._beat is None:
            self._beat = threading.Thread(target=self._beating, name="heartbeat", daemon=True)
            self._beat.start()

    def _beating(self) -> None:
        """A thread: nobody surveys while no run is out, and proposals take minutes."""
        path, draft = self._folder / "heartbeat", self._folder / "heartbeat.tmp"
        count = busy = time.time_ns()  # never a number that an earlier controller wrote
        while True:
            count += 1
            busy += any(not entry.finished for entry in self._table)
            with contextlib.suppress(OSError):  # a full disk is the controller's to report
                draft.write_text(f"{count} {busy}\n")
                draft.replace(path)
            if self._closed.wait(self.heartbeat_s):
                return


def _usable(holder: Holder, entry: Entry) -> list[str]:
    """The nodes that a run may be on: its branch's own, or all that it need not avoid."""
    own = entry.place.get("node")
    return [n for n in holder.nodes if (n == own if own else n not in entry.avoid)]


def _key(entry: Entry) -> tuple[str, str]:
    """What `commands.steps` knows a started run by: equal names may exist in another campaign."""
    return entry.holder or "", entry.name
