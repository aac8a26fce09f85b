"""What is to be done next, by the state alone: which runs to start, whom to ask, when to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime

from jobs import policy
from jobs.history import State, better
from jobs.model import Budget, Run
from jobs.records import Branch, Record
from jobs.settings import Config


@dataclass(frozen=True)
class Wanted:
    """A run that should be started as soon as a slot is free."""

    run: Run
    purpose: str  # "screen": it decides the experiment; "confirm": it only reports
    avoid: frozenset[str] = frozenset()  # nodes


def screening(state: State, budget: Budget, scale: str) -> Iterator[Wanted]:
    """The next run of each experiment in flight that has none, oldest experiment first."""
    busy = {run.run.experiment for run in state.open_runs.values()}
    for name in state.in_flight:
        if name not in busy:
            yield from _next_run(state, name, 1, "screen", budget, scale)


def confirming(state: State, budget: Budget, scale: str, seeds: int) -> Iterator[Wanted]:
    """The closing reruns: first and best of each branch on fresh seeds 2 .. seeds + 1."""
    for branch in state.branches.values():
        for name in dict.fromkeys(filter(None, (branch.baseline, branch.best))):
            for seed in range(2, seeds + 2):
                if not any((r.run.experiment, r.run.seed) == (name, seed) for r in state.running()):
                    yield from _next_run(state, name, seed, "confirm", budget, scale)


def _next_run(
    state: State, experiment: str, seed: int, purpose: str, budget: Budget, scale: str
) -> Iterator[Wanted]:
    """Its first attempt, or another one where infrastructure killed the last; else nothing."""
    record = state.record(experiment)
    tries = [r for r in record.runs if r.seed == seed]
    if not tries:
        run = Run(experiment, seed, 1, budget, scale)
        yield Wanted(run, purpose, policy.avoided_nodes(state, record, seed))
        return
    fate = policy.after(state, record, seed)
    if isinstance(fate, policy.Retry):
        yield Wanted(Run(experiment, seed, fate.attempt, budget, scale), purpose, fate.avoid)


def undecided(state: State) -> Iterator[str]:
    """Experiments whose runs have all ended, none of which is to be tried again."""
    busy = {run.run.experiment for run in state.open_runs.values()}
    for name in state.in_flight:
        record = state.record(name)
        if name in busy or not record.runs:
            continue
        last = max(record.runs, key=lambda r: r.n)
        if not isinstance(policy.after(state, record, last.seed), policy.Retry):
            yield name


def in_flight(state: State) -> Counter[str]:
    """Experiments without a decision and proposals without an answer, by branch."""
    found = Counter(state.record(name).branch for name in state.in_flight)
    found.update(request.branch for request in state.requests.values())
    return found


def openings(state: State, config: Config, mute: Collection[str] = frozenset()) -> Iterator[str]:
    """Names of branches, once for each proposal that should be asked for now.

    Args:
        mute: branches that nobody can propose for; their turn goes to the others.
    """
    busy = in_flight(state)
    room = config.executor.slots - busy.total()
    asked = len(state.records) + len(state.requests)
    if config.limits.experiments is not None:
        room = min(room, config.limits.experiments - asked)
    wanting = [
        b for b in state.branches.values() if b.active and b.head is not None and b.name not in mute
    ]
    # The one with the least under way is next: none takes every slot, also none that came late.
    while room > 0 and (free := [b for b in wanting if busy[b.name] < slots(b, config)]):
        branch = min(free, key=lambda b: (busy[b.name], b.experiments))
        busy[branch.name] += 1
        room -= 1
        yield branch.name


def stale_wins(state: State) -> Iterator[Record]:
    """What active branches should have proposed again on their heads, and have not yet."""
    for record in state.experiments():
        branch = state.branch(record.branch)
        if record.verdict != "discard" or record.metric is None or branch.best_metric is None:
            continue
        if not branch.active or not better(record.metric, branch.best_metric, state.direction):
            continue
        decision = state.decision(record.id)
        if decision and decision.numbers.get("rebase") and not _carried(state, record):
            yield record


def _carried(state: State, record: Record) -> bool:
    """Whether a win was proposed again on its branch (its description says so, and others may)."""
    again = (r for r in state.experiments(record.branch) if f" {record.id}: " in r.description)
    return any(state.experiment(r.id).rebased_from == record.id for r in again)


def lacking_baseline(state: State, config: Config) -> Iterator[str]:
    """Active branches without a head whose baseline is not on its way, within the limit."""
    on_its_way = {state.record(name).branch for name in state.in_flight}
    lacking = [
        branch.name
        for branch in state.branches.values()
        if branch.active and branch.head is None and branch.name not in on_its_way
    ]
    limit = config.limits.experiments
    yield from lacking if limit is None else lacking[: max(0, limit - len(state.records))]


def slots(branch: Branch, config: Config) -> int:
    """Experiments that a branch may have in flight."""
    return int(branch.settings.get("slots") or config.executor.slots)


def end_reason(
    state: State, config: Config, now: datetime, deadline: datetime | None
) -> str | None:
    """Why no more proposals are asked for; None: go on."""
    limits = config.limits
    if limits.experiments is not None and len(state.records) >= limits.experiments:
        return f"{len(state.records)} experiments done, as limits.experiments says"
    if deadline is not None and now >= deadline:
        return f"time is up ({deadline.astimezone().strftime('%H:%M')})"
    if limits.target is not None:
        for branch in state.branches.values():
            best = branch.best_metric
            if best is not None and not better(limits.target, best, state.direction):
                return f"{branch.name} reached {best:.6g}, the target is {limits.target:g}"
    if state.branches and all(b.retired is not None for b in state.branches.values()):
        return "every branch is retired"
    return None
