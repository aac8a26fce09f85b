"""Owns what a researcher is: a snapshot of the campaign in, one proposal (or a reason) out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from jobs.model import Proposal, Unavailable, Usage

if TYPE_CHECKING:
    from jobs.history import State


class Records(Protocol):
    """What earlier experiments left behind, for reading only. Safe to call from any thread.

    Each returns "" (or no files) where nothing was left: an experiment that never ran has no log.
    """

    def files(self, experiment: str) -> Mapping[str, str]:
        """Editable path -> text, as the experiment ran it."""
        ...

    def diff(self, experiment: str) -> str:
        """Unified diff of the experiment against the commit that it was made on."""
        ...

    def log(self, experiment: str, lines: int) -> str:
        """The last `lines` lines of its latest run's train.log."""
        ...

    def telemetry(self, experiment: str, lines: int) -> str:
        """The last `lines` lines of its latest run's telemetry.jsonl."""
        ...


class NoRecords:
    """Records of a campaign that has none (tests, `--dry-run`)."""

    def files(self, experiment: str) -> Mapping[str, str]:
        return {}

    def diff(self, experiment: str) -> str:
        return ""

    def log(self, experiment: str, lines: int) -> str:
        return ""

    def telemetry(self, experiment: str, lines: int) -> str:
        return ""


def _say_nothing(usage: Usage, doing: str) -> None:
    """The default of `Context.report`."""


@dataclass(frozen=True)
class Context:
    """What a researcher may look at besides the folded ledger. Immutable but for `stop`."""

    base: str  # commit that the edit is made from (full sha): the head of the branch
    files: Mapping[str, str]  # editable path -> its text at `base`
    program: str  # program.md as it reads now, front matter included
    scale: str  # the active scale: "cpu", "small", "h100"
    seed: int  # of the campaign's search (never of a run)
    number: int  # how many proposals this branch has had, this one not counted
    metric: str = "val_bpb"
    direction: str = "minimise"  # or "maximise"
    reserve: Usage | None = None  # what Researcher.reserve gave for this proposal
    readable: Mapping[str, str] = field(
        default_factory=dict
    )  # read-only files, e.g. trainer/prepare.py
    known: Mapping[str, str] = field(
        default_factory=dict
    )  # edit.fingerprint -> experiment that was it
    records: Records = field(default_factory=NoRecords)
    stop: threading.Event = field(default_factory=threading.Event)  # set: return within 2 s
    # Called on the researcher's own thread after each paid reply and before each sleep, with what
    # this proposal has cost so far and what it does now: a kill in a sleep loses no money's record.
    report: Callable[[Usage, str], None] = _say_nothing


class Researcher(Protocol):
    """Proposes one experiment at a time. Called from several threads at once, one for each slot.

    Never raises for trouble of its own (no network, no money, broken reply): that is Unavailable.
    """

    def reserve(self, state: State, branch: str) -> Usage | None:
        """What the next proposal may cost at most; None: the caps leave no room for it.

        Pure. The controller records it with the request (so that caps count what is in flight,
        also after a kill) and hands it back in the Context. `propose` spends no more than that.
        """
        ...

    def propose(self, state: State, branch: str, context: Context) -> Proposal | Unavailable: ...


def after(seconds: float) -> str:
    """The time `seconds` from now, as `Unavailable.until` wants it: UTC, ISO 8601."""
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def researcher(settings: Any, campaign_caps: Any = None) -> Researcher:
    """The researcher that `settings` (the agent settings of one branch) describe.

    Those that can fail for want of network or money come with the sweep behind them. Imports are
    lazy: `autoresearch --help` must not pay for Optuna or the SDK.

    Args:
        campaign_caps: dollars and tokens (`Caps`) for all branches together.

    Raises:
        UserError: the settings name what is not there (a script, a price, a program on PATH).
    """
    if settings.kind == "scripted":
        from agent.scripted import Scripted

        return Scripted(settings)
    from agent.sweep import Sweep

    sweep = Sweep(settings)
    if settings.kind == "anthropic":
        from agent.conversation import Anthropic

        return Fallback(Anthropic(settings, campaign_caps), sweep, settings.at_cap)
    if settings.kind == "command":
        from agent.command import Command

        return Fallback(Command(settings, campaign_caps), sweep, settings.at_cap)
    return sweep


class Fallback:
    """Asks `first`; while that is unavailable, `second` keeps the slots busy."""

    def __init__(self, first: Researcher, second: Researcher, at_cap: str = "fallback") -> None:
        self._first, self._second, self._at_cap = first, second, at_cap
        self._not_before = ""  # UTC; `first` is not asked again until then
        self.why = ""  # in words, while `second` stands in

    def reserve(self, state: State, branch: str) -> Usage | None:
        if self._not_before > after(0):
            return Usage()  # nothing will be spent
        want = self._first.reserve(state, branch)
        return Usage() if want is None and self._at_cap == "fallback" else want

    def propose(self, state: State, branch: str, context: Context) -> Proposal | Unavailable:
        if context.reserve is None:
            return Unavailable("the cap on dollars or tokens is reached (agent.at_cap: end)")
        spent = Usage()
        if context.reserve == Usage():
            self.why = self.why or "the cap on dollars or tokens leaves no room for a proposal"
        else:
            found = self._first.propose(state, branch, context)
            if isinstance(found, Proposal):
                self.why = self._not_before = ""
                return found
            spent, self.why = found.usage, found.reason
            self._not_before = found.until or ""
            if context.stop.is_set():
                return found
            context.report(spent, f"the sweep stands in: {found.reason}")
        return _add_usage(self._second.propose(state, branch, context), spent)


def _add_usage(found: Proposal | Unavailable, spent: Usage) -> Proposal | Unavailable:
    """What `first` spent in vain is booked with what `second` found."""
    return replace(found, usage=spent) if spent != Usage() else found
