"""What people are told of a campaign: status, log, one experiment, and the notes beside commits.

Pure functions of the state. Descriptions, reasons and metrics' names are others' text: one line
each, without control characters.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import compare
from jobs.errors import UserError
from jobs.history import State
from jobs.model import Result, Usage
from jobs.records import Branch, Record, RunRecord
from jobs.tables import is_general, is_settled, status, value, write_tables
from jobs.text import one_line

if TYPE_CHECKING:
    from jobs.repository import Repository

# Of `compare.rows`, what `status` shows.
STANDING = (
    *("branch", "experiments", "kept", "discarded", "crashed"),
    *("first", "best", "gain", "state"),
)
LONGEST_FACT = 200  # characters of one line of a note


# -- finding --------------------------------------------------------------------------------------


def find(state: State, name: str) -> Record:
    """The experiment that a person means: its id ("e0042", "42"), a commit, or a branch (its head).

    Raises UserError: none, or several.
    """
    if name in state.branches:
        head = state.branches[name].head
        if head is None:
            raise UserError(f"branch {name} of campaign {state.campaign} has kept nothing yet")
        return state.record(head)
    number = name.removeprefix("e")
    if number.isdecimal() and 0 < int(number) <= len(state.records):
        return state.records[int(number) - 1]
    found = [r for r in state.experiments() if len(name) >= 4 and r.commit.startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(r.id for r in found[:5])
        raise UserError(f"{name!r} is the beginning of several commits ({ids}): give more digits")
    count = len(state.records)
    known = f"e0001 to {state.records[count - 1].id}" if count else "none yet"
    branches = ", ".join(state.branches) or "none"
    raise UserError(
        f"{one_line(name, 80)!r} is no experiment of campaign {state.campaign}: it has experiments "
        f"{known} and branches {branches} (autoresearch log)"
    )


# -- summary --------------------------------------------------------------------------------------


def condition(state: State, controller: str | None) -> str:
    """new, running, paused, stopped, or interrupted (its controller is gone without a word)."""
    if controller:
        return "running"
    if not state.campaign:
        return "new"
    if state.paused:
        return "paused"
    return "stopped" if state.stopped else "interrupted"


def summary(state: State, controller: str | None = None) -> dict[str, Any]:
    """`status --json`. `controller` names the live one ("host, process 123"), None: there is none.

    Later versions only add keys. Seconds; null where there is nothing yet.
    """
    return {
        "campaign": state.campaign,
        "state": condition(state, controller),
        "reason": (state.paused or {}).get("reason") or state.stopped,
        "controller": controller,
        "metric": metric_name(state),
        "direction": state.direction,
        "branches": {name: _branch_summary(state, b) for name, b in state.branches.items()},
        "experiments": len(state.records),
        "running": len(state.open_runs),
        "gpu_seconds": _gpu_seconds(state, state),
        "cost": _cost(state.spent),
        "refused": state.refused,
        "updated": state.time or None,
    }


def _branch_summary(state: State, branch: Branch) -> dict[str, Any]:
    best = state.best(branch.name)
    return {
        "head": branch.head_commit,
        "head_experiment": branch.head,
        "baseline": {"experiment": branch.baseline, "value": branch.baseline_metric},
        "best": {
            "experiment": branch.best,
            "commit": best and best.commit,
            "value": branch.best_metric,
        },
        "experiments": branch.experiments,
        "kept": branch.kept,
        "discarded": branch.discarded,
        "crashed": branch.crashed,
        "parked": branch.parked,
        "running": len(state.running(branch.name)),
        "paused": branch.paused,
        "retired": branch.retired,
        "gpu_seconds": _gpu_seconds(state, branch),
        "cost": _cost(branch.spent),
    }


def _gpu_seconds(state: State, used: State | Branch) -> dict[str, float]:
    gpus = compare.gpus(state)
    return {"allocated": used.allocated_s * gpus, "training": used.training_s * gpus}


def dollars_each(state: State) -> tuple[float, float]:
    """What proposals cost by experiment and by keep."""
    kept = sum(branch.kept for branch in state.branches.values())
    return state.spent.dollars / max(1, len(state.records)), state.spent.dollars / max(1, kept)


def _cost(usage: Usage) -> dict[str, Any]:
    tokens = usage.input_tokens + usage.cache_write_tokens + usage.cache_read_tokens
    return {
        "dollars": usage.dollars,
        "input_tokens": tokens,
        "output_tokens": usage.output_tokens,
        "thinking_tokens": usage.thinking_tokens,
        "estimated": usage.estimated,
    }


def metric_name(state: State) -> str:
    """What the score is called."""
    return one_line((state.config.get("task") or {}).get("metric") or "val_bpb", 40)


def confirmed(record: Record) -> list[float]:
    """Metrics of the reruns on fresh seeds that ended with a score; the deciding run is not one."""
    return [
        r.metric for r in record.runs if r.purpose == "confirm" and r.metric is not None and r.ok
    ]


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Closing:
    """What the closing reruns of a branch's first and best say: metrics on fresh seeds."""

    first: list[float]
    best: list[float]
    gain: float  # of the means; positive is better
    noise: float  # standard error of the gain; 0 where there is a single run of each

    @property
    def real(self) -> bool:
        """Whether there is a gain beyond noise."""
        return self.gain > 2 * self.noise


