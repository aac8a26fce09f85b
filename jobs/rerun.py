"""Runs of experiments that are decided already: the campaign's own runs, on a copy of its state.

Nothing of this enters the campaign's ledger: what comes of it is told, and lies in its folder.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs import disk, materialise
from jobs.history import State, fold
from jobs.journal import Journal
from jobs.model import Experiment, Result, Run, to_json
from jobs.plan import Wanted
from jobs.repository import Repository
from jobs.runs import Runs
from jobs.settings import Executor as Settings
from jobs.submission import PLACE, Executor

POLL_S = 0.1


class Memory(Journal):
    """A journal that is never written down."""

    def __init__(self, state: State) -> None:
        self.state = state

    def record_all(self, events: list[tuple[str, Mapping[str, Any]]]) -> None:
        self.state = fold([{"event": name, **payload} for name, payload in events], self.state)


def enough(settings: Settings, runs: int) -> Settings:
    """The settings with no more slots, and nodes held for them, than so many runs fill."""
    slots, per_node = min(settings.slots, runs), math.ceil(settings.slots / settings.nodes)
    return dataclasses.replace(settings, slots=slots, nodes=math.ceil(slots / per_node))


def afresh(state: State, experiments: Sequence[Experiment], timed: bool, kind: str) -> State:
    """The state as if these experiments (changed ones, perhaps) had just been proposed.

    Args:
        timed: whether the baselines' times still say how long a run may train.
        kind: of executor. Of a branch's place, GPU model and feature are part of what it measured,
            and only Slurm can be asked for them; its node is not.
    """
    dropped = ("node",) if kind == "slurm" else PLACE
    records = state.records.thaw()
    for one in experiments:
        old, told = state.record(one.id), {"experiment": to_json(one)}
        new = old._replace(commit=one.commit, proposed=told, runs=(), verdict=None, decided=None)
        records.replace(int(one.id[1:]) - 1, new)
    branches = {}
    for name, branch in state.branches.items():
        settings = {k: v for k, v in branch.settings.items() if k not in dropped}
        first = branch.baseline if timed else None
        # of any GPU model: it may be run again elsewhere
        branches[name] = dataclasses.replace(branch, settings=settings, baseline=first, gpu=None)
    return dataclasses.replace(state, records=records, open_runs={}, branches=branches)


def run_all(
    site: materialise.Site,
    repository: Repository,
    executor: Executor,
    state: State,
    wanted: Sequence[tuple[str, int]],
    show: Callable[[str], None],
) -> dict[str, list[Result]]:
    """Run experiments (id, seed) of a state that `afresh` made; their results by id.

    What infrastructure kills is tried again, elsewhere, as often as the settings allow. Raises
    KeyboardInterrupt: after SIGINT or SIGTERM, once the runs are ended.
    """
    settings, begun = site.config.executor, time.monotonic()
    journal = Memory(state)
    runs = Runs(site, journal, repository, executor, show)
    waiting = [(name, seed, frozenset[str]()) for name, seed in wanted]
    attempts: Counter[str] = Counter()
    deaths: Counter[tuple[str, int]] = Counter()
    found: dict[str, list[Result]] = {name: [] for name, _ in wanted}
    signals: list[int] = []  # obeyed between two steps: no run is started and not known
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in numbers}
    try:
        while waiting or journal.state.open_runs:
            if signals:
                raise KeyboardInterrupt("interrupted: its runs are ended")
            while waiting and len(journal.state.open_runs) < settings.slots:
                name, seed, avoid = waiting.pop(0)
                attempts[name] += 1
                length, scale = materialise.budget(site.config), site.config.data.scale
                runs.start(Wanted(Run(name, seed, attempts[name], length, scale), "screen", avoid))
            for run, result in runs.ended():
                journal.record("run_ended", result=to_json(result))
                disk.tidy(runs.folder(run), keep=None)
                name, seed = run.run.experiment, run.run.seed
                died = result.status == "infrastructure"
                # Preemption is nobody's fault, and does not count.
                deaths[name, seed] += died and not result.details.get("preempted")
                if died and deaths[name, seed] < settings.max_attempts:
                    waiting.append((name, seed, frozenset(filter(None, [result.node]))))
                else:
                    found[name].append(result)
            ended = sum(map(len, found.values()))
            show(f"{ended} of {len(wanted)} runs have ended, {time.monotonic() - begun:.0f} s")
            time.sleep(POLL_S)
    finally:
        executor.cancel([r.submission for r in journal.state.open_runs.values() if r.submission])
        executor.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return found
