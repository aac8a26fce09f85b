"""The referee process: serves one program its data, watches the clock, takes the score.

Run as `python -m referee.server` with trainer/ on PYTHONPATH and a specification (JSON) on standard
input. It has no torch, maps nothing that the program can write to, and whatever the program sends
it answers in words; score.json, its account of the run, is written to its private folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import rows as data  # trainer/rows.py

from . import protocol
from .clock import Clock, Terms
from .protocol import Garbage, Refused
from .ring import Ring
from .score import NotFinite, Scoring

TELEMETRY_BYTES = 8 * 2**20


class Feed:
    """The training rows in the order of the run's seed, one batch written ahead."""

    def __init__(self, folder: Path, seed: int, longest: int, ring: Ring):
        self._folder, self._seed, self._longest, self._ring = folder, seed, longest, ring
        self._stream: data.RowStream | None = None
        self._position = 0
        self._ahead: tuple[tuple[int, int], tuple[np.ndarray, int, int], int] | None = None
        self._last: tuple[np.ndarray, int, int] | None = None  # rows, epoch, offset
        self.epoch = 1

    def check(self, message: Mapping[str, Any]) -> tuple[int, int]:
        """(rows, length) as asked. Raises Refused for what is not served."""
        count, length = protocol.whole(message, "rows"), protocol.whole(message, "length")
        if message.get("split") != "train":
            raise Refused(
                f"the split {message.get('split')!r:.40} is not served: only 'train'."
                " Validation rows are the referee's, see evaluate_bpb"
            )
        if length > self._longest:
            raise Refused(f"T = {length} is longer than MAX_SEQ_LEN = {self._longest}")
        check_size(count, length)
        return count, length

    def fresh(self, count: int, length: int) -> tuple[int, int]:
        """Hand out the next batch: (offset in the shared file, epoch)."""
        if self._ahead is None or self._ahead[0] != (count, length):
            self._write_ahead(count, length)
        assert self._ahead is not None
        _, (rows, self.epoch, self._position), offset = self._ahead
        self._ahead = None
        self._last = rows, self.epoch, offset
        return offset, self.epoch

    def repeat(self, count: int, length: int) -> tuple[int, int]:
        """The last batch again, cut or repeated to the shape asked for."""
        if self._last is None:
            return self.fresh(count, length)
        rows, epoch, offset = self._last
        if rows.shape != (count, length + 1):
            rows = np.resize(rows, (count, length + 1))
            offset = self._ring.put(rows)
            self._last = rows, epoch, offset
        return offset, epoch

    def prepare(self, count: int, length: int) -> None:
        """Write the batch that will most likely be asked for next."""
        if self._ahead is None:
            self._write_ahead(count, length)

    def _write_ahead(self, count: int, length: int) -> None:
        if self._stream is None or length != self._stream.T:
            self._change(length)
        stream = self._stream
        assert stream is not None
        batch = stream.take(count, self._position)
        self._ahead = (count, length), batch, self._ring.put(batch[0])

    def _change(self, length: int) -> None:
        """Go on with rows of another length. One stream is open at a time: it may fill memory."""
        before, self._stream = self._stream, None
        if before is not None:
            before.close()
        stream = data.RowStream(self._folder, "train", length, self._seed)
        if before is not None:
            self._position = stream.follow(before, self._position)
        self._stream = stream