def closing(state: State, branch: Branch) -> Closing | None:
    """None: first and best were not both run again."""
    first, best = (
        confirmed(state.record(name)) if name else [] for name in (branch.baseline, branch.best)
    )
    if not first or not best:
        return None
    gain = statistics.fmean(first) - statistics.fmean(best)
    variance = sum(statistics.variance(v) / len(v) for v in (first, best) if len(v) > 1)
    gain = -gain if state.direction == "maximise" else gain
    return Closing(first, best, gain, math.sqrt(variance))


# -- for the terminal -----------------------------------------------------------------------------


def status_text(state: State, controller: str | None = None, now: datetime | None = None) -> str:
    """`autoresearch status`: the branches, what runs, what was decided last."""
    now = now or datetime.now(UTC)
    state_is = condition(state, controller)
    why = (
        (state.paused or {}).get("reason") or state.stopped if state_is != "running" else controller
    )
    rows = [
        f"campaign {state.campaign or '-'}: {state_is}" + (f" ({one_line(why)})" if why else "")
    ]
    if state_is == "paused" and (remedy := (state.paused or {}).get("remedy")):
        rows.append(f"  {one_line(remedy)}")
    rows += ["", compare.text(state, STANDING)]
    for run in state.open_runs.values():
        where = (
            run.submission.node or run.submission.executor if run.submission else "not submitted"
        )
        rows.append(
            f"  running {run.run.id:<14} {run.branch}  {_since(run.time, now)}  {where}  "
            f"{one_line(state.record(run.run.experiment).description, 60)}"
        )
    for request in state.requests.values():
        rows.append(f"  asking  {request.branch}  {_since(request.time, now)}")
    if state.refused:
        rows.append(f"  the last order was refused: {one_line(state.refused)}")
    rows += ["", *_use(state)]
    if recent := [line(state, r.id) for r in state.recent(5)]:
        rows += ["", *recent[::-1]]
    return "\n".join(rows)


def _use(state: State) -> list[str]:
    share = (
        f", {state.training_s / state.allocated_s:.0%} of it training" if state.allocated_s else ""
    )
    rows = [f"  {duration(state.allocated_s)} of run time{share}"]
    if state.spent.dollars or state.spent.output_tokens:
        about = "about " if state.spent.estimated else ""
        each, keep = dollars_each(state)
        rows.append(
            f"  proposals: {about}{state.spent.dollars:.2f} dollars, "
            f"{each:.3f} an experiment, {keep:.3f} a keep"
        )
    return rows


def line(state: State, name: str) -> str:
    """One experiment in a line: id, commit, verdict, metric, change against the then-best."""
    record = state.record(name)
    change = "" if record.gain is None else signed(state, record.gain)
    return (
        f"{record.id}  {record.commit[:7]}  {status(record):<9} {value(state, record.metric):>10} "
        f"{change:>10}  {record.branch}  {one_line(record.description, 100)}"
    )


def signed(state: State, gain: float) -> str:
    """A gain (positive is better) as the metric's change."""
    change = gain if state.direction == "maximise" else -gain
    return f"{change:+.6g}" if is_general(state) else f"{change:+.6f}"


def chosen(state: State, branch: str | None, limit: int | None) -> list[Record]:
    """The latest experiments, of one branch if named, the latest first; no limit: all of them."""
    return state.recent(len(state.records) if limit is None else limit, branch)[::-1]


def log_text(state: State, branch: str | None = None, limit: int | None = 20) -> str:
    """`autoresearch log`: experiments as lines, the latest first."""
    return "".join(line(state, record.id) + "\n" for record in chosen(state, branch, limit))


