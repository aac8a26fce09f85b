"""results.tsv (upstream's five columns) and results.parquet (everything), in order of decision.

Both are made from the state alone and hold the experiments that are decided; writing them again
reads only what is new, and gives the same bytes or rows as writing them from nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs.history import State
from jobs.model import Result, to_json
from jobs.records import Place, Record
from jobs.text import one_line

SCORELESS = "crash"  # upstream's word for whatever left no score


def settled(state: State, branch: str | None = None) -> list[Record]:
    """The decided experiments, of one branch if named, in the order they were decided."""
    found = (r for r in state.experiments(branch) if is_settled(r))
    return sorted(found, key=lambda r: _order(r.decided))


def is_settled(record: Record) -> bool:
    """Whether it has its final verdict."""
    return record.verdict not in (None, "measure")


def status(record: Record) -> str:
    """keep, discard, parked, or how it failed: crash, timeout, oom, invalid, ..."""
    if record.verdict == "discard" and record.status != "ok":
        return record.status or SCORELESS
    return record.verdict if record.verdict and is_settled(record) else "running"


def value(state: State, metric: float | None) -> str:
    """A metric as it is printed: bits per byte with six decimals; empty where there is none."""
    if metric is None:
        return ""
    return f"{metric:.6g}" if is_general(state) else f"{metric:.6f}"


def is_general(state: State) -> bool:
    """Whether the task is one of the user's own, with a metric of any size."""
    return (state.config.get("task") or {}).get("kind") == "general"


def _order(place: Place | None) -> int:
    return place if isinstance(place, int) else (place or {}).get("n", 0)


# -- results.tsv ----------------------------------------------------------------------------------


class Tables:
    """results.tsv of a campaign and branches/<branch>/results.tsv, kept up by appending rows."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the campaign's."""
        self.folder = folder
        self._sizes: dict[str | None, int | None] = {}  # of tables as this object left them
        self._seen = 0  # experiments at the last update
        self._open: tuple[str, ...] = ()  # those of them that were undecided

    def update(self, state: State) -> None:
        """Bring every table up to `state`; costs what is new, not what is there.

        Raises OSError: the disk refused.
        """
        new = self._newly_settled(state) if self._sizes else []
        moved = {None, *(record.branch for record in new)} if new else set()
        for branch in (None, *state.branches):
            if branch in self._sizes and branch not in moved:
                continue
            path = (self.folder / "branches" / branch if branch else self.folder) / "results.tsv"
            if branch not in self._sizes or _size(path) != self._sizes[branch]:
                _catch_up(path, state, branch)
            else:
                _append(path, [_row(state, r) for r in new if branch in (None, r.branch)])
            self._sizes[branch] = _size(path)
        self._seen, self._open = len(state.records), state.in_flight

    def _newly_settled(self, state: State) -> list[Record]:
        names = [*self._open, *(state.records[i].id for i in range(self._seen, len(state.records)))]
        new = [record for record in map(state.record, names) if is_settled(record)]
        return sorted(new, key=lambda r: _order(r.decided))


def write_tables(folder: Path, state: State) -> None:
    """Bring the tables in a campaign's folder up to `state`, once (`Tables` does so repeatedly)."""
    Tables(folder).update(state)


def _row(state: State, record: Record) -> bytes:
    verdict = SCORELESS if record.verdict == "discard" and record.status != "ok" else record.verdict
    columns = (
        record.commit[:7],
        value(state, record.metric) if record.status == "ok" else "",
        _memory_gb(state.result(run) for run in record.runs if run.purpose != "confirm"),
        verdict or "",
        one_line(record.description),
    )
    return ("\t".join(columns) + "\n").encode("utf-8", "replace")


def _memory_gb(results: Iterable[Result]) -> str:
    peak = max((r.gpu_memory_mb or r.memory_mb or 0.0 for r in results), default=0.0)
    return f"{peak / 1024:.1f}" if peak else ""


def _header(state: State) -> bytes:
    metric = (state.config.get("task") or {}).get("metric") or "val_bpb"
    return f"commit\t{one_line(metric)}\tmemory_gb\tstatus\tdescription\n".encode()


def _catch_up(path: Path, state: State, branch: str | None) -> None:
    """Append what is missing if what is there can be trusted, else write it anew."""
    records = settled(state, branch)
    try:
        old = path.read_bytes()
    except FileNotFoundError:
        old = b""
    count = old.count(b"\n") - 1
    last = old[old.rfind(b"\n", 0, -1) + 1 :]
    if old.startswith(_header(state)) and 0 <= count <= len(records):
        expected = _row(state, records[count - 1]) if count else _header(state)
        if last == expected:  # also says that no line is torn
            _append(path, [_row(state, r) for r in records[count:]])
            return
    write_whole(path, _header(state) + b"".join(_row(state, r) for r in records))


def _append(path: Path, rows: list[bytes]) -> None:
    if rows:
        with open(path, "ab", buffering=0) as file:
            file.write(b"".join(rows))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


# -- results.parquet ------------------------------------------------------------------------------

