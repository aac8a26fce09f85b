"""Owns the search that needs no model: Optuna's TPE over the constants found in the programs."""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna

from agent import constants, edit, program
from agent.constants import Number
from agent.researcher import Context, after
from jobs.model import Proposal, Unavailable, Usage

if TYPE_CHECKING:
    from jobs.history import State
    from jobs.records import Record

optuna.logging.set_verbosity(optuna.logging.ERROR)

# Simulated campaigns of 41 trials over 12 constants, two of them worsened threefold: moving two
# constants at first and one later, within a factor of 3, recovered most; all of them at once
# recovered nothing in 12 trials.
FACTOR = 3.0
REMEMBERED = 600  # trials that the sampler sees: the best and the newest (asking costs O(trials))
PROGRAM_S = 30.0  # until a broken program.md is looked at again
TRIES = 40  # draws before every value near the head counts as tried

Key = tuple[str, str]  # editable path, constant


@dataclass(frozen=True)
class Range:
    """Where one constant may go, as a coordinate in which equal steps are equally bold."""

    # "log", "whole" (log, rounded), "complement" (log of 1 - value), "integer", "power" (of two)
    form: str
    low: float
    high: float

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        if self.form in ("integer", "power"):
            return optuna.distributions.IntDistribution(int(self.low), int(self.high))
        return optuna.distributions.FloatDistribution(self.low, self.high)

    def coordinate(self, value: Number) -> float:
        """The coordinate of `value`, clipped into the range (people and models go beyond it)."""
        if self.form == "integer":
            place = value
        elif self.form == "power":
            place = round(math.log2(max(value, 1)))
        elif self.form == "complement":
            place = math.log(max(1 - value, 1e-9))
        else:
            place = math.log(max(abs(value), 1e-300))
        return min(max(place, self.low), self.high)

    def suggest(self, trial: optuna.trial.Trial, label: str, like: Number) -> Number:
        """The sampler's choice as a number: three significant digits, the sign of `like`."""
        if self.form in ("integer", "power"):
            place: float = trial.suggest_int(label, int(self.low), int(self.high))
        else:
            place = trial.suggest_float(label, self.low, self.high)
        if self.form == "integer":
            return round(place)
        if self.form == "power":
            return 1 << round(place)
        if self.form == "whole":
            return round(_three_digits(math.exp(place)))
        if self.form == "complement":
            return float(f"{1 - _three_digits(math.exp(place)):.12g}")  # 0.97, not 0.97000000001
        return math.copysign(_three_digits(math.exp(place)), like)


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def range_of(name: str, shipped: Number) -> Range | None:
    """A sensible range around a shipped value; None for what has no scale (0) or must stay.

    Learning rates may exceed 1; other numbers between 0 and 1 are taken for fractions, those
    from 1/2 on for ones whose distance from 1 matters (betas, momenta).
    """
    if shipped == 0 or "seed" in name.lower():
        return None
    if isinstance(shipped, int):
        return _integers(shipped)
    spread, size = math.log(FACTOR), abs(shipped)
    rate = "lr" in name.lower() or "rate" in name.lower()
    if 0.5 <= shipped < 1 and not rate:
        middle = math.log(1 - shipped)
        return Range("complement", middle - spread, min(middle + spread, math.log(0.95)))
    high = math.log(size) + spread
    if size < 1 and not rate:
        high = min(high, 0.0)
    return Range("log", math.log(size) - spread, high)


