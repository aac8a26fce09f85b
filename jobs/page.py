"""report/index.html: one page that says what a campaign found, what it took, and how to repeat it.

Descriptions, reasons and diffs are others' text: everything is escaped.
"""

from __future__ import annotations

import base64
import html
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import disk, picture, report, tables
from jobs.history import State
from jobs.records import Branch, Record
from jobs.tables import write_whole
from jobs.text import lines, one_line

LONGEST_DIFF = 400  # lines of one keep that the page shows


def write_report(folder: Path, state: State, diff: Callable[[Record], str]) -> Path:
    """Write results.parquet, report/progress.png and report/index.html of a campaign's folder.

    `diff` gives a keep's diff against its base. Returns the page's path. Costs a second or two.
    Raises OSError: the disk refused.
    """
    table = tables.write_parquet(folder / "results.parquet", state)
    png = picture.progress(state)
    write_whole(folder / "report" / "progress.png", png)
    path = folder / "report" / "index.html"
    heads = folder / "heads"
    samples = {
        name: _sample(heads / name / (branch.best or "") / disk.SAMPLE)
        for name, branch in state.branches.items()
    }
    write_whole(path, page(state, table, png, diff, samples).encode("utf-8", "replace"))
    return path


def _sample(path: Path) -> str:
    """What a branch's best model writes by itself, where its program left it."""
    try:
        return lines(path.read_text(errors="replace"))
    except OSError:
        return ""


def page(
    state: State,
    table: Any,
    png: bytes,
    diff: Callable[[Record], str],
    samples: Mapping[str, str],
) -> str:
    """The HTML, pictures and style inside.

    Args:
        table: what `tables.write_parquet` returned.
        samples: by branch, text that its best model wrote; "" where there is none.
    """
    data = base64.b64encode(png).decode()
    as_of = _text(f"{picture.title(state)}; as of {state.time}")
    parts = [
        f"<h1>{_text(state.campaign)}</h1><p>{as_of}</p>",
        *(
            _headline(state, branch) + _written(samples[branch.name])
            for branch in state.branches.values()
        ),
        f'<img alt="progress" src="data:image/png;base64,{data}">',
        *(_keeps(state, branch, diff) for branch in state.branches.values()),
        "<h2>What failed</h2>",
        _failures(state, table),
        "<h2>What it took</h2>",
        _use(state, table),
        "<h2>Again</h2>",
        _again(state),
    ]
    title = _text(f"{state.campaign}: report")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>{STYLE}'
    return f"{head}{''.join(parts)}</html>\n"


STYLE = """<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.25em .7em;text-align:right;
border-bottom:1px solid #ddd;vertical-align:top}td.l,th.l{text-align:left}img{max-width:100%}
pre{background:#f6f6f6;padding:.6em;overflow:auto;font-size:12px;text-align:left;max-height:40em}
.big{font-size:1.5em}summary{cursor:pointer}.add{color:#1a7f37}.del{color:#b42318}
</style>"""