_TEXT = (
    *("experiment", "branch", "commit", "base", "parent", "rebased_from", "verdict", "status"),
    *("reason", "description", "hypothesis", "researcher", "program_sha256", "rule", "node", "gpu"),
)
_FLOATS = ("metric", "best_before", "gain", "required", "dollars")
_PEAKS = ("memory_mb", "gpu_memory_mb")
_SECONDS = ("queue_s", "turnaround_s", "startup_s", "training_s", "scoring_s", "total_s")
_COUNTS = ("lines_added", "lines_removed", "runs", "steps", "tokens", "params")
_USAGE = (
    *("input_tokens", "output_tokens", "thinking_tokens", "cache_write_tokens"),
    "cache_read_tokens",
)


@functools.cache
def schema() -> Any:
    """Columns and types of results.parquet; every one may be null."""
    import pyarrow as pa

    moment = pa.timestamp("ms", tz="UTC")
    run = [
        (n, pa.string()) for n in ("run", "purpose", "status", "reason", "node", "gpu", "details")
    ]
    run += [(n, pa.int64()) for n in ("seed", "attempt", "steps", "tokens", "params")]
    run += [(n, pa.float64()) for n in ("metric", *_PEAKS, *_SECONDS)]
    run += [("started", moment), ("ended", moment)]
    return pa.schema(
        [
            *((name, pa.string()) for name in _TEXT),
            *((name, pa.float64()) for name in (*_FLOATS, *_PEAKS, *_SECONDS)),
            *((name, pa.int64()) for name in (*_COUNTS, *_USAGE)),
            ("usage_estimated", pa.bool_()),
            ("tags", pa.list_(pa.string())),
            ("proposed_at", moment),
            ("decided_at", moment),
            ("run_details", pa.list_(pa.struct(run))),
        ]
    )


def write_parquet(path: Path, state: State) -> Any:
    """Write results.parquet, a row for each decided experiment. Returns the pyarrow table.

    Seconds and memory are sums and peaks over all runs of an experiment, closing reruns included;
    `run_details` has each run. Rows that the file has already are taken over from it. Raises
    OSError: the disk refused.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    old = _read_old(path)
    places = {}
    if old is not None:
        keys = (old.column(name).to_pylist() for name in ("experiment", "commit", "runs"))
        places = {key: i for i, key in enumerate(zip(*keys, strict=True))}
    records = settled(state)
    # closing reruns are added to experiments that were decided long before
    new = [r for r in records if (r.id, r.commit, len(r.runs)) not in places]
    made = pa.Table.from_pylist([_parquet_row(state, r) for r in new], schema=schema())
    fresh = {r.id: i for i, r in enumerate(new)}
    offset = 0 if old is None else len(old)
    order = [
        offset + fresh[r.id] if r.id in fresh else places[r.id, r.commit, len(r.runs)]
        for r in records
    ]
    table = made if old is None else pa.concat_tables([old, made]).take(pa.array(order, pa.int64()))
    if old is None or order != list(range(len(old))):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_whole(path, sink.getvalue().to_pybytes())
    return table


def _read_old(path: Path) -> Any:
    """The table that is there, None if there is none of this schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
    except (FileNotFoundError, pa.ArrowException):
        return None
    return table if table.schema.equals(schema()) else None


def _parquet_row(state: State, record: Record) -> dict[str, Any]:
    experiment, decision = state.experiment(record.id), state.decision(record.id)
    results = state.results(record.id)
    first = next((r for r in results if r.ok), None)
    numbers: Mapping[str, Any] = decision.numbers if decision else {}
    row = {**to_json(experiment), **to_json(experiment.usage), "experiment": record.id}
    row |= {"usage_estimated": experiment.usage.estimated, "proposed_at": _moment(record.time)}
    row |= {"verdict": record.verdict, "status": status(record), "reason": record.reason}
    row |= {"metric": record.metric, "best_before": numbers.get("best"), "gain": record.gain}
    row |= {"required": numbers.get("required"), "runs": len(results)}
    row |= {"rule": decision and f"{decision.rule} {decision.rule_version}"}
    row |= {"decided_at": _moment(_time(state, record.decided))}
    row |= {
        name: getattr(first, name, None) for name in ("steps", "tokens", "params", "node", "gpu")
    }
    for names, combine in ((_PEAKS, max), (_SECONDS, sum)):
        for name in names:
            known = [x for x in (getattr(r, name) for r in results) if x is not None]
            row[name] = combine(known) if known else None
    row["run_details"] = [
        {
            **to_json(result),
            **{"seed": run.seed, "attempt": run.attempt, "purpose": run.purpose},
            **{"started": _moment(result.started), "ended": _moment(result.ended)},
            "details": json.dumps(to_json(result.details), sort_keys=True),
        }
        for run, result in zip(record.runs, results, strict=True)
    ]
    return {name: row.get(name) for name in schema().names}


def _time(state: State, place: Place | None) -> str | None:
    event = state.source(place) if isinstance(place, int) and state.source else place
    return event.get("time") if isinstance(event, Mapping) else None


def _moment(text: str | None) -> Any:
    from datetime import datetime

    try:
        moment = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return moment
