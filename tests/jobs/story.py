"""Campaigns told event by event, for tests of the history and of the rules."""

from __future__ import annotations

from typing import Any

from jobs import history, policy
from jobs.model import Budget, Decision, Experiment, Result, Run, Submission, to_json


class Story:
    """Appends events as a controller would, and folds each one. `events` is the ledger so far."""

    def __init__(self, *branches: str, fence: int = 1, **config: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.state = history.State()
        self.fence = fence
        self.put("campaign_started", campaign="tale", config=config)
        for branch in branches or ("main",):
            self.put("branch_added", branch=branch, settings={})

    def put(self, event_name: str, /, **payload: Any) -> None:
        n = self.state.events
        time = f"2025-01-01T{n // 3600 % 24:02d}:{n // 60 % 60:02d}:{n % 60:02d}.000Z"
        head = {"v": 1, "n": n, "fence": self.fence, "time": time, "mono": float(n)}
        event = {**head, "event": event_name, **payload}
        self.state = history.fold([event], self.state)
        self.events.append(event)

    def propose(self, branch: str = "main", base: str | None = None, **facts: Any) -> str:
        """A proposed experiment on the branch's head (or on the commit `base`): its id."""
        state, line = self.state, self.state.branch(branch)
        experiment = Experiment(
            id=state.next_id,
            branch=branch,
            commit=f"commit-of-{state.next_id}",
            base=base or line.head_commit or "start",
            parent=line.head,
            description=f"idea {state.next_id}",
            researcher="tale",
            program_sha256="0" * 64,
            **facts,
        )
        self.put("proposed", proposal=None, experiment=to_json(experiment))
        return experiment.id

    def intend(self, experiment: str, seed: int = 1, purpose: str = "screen") -> str:
        """The next attempt of a run, intended but not submitted: its id."""
        tries = [r.attempt for r in self.state.record(experiment).runs if r.seed == seed]
        run = Run(experiment, seed, max(tries, default=0) + 1, Budget("tokens", 1000), "cpu")
        self.put(
            "run_intended",
            run=to_json(run),
            executor="local",
            name=f"tale-{run.id}",
            folder=run.folder,
            purpose=purpose,
        )
        return run.id

    def submit(self, run: str, node: str | None = "n1") -> None:
        self.put("run_submitted", submission=to_json(Submission(run, "local", "1@2@3", node)))

    def end(self, run: str, metric: float | None = None, status: str = "", **facts: Any) -> None:
        status = status or ("crash" if metric is None else "ok")
        result = Result(run, status, "as told", metric=metric, **facts)
        self.put("run_ended", result=to_json(result))

    def run(
        self,
        experiment: str,
        metric: float | None = None,
        status: str = "",
        node: str | None = "n1",
        seed: int = 1,
        purpose: str = "screen",
        **facts: Any,
    ) -> str:
        """A whole run of an experiment: its id."""
        run = self.intend(experiment, seed, purpose)
        self.submit(run, node)
        self.end(run, metric, status, **facts)
        return run

    def dies(self, experiment: str, node: str | None, **facts: Any) -> Any:
        """A run killed by infrastructure, and what the rules make of it."""
        self.run(experiment, status="infrastructure", node=node, **facts)
        return policy.after(self.state, self.state.record(experiment), facts.get("seed", 1))

    def decide(self, experiment: str) -> Decision:
        decision = policy.decide(self.state, experiment)
        self.put("decided", decision=to_json(decision))
        return decision

    def experiment(
        self, metric: float | None = None, branch: str = "main", node: str = "n1", **facts: Any
    ) -> Decision:
        """Proposed, run and decided."""
        experiment = self.propose(branch, **facts)
        self.run(experiment, metric, node=node)
        return self.decide(experiment)