def _integers(shipped: int) -> Range | None:
    if shipped < 0:
        return None
    if shipped >= 8 and shipped & (shipped - 1) == 0:  # widths, batches: shapes must divide
        power = shipped.bit_length() - 1
        return Range("power", power - 1, power + 1)
    if shipped >= 50:
        return Range("whole", math.log(shipped / FACTOR), math.log(shipped * FACTOR))
    return Range("integer", max(1, shipped // 2), shipped * 2)


class Sweep:
    """Moves one or two constants of the branch's head to where TPE expects the most.

    Rebuilt from the history at every call: the same history gives the same proposal, so resuming
    needs nothing of its own. Runs that crashed count as worse than any that ended (Optuna's
    "pruned"; its "failed" trials are ignored, and would be proposed again), runs in flight as
    bad for now (constant liar).
    """

    def __init__(self, settings: Any) -> None:
        self._sampler = getattr(settings, "sampler", "tpe")
        self._only = frozenset(getattr(settings, "constants", ()) or ())
        self._values: dict[str, Mapping[Key, Number]] = {}  # of past experiments: they never change
        self._lock = threading.Lock()

    def reserve(self, state: State, branch: str) -> Usage:
        return Usage()

    def propose(self, state: State, branch: str, context: Context) -> Proposal | Unavailable:
        try:
            limits = program.limits(context.program)
        except program.ProgramError as error:
            return Unavailable(str(error), until=after(PROGRAM_S))
        here = _vector(context.files, context.scale)
        allowed = self._only or {name.split("[")[0] for _, name in here}
        ranges = {
            key: found
            for key, value in self._shipped(state, branch, context).items()
            if key in here
            and key[1].split("[")[0] in allowed & (set(limits.may_change) or allowed)
            and (found := range_of(key[1], value)) is not None
        }
        if not ranges:
            return Unavailable(
                f"the sweep found no number to move in {', '.join(context.files)}: neither a "
                f"block of constants for scale {context.scale!r} nor a top-level NAME = number "
                f"that agent.constants and program.md's may_change allow"
            )
        study = self._study(state, branch, context, ranges)
        refused = None
        for draw in range(TRIES):
            changes = _draw(study, context, ranges, here, draw)
            files = _apply(context.files, changes, context.scale)
            refused = edit.refusal(edit.of(context, files))
            if refused is None:
                return self._proposal(branch, context, here, changes, files)
        return Unavailable(f"the sweep drew {TRIES} changes and none may be run; last: {refused}")

    def _shipped(self, state: State, branch: str, context: Context) -> Mapping[Key, Number]:
        """The branch's baseline: ranges centred there stay put while the head moves."""
        baseline = state.branches[branch].baseline
        vector = self._vector_of(baseline, context) if baseline else {}
        return vector or _vector(context.files, context.scale)

    def _vector_of(self, experiment: str, context: Context) -> Mapping[Key, Number]:
        with self._lock:
            if experiment not in self._values:
                files = context.records.files(experiment)
                self._values[experiment] = _vector(files, context.scale)
            return self._values[experiment]

    def _study(
        self, state: State, branch: str, context: Context, ranges: Mapping[Key, Range]
    ) -> optuna.Study:
        study = optuna.create_study(
            sampler=_sampler(self._sampler, _seed(context.seed, context.number)),
            direction="minimize" if context.direction == "lower" else "maximize",
        )
        for record in remembered(state.experiments(branch), context.direction):
            vector = self._vector_of(record.id, context)
            known = {key: ranges[key] for key in ranges if key in vector}
            study.add_trial(_as_optuna(record, vector, known))
        return study

    def _proposal(
        self,
        branch: str,
        context: Context,
        here: Mapping[Key, Number],
        changes: Mapping[Key, Number],
        files: Mapping[str, str],
    ) -> Proposal:
        spell = constants.spell
        moved = [f"{key[1]} {spell(here[key])} -> {spell(changes[key])}" for key in sorted(changes)]
        tags = ["constant"]
        for key in sorted(changes):
            tags += [key[1], "up" if changes[key] > here[key] else "down"]
        return Proposal(
            branch=branch,
            base=context.base,
            files=files,
            description=", ".join(moved),
            researcher="sweep" if self._sampler == "tpe" else f"sweep:{self._sampler}",
            hypothesis=f"{self._sampler} expects a better {context.metric} there",
            tags=tuple(tags),
        )


def _draw(
    study: optuna.Study,
    context: Context,
    ranges: Mapping[Key, Range],
    here: Mapping[Key, Number],
    draw: int,
) -> dict[Key, Number]:
    """New values for one or two constants. Earlier draws stay in the study, as in flight."""
    trial, changes = study.ask(), {}
    for key in chosen(sorted(ranges), context.seed, context.number + draw, context.number):
        changes[key] = ranges[key].suggest(trial, _label(key), here[key])
    return {key: value for key, value in changes.items() if value != here[key]}


def remembered(records: Iterable[Record], direction: str) -> list[Record]:
    """The best and the newest experiments, oldest first, at most REMEMBERED."""
    every = list(records)
    if len(every) <= REMEMBERED:
        return every
    sign = 1 if direction == "lower" else -1
    scored = [record for record in every if _score(record) is not None]
    best = sorted(scored, key=lambda record: sign * (record.metric or 0.0))[: REMEMBERED // 3]
    kept = {record.id for record in best} | {r.id for r in every[-REMEMBERED * 2 // 3 :]}
    return [record for record in every if record.id in kept]


def _score(record: Record) -> float | None:
    """None: it did not end well, or has not ended."""
    return record.metric if record.status == "ok" else None


def chosen(keys: list[Key], seed: int, turn: int, number: int) -> list[Key]:
    """Which constants this proposal moves: shuffled rounds, so that each has its turn.

    Two at a time in the first round, where little is known, then one, so that a gain has a name.
    """
    count = 2 if number < len(keys) and len(keys) > 2 else 1
    picked: list[Key] = []
    place = turn * count
    while len(picked) < count:
        around = list(keys)
        random.Random(_seed(seed, place // len(keys), 1)).shuffle(around)
        key = around[place % len(keys)]
        if key not in picked:
            picked.append(key)
        place += 1
    return picked


def _vector(files: Mapping[str, str], scale: str) -> dict[Key, Number]:
    return {
        (path, name): value
        for path, text in files.items()
        if path.endswith(".py")
        for name, value in constants.values(text, scale).items()
    }


def _apply(files: Mapping[str, str], changes: Mapping[Key, Number], scale: str) -> dict[str, str]:
    changed: dict[str, str] = {}
    for path in {path for path, _ in changes}:
        of_file = {name: value for (where, name), value in changes.items() if where == path}
        changed[path] = constants.replace(files[path], of_file, scale)
    return changed


def _as_optuna(
    record: Record, vector: Mapping[Key, Number], ranges: Mapping[Key, Range]
) -> optuna.trial.FrozenTrial:
    if _score(record) is not None:
        outcome = optuna.trial.TrialState.COMPLETE
    elif record.verdict in (None, "measure"):
        outcome = optuna.trial.TrialState.RUNNING
    else:
        outcome = optuna.trial.TrialState.PRUNED
    params: dict[str, float] = {}
    for key, found in ranges.items():
        place = found.coordinate(vector[key])
        params[_label(key)] = int(place) if found.form in ("integer", "power") else place
    return optuna.trial.create_trial(
        state=outcome,
        value=_score(record),
        params=params,
        distributions={_label(key): found.distribution for key, found in ranges.items()},
    )


def _label(key: Key) -> str:
    return f"{key[0]}:{key[1]}"


def _sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar was experimental before Optuna 5
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=1, multivariate=False, constant_liar=True
        )


def _seed(*parts: int) -> int:
    """The same for ever, unlike hash()."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big")
