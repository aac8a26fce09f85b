"""The campaign's state as a pure fold over the ledger's events.

A `State` never changes, so that another thread may keep one. Experiments are compact `Record`s in a
persistent vector (100,000 of them in about 100 MB); whole experiments, results and decisions are
read back from their ledger lines when somebody asks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jobs.errors import LedgerBroken
from jobs.model import Decision, Experiment, Result, Run, Submission, Usage, from_json

RECENT_RUNS = 20  # remembered per node: enough to judge it by, forgiving over a long campaign

Event = Mapping[str, Any]
# Where an event is: the byte offset of its ledger line, or the event itself if it has none.
Place = int | Event


class RunRecord(NamedTuple):
    """An ended run, as far as rules and tables need it."""

    seed: int
    attempt: int
    purpose: str  # "screen", "confirm"
    status: str
    metric: float | None
    node: str | None
    preempted: bool
    n: int  # count of its run_ended event: orders ends
    place: Place

    @property
    def ok(self) -> bool:
        return self.status == "ok" and self.metric is not None


class Record(NamedTuple):
    """An experiment, as far as rules and tables need it; `verdict` is None while undecided."""

    id: str
    branch: str
    commit: str
    base: str
    parent: str | None
    description: str
    tags: tuple[str, ...]
    lines_added: int
    lines_removed: int
    time: str  # UTC of its proposal
    proposed: Place
    runs: tuple[RunRecord, ...] = ()
    verdict: str | None = None
    status: str | None = None  # "ok", "crash", ...: what the decision took it for
    metric: float | None = None  # as weighed
    gain: float | None = None  # over the branch's best when it was weighed; positive is better
    reason: str | None = None
    decided: Place | None = None

    @property
    def net_lines(self) -> int:
        return self.lines_added - self.lines_removed


class NodeRun(NamedTuple):
    """One ended run on a node; preempted ones are left out."""

    experiment: str
    died: bool  # of infrastructure
    n: int  # count of the run_ended event


@dataclass(frozen=True)
class OpenRun:
    """A run that was intended and has not ended; without `submission` it may not have started."""

    run: Run
    branch: str
    purpose: str
    executor: str
    name: str
    folder: str
    time: str  # UTC of the intent
    submission: Submission | None = None


@dataclass(frozen=True)
class Request:
    """A proposal that was asked for and has not come; `reserve` is what it may cost at most."""

    proposal: str
    branch: str
    base: str | None
    slot: int
    time: str
    reserve: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class Branch:
    """One line of work."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None  # experiment id, once kept
    head: str | None = None  # experiment id of the latest keep
    head_commit: str | None = None
    best: str | None = None  # experiment id of the best metric among the kept
    best_metric: float | None = None
    baseline_metric: float | None = None
    kept_ids: tuple[str, ...] = ()  # from the baseline to the head
    experiments: int = 0
    kept: int = 0
    discarded: int = 0
    crashed: int = 0
    parked: int = 0
    since_keep: int = 0  # decisions since the latest keep
    paused: str | None = None  # the reason
    retired: str | None = None
    notes: tuple[str, ...] = ()  # what its researcher was told
    spent: Usage = field(default_factory=Usage)
    allocated_s: float = 0.0  # seconds that runs held their slot
    training_s: float = 0.0

    @property
    def active(self) -> bool:
        """Whether it wants proposals."""
        return self.paused is None and self.retired is None


class Chunk:
    """Some records, as values or as their JSON (from a snapshot), each made when first needed."""

    __slots__ = ("_items", "_text")

    def __init__(self, items: list[Record] | None = None, text: bytes | None = None) -> None:
        self._items, self._text = items, text

    @property
    def items(self) -> list[Record]:
        if self._items is None:
            self._items = [_record(item) for item in json.loads(self._text or b"[]")]
        return self._items

    @property
    def text(self) -> bytes:
        if self._text is None:
            self._text = json.dumps(self._items, separators=(",", ":")).encode()
        return self._text


