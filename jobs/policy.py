"""The rules, all pure: what becomes of an experiment, and of a run that infrastructure killed.

A rule reads the State alone (settings too: the configuration is a ledger event), so deciding again
from any prefix of the ledger gives what was decided then. A changed rule is a new version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.history import State
from jobs.model import Decision
from jobs.records import Branch, Record, RunRecord

MAX_ATTEMPTS = 3
PARKED_IN_ROW = 3
PER_LINE = 0.00005  # bits per byte: twenty more lines must gain 0.001

# -- a run has ended ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retry:
    """Run it again as another attempt, not on the nodes `avoid` as long as there are others."""

    attempt: int
    avoid: frozenset[str]


@dataclass(frozen=True)
class Crash:
    """Infrastructure died with it wherever it ran while others lived: the idea is at fault."""

    reason: str


@dataclass(frozen=True)
class Park:
    """Nobody can tell what is at fault: the experiment is set aside."""

    reason: str


def after(state: State, record: Record, seed: int) -> Retry | Crash | Park | None:
    """What a seed's latest run asks for, at its end; None: it ended by itself, for `decide`."""
    tries = [r for r in record.runs if r.seed == seed]
    last = max(tries, key=lambda r: r.attempt)
    if last.status != "infrastructure":
        return None
    # Preemption is nobody's fault: it is tried again, and does not count. Nor is another GPU model
    # the fault of node or idea, but it may be all there is.
    died = [r for r in tries if r.status == "infrastructure" and not r.preempted]
    deaths = _deaths(record, seed)
    fate: Crash | Park | None = None
    if last.misplaced:
        fate = _tired(state, len(died))
    elif not last.preempted:
        fate = _fate(state, record.id, deaths)
    return fate or Retry(last.attempt + 1, avoided_nodes(state, record, seed))


def _fate(state: State, experiment: str, deaths: list[RunRecord]) -> Crash | Park | None:
    """The verdict on a series of deaths of one run; None: try once more."""
    nodes = dict.fromkeys(r.node for r in deaths if r.node)
    fit = [node for node in nodes if _ran_others(state, node, experiment)]
    if len(fit) >= 2:
        return Crash(f"died on {' and '.join(fit)}, where other experiments ran")
    last = deaths[-1]
    earlier = [r for r in deaths[:-1] if r.node == last.node]
    if last.node and earlier:  # it came back to the same node, so there is no other one
        if _ran_others(state, last.node, experiment, since=earlier[0].n):
            return Crash(f"died twice on {last.node}, where another experiment ran in between")
        return Park(f"died twice on {last.node}, and nothing else ran there in between")
    return _tired(state, len(deaths))


def _tired(state: State, attempts: int) -> Park | None:
    limit = (state.config.get("executor") or {}).get("max_attempts") or MAX_ATTEMPTS
    if attempts >= limit:
        return Park(f"infrastructure killed {attempts} attempts, the last one: see its result")
    return None


def _ran_others(state: State, node: str, experiment: str, since: int = -1) -> bool:
    """Whether another experiment ended by itself on `node` after event `since`."""
    return any(
        not run.died and run.experiment != experiment and run.n > since
        for run in state.nodes.get(node, ())
    )


def avoided_nodes(state: State, record: Record, seed: int) -> frozenset[str]:
    """Nodes that a seed's next run should not be on: those it died on, and no run should."""
    died = {r.node for r in _deaths(record, seed) if r.node}
    return excluded_nodes(state).union(state.branch(record.branch).unfit, died)


def _deaths(record: Record, seed: int) -> list[RunRecord]:
    """The seed's runs whose end may be the fault of node or idea."""
    died = [r for r in record.runs if r.seed == seed and r.status == "infrastructure"]
    return [r for r in died if not r.preempted and not r.misplaced]


def excluded_nodes(state: State) -> frozenset[str]:
    """Nodes where two different experiments died that other nodes ran."""
    return frozenset(node for node in state.nodes if len(_blamed(state, node)) >= 2)


def _blamed(state: State, node: str) -> set[str]:
    """The experiments that speak against `node`, among the last runs on it."""
    died = {run.experiment for run in state.nodes[node] if run.died}
    return {name for name in died if _ran_elsewhere(state.record(name), node)}


def _ran_elsewhere(record: Record, node: str) -> bool:
    return any(r.status != "infrastructure" and r.node not in (None, node) for r in record.runs)


def pause_reason(state: State) -> str | None:
    """Why the campaign must stop taking work, by the experiments parked in a row; None: go on."""
    if state.parked_in_row < PARKED_IN_ROW:
        return None
    return f"{state.parked_in_row} experiments in a row were parked: the infrastructure is broken"


