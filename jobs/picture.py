"""report/progress.png: every experiment a dot by what became of it, the best a staircase."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

from jobs import report, tables
from jobs.history import State, better
from jobs.records import Branch, Record
from jobs.text import one_line

COLOURS = ("#1f6f43", "#2458a6", "#a63d24", "#7a3fa0", "#8a6d00", "#0f7a80")  # staircases
MARKS = {  # colour, marker, size, layer
    "keep": ("#2ca02c", "o", 34, 4),
    "discard": ("#b8b8b8", "o", 12, 2),
    "parked": ("#ff9f1c", "s", 14, 2),
    "no score": ("#d62728", "x", 16, 2),
    "far worse": ("#8a8a8a", "d", 14, 2),
}
LABELLED = 25  # keeps at most that carry their description in the picture


def progress(state: State) -> bytes:
    """The PNG. Costs about a second, for matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    records = [r for r in state.experiments() if tables.is_settled(r)]
    again = _reruns(state)
    low, high = _window(state, records)
    for _, mean, sd in again:
        beyond = sd + 0.04 * (high - low)
        low, high = min(low, mean - beyond), max(high, mean + beyond)
    _dots(axes, state, records, low, high)
    for branch in state.branches.values():
        _staircase(axes, state, branch)
    if again:
        xs, means, sds = zip(*again, strict=True)
        label = "reruns on fresh seeds, mean and sd"
        looks: dict[str, Any] = {"markersize": 6, "markerfacecolor": "white", "color": "#222222"}
        axes.errorbar(xs, means, yerr=sds, fmt="D", zorder=6, capsize=4, label=label, **looks)
    axes.set_ylim(low, high)
    axes.set_xlim(0, max(10, len(state.records)) * 1.02 + 1)
    axes.set_xlabel("experiment")
    aim = "higher" if state.direction == "maximise" else "lower"
    axes.set_ylabel(f"{report.metric_name(state)} ({aim} is better)", parse_math=False)
    axes.set_title(title(state), loc="left", fontsize=11, parse_math=False)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8, frameon=False, ncols=2)
    sink = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks are drawn as boxes
        figure.savefig(sink, format="png", metadata={"Software": None})  # no version: same bytes
    return sink.getvalue()


def _window(state: State, records: Sequence[Record]) -> tuple[float, float]:
    """Limits of the axis: the best to a bit beyond the baselines; what is out lies at the edge."""
    metrics = sorted(r.metric for r in records if r.metric is not None)
    if not metrics:
        return 0.0, 1.0
    if state.direction == "maximise":
        metrics.reverse()
    usual = metrics[int(0.8 * (len(metrics) - 1))]  # four in five are no worse
    starts = [b.baseline_metric for b in state.branches.values() if b.baseline_metric is not None]
    worst = max([usual, *starts], key=lambda metric: abs(metric - metrics[0]))
    span = (worst - metrics[0]) or abs(metrics[0]) * 0.01 or 1.0
    edges = metrics[0] - 0.12 * span, worst + 0.4 * span
    return min(edges), max(edges)


def _dots(axes: Any, state: State, records: Sequence[Record], low: float, high: float) -> None:
    """Each experiment; what has no score, or one far out of sight, along the worse edge."""
    maximise = state.direction == "maximise"
    edge = low + 0.03 * (high - low) if maximise else high - 0.03 * (high - low)
    groups: dict[str, list[tuple[int, float, str]]] = {name: [] for name in MARKS}
    for record in records:
        kind, y = tables.status(record), record.metric
        if y is None or not low <= y <= high:
            kind, y = "far worse" if y is not None else kind, edge
        name = kind if kind in MARKS else "no score"
        colour = MARKS[name][0]
        if name == "keep" and len(state.branches) > 1:
            colour = _colour(state, record.branch)
        groups[name].append((int(record.id[1:]), y, colour))
    shrink = max(0.4, min(1.0, (150 / max(1, len(records))) ** 0.5))
    for name, points in groups.items():
        if points:
            xs, ys, colours = zip(*points, strict=True)
            _, marker, size, layer = MARKS[name]
            label = f"{name} ({len(points)})"
            axes.scatter(
                xs, ys, s=size * shrink, c=colours, marker=marker, label=label, zorder=layer
            )


def _colour(state: State, branch: str) -> str:
    return COLOURS[list(state.branches).index(branch) % len(COLOURS)]


def _staircase(axes: Any, state: State, branch: Branch) -> None:
    """The best so far: a step at each keep that improved it."""
    steps: list[tuple[int, float, str]] = []
    for record in state.chain(branch.name):
        y = record.metric
        if y is not None and (not steps or better(y, steps[-1][1], state.direction)):
            steps.append((int(record.id[1:]), y, one_line(record.description, 44)))
    if not steps:
        return
    xs, ys, texts = (list(column) for column in zip(*steps, strict=True))
    label = f"best of {branch.name}: {tables.value(state, ys[-1])}"
    axes.step(
        [*xs, len(state.records)],
        [*ys, ys[-1]],
        where="post",
        color=_colour(state, branch.name),
        linewidth=1.6,
        zorder=3,
        label=label,
    )
    if len(state.branches) == 1 and len(steps) <= LABELLED:
        looks = {"rotation": 28, "fontsize": 7, "color": "#444444", "parse_math": False}
        for x, y, text in zip(xs, ys, texts, strict=True):
            axes.annotate(text, (x, y), (5, 5), textcoords="offset points", zorder=5, **looks)


def _reruns(state: State) -> list[tuple[int, float, float]]:
    """First and best again on fresh seeds: (number, mean, standard deviation or 0)."""
    points = []
    for branch in state.branches.values():
        for name in dict.fromkeys(filter(None, (branch.baseline, branch.best))):
            if values := report.confirmed(state.record(name)):
                mean, sd = report.mean_sd(values)
                points.append((int(name[1:]), mean, sd or 0.0))
    return points


def title(state: State) -> str:
    """'night: 126 experiments, 23 kept'."""
    kept = sum(b.kept for b in state.branches.values())
    return f"{state.campaign}: {len(state.records)} experiments, {kept} kept"
