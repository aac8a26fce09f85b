"""The campaign's state as a pure fold over the ledger's events.

A `State` never changes, so that another thread may keep one. Experiments are compact `Record`s in a
persistent vector (100,000 of them in about 100 MB); whole experiments, results and decisions are
read back from their ledger lines when somebody asks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from jobs.errors import LedgerBroken
from jobs.model import Decision, Experiment, Result, Usage, from_json
from jobs.records import (
    Branch,
    Event,
    NodeRun,
    OpenRun,
    Place,
    Record,
    Request,
    RunRecord,
    Vector,
)

RECENT_RUNS = 20  # remembered per node: enough to judge it by, forgiving over a long campaign


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
    refused: str | None = None  # what came of the last order, where it could not be obeyed
    parked_in_row: int = 0
    paused: Mapping[str, Any] | None = None  # {"reason", "remedy"} while the campaign is paused
    stopped: str | None = None  # the reason, after a clean stop
    night: tuple[str | None, str] = (None, "")  # the controller's Slurm job, and when it all began
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
    def spent(self) -> Usage:
        """Money and tokens, settled; see `committed`."""
        return functools.reduce(add_usage, (b.spent for b in self.branches.values()), Usage())

    @property
    def allocated_s(self) -> float:
        """Seconds that places were held for runs."""
        return sum(branch.allocated_s for branch in self.branches.values())

    @property
    def training_s(self) -> float:
        return sum(branch.training_s for branch in self.branches.values())

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
        one.thinking_tokens + other.thinking_tokens,
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
        self.source = source or state.source
        self.campaign, self.start, self.config = state.campaign, state.start, state.config
        self.records = state.records.thaw()
        self.branches = dict(state.branches)
        self.edited: dict[str, dict[str, Any]] = {}  # branches that changed, as their fields
        self.open_runs = dict(state.open_runs)
        self.requests = dict(state.requests)
        self.in_flight = dict.fromkeys(state.in_flight)
        self.nodes = dict(state.nodes)
        self.orders, self.refused = set(state.orders), state.refused
        self.parked_in_row = state.parked_in_row
        self.paused, self.stopped, self.night = state.paused, state.stopped, state.night
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
        except (LookupError, TypeError, ValueError) as error:
            raise LedgerBroken(
                f"Event {n} ({event['event']}, byte {event.get('at')}) does not fit what came "
                f"before it: {type(error).__name__} {error}",
                "The ledger was edited or written by another program: restore it from a copy",
            ) from error

    def freeze(self) -> State:
        for name, changed in self.edited.items():
            spent = changed["spent"]
            spent = Usage(**{**spent, "estimated": bool(spent["estimated"])})
            kept = tuple(changed["kept_ids"])
            self.branches[name] = Branch(**{**changed, "spent": spent, "kept_ids": kept})
        values = {f.name: getattr(self, f.name) for f in fields(State)}
        values["in_flight"], values["orders"] = tuple(self.in_flight), frozenset(self.orders)
        return State(**values)

    def branch(self, name: str) -> dict[str, Any]:
        """The fields of a branch, to be changed: a new Branch for each event would cost half of
        a replay's time."""
        if name not in self.edited:
            before = self.branches[name]
            values = {"spent": dict(vars(before.spent)), "kept_ids": list(before.kept_ids)}
            self.edited[name] = {**vars(before), **values}
        return self.edited[name]

    # -- on_NAME is called for each event of that name -----------------------------------------

    def on_campaign_started(self, event: Event) -> None:
        self.campaign = event["campaign"]
        self.start = {k: v for k, v in event.items() if k not in ("config", "at")}
        self.config = event["config"]
        self.stopped = None

    def on_config_changed(self, event: Event) -> None:
        self.config = event["config"]

    def on_branch_added(self, event: Event) -> None:
        name = event["branch"]
        self.branches.setdefault(name, Branch(name))
        self.branch(name).update(settings=event.get("settings") or {}, unfit=())

    def on_branch_paused(self, event: Event) -> None:
        self.branch(event["branch"])["paused"] = event.get("reason") or "paused"

    def on_branch_resumed(self, event: Event) -> None:
        self.branch(event["branch"]).update(paused=None, retired=None)

    def on_branch_retired(self, event: Event) -> None:
        self.branch(event["branch"])["retired"] = event.get("reason") or "retired"

    def on_told(self, event: Event) -> None:
        branch = self.branch(event["branch"])
        branch["notes"] = (*branch["notes"], event["text"])

    def on_proposal_requested(self, event: Event) -> None:
        reserve = event.get("reserve")
        self.requests[event["proposal"]] = Request(
            proposal=event["proposal"],
            branch=event["branch"],
            base=event.get("base"),
            slot=event.get("slot", 0),
            time=event.get("time", ""),
            reserve=from_json(Usage, reserve) if reserve else Usage(),
        )

    def on_proposal_failed(self, event: Event) -> None:
        request = self.requests.pop(event["proposal"])
        self._spend(request.branch, (event.get("unavailable") or {}).get("usage"))

    def on_proposed(self, event: Event) -> None:
        given = event["experiment"]
        expected = experiment_id(len(self.records))
        if given["id"] != expected:
            raise ValueError(f"experiment {given['id']} where {expected} was due")
        self.requests.pop(event.get("proposal"), None)  # type: ignore[arg-type]
        branch = self.branch(given["branch"])
        head, base = branch["head_commit"], given["base"]
        record = Record(
            id=expected,
            branch=branch["name"],
            commit=given["commit"],
            base=head if head == base else base,  # one text in memory, however often it is there
            parent=given.get("parent"),
            description=given["description"],
            tags=tuple(given.get("tags") or ()),
            lines_added=given.get("lines_added", 0),
            lines_removed=given.get("lines_removed", 0),
            time=event.get("time", ""),
            proposed=event.get("at", event),
            fingerprint=event.get("fingerprint", ""),
        )
        self.records.push(record)
        self.in_flight[expected] = None
        branch["experiments"] += 1
        branch["proposals"] += event.get("proposal") is not None
        self._spend(branch["name"], given.get("usage"))

    def _spend(self, branch: str, usage: Mapping[str, Any] | None) -> None:
        if not usage or not any(usage.values()):
            return
        total = self.branch(branch)["spent"]
        for name in total:
            total[name] += usage.get(name, 0)

    def on_run_intended(self, event: Event) -> None:
        run = event["run"]
        name = f"{run['experiment']}-s{run['seed']}-a{run['attempt']}"
        if name in self.open_runs:
            raise ValueError(f"run {name} was intended already")
        record = self._record(run["experiment"])
        if any((r.seed, r.attempt) == (run["seed"], run["attempt"]) for r in record.runs):
            raise ValueError(f"run {name} has ended already")
        self.open_runs[name] = OpenRun(record.branch, event)

    def on_run_submitted(self, event: Event) -> None:
        name = event["submission"]["run"]
        opened = self.open_runs[name]
        self.open_runs[name] = OpenRun(opened.branch, opened.intended, event["submission"])

    def on_run_ended(self, event: Event) -> None:
        result = event["result"]
        opened = self.open_runs.pop(result["run"])
        details = result.get("details") or {}
        run = opened.intended["run"]
        node = result.get("node") or (opened.submitted or {}).get("node")
        if details.get("cancelled"):
            node = None  # it had no part in that
        ended = RunRecord(
            seed=run["seed"],
            attempt=run["attempt"],
            purpose=sys.intern(opened.purpose),
            status=sys.intern(result["status"]),
            metric=result.get("metric"),
            node=sys.intern(node) if node else None,
            preempted=bool(details.get("preempted")),
            n=self.events - 1,
            place=event.get("at", event),
            misplaced=bool(details.get("misplaced")),
        )
        record = self._record(run["experiment"])
        self._store(record._replace(runs=(*record.runs, ended)))
        branch = self.branch(record.branch)
        if branch["head"] is None and ended.status != "infrastructure":
            branch["gpu"] = result.get("gpu")
        if ended.node and ended.misplaced:
            branch["unfit"] = tuple(dict.fromkeys((*branch["unfit"], ended.node)))
        elif ended.node and not ended.preempted:
            died = ended.status == "infrastructure"
            seen = (*self.nodes.get(ended.node, ()), NodeRun(record.id, died, ended.n))
            self.nodes[ended.node] = seen[-RECENT_RUNS:]
        branch["allocated_s"] += details.get("allocated_s") or result.get("total_s") or 0.0
        branch["training_s"] += result.get("training_s") or 0.0

    def on_decided(self, event: Event) -> None:
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
        if verdict != "parked":
            self.parked_in_row = 0
        elif record.parent is not None:  # a baseline's pauses its branch, the others go on
            self.parked_in_row += 1
        branch = self.branch(record.branch)
        if verdict == "keep":
            _keep(branch, record, direction_of(self.config))
        else:
            _drop(branch, record)

    def on_stopped(self, event: Event) -> None:
        self.stopped = event.get("reason") or "stopped"

    def on_paused(self, event: Event) -> None:
        self.paused = {"reason": event["reason"], "remedy": event.get("remedy", "")}

    def on_resumed(self, event: Event) -> None:
        self.paused, self.stopped, self.parked_in_row = None, None, 0

    def on_lease_taken(self, event: Event) -> None:
        """A night goes on through kills, and through requeues of the job that is its controller."""
        job, (known, began) = event.get("job"), self.night
        killed = self.stopped is None and self.paused is None
        if not began or not (killed or (job and job == known)):
            began = event["time"]
        self.night, self.stopped = (job, began), None

    def on_order(self, event: Event) -> None:
        self.orders.add(event["name"])
        why = event.get("refused")
        self.refused = f"{event.get('order') or event['name']}: {why}" if why else None

    def _record(self, experiment: str) -> Record:
        record = self.records[int(experiment[1:]) - 1]
        if record.id != experiment:
            raise KeyError(experiment)
        return record

    def _store(self, record: Record) -> None:
        self.records.replace(int(record.id[1:]) - 1, record)


def _keep(branch: dict[str, Any], record: Record, direction: str) -> None:
    """Puts a kept experiment at the head of the branch's fields."""
    best, metric = branch["best_metric"], record.metric
    if branch["head"] is None:
        branch |= {"baseline": record.id, "baseline_metric": metric}
    if best is None or (metric is not None and better(metric, best, direction)):
        branch |= {"best": record.id, "best_metric": metric}
    branch |= {"head": record.id, "head_commit": record.commit, "since_keep": 0}
    branch["kept_ids"].append(record.id)
    branch["kept"] += 1


def _drop(branch: dict[str, Any], record: Record) -> None:
    """Counts it: `parked` was set aside, `crashed` had no score, the others are `discarded`."""
    branch["since_keep"] += 1
    scored = "discarded" if record.status == "ok" else "crashed"
    branch["parked" if record.verdict == "parked" else scored] += 1


_HANDLERS: Mapping[str, Callable[[_Fold, Event], None]] = {
    name.removeprefix("on_"): method
    for name, method in vars(_Fold).items()
    if name.startswith("on_")
}
