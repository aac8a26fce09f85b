"""What the history remembers: compact records of experiments and runs, branches, a vector."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from jobs.model import Run, Submission, Usage, from_json

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
    node: str | None  # None, too, where it had no part in the end: the run was cancelled
    preempted: bool
    n: int  # count of its run_ended event: orders ends
    place: Place
    misplaced: bool = False  # on another GPU model than its branch's

    @property
    def ok(self) -> bool:
        return self.status == "ok" and self.metric is not None

    @property
    def folder(self) -> str:
        """Below its experiment's, as `Run.folder`."""
        return f"s{self.seed}-a{self.attempt}"


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
    fingerprint: str = ""  # of its program; "" in ledgers older than this

    @property
    def net_lines(self) -> int:
        return self.lines_added - self.lines_removed


class NodeRun(NamedTuple):
    """One ended run on a node; preempted and misplaced ones are left out."""

    experiment: str
    died: bool  # of infrastructure
    n: int  # count of the run_ended event


@dataclass(frozen=True)
class OpenRun:
    """A run that was intended and has not ended; without `submission` it may not have started.

    It holds its events and makes values of them when asked: most runs of a replay have ended before
    anybody looks at them.
    """

    branch: str
    intended: Event  # run_intended
    submitted: Mapping[str, Any] | None = None  # the submission, as JSON

    @cached_property
    def run(self) -> Run:
        return from_json(Run, self.intended["run"])

    @cached_property
    def submission(self) -> Submission | None:
        return None if self.submitted is None else from_json(Submission, self.submitted)

    @property
    def purpose(self) -> str:
        return str(self.intended.get("purpose") or "screen")

    @property
    def executor(self) -> str:
        return str(self.intended["executor"])

    @property
    def name(self) -> str:
        return str(self.intended["name"])

    @property
    def folder(self) -> str:
        return str(self.intended["folder"])

    @property
    def time(self) -> str:
        """UTC of the intent."""
        return str(self.intended.get("time", ""))


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
    proposals: int = 0  # experiments that its researcher proposed: no baselines, no rebases
    kept: int = 0
    discarded: int = 0
    crashed: int = 0
    parked: int = 0
    since_keep: int = 0  # decisions since the latest keep
    paused: str | None = None  # the reason
    retired: str | None = None
    notes: tuple[str, ...] = ()  # what its researcher was told
    spent: Usage = field(default_factory=Usage)
    unfit: tuple[str, ...] = ()  # nodes that have another GPU model than it wants
    gpu: str | None = None  # the model that its baseline ran on
    allocated_s: float = 0.0  # seconds that places were held for its runs
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vector) and list(self) == list(other)

    def thaw(self) -> Vector:
        """A copy to write to, before anybody else sees it."""
        return Vector(self.chunks, self._size)

    def push(self, record: Record) -> None:
        """Appends; only to a thawed vector."""
        if self._size % self.CHUNK == 0:
            self.chunks.append(Chunk([]))
        self._writable(self._size // self.CHUNK).append(record)
        self._size += 1

    def replace(self, i: int, record: Record) -> None:
        """Only in a thawed vector."""
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
