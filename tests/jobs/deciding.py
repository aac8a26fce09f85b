"""Deciding again at every decision of a ledger: the rules are pure, so nothing may differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs import policy
from jobs.history import State, fold
from jobs.model import to_json
from jobs.records import Event


@dataclass(frozen=True)
class Difference:
    """A recorded decision that its own prefix of the ledger does not give."""

    experiment: str
    n: int  # of the decided event
    recorded: Mapping[str, Any]
    again: Mapping[str, Any]

    def __str__(self) -> str:
        keys = [k for k in self.recorded if self.recorded[k] != self.again.get(k)]
        return f"{self.experiment} (event {self.n}): " + "; ".join(
            f"{key} was {self.recorded[key]!r}, again {self.again.get(key)!r}" for key in keys
        )


def verify(events: Iterable[Event], state: State | None = None) -> list[Difference]:
    """Decides again at every decision of a ledger, from what came before it alone."""
    state, found = state or State(), []
    between: list[Event] = []
    for event in events:
        if event["event"] == "decided":
            state = fold(between, state)
            between.clear()
            found += _again(event, state)
        between.append(event)
    return found


def _again(event: Event, state: State) -> list[Difference]:
    """What differs between a recorded decision and the same one now, on `state`."""
    if event.get("fence", state.fence) < state.fence:
        return []  # a displaced writer's
    recorded = event["decision"]
    again = to_json(policy.decide(state, recorded["experiment"], recorded["rule_version"]))
    if again == recorded:
        return []
    return [Difference(recorded["experiment"], event.get("n", state.events), recorded, again)]