class Referee:
    """One run, from the hello to the account. Methods named on_* answer the message of that name.

    Raises rows.DataError when the data folder cannot serve this run.
    """

    def __init__(self, spec: Mapping[str, Any]):
        folder = Path(spec["data"])
        self._scale = data.check(folder)["scale"]
        if spec.get("scale") not in (None, self._scale["name"]):
            raise data.DataError(
                f"{folder} holds data of scale {self._scale['name']!r}, the run is of"
                f" {spec['scale']!r}: prepare the data for that scale"
            )
        self._folder, self._seed = folder, spec["seed"]
        self._private = Path(spec["private"])
        self._scoring_limit_s = spec.get("scoring_limit_s", 600.0)
        # The one file of the data folder that a program reads.
        shutil.copyfile(folder / "tokenizer.json", Path(spec["shared"]) / "tokenizer.json")
        self._ring = Ring(Path(spec["shared"]) / protocol.RING_NAME)
        self._feed = Feed(folder, self._seed, self._scale["max_seq_len"], self._ring)
        self.clock = Clock(terms(spec, self._scale), spec.get("begun", time.monotonic()))
        self._scoring: Scoring | None = None
        self._asked = 0  # index of the batch of rows that is being answered
        self._answers = (0, 0, 0)  # offset in the shared file, rows, T
        self._deadline: float | None = None
        self._after: Any = None  # work left for after the reply
        self._telemetry = (self._private / "telemetry.jsonl").open("wb")
        self._account: dict[str, Any] = {
            "protocol": protocol.VERSION,
            "state": "unscored",
            "reason": "the program never connected",
            "scale": self._scale["name"],
            "budget": {"kind": self.clock.terms.kind, "amount": self.clock.terms.amount},
            "val_bpb": None,
            "batches": 0,
            "waiting_seconds": None,  # as the program tells it
            "scoring_seconds": None,
            "refusals": [],
            "reported": {},  # the last value of each name that the program logged
        }

    def serve(self, connection: socket.socket) -> None:
        """Answer until the program leaves, breaks the protocol or exceeds the scoring limit."""
        try:
            greeted = self._greet(connection)
            while greeted:
                self._wait(connection)
                message = protocol.receive(connection)
                if message is None:
                    break
                protocol.send(connection, self._answer(message))
                self._finish()
            self._ring.check()
        except (Garbage, RecursionError) as error:
            self._end("invalid", str(error))
            with contextlib.suppress(OSError):
                protocol.send(connection, {"type": "invalid", "reason": str(error)[:1000]})
        except TimeoutError:
            limit = f"{self._scoring_limit_s:g} s"
            self._end("overtime", f"scoring took longer than its limit of {limit}")
        except OSError as error:  # the program died with a message half sent
            print(f"the program left: {error}", file=sys.stderr)

    def write_account(self) -> None:
        """Write score.json, whole or not at all. Repeated: the last one holds."""
        account = {
            **self._account,
            **self.clock.report(time.monotonic()),
            "epoch": self._feed.epoch,
            "referee_cpu_seconds": round(time.process_time(), 4),
        }
        draft = self._private / ".score.json"
        draft.write_text(json.dumps(account, indent=1, allow_nan=False) + "\n")
        draft.rename(self._private / "score.json")

    # --- messages ---------------------------------------------------------------------------------

    def _greet(self, connection: socket.socket) -> bool:
        """Exchange hellos. False: there is nobody to serve."""
        hello = protocol.receive(connection)
        self._end("unscored", "the program never asked to be scored")
        if hello is None:
            return False
        if hello["type"] != "hello" or hello.get("protocol") != protocol.VERSION:
            reason = (
                f"this referee speaks protocol {protocol.VERSION}, the program opened with"
                f" {hello['type']!r:.20} of protocol {hello.get('protocol')!r:.20}"
            )
            self._end("refused", reason)
            protocol.send(connection, {"type": "refused", "reason": reason})
            return False
        budget = self.clock.terms.time_budget
        welcome = {
            "type": "welcome",
            "protocol": protocol.VERSION,
            "features": protocol.FEATURES,
            "max_seq_len": self._scale["max_seq_len"],
            "time_budget": None if budget == float("inf") else budget,
            "seed": self._seed,
            "scale": self._scale["name"],
            "progress": self.clock.progress(time.monotonic()),
        }
        protocol.send(connection, welcome)
        return True

    def _answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one request. Raises Garbage."""
        self._ring.check()
        kind = message["type"]
        handler = getattr(self, f"on_{kind}", None) if kind in protocol.REQUESTS else None
        try:
            if handler is None:
                known = "reserved for an audit" if kind in protocol.RESERVED else "not known"
                raise Refused(f"the message {kind!r:.40} is {known} in protocol 1")
            return handler(message)
        except Refused as refusal:
            if len(self._account["refusals"]) < 20:
                self._account["refusals"].append(str(refusal))
            return {"type": "refused", "reason": str(refusal)}

    def on_next(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of training rows; after the close, the last one again."""
        count, length = self._feed.check(message)
        if self._scoring is not None:
            raise Refused("no batch is served while a scoring is under way")
        now, tokens, granted = time.monotonic(), count * length, self.clock.terms
        if granted.kind == "tokens" and tokens > granted.amount:
            raise Refused(f"a batch of {tokens} tokens is over the budget of {granted.amount:g}")
        if self.clock.hand_out(now, tokens):
            offset, epoch = self._feed.fresh(count, length)
            self._account["batches"] += 1
            if self.clock.has_room_for(tokens):
                self._after = lambda: self._feed.prepare(count, length)
        else:
            offset, epoch = self._feed.repeat(count, length)
        return {
            "type": "batch",
            "offset": offset,
            "size": self._ring.size,
            "rows": count,
            "length": length,
            "epoch": epoch,
            "progress": self.clock.progress(now),
            "pace": self.clock.pace(),
        }

    def on_log(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Telemetry: stored up to a size. The last values go into score.json."""
        metrics = protocol.check_metrics(message.get("metrics"))
        reported = self._account["reported"]
        if len(reported.keys() | metrics.keys()) <= protocol.MAX_LOG_KEYS:
            reported.update(metrics)
        now = time.monotonic()
        facts = {
            "seconds": round(now - self.clock.begun, 3),
            "tokens": self.clock.trained,
            "progress": round(self.clock.progress(now), 4),
        }
        line = json.dumps({**metrics, **facts}) + "\n"
        if self._telemetry.tell() + len(line) <= TELEMETRY_BYTES:
            self._telemetry.write(line.encode())
            self._telemetry.flush()
        return {"type": "logged"}

    def on_score(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Close the feed and show the first batch of validation rows."""
        batch, now = protocol.whole(message, "rows"), time.monotonic()
        if self.clock.scored is not None:
            raise Refused(
                f"the score of this run is final: {self._account['state']},"
                f" {self._account['reason']}. It is asked for once"
            )
        length = self._scale["max_seq_len"]
        check_size(batch, length)
        self._account["waiting_seconds"] = protocol.seconds(message.get("waited_s"))
        overrun = self.clock.ask_score(now)
        if self.clock.is_late(now):
            reason = (
                f"scoring was asked for {overrun:.1f} s after the feed closed, later than the"
                f" {self.clock.terms.window_s:g} s allowed"
            )
            self._end("late", reason)
            raise Refused(reason)
        self._scoring = self._start_scoring(batch, length)
        self._deadline = now + self._scoring_limit_s
        self._answers = self._ring.reserve(batch * length * 4), batch, length
        return self._show(0)

    def on_answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Take the losses of the batch on show; the next batch, or the score."""
        if self._scoring is None or message.get("index") != self._asked:
            raise Garbage(f"an answer to batch {message.get('index')!r:.20}, which is not on show")
        offset, count, length = self._answers
        claims = self._ring.read(offset, count * length * 4)
        losses = np.frombuffer(claims, "<f4").reshape(count, length)
        try:
            self._scoring.take(self._asked, losses)
        except NotFinite as error:
            self._scoring = None
            self._end("nonfinite", str(error))
            raise Refused(str(error)) from None
        except ValueError as error:
            raise Garbage(str(error)) from None
        if self._asked + 1 < self._scoring.batches:
            return self._show(self._asked + 1)
        result = self._scoring.result()
        self._scoring = self._deadline = None
        self._end("scored", f"val_bpb {result['val_bpb']:.6f}")
        self._account |= result
        self._account["scoring_seconds"] = round(time.monotonic() - self.clock.scored, 6)
        self._after = self.write_account
        return {"type": "done", "val_bpb": result["val_bpb"], "rows": result["rows_scored"]}

    # --- parts ------------------------------------------------------------------------------------

    def _start_scoring(self, batch: int, length: int) -> Scoring:
        stream = data.RowStream(self._folder, "val", length)
        count = max(1, min(self._scale["eval_tokens"] // length, stream.rows))
        rows, _, _ = stream.take(count, 0)
        order = np.random.default_rng().permutation(count)  # from the system's entropy: secret
        return Scoring(rows, *data.token_bytes(self._folder), batch, order)

    def _show(self, index: int) -> dict[str, Any]:
        """Write batch `index`; the message that shows it."""
        assert self._scoring is not None
        self._asked = index
        answer, count, length = self._answers
        offset = self._ring.put(self._scoring.rows(index))
        return {
            "type": "rows",
            "offset": offset,
            "answer": answer,
            "size": self._ring.size,
            "rows": count,
            "length": length,
            "index": index,
        }

    def _finish(self) -> None:
        """What could wait until the program had its answer."""
        after, self._after = self._after, None
        if after is not None:
            after()

    def _wait(self, connection: socket.socket) -> None:
        if self._deadline is None:
            connection.settimeout(None)
        else:
            connection.settimeout(max(0.001, self._deadline - time.monotonic()))

    def _end(self, state: str, reason: str) -> None:
        """How the run stands. What is final stays."""
        if self._account["state"] == "unscored":
            self._account.update(state=state, reason=reason)


def terms(spec: Mapping[str, Any], scale: Mapping[str, Any]) -> Terms:
    """The clock's terms: the run's where it names any, else the scale's."""
    budget = spec.get("budget") or {}
    free = spec.get("startup_free_s")
    return Terms(
        budget.get("kind", scale["budget_kind"]),
        budget.get("amount", scale["budget_amount"]),
        scale["startup_free_s"] if free is None else free,
        scale["warmup_tokens"],
        spec.get("feed_ceiling_s"),
    )


def check_size(count: int, length: int) -> None:
    """Raises Refused for a batch that the shared file has no room for."""
    size = count * (length + 1) * 2
    if size > protocol.MAX_SLOT:
        raise Refused(
            f"a batch of {count} x {length} takes {size >> 20} MiB,"
            f" at most {protocol.MAX_SLOT >> 20} MiB are served at a time: use a smaller one"
        )


def accept(folder: Path, limit_s: float) -> socket.socket:
    """The one connection that is served. Raises TimeoutError."""
    path = folder / protocol.SOCKET_NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(limit_s)
        connection, _ = listener.accept()
    path.unlink(missing_ok=True)  # without walls the program may have done it
    return connection


def main() -> None:
    spec = json.load(sys.stdin)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the wrapper: nobody will connect now
    if spec.get("parent"):
        from .launcher import die_with_parent

        die_with_parent(spec["parent"])
    referee = None
    try:
        referee = Referee(spec)
        with accept(Path(spec["shared"]), spec["accept_s"]) as connection:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            referee.serve(connection)
    finally:
        if referee is not None:
            referee.write_account()
        if spec.get("alone"):  # also when the program was killed
            shutil.rmtree(spec["shared"], ignore_errors=True)


if __name__ == "__main__":
    main()