def show_text(state: State, name: str, diff: str = "") -> str:
    """`autoresearch show`: everything that is recorded of an experiment."""
    record, experiment = state.record(name), state.experiment(name)
    facts = {
        "commit": record.commit,
        "parent": f"{record.parent or 'none: a baseline'} (commit {record.base[:10]})",
        "branch": record.branch,
        "researcher": experiment.researcher,
        "rebased from": experiment.rebased_from,
        "tags": ", ".join(record.tags),
        "lines": f"+{record.lines_added} -{record.lines_removed}",
        "proposed": record.time,
        "program": experiment.program_sha256,
        "cost": f"{experiment.usage.dollars:.4f} dollars" if experiment.usage.dollars else "",
    }
    rows = [line(state, name), "", one_line(experiment.hypothesis), ""]
    rows += [f"  {key + ':':<13} {one_line(str(item))}" for key, item in facts.items() if item]
    rows += ["", *_decision_rows(state, record)]
    for run, result in zip(record.runs, state.results(name), strict=True):
        rows += ["", *(f"  {row}" for row in _run_rows(state, run, result))]
    return "\n".join([*rows, "", diff]).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _decision_rows(state: State, record: Record) -> list[str]:
    decision = state.decision(record.id)
    if decision is None:
        return ["  undecided"]
    numbers = ", ".join(f"{k} {_brief(v)}" for k, v in decision.numbers.items() if v is not None)
    return [
        f"  {status(record)}: {one_line(decision.reason)}",
        f"  by {decision.rule} {decision.rule_version}, head {decision.head or 'none'}: {numbers}",
    ]


def _run_rows(state: State, run: RunRecord, result: Result) -> list[str]:
    """A run's facts, one a line: of its result, then of the rest of result.json."""
    rows = [f"run {result.run} ({run.purpose}): {result.status}, {one_line(result.reason)}"]
    known = {f: getattr(result, f) for f in result.__dataclass_fields__}
    left_out = ("run", "status", "reason", "details")
    # result.json calls "metric" what the score is called; here it is the score
    more = {k: v for k, v in result.details.items() if k not in known}
    facts = {k: v for k, v in known.items() if k not in left_out} | more
    plain = {k: v for k, v in facts.items() if v is not None and not isinstance(v, Mapping | list)}
    nested = {
        f"{k}.{inner}": v
        for k, item in facts.items()
        if isinstance(item, Mapping)
        for inner, v in item.items()
        if v is not None
    }
    for key, item in (plain | nested).items():
        rows.append(one_line(f"{key}: {_brief(item)}", LONGEST_FACT))
    return rows


def _brief(item: Any) -> str:
    return f"{item:.6g}" if isinstance(item, float) else str(item)


def duration(seconds: float) -> str:
    """'7 s', '12 min', '3.4 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _since(time: str, now: datetime) -> str:
    try:
        return duration(max(0.0, (now - datetime.fromisoformat(time)).total_seconds()))
    except (ValueError, TypeError):
        return "?"


# -- files and notes ------------------------------------------------------------------------------


def note_text(state: State, name: str) -> str:
    """What git log --notes=autoresearch shows beside an experiment's commit."""
    record = state.record(name)
    decision = state.decision(name)
    before = (decision.numbers if decision else {}).get("best")
    scores = [value(state, m) for m in (before, record.metric) if m is not None]
    head = f"{' -> '.join(scores) or 'no score'}, {status(record)}: {one_line(record.reason or '')}"
    rows = [head]
    if again := confirmed(record):
        mean, sd = mean_sd(again)
        spread = f" +- {sd:.6f}" if sd is not None else ""
        count = f"{len(again)} rerun{'s' if len(again) > 1 else ''}"
        rows.append(f"{count} on fresh seeds: {value(state, mean)}{spread}")
    rows += ["", f"experiment: {record.id}", *_decision_rows(state, record)[1:]]
    for run, result in zip(record.runs, state.results(name), strict=True):
        rows += ["", *_run_rows(state, run, result)]
    return "\n".join(row.strip() for row in rows)


def write_all(folder: Path, state: State, repository: Repository) -> dict[str, Path]:
    """Write every table, the picture and the page of a campaign's folder; where they are.

    Raises:
        OSError: the disk refused.
        Paused: git could not tell a keep's diff.
    """
    from jobs import page

    write_tables(folder, state)
    index = page.write_report(folder, state, lambda r: repository.diff(r.base, r.commit))
    return {
        "results.tsv": folder / "results.tsv",
        "results.parquet": folder / "results.parquet",
        "progress.png": index.with_name("progress.png"),
        "index.html": index,
    }


def mirror_notes(repository: Repository, state: State) -> int:
    """Note the experiments that were decided or rerun since the last call; how many there were."""
    from jobs import mirror

    noted = mirror.noted(repository)
    due = [
        record
        for record in state.experiments()
        if is_settled(record)
        and (record.commit not in noted or any(r.purpose == "confirm" for r in record.runs))
    ]
    if due:
        mirror.note(repository, {record.commit: note_text(state, record.id) for record in due})
    return len(due)
