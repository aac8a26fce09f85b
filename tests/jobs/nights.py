"""Campaigns for tests: the events that a controller would write, decided by the real rule."""

from __future__ import annotations

import random
from typing import Any

from jobs import history, policy
from jobs.model import Budget, Experiment, Result, Run, Submission, Usage, to_json


class Night:
    """Grows a campaign's events and state; experiments are numbered by the history."""

    def __init__(self, *branches: str, **config: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.state = history.State()
        self.put("campaign_started", campaign="night", config=config, evaluator_sha256="e" * 64)
        for name in branches or ("main",):
            self.put("branch_added", branch=name, settings={})

    def put(self, event: str, **payload: Any) -> None:
        n = len(self.events)
        time = f"2025-01-31T{n // 3600 % 24:02}:{n // 60 % 60:02}:{n % 60:02}.000Z"
        self.events.append({"v": 1, "n": n, "fence": 1, "time": time, "event": event, **payload})
        self.state = history.fold(self.events[-1:], self.state)

    def propose(self, description: str, branch: str = "main", **facts: Any) -> str:
        """An experiment's id; `facts` are fields of Experiment."""
        name, at = self.state.next_id, self.state.branch(branch)
        fields: dict[str, Any] = {
            "commit": f"{len(self.state.records) * 7919 + 1:040x}"[::-1],
            "base": at.head_commit or "f" * 40,
            "parent": at.head,
            "researcher": "sweep",
            "program_sha256": "a" * 64,
            "lines_added": 1,
            "lines_removed": 1,
            "usage": Usage(100, 10, 0, 0, 0.25),
        } | facts
        experiment = Experiment(id=name, branch=branch, description=description, **fields)
        self.put("proposed", proposal=None, experiment=to_json(experiment))
        return name

    def start(self, name: str, seed: int = 1) -> Run:
        """A run from its intent to its submission; seeds from 2 on are closing reruns."""
        run = Run(name, seed, 1, Budget("wall", 300), "h100")
        where = {"executor": "slurm", "name": f"night-{run.id}", "folder": run.folder}
        purpose = "screen" if seed == 1 else "confirm"
        self.put("run_intended", run=to_json(run), purpose=purpose, **where)
        self.put("run_submitted", submission=to_json(Submission(run.id, "slurm", "17", "n1")))
        return run

    def run(self, name: str, metric: float | None, seed: int = 1, **facts: Any) -> None:
        """A whole run; no metric is a crash unless `facts` (fields of Result) say otherwise."""
        run = self.start(name, seed)
        fields: dict[str, Any] = {
            "status": "ok" if metric is not None else "crash",
            "reason": "scored" if metric is not None else "RuntimeError: shapes",
            "node": "n1",
            "gpu": "H100",
            "gpu_memory_mb": 45060.2,
            "training_s": 300.0,
            "total_s": 340.0,
            "ended": "2025-01-31T12:00:00.000Z",
        } | facts
        self.put("run_ended", result=to_json(Result(run=run.id, metric=metric, **fields)))

    def decide(self, name: str) -> None:
        self.put("decided", decision=to_json(policy.decide(self.state, name)))

    def try_(
        self, description: str, metric: float | None, branch: str = "main", **facts: Any
    ) -> str:
        """Propose, run and decide."""
        name = self.propose(description, branch)
        self.run(name, metric, **facts)
        self.decide(name)
        return name


def long_night(count: int, *branches: str, seed: int = 0) -> Night:
    """A plausible campaign: a baseline, mostly losses, some crashes, a falling best."""
    dice = random.Random(seed)
    night = Night(*branches)
    best = {}
    for name in branches or ("main",):
        best[name] = 0.9979 + dice.gauss(0, 0.002)
        night.try_("baseline", best[name], name)
    what = (
        "raise matrix_lr to 0.05",
        "halve the batch",
        "drop the value embeddings",
        "RoPE base 50k",
    )
    for i in range(count):
        branch = dice.choice(list(best))
        fate = dice.random()
        metric = None if fate < 0.08 else best[branch] + dice.expovariate(1 / 0.006)
        if fate > 0.85:
            metric = best[branch] - dice.expovariate(1 / (0.004 / (1 + i / 40)))
        facts = {"status": "oom", "reason": "CUDA out of memory"} if fate < 0.03 else {}
        night.try_(f"{dice.choice(what)} ({i})", metric, branch, **facts)
        best[branch] = night.state.branch(branch).best_metric
    return night
