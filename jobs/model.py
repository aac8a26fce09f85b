"""The nouns. An experiment is a value that gains facts by becoming the next value.

    Proposal -> Experiment -> Run -> Submission -> Result -> Decision

Every class is frozen and holds JSON-able fields only; `to_json` and `from_json` are exact inverses.
Missing is None, never 0: zero bits per byte would be the best score there is. A reader meets a
status or verdict that it does not know with respect: as "not ok", and as "not a keep".
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from jobs.errors import AutoresearchError

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """What one proposal cost. Tokens as the model's API counts them; dollars by the price table."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_write_tokens: int = 0
    cache_read_tokens: int = 0
    dollars: float = 0.0
    estimated: bool = False  # a reply broke off: booked at its upper bound
    thinking_tokens: int = 0  # those of the output that were thought


@dataclass(frozen=True)
class Finding:
    """One check of `autoresearch doctor`: what was seen and, unless it is ok, what to do."""

    check: str
    status: Literal["ok", "warning", "failure"]
    seen: str
    remedy: str = ""

    @classmethod
    def of(cls, check: str, seen: str, **worries: tuple[object, str]) -> Finding:
        """`failure` and `warning`: whether it is one, and then what to do; the first that holds."""
        for status, (holds, remedy) in worries.items():
            if holds:
                return cls(check, status, seen, remedy)  # type: ignore[arg-type]
        return cls(check, "ok", seen)

    @classmethod
    def attempt(cls, check: str, act: Callable[[], str], remedy: str) -> Finding:
        """What `act` saw, or the words of the error that it raised."""
        try:
            return cls(check, "ok", act())
        except AutoresearchError as error:
            return cls(check, "failure", str(error), remedy)


@dataclass(frozen=True)
class Proposal:
    """A researcher's idea: new text for editable files, made against one commit."""

    branch: str
    base: str  # commit the edit was made from (full sha)
    files: Mapping[str, str]  # editable path -> its whole new text; empty for a baseline
    description: str  # one line, for people
    researcher: str  # e.g. "sweep", "anthropic:claude-..."
    hypothesis: str = ""
    tags: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    rebased_from: str | None = None  # experiment whose edit was carried onto a newer base


@dataclass(frozen=True)
class Unavailable:
    """No proposal now. `until` is UTC ISO 8601 (None: the researcher has nothing more to say)."""

    reason: str
    until: str | None = None
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class Experiment:
    """One commit: one edited program on one parent."""

    id: str  # "e0042", unique in the campaign
    branch: str
    commit: str  # full sha, under refs/autoresearch/<campaign>/<id>
    base: str  # the commit it was made on
    parent: str | None  # experiment id of `base` (None for a baseline)
    description: str
    researcher: str
    program_sha256: str  # of program.md as the researcher saw it
    hypothesis: str = ""
    tags: tuple[str, ...] = ()
    lines_added: int = 0
    lines_removed: int = 0
    usage: Usage = field(default_factory=Usage)
    rebased_from: str | None = None


@dataclass(frozen=True)
class Budget:
    """How long a run may train: `amount` wall seconds (GPUs) or tokens (CPU, tests)."""

    kind: Literal["wall", "tokens"]
    amount: float


@dataclass(frozen=True)
class Run:
    """One execution of an experiment. Run k has seed k; a retry of it is another attempt."""

    experiment: str
    seed: int  # from 1; run k of every experiment has seed k
    attempt: int  # from 1; grows by infrastructure trouble only
    budget: Budget
    scale: str

    @property
    def id(self) -> str:
        """'e0042-s1-a1': its ledger key and, with the campaign's name in front, its job's name."""
        return f"{self.experiment}-s{self.seed}-a{self.attempt}"

    @property
    def folder(self) -> str:
        """Its place below campaigns/<campaign>/runs/."""
        return f"{self.experiment}/s{self.seed}-a{self.attempt}"


@dataclass(frozen=True)
class Submission:
    """A run handed to an executor: enough to find it again after the controller was killed."""

    run: str  # Run.id
    executor: str  # "local", "slurm", "allocation"
    job: str  # Slurm's job or step id; locally "<pid>@<start time in clock ticks>@<boot id>"
    node: str | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended: result.json, validated, or what the executor knew in its place."""

    run: str
    status: str  # "ok", "crash", "timeout", "oom", "invalid", "quarantine", "infrastructure"
    reason: str  # one line
    metric: float | None = None  # val_bpb for nanochat
    node: str | None = None
    gpu: str | None = None
    steps: int | None = None
    tokens: int | None = None  # trained on after the warm-up
    memory_mb: float | None = None  # host, peak of the tree
    gpu_memory_mb: float | None = None
    queue_s: float | None = None  # from its submission to its start
    turnaround_s: float | None = None  # since the last run's end in its place: node and device
    startup_s: float | None = None
    training_s: float | None = None
    scoring_s: float | None = None
    total_s: float | None = None
    started: str | None = None  # UTC ISO 8601
    ended: str | None = None
    params: int | None = None  # from the saved weights
    details: Mapping[str, Any] = field(default_factory=dict)  # the rest of result.json, flat

    @property
    def ok(self) -> bool:
        return self.status == "ok" and self.metric is not None


@dataclass(frozen=True)
class Decision:
    """What became of an experiment, and the numbers that it rests on."""

    experiment: str
    verdict: str  # "keep", "discard", "measure", "parked"
    reason: str  # one line, for people
    rule: str
    rule_version: int
    settings: Mapping[str, Any]
    numbers: Mapping[str, Any]  # e.g. metric, best, gain, required
    head: str | None = None  # experiment that headed the branch when it was weighed
    runs: tuple[str, ...] = ()  # the runs weighed


def to_json(value: Any) -> Any:
    """A plain JSON structure of a value of this module (nested dataclasses become objects)."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], data: Mapping[str, Any]) -> T:
    """The value of class `kind` that `to_json` wrote. Unknown keys of a newer writer are ignored.

    Raises TypeError: a field without a default is absent.
    """
    restorers = _restorers(kind)  # type: ignore[arg-type]
    known = [(name, restore) for name, restore in restorers if name in data]
    return kind(**{name: restore(data[name]) if restore else data[name] for name, restore in known})


Restorer = Callable[[Any], Any]


@functools.cache  # resolving annotations costs 0.1 ms; a replay reads 100,000 lines
def _restorers(kind: type) -> list[tuple[str, Restorer | None]]:
    """How each field of `kind` is restored (None: as is)."""
    return [(name, _restorer(hint)) for name, hint in typing.get_type_hints(kind).items()]


def _restorer(hint: Any) -> Restorer | None:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next((arm for arm in typing.get_args(hint) if arm is not type(None)), hint)
    if dataclasses.is_dataclass(hint):
        return lambda value: None if value is None else from_json(hint, value)  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        return lambda value: tuple(value) if isinstance(value, list) else value
    return None