def _text(text: object) -> str:
    return html.escape(one_line(str(text)))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Cells are HTML already; the first `left` columns and the last are text."""

    def row(cells: Sequence[str], tag: str) -> str:
        def kind(i: int) -> str:
            return ' class="l"' if i < left or i == len(cells) - 1 else ""

        return (
            "<tr>" + "".join(f"<{tag}{kind(i)}>{c}</{tag}>" for i, c in enumerate(cells)) + "</tr>"
        )

    return f"<table>{row(titles, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _headline(state: State, branch: Branch) -> str:
    first, best = branch.baseline_metric, branch.best_metric
    if first is None or best is None:
        return f"<h2>{_text(branch.name)}</h2><p>No baseline with a score yet.</p>"
    gain = first - best if state.direction == "minimise" else best - first
    name, shown = _text(report.metric_name(state)), tables.value
    words = (
        f"<h2>{_text(branch.name)}</h2><p class=big>{name} {shown(state, first)} &rarr; "
        f"{shown(state, best)}, gain {gain:.6g}</p>"
    )
    if branch.best == branch.baseline:
        return f"{words}<p>Nothing was better than the baseline.</p>"
    again = report.closing(state, branch)
    if again is None:
        flatters = "One run each, and the best of many flatters: not rerun on fresh seeds yet."
        return f"{words}<p>{flatters}</p>"
    cells = []
    for label, n, values in (
        ("first", branch.baseline, again.first),
        ("best", branch.best, again.best),
    ):
        mean, sd = report.mean_sd(values)
        spread = "" if sd is None else f" &plusmn; {sd:.2g}"
        cells.append(f"{label} ({_text(n)}): {mean:.6g}{spread}, n = {len(values)}")
    verdict = f"<b>Gain {again.gain:.6g}</b>"
    if not again.real:
        verdict = f"<b>No gain beyond noise</b>: {again.gain:.6g} &plusmn; {again.noise:.2g}"
    return f"{words}<p>Again on fresh seeds: {'; '.join(cells)}. {verdict}</p>"


def _written(sample: str) -> str:
    return f"<p>The best model writes:</p><pre>{html.escape(sample)}</pre>" if sample else ""


def _keeps(state: State, branch: Branch, diff: Callable[[Record], str]) -> str:
    rows = []
    for record in state.chain(branch.name):
        change = "" if record.gain is None else report.signed(state, record.gain)
        rows.append(
            (
                _text(record.id),
                f"<code>{_text(record.commit[:10])}</code>",
                tables.value(state, record.metric),
                change,
                f"+{record.lines_added} &minus;{record.lines_removed}",
                _text(record.description) + (_diff(diff(record)) if record.parent else ""),
            )
        )
    titles = ("", "commit", _text(report.metric_name(state)), "change", "lines", "what was kept")
    return f"<h2>Kept on {_text(branch.name)}</h2>{_table(titles, rows, 2)}"


def _diff(text: str) -> str:
    rows = lines(text).split("\n")
    shown = []
    for row in rows[:LONGEST_DIFF]:
        kind = {"+": "add", "-": "del"}.get(row[:1])
        shown.append(f"<span class={kind}>{html.escape(row)}</span>" if kind else html.escape(row))
    if len(rows) > LONGEST_DIFF:
        shown.append(f"... {len(rows) - LONGEST_DIFF} more lines")
    return f"<details><summary>diff</summary><pre>{chr(10).join(shown)}</pre></details>"


def _failures(state: State, table: Any) -> str:
    """Failed experiments by what their last run said."""
    groups: dict[tuple[str, str], list[str]] = {}
    columns = (table.column(name).to_pylist() for name in ("experiment", "status", "run_details"))
    for name, kind, runs in zip(*columns, strict=True):
        if kind not in ("keep", "discard"):
            said = next((r["reason"] for r in reversed(runs) if r["status"] != "ok"), None)
            reason = one_line(said or state.record(name).reason or "", 160)
            groups.setdefault((kind, reason), []).append(name)
    if not groups:
        return "<p>Nothing.</p>"
    rows = [
        (_text(kind), str(len(found)), ", ".join(found[:8]), _text(reason))
        for (kind, reason), found in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return _table(("", "times", "experiments", "reason"), rows[:40])


def _use(state: State, table: Any) -> str:
    """Run time by what became of it, and what proposals cost."""
    count: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    training: dict[str, float] = defaultdict(float)
    columns = (table.column(n).to_pylist() for n in ("status", "total_s", "training_s"))
    for kind, total, trained in zip(*columns, strict=True):
        kind = kind if kind in ("keep", "discard", "parked") else "failed"
        count[kind] += 1
        seconds[kind] += total or 0.0
        training[kind] += trained or 0.0
    rows = [
        (k, str(count[k]), report.duration(seconds[k]), _share(training[k], seconds[k]), "")
        for k in count
    ]
    rows.append(
        (
            "all runs",
            str(len(state.records)),
            report.duration(state.allocated_s),
            _share(state.training_s, state.allocated_s),
            "time that places were held for them",
        )
    )
    spent, each = state.spent, report.dollars_each(state)
    money = f"{spent.dollars:.2f} dollars" + (" (in part estimated)" if spent.estimated else "")
    tokens = spent.input_tokens + spent.cache_read_tokens + spent.cache_write_tokens
    cost = (
        f"<p>Proposals: {money}, {each[0]:.3f} an experiment, {each[1]:.3f} a keep; "
        f"{tokens:,} tokens read, {spent.output_tokens:,} written.</p>"
    )
    return _table(("experiments", "count", "run time", "training", ""), rows) + _waits(table) + cost


def _waits(table: Any) -> str:
    """What a run waits for a GPU, and a GPU for a run."""
    runs = [run for runs in table.column("run_details").to_pylist() for run in runs]
    found = []
    for name, words in (
        ("queue_s", "in the queue"),
        ("turnaround_s", "from a run's end to the next"),
    ):
        if known := [run[name] for run in runs if run[name] is not None]:
            found.append(f"{statistics.median(known):.1f} s {words}")
    return f"<p>In the median {', '.join(found)}.</p>" if found else ""


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _again(state: State) -> str:
    """Commands and the hashes that they rest on."""
    commands = []
    for branch in state.branches.values():
        if branch.best:
            commands.append(
                f"autoresearch reproduce {branch.best}    # {state.record(branch.best).commit}"
            )
            commands.append(
                f"git log --notes=autoresearch autoresearch/{state.campaign}/{branch.name}"
            )
    plain = {
        k: v for k, v in state.start.items() if isinstance(v, str) and k not in ("event", "time")
    }
    facts = "".join(
        f"<tr><td class=l>{_text(k)}</td><td class=l><code>{_text(v)}</code></td></tr>"
        for k, v in plain.items()
    )
    return f"<pre>{html.escape(chr(10).join(commands))}</pre><table>{facts}</table>"
