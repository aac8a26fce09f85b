"""The one writer: asks researchers, commits, runs, decides, remembers, until told to stop.

Every step is a fold of the ledger away from the next: what must be done is read off the state
(jobs/plan.py), the intent is recorded, the act follows. So starting is resuming, and a controller
that was killed at any point is continued by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from agent import program
from agent.researcher import Researcher
from jobs import campaign, disk, inbox, materialise, mirror, names, plan, policy, report
from jobs.campaign import Open
from jobs.effects import effect
from jobs.errors import AutoresearchError, Displaced, Paused, UserError, refusals_told
from jobs.journal import Journal
from jobs.model import Result, to_json
from jobs.plan import Wanted
from jobs.proposals import Proposals
from jobs.records import Branch, OpenRun
from jobs.repository import BranchInUse, RefMoved
from jobs.runs import Runs
from jobs.settings import Config
from jobs.submission import Executor
from jobs.tables import Tables
from jobs.until import deadline

SHOW_S = 1.0  # between two looks around while nothing moves
TICK_S = 0.02  # between two looks at the world
CLUSTER_TICK_S = 0.25  # where every look is a request to a file server that others share
MIRROR_EVERY = 50  # decisions between two copies of the records into git,
MIRROR_S = 600.0  # or seconds, where decisions are that rare

Events = list[tuple[str, Mapping[str, Any]]]


class Controller:
    """Runs one campaign. What it knows is in the journal; the rest can be lost at any moment.

    Args:
        opened: the campaign, held for writing.
        researchers, understudy: as Proposals takes them.
        say: takes a line for people; `show`: progress, which the next line replaces.
    """

    def __init__(
        self,
        opened: Open,
        executor: Executor,
        researchers: Callable[[Branch], Researcher],
        understudy: Callable[[Branch], Researcher | None],
        say: Callable[[str], None],
        show: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.config, self.folder = opened.site.config, opened.site.campaign_dir
        self.opened, self.repository, self.say = opened, opened.repository, say
        self.journal = Journal(self.folder, opened.ledger, opened.state)
        self.stop = threading.Event()
        shared = (opened.site, self.journal, self.repository)
        self.runs = Runs(*shared, executor, say)
        self.proposals = Proposals(*shared, researchers, understudy, say, self.stop)
        self.executor, self.show, self._shown = executor, show, 0.0
        self._ending: str | None = None  # why no more proposals are asked for
        self._confirming = False
        self._interrupts = 0
        self._tick_s = TICK_S if self.config.executor.kind == "local" else CLUSTER_TICK_S
        self._tables = Tables(self.folder)
        # Decisions since the records were last copied into git, at that monotonic time; what a
        # start finds is due at once: its campaign may be pushed or bundled before a decision.
        self._unmirrored, self._mirrored = 1, -math.inf
        self._deadline = _deadline(self.config, opened.state.night[1])

    # -- the loop ---------------------------------------------------------------------------------

    def run(self) -> str:
        """Go on until a limit, an order or a signal. Returns why it ended.

        Raises:
            Paused: infrastructure needs a person; everything recorded is intact.
            Displaced: another controller took over.
        """
        before = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with refusals_told():
                return self._loop()
        except Paused as error:
            self.stop.set()
            with contextlib.suppress(AutoresearchError):  # the trouble may be the disk
                self.proposals.wind_up()
            self.journal.record_pause(error)
            raise
        finally:
            self.stop.set()
            self.proposals.close()
            self.executor.close()
            if self._interrupts < 2:  # twice means now: the next start does it
                self._close_books()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _loop(self) -> str:
        self._recover()
        if self._deadline is not None and datetime.now(UTC) >= self._deadline:
            self.say(
                "the night that was cut off is over: this start closes it, the next is a new one"
            )
        while (reason := self._finished()) is None:
            events = self.journal.state.events
            self._tick()
            if self.journal.state.events == events:
                self._look_around()
                time.sleep(self._tick_s)
        self.stop.set()
        self.proposals.wind_up()
        self.journal.record("stopped", reason=reason)
        return reason

    def _tick(self) -> None:
        """One round over everything that may have moved."""
        self._take_orders()
        for run, result in self.runs.ended():
            self._end_run(run, result)
        self._decide()
        self.proposals.take()
        self._launch()
        if self._ending is None and not self._interrupts:
            self.proposals.ask()
            self._require_a_branch()
            self._launch()
        self._mirror_if_due()
        self.journal.snapshot()

    def _look_around(self) -> None:
        """While nothing moves: how far the runs are, and whether there still is a campaign."""
        if time.monotonic() - self._shown < SHOW_S:
            return
        self._shown = time.monotonic()
        self.show(self.runs.progress())
        if not self.opened.ledger.path.exists():
            raise Paused(f"{self.opened.ledger.path} is gone", "Bring the campaign's folder back")

    def _finished(self) -> str | None:
        """Why the campaign is over, once nothing is left to do for it."""
        state = self.journal.state
        if self._interrupts:
            return "interrupted"
        if self._ending is None:
            self._ending = self._reason_to_end()
            if self._ending is None:
                return None
            self.say(f"ending: {self._ending}")
        if self.proposals.pending or state.open_runs or state.in_flight:
            return None
        if not self._confirming and not self.stop.is_set():
            self._confirming = True
            if self._wanted():
                self.say(f"rerunning first and best on {self.config.confirm.runs} fresh seeds each")
        return None if self._wanted() else self._ending

    def _reason_to_end(self) -> str | None:
        state = self.journal.state
        reason = plan.end_reason(state, self.config, datetime.now(UTC), self._deadline)
        if reason is None and self.proposals.silent and not plan.in_flight(state):
            return "no researcher has anything more to propose"
        return reason

    def _interrupt(self, number: int, frame: Any) -> None:
        """Ctrl-C once: hand over. Twice: leave at once (the ledger is whole at every moment)."""
        self._interrupts += 1
        self.stop.set()
        if self._interrupts > 1:
            raise KeyboardInterrupt

    # -- recovery ---------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Make the world agree with the ledger: refs, proposals that died, runs intended."""
        if self.journal.state.paused or self.journal.state.stopped:
            self.journal.record("resumed")
        self._restore_refs()
        self._resume_branches()
        self.proposals.recover()
        state = self.journal.state
        rerun = {name for b in state.branches.values() for name in (b.baseline, b.best) if name}
        for name in sorted(rerun | {record.id for record in state.recent(MIRROR_EVERY)}):
            if state.record(name).verdict not in (None, "measure"):
                self._tidy(name)
        self._carry_over_stale()
        self.runs.adopt()
        self._forget_stops()
        self._take_orders()  # also those that a campaign at its end would not come to

    def _restore_refs(self) -> None:
        campaign, state = self.config.campaign, self.journal.state
        wanted = {names.attempt_ref(campaign, r.id): r.commit for r in state.experiments()}
        for branch in state.branches.values():
            if branch.head_commit:
                wanted[names.branch_ref(campaign, branch.name)] = branch.head_commit
        for trouble in self.repository.restore(wanted):
            self.say(trouble)

    def _resume_branches(self) -> None:
        """A branch that its own trouble paused is tried again at every start."""
        for branch in self.journal.state.branches.values():
            if branch.paused and branch.paused != BY_ORDER:
                self.journal.record("branch_resumed", branch=branch.name, reason="started again")

    # -- orders -----------------------------------------------------------------------------------

    def _forget_stops(self) -> None:
        """A stop that came when nobody ran, or too late, was not meant for this start."""
        began = datetime.fromisoformat(self.opened.lease.started).timestamp()
        for path, content in inbox.waiting(self.folder):
            if content["order"] == "stop" and inbox.given(path) < began:
                self.say("an order to stop from before this start is dropped")
                with effect("inbox.take"):
                    path.unlink(missing_ok=True)

    def _take_orders(self) -> None:
        for path, content in inbox.waiting(self.folder):
            if path.stem not in self.journal.state.orders:
                self._obey({**content, "name": path.stem})
            with effect("inbox.take"):
                path.unlink(missing_ok=True)

    def _obey(self, order: dict[str, Any]) -> None:
        """Record an order together with what comes of it, so that no kill can part the two."""
        recorded: Events = [("order", order)]
        try:
            if order["order"] == "adopt":
                refused = self._adopt(order, recorded)
                if refused is None:
                    return
            else:
                recorded += self._obeyed(order)
                refused = None
        except UserError as error:
            refused = str(error)
            self.say(f"order {order['order'] or order['name']} refused: {refused}")
        self.journal.record_all([("order", order | {"refused": refused})] if refused else recorded)
        if order["order"] == "stop":
            self._ending = "stopped by order"
            self.stop.set()
        if order["order"] == "resume":
            self._carry_over_stale()

    def _adopt(self, order: dict[str, Any], recorded: Events) -> str | None:
        """Why there is no experiment of it; None: there is, and `recorded` in the ledger."""
        name, into = str(order.get("experiment")), str(order.get("into"))
        branch = self.journal.state.branches.get(into)
        if branch is not None and branch.retired:
            raise UserError(f"branch {into} is retired")
        return self.proposals.carry_over(name, into, "adopted", recorded)

    def _obeyed(self, content: dict[str, Any]) -> Events:
        """The events that an order amounts to. Raises UserError where it cannot be obeyed."""
        order, name = content["order"], str(content.get("branch", ""))
        if order in ("stop", "adopt"):
            return []
        if order == "add":
            shared = (self.journal.state, self.config, self.repository)
            settings = campaign.new_branch(name, content.get("settings") or {}, *shared)
            return [("branch_added", {"branch": name, "settings": settings})]
        if order == "":
            raise UserError(content["why"])
        branch = self.journal.state.branches.get(name)
        if branch is None:
            raise UserError(f"there is no branch {name!r}")
        if branch.retired and order != "resume":
            raise UserError(f"branch {name} is retired")
        self.say(f"order: {order} {name}")
        if order == "tell":
            return [("told", {"branch": name, "text": inbox.note(str(content.get("text", "")))})]
        event = {"pause": "branch_paused", "resume": "branch_resumed", "retire": "branch_retired"}
        return [(event[order], {"branch": name, "reason": BY_ORDER})]

    # -- runs -------------------------------------------------------------------------------------

    def _wanted(self) -> list[Wanted]:
        length, scale = materialise.budget(self.config), self.config.data.scale
        wanted = list(plan.screening(self.journal.state, length, scale))
        if self._confirming:
            seeds = self.config.confirm.runs
            wanted += plan.confirming(self.journal.state, length, scale, seeds)
        return wanted

    def _launch(self) -> None:
        free = self.config.executor.slots - len(self.journal.state.open_runs)
        if free > 0 and not self._interrupts and (wanted := self._wanted()):
            disk.require_free(self.folder, self.config.disk.keep_free_mb)
            for one in wanted[:free]:
                self.runs.start(one)

    def _end_run(self, run: OpenRun, result: Result) -> None:
        result = self._against_program(run, result)
        self.journal.record("run_ended", result=to_json(result))
        if run.purpose == "confirm":
            score = "no score" if result.metric is None else f"{result.metric:.6f}"
            self.say(f"{run.run.experiment}  seed {run.run.seed}: {score} ({result.status})")
            with effect("run.tidy"):
                disk.tidy(self.runs.folder(run), keep=None)
            self._keep_books()

    def _against_program(self, run: OpenRun, result: Result) -> Result:
        """What program.md's front matter demands of a result (parameters, memory) is enforced."""
        if not result.ok:
            return result
        result = dataclasses.replace(result, params=disk.parameters(self.runs.folder(run)))
        try:
            demands = program.limits(self.proposals.program(run.branch))
        except (program.ProgramError, UserError):
            return result  # it was broken since: told when its researcher is next asked
        reason = program.check_result(demands, result)
        return dataclasses.replace(result, status="invalid", reason=reason) if reason else result

    # -- decisions --------------------------------------------------------------------------------

    def _decide(self) -> None:
        for name in list(plan.undecided(self.journal.state)):
            decision = policy.decide(self.journal.state, name)
            if decision.verdict == "measure":
                continue  # a run of it is missing still
            branch = self.journal.state.branch(self.journal.state.record(name).branch)
            self.journal.record("decided", decision=to_json(decision))
            self.say(report.line(self.journal.state, name))
            if decision.verdict == "keep":
                self._advance(branch.name, branch.head_commit)
            self._tidy(name)
            self._keep_books()
            self._after(name, bool(decision.numbers.get("rebase")))
        if reason := policy.pause_reason(self.journal.state):
            raise Paused(reason, "See the last results (autoresearch log), mend it, start again")

    def _advance(self, name: str, previous: str | None) -> None:
        """Move the branch to its new head, unless somebody else has a hand on it."""
        head = self.journal.state.branch(name).head_commit
        assert head is not None  # a keep has just set it
        try:
            self.repository.point(names.branch_ref(self.config.campaign, name), head, previous)
        except (BranchInUse, RefMoved) as error:
            self.say(str(error))

    def _tidy(self, name: str) -> None:
        """Keep or drop what an experiment's runs left on disk."""
        record = self.journal.state.record(name)
        branch, folder = self.journal.state.branch(record.branch), self.folder / "heads"
        kept = (branch.head, branch.best)  # equal with fewer lines, a head need not be the best
        keep = folder / branch.name / name if name in kept else None
        with effect("run.tidy"):
            for run in record.runs:
                # What a closing rerun left is dropped: the weights kept are the deciding run's.
                place = self.folder / "runs" / name / run.folder
                disk.tidy(place, None if run.purpose == "confirm" else keep)
            disk.keep_only(folder / branch.name, kept)

    def _after(self, name: str, rebase: bool) -> None:
        """A baseline that failed pauses its branch; a gain on an older base is tried on the new."""
        record = self.journal.state.record(name)
        if rebase and self.journal.state.branch(record.branch).active:
            self.proposals.carry_over(name, record.branch, "rebased")
        if record.parent is not None or record.verdict == "keep":
            return
        why = f"{record.reason} ({self.journal.state.results(name)[-1].reason})"
        reason = f"its baseline {name} has no score: {why}"
        self.say(f"{record.branch} is paused: {reason}")
        if self.journal.state.branch(record.branch).paused != BY_ORDER:  # that outlasts a start
            self.journal.record("branch_paused", branch=record.branch, reason=reason)

    def _require_a_branch(self) -> None:
        """Raises Paused where every branch came to grief and nothing is under way."""
        state = self.journal.state
        left = [b for b in state.branches.values() if b.retired is None]
        grieved = [b for b in left if b.paused not in (None, BY_ORDER)]
        if grieved and grieved == left and not plan.in_flight(state):
            raise Paused(
                f"branch {grieved[0].name} cannot go on: {grieved[0].paused}",
                "See `autoresearch log` and `autoresearch show`, mend that, start again",
            )

    def _carry_over_stale(self) -> None:
        """Rebases decided and not proposed: the controller was killed, or the branch rested."""
        for record in list(plan.stale_wins(self.journal.state)):
            self.proposals.carry_over(record.id, record.branch, "rebased")

    # -- books ------------------------------------------------------------------------------------

    def _keep_books(self) -> None:
        self._write_tables()
        self._unmirrored += 1

    def _mirror_if_due(self) -> None:
        """In batches, since each costs as much as a hundred; yet none waits for long."""
        late = self._unmirrored and time.monotonic() - self._mirrored >= MIRROR_S
        if late or self._unmirrored >= MIRROR_EVERY:
            self._mirror()

    def _write_tables(self) -> None:
        with effect("report.write"):
            self._tables.update(self.journal.state)

    def _mirror(self) -> None:
        """Notes and records into git, from where the campaign can be rebuilt; a sweep first."""
        self._unmirrored, self._mirrored = 0, time.monotonic()
        with effect("run.tidy"):
            disk.sweep_jobs(self.folder, {run.folder for run in self.journal.state.running()})
        report.mirror_notes(self.repository, self.journal.state)
        others = campaign.records(self.opened.site)
        mirror.save_ledger(self.repository, self.config.campaign, self.opened.ledger.path, others)
        self.repository.pack()

    def _close_books(self) -> None:
        try:
            self.opened.lease.check()  # a displaced controller knows less than the other one
            self._write_tables()
            self._mirror()
            self.journal.snapshot(force=True)
        except Displaced:
            return
        except (OSError, AutoresearchError) as error:
            self.say(f"the closing tables are incomplete, the ledger is not: {error}")


BY_ORDER = "by order"


def _deadline(config: Config, night: str) -> datetime | None:
    """The earlier of limits.hours and limits.until, counted from when the night began."""
    now = datetime.fromisoformat(night)
    ends = []
    if config.limits.hours is not None:
        ends.append(now + timedelta(hours=config.limits.hours))
    if config.limits.until is not None:
        ends.append(deadline(now, config.limits.until))
    return min(ends, default=None)
