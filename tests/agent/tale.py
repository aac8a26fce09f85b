"""A campaign's history for tests of the researchers: real events, really folded."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from agent import edit
from agent.researcher import Context
from jobs.history import fold
from jobs.model import Decision, Experiment, Proposal, to_json

PATH = "trainer/train.py"
PROGRAM = '''\
"""A small program that stands in for train.py."""

import torch
from prepare import SCALE, SEED, Tokenizer, evaluate_bpb, log, make_dataloader

CONSTANTS = {
    "h100": dict(
        depth=8,
        matrix_rate=0.02,
    ),
    "cpu": dict(
        depth=2,
        matrix_rate=0.04,  # of the matrices
        beta=0.95,
        warmdown=0.5,
        batch=2**11,
    ),
}
c = CONSTANTS[SCALE]


def train(model, tokenizer):
    """Trains until the feed ends."""
    for inputs, targets, epoch in make_dataloader(tokenizer, 8, 256, "train"):
        loss = model(inputs, targets)
        log(loss=float(loss), epoch=epoch, rate=c["matrix_rate"])


def main():
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_directory()
    model = torch.nn.Linear(4, c["depth"])
    train(model, tokenizer)
    evaluate_bpb(model, tokenizer, 8)


main()
'''
PREPARE = (
    '"""The frozen half."""\n\n\ndef evaluate_bpb(model, tokenizer, batch_size):\n    return 1\n'
)


class Shelf:
    """Records in memory."""

    def __init__(self) -> None:
        self.programs: dict[str, dict[str, str]] = {}
        self.logs: dict[str, str] = {}
        self.diffs: dict[str, str] = {}

    def files(self, experiment: str) -> dict[str, str]:
        return self.programs.get(experiment, {})

    def diff(self, experiment: str) -> str:
        return self.diffs.get(experiment, "")

    def log(self, experiment: str, lines: int) -> str:
        return "\n".join(self.logs.get(experiment, "").split("\n")[-lines:])

    def telemetry(self, experiment: str, lines: int) -> str:
        return '{"loss": 2.5}'


@dataclass
class Tale:
    """A folded campaign. Every branch begins with a baseline of 1.6."""

    branches: tuple[str, ...] = ("main",)
    shelf: Shelf = field(default_factory=Shelf)
    known: dict[str, str] = field(default_factory=dict)
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    program: str = "# Goal\n\nLower val_bpb.\n"
    source: str = PROGRAM

    def __post_init__(self) -> None:
        self.state = fold([{"event": "campaign_started", "campaign": "tale", "config": {}}])
        for branch in self.branches:
            self.put("branch_added", branch=branch, settings={})
            self.add({PATH: self.source}, 1.6, "keep", branch=branch, description="baseline")

    def put(self, event: str, **payload: Any) -> None:
        self.state = fold([{"event": event, **payload}], self.state)

    def add(
        self,
        files: dict[str, str],
        metric: float | None,
        verdict: str | None,
        branch: str = "main",
        status: str = "ok",
        gain: float | None = None,
        reason: str = "as told",
        **facts: Any,
    ) -> str:
        """An experiment, decided unless `verdict` is None: its id."""
        state = self.state
        line, name = state.branch(branch), state.next_id
        facts.setdefault("description", f"idea {name}")
        made = Experiment(
            id=name,
            branch=branch,
            commit=f"commit-{name}",
            base=line.head_commit or "start",
            parent=line.head,
            researcher="tale",
            program_sha256="0" * 64,
            **facts,
        )
        self.put("proposed", experiment=to_json(made))
        self.shelf.programs[name] = {**self.heads.get(branch, {}), **files}
        self.known[edit.fingerprint(self.shelf.programs[name])] = name
        if verdict:
            numbers = {"status": status, "metric": metric, "gain": gain}
            decision = Decision(name, verdict, reason, "greedy", 1, {}, numbers)
            self.put("decided", decision=to_json(decision))
        if verdict == "keep":
            self.heads[branch] = self.shelf.programs[name]
        return name

    def accept(self, proposal: Proposal, metric: float | None, verdict: str | None) -> str:
        """What a controller does with a proposal."""
        return self.add(
            dict(proposal.files),
            metric,
            verdict,
            proposal.branch,
            status="ok" if metric is not None else "crash",
            description=proposal.description,
            tags=proposal.tags,
            usage=proposal.usage,
        )

    def context(self, branch: str = "main", **changes: Any) -> Context:
        facts: dict[str, Any] = {
            "base": self.state.branch(branch).head_commit,
            "files": self.heads[branch],
            "program": self.program,
            "scale": "cpu",
            "seed": 0,
            "number": self.state.branch(branch).experiments - 1,
            "readable": {"trainer/prepare.py": PREPARE},
            "known": dict(self.known),
            "records": self.shelf,
            "stop": self.stop,
            "say": self.said.append,
        }
        return Context(**{**facts, **changes})


def settings(**changes: Any) -> SimpleNamespace:
    """Agent settings as campaign.yaml's defaults give them."""
    from jobs.settings import Agent

    return SimpleNamespace(**{**vars(Agent()), **changes})