# -- an experiment is weighed ---------------------------------------------------------------------

Rule = Callable[[State, Record, Mapping[str, Any]], Decision]


def decide(state: State, experiment: str, version: int | None = None) -> Decision:
    """Keep, discard, park or measure (again) an experiment whose runs have ended.

    Args:
        version: of the configured rule; the newest by default.

    Raises:
        KeyError: no such experiment or rule.
    """
    settings = settings_of(state)
    name = settings["rule"]
    version = version or max(v for rule, v in RULES if rule == name)
    return RULES[name, version](state, state.record(experiment), settings)


def settings_of(state: State) -> dict[str, Any]:
    """The rule's name and numbers as the ledger's configuration has them."""
    keep = state.config.get("keep") or {}
    task = state.config.get("task") or {}
    per_line = keep.get("per_line")
    if per_line is None:  # another metric's unit says nothing about what a line may cost
        per_line = 0.0 if task.get("kind") == "general" else PER_LINE
    return {
        "rule": keep.get("rule") or "greedy",
        "tie": keep.get("tie") or 0.0,
        "per_line": per_line,
        "direction": state.direction,
    }


def greedy(state: State, record: Record, settings: Mapping[str, Any]) -> Decision:
    """Version 1: whatever is better than the branch's best is kept.

    Within the tie it is kept if it has fewer lines; beyond it, each added line demands `per_line`
    of gain. The gain is taken over the best of all keeps, so that ties cannot creep uphill. What
    was made on an older base and is better all the same lacks the newer keeps: it is discarded
    with `rebase`, for its edit to be carried over and measured again.
    """
    branch = state.branch(record.branch)
    counted = [r for r in record.runs if r.status != "infrastructure"]
    fates = [after(state, record, seed) for seed in sorted({r.seed for r in record.runs})]
    verdict, reason, numbers = _unscored(fates, counted) or _weigh(
        sum(r.metric for r in counted if r.metric is not None) / len(counted),
        record,
        branch,
        settings,
    )
    return Decision(
        experiment=record.id,
        verdict=verdict,
        reason=reason,
        rule="greedy",
        rule_version=1,
        settings={key: value for key, value in settings.items() if key != "rule"},
        numbers=numbers,
        head=branch.head,
        runs=tuple(f"{record.id}-{r.folder}" for r in record.runs),
    )


Verdict = tuple[str, str, dict[str, Any]]  # word, reason for people, numbers


def _unscored(fates: list[Retry | Crash | Park | None], counted: list[RunRecord]) -> Verdict | None:
    """The verdict on what left no score; None: all its runs have one."""
    for fate in fates:
        if isinstance(fate, Crash):
            return "discard", f"crash: {fate.reason}", {"status": "crash"}
        if isinstance(fate, Park):
            return "parked", fate.reason, {"status": "infrastructure"}
    if not counted or any(isinstance(fate, Retry) for fate in fates):
        return "measure", "a run has not ended by itself yet", {"status": "infrastructure"}
    for run in counted:
        if not run.ok:
            status = "invalid" if run.status == "ok" else run.status
            return "discard", f"{status}: no score", {"status": status}
    return None


def _weigh(metric: float, record: Record, branch: Branch, settings: Mapping[str, Any]) -> Verdict:
    """Whether a score is worth its lines."""
    numbers = {"status": "ok", "metric": metric, "best": branch.best_metric}
    best = branch.best_metric
    if best is None:
        if record.parent is None:
            return "keep", f"baseline {metric:.6g}", numbers
        return "discard", "its branch has no baseline to compare with", numbers
    gain = metric - best if settings["direction"] == "maximise" else best - metric
    lines, tie = record.net_lines, settings["tie"]
    required = settings["per_line"] * max(lines, 0)
    stale = record.base != branch.head_commit
    numbers |= {"gain": gain, "required": required, "lines": lines}
    if abs(gain) <= tie:
        if lines < 0 and not stale:
            return "keep", f"equal ({gain:+.3g}, tie {tie:g}) with {-lines} lines fewer", numbers
        return "discard", f"equal ({gain:+.3g}, tie {tie:g}) and no simpler", numbers
    if gain < 0:
        return "discard", f"worse than {best:.6g} by {-gain:.3g}", numbers
    if gain <= required:
        wanted = f"{lines} added lines demand more than {required:.3g}"
        return "discard", f"better than {best:.6g} by {gain:.3g}, but {wanted}", numbers
    better = f"better than {best:.6g} by {gain:.3g}"
    if stale:
        return (
            "discard",
            f"stale-base: {better}, but without newer keeps",
            numbers | {"rebase": True},
        )
    return "keep", better, numbers


RULES: Mapping[tuple[str, int], Rule] = {("greedy", 1): greedy}