class Vector:
    """A persistent list of records: a changed copy shares all chunks but those it changed."""

    CHUNK = 512

    def __init__(self, chunks: Iterable[Chunk] = (), size: int = 0) -> None:
        self.chunks, self._size = list(chunks), size
        self._own: dict[int, list[Record]] = {}  # chunks that no older vector shares

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < self._size:
            raise IndexError(i)
        return self.chunks[i // self.CHUNK].items[i % self.CHUNK]

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(self._size))

    def thaw(self) -> Vector:
        """A copy to write to, before anybody else sees it."""
        return Vector(self.chunks, self._size)

    def push(self, record: Record) -> None:
        """Appends; only to a thawed vector."""
        if self._size % self.CHUNK == 0:
            self.chunks.append(Chunk([]))
        self._writable(self._size // self.CHUNK).append(record)
        self._size += 1

    def set(self, i: int, record: Record) -> None:
        """Replaces; only in a thawed vector."""
        self._writable(i // self.CHUNK)[i % self.CHUNK] = record

    def _writable(self, k: int) -> list[Record]:
        if k not in self._own:
            self._own[k] = list(self.chunks[k].items)
            self.chunks[k] = Chunk(self._own[k])
        return self._own[k]


def _record(item: list[Any]) -> Record:
    """A record from its JSON."""
    record = Record(*item)
    runs = tuple(RunRecord(*run) for run in record.runs)
    return record._replace(tags=tuple(record.tags), runs=runs)


@dataclass(frozen=True)
class State:
    """Everything the ledger tells, as of its event `events - 1`."""

    campaign: str = ""
    start: Mapping[str, Any] = field(default_factory=dict)  # payload of campaign_started
    config: Mapping[str, Any] = field(default_factory=dict)  # the present configuration
    records: Vector = field(default_factory=Vector)
    branches: Mapping[str, Branch] = field(default_factory=dict)
    open_runs: Mapping[str, OpenRun] = field(default_factory=dict)  # by run id
    requests: Mapping[str, Request] = field(default_factory=dict)  # by proposal id
    in_flight: tuple[str, ...] = ()  # experiments without a final decision, oldest first
    nodes: Mapping[str, tuple[NodeRun, ...]] = field(default_factory=dict)  # the last runs on each
    orders: frozenset[str] = frozenset()  # names of the inbox files recorded lately
    spent: Usage = field(default_factory=Usage)  # settled; see `committed`
    allocated_s: float = 0.0
    training_s: float = 0.0
    parked_in_row: int = 0
    paused: Mapping[str, Any] | None = None  # {"reason", "remedy"} while the campaign is paused
    stopped: str | None = None  # the reason, after a clean stop
    fence: int = 0  # highest seen
    events: int = 0  # of the ledger, up to here
    time: str = ""  # UTC of the last event
    source: Callable[[int], Event] | None = field(default=None, compare=False, repr=False)

    # -- experiments ------------------------------------------------------------------------------

    @property
    def next_id(self) -> str:
        """What the next experiment is called."""
        return experiment_id(len(self.records))

    def record(self, experiment: str) -> Record:
        """The compact record. Raises KeyError for an id that is not in this campaign."""
        number = experiment[1:]
        i = int(number) - 1 if number.isdigit() else -1
        if not 0 <= i < len(self.records) or self.records[i].id != experiment:
            raise KeyError(experiment)
        return self.records[i]

    def experiments(self, branch: str | None = None) -> Iterator[Record]:
        """All records, of one branch if named, in the order of their proposals."""
        return (r for r in self.records if branch is None or r.branch == branch)

    def recent(self, count: int, branch: str | None = None) -> list[Record]:
        """The last `count` records, oldest first; touches no more than it must."""
        found: list[Record] = []
        for i in range(len(self.records) - 1, -1, -1):
            if len(found) == count:
                break
            if branch is None or self.records[i].branch == branch:
                found.append(self.records[i])
        return found[::-1]

    def experiment(self, experiment: str) -> Experiment:
        """The whole experiment, from its ledger line."""
        return from_json(Experiment, self._event(self.record(experiment).proposed)["experiment"])

    def results(self, experiment: str) -> list[Result]:
        """Results of its ended runs in the order they ended, from their ledger lines."""
        return [self.result(run) for run in self.record(experiment).runs]

    def result(self, run: RunRecord) -> Result:
        """The whole result of one ended run."""
        return from_json(Result, self._event(run.place)["result"])

    def decision(self, experiment: str) -> Decision | None:
        """Its latest decision, from its ledger line."""
        place = self.record(experiment).decided
        return None if place is None else from_json(Decision, self._event(place)["decision"])

    def _event(self, place: Place) -> Event:
        if not isinstance(place, int):
            return place
        if self.source is None:
            raise LookupError("this State was folded from a file; give fold its `source`")
        return self.source(place)

    # -- branches ---------------------------------------------------------------------------------

    def branch(self, name: str) -> Branch:
        """Raises KeyError for an unknown branch."""
        return self.branches[name]

    def chain(self, branch: str) -> list[Record]:
        """The kept experiments from the baseline to the head."""
        return [self.record(name) for name in self.branches[branch].kept_ids]

    def best(self, branch: str) -> Record | None:
        """The kept experiment with the best metric."""
        name = self.branches[branch].best
        return self.record(name) if name else None

    def running(self, branch: str | None = None) -> list[OpenRun]:
        """Runs intended and not ended, oldest first."""
        return [run for run in self.open_runs.values() if branch in (None, run.branch)]

    def committed(self, branch: str | None = None) -> Usage:
        """Money and tokens spent, with what proposals in flight may cost at most."""
        total = self.spent if branch is None else self.branches[branch].spent
        for request in self.requests.values():
            if branch in (None, request.branch):
                total = add_usage(total, request.reserve)
        return total

    @property
    def direction(self) -> str:
        """'minimise' or 'maximise'."""
        return direction_of(self.config)


def experiment_id(index: int) -> str:
    """'e0001' for 0: experiments are numbered from 1 in the order of their proposals."""
    return f"e{index + 1:04d}"


def direction_of(config: Mapping[str, Any]) -> str:
    """'minimise' (also where nothing is said) or 'maximise'."""
    return (config.get("task") or {}).get("direction") or "minimise"


def better(metric: float, than: float, direction: str) -> bool:
    """Whether `metric` is strictly better."""
    return metric > than if direction == "maximise" else metric < than


def add_usage(one: Usage, other: Usage) -> Usage:
    """The sum; estimated if a part is."""
    return Usage(
        one.input_tokens + other.input_tokens,
        one.output_tokens + other.output_tokens,
        one.cache_write_tokens + other.cache_write_tokens,
        one.cache_read_tokens + other.cache_read_tokens,
        one.dollars + other.dollars,
        one.estimated or other.estimated,
    )


def fold(
    events: Iterable[Event],
    state: State | None = None,
    source: Callable[[int], Event] | None = None,
) -> State:
    """The state after `events`, beginning from `state`, which stays as it is.

    Events of a fence lower than one seen before are ignored, and so are unknown names.

    Args:
        source: finds an event by its "at" (`ledger.Lines`); not needed for events without one.

    Raises:
        LedgerBroken: events that no controller can have written in this order.
    """
    builder = _Fold(state or State(), source)
    for event in events:
        builder.add(event)
    return builder.freeze()


class _Fold:
    """The mutable inside of `fold`."""

    def __init__(self, state: State, source: Callable[[int], Event] | None) -> None:
        self.before = state
        self.source = source or state.source
        self.campaign, self.start, self.config = state.campaign, state.start, state.config
        self.records = state.records.thaw()
        self.branches = dict(state.branches)
        self.open_runs = dict(state.open_runs)
        self.requests = dict(state.requests)
        self.in_flight = dict.fromkeys(state.in_flight)
        self.nodes = dict(state.nodes)
        self.orders = set(state.orders)
        self.spent = state.spent
        self.allocated_s, self.training_s = state.allocated_s, state.training_s
        self.parked_in_row = state.parked_in_row
        self.paused, self.stopped = state.paused, state.stopped
        self.fence, self.events, self.time = state.fence, state.events, state.time

    def add(self, event: Event) -> None:
        fence = event.get("fence", self.fence)
        if fence < self.fence:
            return
        n = event.get("n", self.events)
        if n != self.events and (fence == self.fence or n > self.events):
            raise LedgerBroken(
                f"The ledger has event {n} where event {self.events} was due "
                f"(byte {event.get('at')})",
                "Lines were lost or doubled: restore the file from a copy",
            )
        self.fence, self.events = fence, n + 1
        self.time = event.get("time", self.time)
        handler = _HANDLERS.get(event["event"])
        if handler is None:
            return
        try:
            handler(self, event)
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerBroken(
                f"Event {n} ({event['event']}, byte {event.get('at')}) does not fit what came "
                f"before it: {type(error).__name__} {error}",
                "The ledger was edited or written by another program: restore it from a copy",
            ) from error

    def freeze(self) -> State:
        return replace(
            self.before,
            campaign=self.campaign,
            start=self.start,
            config=self.config,
            records=self.records,
            branches=self.branches,
            open_runs=self.open_runs,
            requests=self.requests,
            in_flight=tuple(self.in_flight),
            nodes=self.nodes,
            orders=frozenset(self.orders),
            spent=self.spent,
            allocated_s=self.allocated_s,
            training_s=self.training_s,
            parked_in_row=self.parked_in_row,
            paused=self.paused,
            stopped=self.stopped,
            fence=self.fence,
            events=self.events,
            time=self.time,
            source=self.source,
        )

    # -- one handler per event name -----------------------------------------------------------

    def campaign_started(self, event: Event) -> None:
        self.campaign = event["campaign"]
        self.start = {k: v for k, v in event.items() if k not in ("config", "at")}
        self.config = event["config"]
        self.stopped = None

    def config_changed(self, event: Event) -> None:
        self.config = event["config"]

    def branch_added(self, event: Event) -> None:
        name = event["branch"]
        branch = self.branches.get(name) or Branch(name)
        self.branches[name] = replace(branch, settings=event.get("settings") or {})

    def branch_paused(self, event: Event) -> None:
        self._branch(event, paused=event.get("reason") or "paused")

    def branch_resumed(self, event: Event) -> None:
        self._branch(event, paused=None)

    def branch_retired(self, event: Event) -> None:
        self._branch(event, retired=event.get("reason") or "retired")

    def told(self, event: Event) -> None:
        notes = self.branches[event["branch"]].notes
        self._branch(event, notes=(*notes, event["text"]))

    def _branch(self, event: Event, **changes: Any) -> None:
        self.branches[event["branch"]] = replace(self.branches[event["branch"]], **changes)

    def proposal_requested(self, event: Event) -> None:
        reserve = from_json(Usage, event.get("reserve") or {})
        base, slot, time = event.get("base"), event.get("slot", 0), event.get("time", "")
        self.requests[event["proposal"]] = Request(
            event["proposal"], event["branch"], base, slot, time, reserve
        )

    def proposal_failed(self, event: Event) -> None:
        request = self.requests.pop(event["proposal"])
        self._spend(request.branch, (event.get("unavailable") or {}).get("usage"))

    def proposed(self, event: Event) -> None:
        given = event["experiment"]
        expected = experiment_id(len(self.records))
        if given["id"] != expected:
            raise ValueError(f"experiment {given['id']} where {expected} was due")
        self.requests.pop(event.get("proposal"), None)  # type: ignore[arg-type]
        branch = self.branches[given["branch"]]
        self.records.push(
            Record(
                expected,
                branch.name,
                given["commit"],
                # the same text many times over: 40 characters each, once is enough
                branch.head_commit if branch.head_commit == given["base"] else given["base"],
                given.get("parent"),
                given["description"],
                tuple(given.get("tags") or ()),
                given.get("lines_added", 0),
                given.get("lines_removed", 0),
                event.get("time", ""),
                event.get("at", event),
            )
        )
        self.branches[branch.name] = replace(branch, experiments=branch.experiments + 1)
        self.in_flight[expected] = None
        self._spend(branch.name, given.get("usage"))

    def _spend(self, branch: str, usage: Mapping[str, Any] | None) -> None:
        if not usage or not any(usage.values()):
            return
        cost = from_json(Usage, usage)
        self.spent = add_usage(self.spent, cost)
        before = self.branches[branch]
        self.branches[branch] = replace(before, spent=add_usage(before.spent, cost))

    def run_intended(self, event: Event) -> None:
        run = from_json(Run, event["run"])
        if run.id in self.open_runs:
            raise ValueError(f"run {run.id} was intended already")
        record = self._record(run.experiment)
        if any((r.seed, r.attempt) == (run.seed, run.attempt) for r in record.runs):
            raise ValueError(f"run {run.id} has ended already")
        self.open_runs[run.id] = OpenRun(
            run,
            record.branch,
            event.get("purpose", "screen"),
            event["executor"],
            event["name"],
            event["folder"],
            event.get("time", ""),
        )

    def run_submitted(self, event: Event) -> None:
        submission = from_json(Submission, event["submission"])
        opened = self.open_runs[submission.run]
        self.open_runs[submission.run] = replace(opened, submission=submission)

    def run_ended(self, event: Event) -> None:
        result = event["result"]
        opened = self.open_runs.pop(result["run"])
        node = result.get("node") or (opened.submission.node if opened.submission else None)
        details = result.get("details") or {}
        status = sys.intern(result["status"])
        node = sys.intern(node) if node else None
        preempted = bool(details.get("preempted"))
        n, run = self.events - 1, opened.run
        ended = RunRecord(
            run.seed,
            run.attempt,
            sys.intern(opened.purpose),
            status,
            result.get("metric"),
            node,
            preempted,
            n,
            event.get("at", event),
        )
        record = self._record(run.experiment)
        self._store(record._replace(runs=(*record.runs, ended)))
        if node and not preempted:
            seen = (*self.nodes.get(node, ()), NodeRun(record.id, status == "infrastructure", n))
            self.nodes[node] = seen[-RECENT_RUNS:]
        self._use(record.branch, result, details)

    def _use(self, name: str, result: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        allocated = details.get("allocated_s") or result.get("total_s") or 0.0
        training = result.get("training_s") or 0.0
        self.allocated_s += allocated
        self.training_s += training
        branch = self.branches[name]
        self.branches[name] = replace(
            branch,
            allocated_s=branch.allocated_s + allocated,
            training_s=branch.training_s + training,
        )

    def decided(self, event: Event) -> None:
        decision = event["decision"]
        record = self._record(decision["experiment"])
        if record.verdict not in (None, "measure"):
            # A later verdict (an audit's quarantine) is a newer release's event; numbers that the
            # branch rests on are never taken back silently.
            raise ValueError(f"experiment {record.id} was decided already")
        numbers, verdict = decision["numbers"], sys.intern(decision["verdict"])
        record = record._replace(
            verdict=verdict,
            status=sys.intern(numbers.get("status") or "ok"),
            metric=numbers.get("metric"),
            gain=numbers.get("gain"),
            reason=decision["reason"],
            decided=event.get("at", event),
        )
        self._store(record)
        if verdict == "measure":
            return
        self.in_flight.pop(record.id)
        self.parked_in_row = self.parked_in_row + 1 if verdict == "parked" else 0
        branch = self.branches[record.branch]
        self.branches[branch.name] = (
            _kept(branch, record, self.config) if verdict == "keep" else _dropped(branch, record)
        )

    def stop(self, event: Event) -> None:
        self.stopped = event.get("reason") or "stopped"

    def pause(self, event: Event) -> None:
        self.paused = {"reason": event["reason"], "remedy": event.get("remedy", "")}

    def resumed(self, event: Event) -> None:
        self.paused, self.stopped, self.parked_in_row = None, None, 0

    def lease_taken(self, event: Event) -> None:
        self.stopped = None

    def order(self, event: Event) -> None:
        self.orders.add(event["name"])

    def node_cleared(self, event: Event) -> None:
        self.nodes.pop(event["node"], None)

    def _record(self, experiment: str) -> Record:
        record = self.records[int(experiment[1:]) - 1]
        if record.id != experiment:
            raise KeyError(experiment)
        return record

    def _store(self, record: Record) -> None:
        self.records.set(int(record.id[1:]) - 1, record)


def _kept(branch: Branch, record: Record, config: Mapping[str, Any]) -> Branch:
    changes: dict[str, Any] = {}
    if branch.head is None:
        changes = {"baseline": record.id, "baseline_metric": record.metric}
    if branch.best_metric is None or (
        record.metric is not None
        and better(record.metric, branch.best_metric, direction_of(config))
    ):
        changes |= {"best": record.id, "best_metric": record.metric}
    return replace(
        branch,
        head=record.id,
        head_commit=record.commit,
        kept_ids=(*branch.kept_ids, record.id),
        kept=branch.kept + 1,
        since_keep=0,
        **changes,
    )


def _dropped(branch: Branch, record: Record) -> Branch:
    """`crashed` counts every discard that did not end with a score; `parked` those set aside."""
    changes = {"since_keep": branch.since_keep + 1}
    if record.verdict == "parked":
        changes["parked"] = branch.parked + 1
    elif record.status == "ok":
        changes["discarded"] = branch.discarded + 1
    else:
        changes["crashed"] = branch.crashed + 1
    return replace(branch, **changes)


_HANDLERS: Mapping[str, Callable[[_Fold, Event], None]] = {
    "campaign_started": _Fold.campaign_started,
    "config_changed": _Fold.config_changed,
    "branch_added": _Fold.branch_added,
    "branch_paused": _Fold.branch_paused,
    "branch_resumed": _Fold.branch_resumed,
    "branch_retired": _Fold.branch_retired,
    "told": _Fold.told,
    "proposal_requested": _Fold.proposal_requested,
    "proposal_failed": _Fold.proposal_failed,
    "proposed": _Fold.proposed,
    "run_intended": _Fold.run_intended,
    "run_submitted": _Fold.run_submitted,
    "run_ended": _Fold.run_ended,
    "decided": _Fold.decided,
    "stopped": _Fold.stop,
    "paused": _Fold.pause,
    "resumed": _Fold.resumed,
    "lease_taken": _Fold.lease_taken,
    "order": _Fold.order,
    "node_cleared": _Fold.node_cleared,
}
