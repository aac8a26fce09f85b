"""Opening a campaign's history quickly: snapshot.json, checked against the ledger it was made from.

Line 1 is a header (which ledger, how far, checksum), line 2 everything that is small, and then one
line for each chunk of experiments, decoded only when somebody looks. A snapshot that does not fit
is ignored: the ledger alone is the truth.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.effects import effect
from jobs.history import State, fold
from jobs.ledger import Lines, Tail, read, sync_folder
from jobs.model import from_json, to_json
from jobs.records import Branch, Chunk, NodeRun, OpenRun, Request, Vector

VERSION = 4
_PROOF_BYTES = 65536  # of the ledger's first and last bytes that a snapshot vouches for

# Fields of a State that are JSON as they are (in_flight but for being a tuple).
_PLAIN = (
    *("campaign", "start", "config", "in_flight", "parked_in_row"),
    *("refused", "paused", "stopped", "fence", "events", "time", "night"),
)


def open_history(folder: Path) -> tuple[State, Tail]:
    """The state of the campaign in `folder`, from its snapshot where that fits, and where it ends.

    Raises:
        FileNotFoundError: there is no ledger.
        LedgerBroken: the ledger cannot be read or folded.
    """
    path = folder / "ledger.jsonl"
    source, tail = Lines(path), Tail()
    state, offset = load(folder) or (State(), 0)
    return fold(read(path, offset, tail), state, source), tail


def due(state: State, saved_events: int) -> bool:
    """Whether so much was appended since the last `save` that the next start would feel it."""
    return state.events - saved_events >= max(1000, state.events // 50)


def save(folder: Path, state: State, offset: int) -> None:
    """Writes snapshot.json atomically; `offset`: bytes of the ledger that `state` is the fold of.

    Raises OSError: the disk refuses; nothing is lost by that.
    """
    body = [json.dumps(_small(state), separators=(",", ":")).encode()]
    body += [chunk.text for chunk in state.records.chunks]
    data = b"\n".join(body)
    header = {
        "v": VERSION,
        "offset": offset,
        "ledger_sha256": _proof(folder / "ledger.jsonl", offset),
        "experiments": len(state.records),
        "crc32": zlib.crc32(data),
    }
    with effect("snapshot.write"):
        temporary = folder / ".snapshot.json"
        with open(temporary, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n" + data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "snapshot.json")
        sync_folder(folder)


def load(folder: Path) -> tuple[State, int] | None:
    """The snapshot's state and the offset in the ledger that it stands for; None if unusable."""
    try:
        first, _, data = (folder / "snapshot.json").read_bytes().partition(b"\n")
        header = json.loads(first)
        if header["v"] != VERSION or header["crc32"] != zlib.crc32(data):
            return None
        if header["ledger_sha256"] != _proof(folder / "ledger.jsonl", header["offset"]):
            return None
        small, *chunks = data.split(b"\n")
        records = Vector((Chunk(text=text) for text in chunks), header["experiments"])
        return _state(json.loads(small), records), header["offset"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _proof(ledger: Path, offset: int) -> str | None:
    """Hash of the beginning and of the end of the ledger's first `offset` bytes.

    Every line carries its number and time, so the end alone tells ledgers apart; None where the
    ledger is shorter.
    """
    with open(ledger, "rb") as file:
        if os.fstat(file.fileno()).st_size < offset:
            return None
        head = file.read(min(_PROOF_BYTES, offset))
        file.seek(max(0, offset - _PROOF_BYTES))
        end = file.read(min(_PROOF_BYTES, offset))
    return hashlib.sha256(head + end).hexdigest()


def _small(state: State) -> dict[str, Any]:
    """All of a state but its records, as JSON."""
    return {
        **{name: getattr(state, name) for name in _PLAIN},
        "branches": {name: to_json(branch) for name, branch in state.branches.items()},
        "open_runs": [to_json(run) for run in state.open_runs.values()],
        "requests": [to_json(request) for request in state.requests.values()],
        "nodes": state.nodes,
        "orders": sorted(state.orders),
    }


def _state(small: Mapping[str, Any], records: Vector) -> State:
    runs = [from_json(OpenRun, item) for item in small["open_runs"]]
    requests = [from_json(Request, item) for item in small["requests"]]
    plain = {name: small[name] for name in _PLAIN}
    return State(
        **{**plain, "in_flight": tuple(small["in_flight"]), "night": tuple(small["night"])},
        records=records,
        branches={name: from_json(Branch, item) for name, item in small["branches"].items()},
        open_runs={item.run.id: item for item in runs},
        requests={item.proposal: item for item in requests},
        nodes={k: tuple(NodeRun(*run) for run in seen) for k, seen in small["nodes"].items()},
        orders=frozenset(small["orders"]),
    )
