"""Owns what a researcher is: a snapshot of the campaign in, one proposal (or a reason) out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Context:
    """What a researcher may look at besides the folded ledger. Immutable but for `stop`."""

    base: str  # commit that the edit is made from (full sha): the head of the branch
    files: Mapping[str, str]  # editable path -> its text at `base`
    program: str  # program.md as it reads now, front matter included
    scale: str  # the active scale: "cpu", "small", "h100"
    seed: int  # of the campaign's search (never of a run)
    number: int  # how many proposals this branch has had, this one not counted
    records: Records
    metric: str = "val_bpb"
    direction: str = "lower"  # "lower" or "higher" is better
    readable: Mapping[str, str] = field(
        default_factory=dict
    )  # read-only files, e.g. trainer/prepare.py
    known: Mapping[str, str] = field(
        default_factory=dict
    )  # edit.fingerprint -> experiment that was it
    stop: threading.Event = field(default_factory=threading.Event)  # set: return within 2 s
    say: Callable[[str], None] = lambda line: None  # what it waits for; on its own thread


class Researcher(Protocol):
    """Proposes one experiment at a time. Called from several threads at once, one for each slot.

    Never raises for trouble of its own (no network, no money, broken reply): that is Unavailable.
    """

    def reserve(self, state: State, branch: str) -> Usage:
        """What one proposal may cost at most; `propose` spends no more.

        The controller records it with the request before it calls `propose`, so that caps count
        what is in flight, and books it where a proposal died with the controller.
        """
        ...

    def propose(self, state: State, branch: str, context: Context) -> Proposal | Unavailable:
        """One proposal. `state` has this proposal's own request in it already."""
        ...


def after(seconds: float) -> str:
    """The time `seconds` from now, as `Unavailable.until` wants it: UTC, ISO 8601."""
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def researcher(settings: Any, campaign_caps: Any = None) -> Researcher:
    """The researcher that `settings` (the agent settings of one branch) describe.

    Imports are lazy: `autoresearch --help` must not pay for Optuna or the SDK.

    Args:
        campaign_caps: dollars and tokens (`Caps`) for all branches together.

    Raises:
        UserError: the settings name what is not there (a script, a price, a program on PATH).
    """
    if settings.kind == "scripted":
        from agent.scripted import Scripted

        return Scripted(settings)
    if settings.kind == "anthropic":
        from agent.conversation import Anthropic

        return Anthropic(settings, campaign_caps)
    if settings.kind == "command":
        from agent.command import Command

        return Command(settings, campaign_caps)
    from agent.sweep import Sweep

    return Sweep(settings)
