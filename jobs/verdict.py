"""Whether a rerun is what the campaign saw: the spread it knew, and a verdict in words. Pure."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from jobs.history import State
from jobs.model import Result
from jobs.records import RunRecord

REPRODUCED, DIFFERENT, INCOMPARABLE = "reproduced", "not reproduced", "not comparable"
FAILED = "failed"  # of several: this one could not be run
EXIT = {REPRODUCED: 0, DIFFERENT: 1, INCOMPARABLE: 4, FAILED: 1}
SAME_SEED, FRESH_SEEDS = 5.0, 2.0  # tolerance, in standard deviations of the known spread
OWN = 0.002  # of the metric, where the campaign knows no spread
FLOOR = 1e-6  # two runs that happened to be identical are no promise against a float's last digits
LENGTH = ("budget", "scale", "threads")  # runs of another are no measure, as on another processor


@dataclass(frozen=True)
class Spread:
    """By how much runs of one program may differ and still be the same, and why that much."""

    tolerance: float
    words: str


def spread(state: State, old: Result, contained: bool, seeds: bool = False) -> Spread:
    """As the campaign measured it by runs made as `old` was, else a share of the metric.

    Args:
        seeds: whether what is judged may differ by its seed's luck, too: then the spread over fresh
            seeds comes before that on one seed.
    """
    alike: dict[Any, list[RunRecord]] = defaultdict(list)
    fresh: dict[Any, list[RunRecord]] = defaultdict(list)
    for record in state.experiments():
        # Baselines of branches that start at the same commit are the same program.
        program = record.base if record.parent is None else record.id
        for run in filter(attrgetter("ok"), record.runs):
            alike[program, run.seed].append(run)
            if run.purpose == "confirm":
                fresh[record.id].append(run)
    kinds = [(alike, SAME_SEED, "on one seed"), (fresh, FRESH_SEEDS, "of seeds")]
    for groups, factor, kind in reversed(kinds) if seeds else kinds:
        if known := list(_scores(state, groups.values(), old, contained)):
            sd = statistics.fmean(map(statistics.variance, known)) ** 0.5
            count = sum(map(len, known))
            words = f"{factor:g} times the spread {kind} ({sd:.3g}, {count} runs)"
            return Spread(max(FLOOR, factor * sd), words)
    words = f"{OWN:.1%} of it, since no spread is known"
    return Spread(max(FLOOR, OWN * abs(old.metric or 0.0)), words)


def _scores(
    state: State, groups: Iterable[Sequence[RunRecord]], old: Result, contained: bool
) -> Iterator[list[float]]:
    """The scores of each group's runs that were made as `old` was, where there are several."""
    for group in groups:
        if len(group) > 1:  # else its ledger lines need not be read
            found = [run for run in group if _made_alike(old, state.result(run), contained)]
            scores = [run.metric for run in found if run.metric is not None]
            if len(scores) > 1:
                yield scores


def _made_alike(old: Result, other: Result, contained: bool) -> bool:
    same = all(old.details.get(name) == other.details.get(name) for name in LENGTH)
    return same and not differences(old, other, contained)


def differences(old: Result, new: Result, contained: bool) -> list[str]:
    """What forbids comparing two runs: another processor, other versions, too little time."""
    pairs: list[tuple[str, Any, Any]] = [("GPU", old.gpu or "none", new.gpu or "none")]
    if old.gpu is None and new.gpu is None:
        pairs = [("CPU", old.details.get("cpu"), new.details.get("cpu"))]
    if not contained:
        then, now = (result.details.get("versions") or {} for result in (old, new))
        pairs += [(name, then[name], now.get(name)) for name in then]
    reasons = [f"{what} was {a}, is {b}" for what, a, b in pairs if a and b and a != b]
    late = [when for when, result in (("was", old), ("is", new)) if _out_of_time(result)]
    return reasons + [
        f"its feed {when} closed by the time ceiling, short of tokens" for when in late
    ]


def _out_of_time(result: Result) -> bool:
    """Whether a budget of tokens was cut by the clock: how far it came is the machine's doing."""
    kind = (result.details.get("budget") or {}).get("kind")
    return kind == "tokens" and result.details.get("closed_by") == "wall"


def judge(
    old: Result, new: Sequence[Result], known: Spread, against: Iterable[str]
) -> tuple[str, str]:
    """(verdict, why): a score must come again within the spread, a crash must crash alike."""
    if lost := [r for r in new if r.status == "infrastructure"]:
        return INCOMPARABLE, f"infrastructure ended it: {lost[0].reason}"
    if reasons := list(dict.fromkeys(against)):
        return INCOMPARABLE, "; ".join(reasons)
    if off := [r for r in new if not _alike(old, r, known.tolerance)]:
        count = f"{len(off)} of {len(new)} runs: " if len(new) > 1 else ""
        return DIFFERENT, count + _gap(old, off[0], known)
    if old.metric is None:
        return REPRODUCED, f"it ends as it did: {new[0].status}"
    if all(r.metric == old.metric for r in new):
        return REPRODUCED, "identical"
    return REPRODUCED, f"within {known.tolerance:.3g}, which is {known.words}"


def _alike(old: Result, new: Result, tolerance: float) -> bool:
    if old.metric is not None and new.metric is not None:
        return abs(new.metric - old.metric) <= tolerance
    return (old.status, _pattern(old.reason)) == (new.status, _pattern(new.reason))


def _pattern(reason: str) -> str:
    """A reason without its numbers and addresses."""
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", reason)


def _gap(old: Result, new: Result, known: Spread) -> str:
    if old.metric is not None and new.metric is not None:
        gap = abs(new.metric - old.metric)
        return f"off by {gap:.3g}; {known.tolerance:.3g} is allowed, {known.words}"
    return f"it was {old.status} ({old.reason}), it is {new.status} ({new.reason})"


def transfer(
    direction: str, new: Sequence[Result], first: Sequence[Result], noise: Spread, contained: bool
) -> tuple[str, str]:
    """(verdict, why): whether a gain over the baseline is there under other conditions, too.

    Args:
        first: runs of the baseline under the same conditions.
        noise: what a gain must exceed, as the campaign's own conditions had it.
    """
    if lost := [r for r in (*first, *new) if r.status == "infrastructure"]:
        return INCOMPARABLE, f"infrastructure ended {lost[0].run}: {lost[0].reason}"
    before, after = ([r for r in found if r.metric is not None] for found in (first, new))
    if not before:
        return INCOMPARABLE, "without a score of its baseline no gain is known"
    if not after:
        return DIFFERENT, f"its baseline has a score, it ends as {new[0].status} ({new[0].reason})"
    if reasons := [why for r in after for why in differences(before[0], r, contained)]:
        return INCOMPARABLE, f"beside its baseline's run, {reasons[0]}"
    one, other = (statistics.fmean(r.metric or 0.0 for r in found) for found in (before, after))
    gain = other - one
    gain = gain if direction == "maximise" else -gain
    told = f"gain over its baseline: {gain:+.6g}"
    if abs(gain) <= noise.tolerance:
        return INCOMPARABLE, f"{told}, within {noise.tolerance:.3g}, which is {noise.words}"
    return REPRODUCED if gain > 0 else DIFFERENT, told
