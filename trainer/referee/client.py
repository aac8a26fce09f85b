"""train.py's end of the protocol: asks the referee for batches and answers for its losses.

Used by prepare.py inside the program's process. Nothing here is trusted by the referee.
"""

from __future__ import annotations

import atexit
import json
import math
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import folder as shared
from . import protocol
from .protocol import Refused

CONNECT_S = 600.0  # beside a wrapper, which ends the run if the referee dies; disks can be slow
ALONE_S = 60.0

Answer = Callable[[np.ndarray], None]


class Session:
    """One run's conversation with its referee. Made by `open`; threads take turns at it.

    Attributes:
        folder: the shared folder.
        max_seq_len: longest row that may be asked for, in tokens.
        time_budget: seconds; 0.98 of a wall budget; of a token budget its wall ceiling, else inf.
        seed: the run's seed.
        scale: the campaign's scale, by name.
        progress: share of the budget used, in [0, 1]: as sent with the last batch, and on from
            there by the same monotonic clock when the budget is wall time.
        val_bpb: bits per byte by the referee, once scored.
        waited_s: seconds spent waiting in `next`.
    """

    def __init__(self, folder: Path, connection: socket.socket, welcome: Mapping[str, Any]):
        self.folder = folder
        self.max_seq_len: int = welcome["max_seq_len"]
        self.time_budget: float = math.inf
        if welcome["time_budget"] is not None:
            self.time_budget = welcome["time_budget"]
        self.seed: int = welcome["seed"]
        self.scale: str = welcome["scale"]
        self._sent = (welcome["progress"], 0.0, time.monotonic())  # progress, per second, as of
        self.val_bpb: float | None = None
        self.waited_s = 0.0
        self._connection = connection
        self._turn = threading.Lock()
        self._pid = os.getpid()
        self._file = os.open(folder / protocol.RING_NAME, os.O_RDWR)
        self._map: mmap.mmap | None = None
        self._own_referee: subprocess.Popen | None = None

    @classmethod
    def open(cls) -> Session:
        """Connect to the referee in $AUTORESEARCH_REFEREE, or start one for this program alone.

        Alone, the data folder is $AUTORESEARCH_DATA, the seed $AUTORESEARCH_SEED (default 1).

        Raises:
            ConnectionError: no referee answers.
            Refused: the referee speaks another version of the protocol.
        """
        given = os.environ.get("AUTORESEARCH_REFEREE")
        referee = None
        if given:
            folder = Path(given)
        else:
            folder, referee = _start_referee()
        connection = _connect(folder / protocol.SOCKET_NAME, referee)
        hello = {"type": "hello", "protocol": protocol.VERSION, "features": protocol.FEATURES}
        welcome = _exchange(connection, hello)
        if welcome.get("protocol") != protocol.VERSION:
            raise Refused(
                f"the referee speaks protocol {welcome.get('protocol')}, this program's prepare"
                f" {protocol.VERSION}: take both from one version of the project"
            )
        session = cls(folder, connection, welcome)
        session._own_referee = referee
        atexit.register(session.close)
        return session

    @property
    def progress(self) -> float:
        sent, pace, since = self._sent
        return min(1.0, sent + pace * (time.monotonic() - since))

    def next(self, rows: int, length: int, split: str = "train") -> tuple[np.ndarray, int]:
        """The next batch: a uint16 view (rows, length + 1) of shared memory, and its epoch.

        The view is valid until the call after the next one. `progress` is brought up to date.

        Raises:
            Refused: a split other than "train", a length over max_seq_len, too large a batch.
            ConnectionError: the referee is gone.
        """
        start = time.perf_counter()
        reply = self._ask(
            {"type": "next", "rows": int(rows), "length": int(length), "split": str(split)}
        )
        self.waited_s += time.perf_counter() - start
        self._sent = (reply["progress"], reply["pace"], time.monotonic())
        return self._view(reply, np.dtype("<u2"), reply["length"] + 1), reply["epoch"]

    def log(self, metrics: Mapping[str, float | str | None]) -> None:
        """Store telemetry. Numbers that are not finite are stored as None.

        Raises:
            Refused: too many values, or one that is neither a number nor a short string.
        """
        plain = {str(key): _plain(value) for key, value in metrics.items()}
        self._ask({"type": "log", "metrics": protocol.check_metrics(plain)})

    def score(self, batch_size: int) -> Iterator[tuple[np.ndarray, Answer]]:
        """Close the feed and be scored: yields (rows, answer) until the referee has seen enough.

        rows: uint16 view (batch_size, T + 1). answer: takes float32 (batch_size, T), the loss in
        nats of every position, and must be called before the next pair is asked for.
        Afterwards `val_bpb` holds the score, which is final.

        Raises:
            Refused: a second score, or one asked for too late.
        """
        reply = self._ask(
            {"type": "score", "rows": int(batch_size), "waited_s": round(self.waited_s, 6)}
        )
        while reply["type"] == "rows":
            losses = self._view(reply, np.dtype("<f4"), reply["length"], reply["answer"])
            answered: list[bool] = []

            def answer(
                values: np.ndarray, losses: np.ndarray = losses, answered: list = answered
            ) -> None:
                if np.shape(values) != losses.shape:
                    raise ValueError(
                        f"losses of shape {np.shape(values)} for rows that need {losses.shape}"
                    )
                losses[...] = values
                answered.append(True)

            yield self._view(reply, np.dtype("<u2"), reply["length"] + 1), answer
            if not answered:
                raise RuntimeError("the rows of one batch were not answered before the next")
            reply = self._ask({"type": "answer", "index": reply["index"]})
        self.val_bpb = reply["val_bpb"]

    def close(self) -> None:
        """End the session. Harmless when repeated, and in a forked child."""
        if os.getpid() != self._pid or self._file < 0:
            return
        os.close(self._file)
        self._file = -1
        self._connection.close()
        if self._own_referee is not None:
            try:
                self._own_referee.wait(5)
            except subprocess.TimeoutExpired:
                self._own_referee.kill()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        with self._turn:  # programs fetch the next batch in a thread, and log in another
            return _exchange(self._connection, message)

    def _view(
        self, reply: Mapping[str, Any], kind: np.dtype, width: int, offset: int | None = None
    ) -> np.ndarray:
        """(rows, width) of the shared file at `offset`, by default where the reply's rows lie."""
        offset = reply["offset"] if offset is None else offset
        if self._map is None or len(self._map) < reply["size"]:
            # Views of an older, smaller map keep it alive: both show the same pages.
            self._map = mmap.mmap(self._file, reply["size"])
        count = reply["rows"] * width
        return np.frombuffer(self._map, kind, count, offset).reshape(reply["rows"], width)


def _exchange(connection: socket.socket, message: Mapping[str, Any]) -> dict[str, Any]:
    """Send one request, return its reply."""
    try:
        protocol.send(connection, message)
        reply = protocol.receive(connection)
    except OSError as error:
        raise ConnectionError(f"the referee is gone ({message['type']}: {error})") from error
    if reply is None:
        raise ConnectionError(f"the referee ended the session (at {message['type']})")
    if reply["type"] == "refused":
        raise Refused(reply["reason"])
    if reply["type"] == "invalid":
        raise ConnectionError(f"the referee ended the run: {reply['reason']}")
    return reply


def _connect(path: Path, referee: subprocess.Popen | None) -> socket.socket:
    limit = CONNECT_S if referee is None else ALONE_S
    deadline = time.monotonic() + limit
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            gone = referee is not None and referee.poll() is not None
            if gone or time.monotonic() > deadline:
                raise ConnectionError(
                    f"no referee answers at {path}: "
                    + ("it ended at its start, see above" if gone else f"waited {limit:.0f} s")
                ) from None
            time.sleep(0.002)


def _start_referee() -> tuple[Path, subprocess.Popen]:
    """A referee for this program alone, in a private folder that goes with it."""
    shared.sweep()
    folder = shared.make()
    trainer = str(Path(__file__).resolve().parent.parent)
    spec = {
        "shared": str(folder),
        "private": str(folder),
        "data": os.environ.get("AUTORESEARCH_DATA", "data"),
        "seed": int(os.environ.get("AUTORESEARCH_SEED", "1")),
        "alone": True,
        "accept_s": ALONE_S,
    }
    referee = subprocess.Popen(
        [sys.executable, "-m", "referee.server"],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": trainer, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is train.py's; the referee ends with its connection
    )
    assert referee.stdin is not None
    referee.stdin.write(json.dumps(spec).encode())
    referee.stdin.close()
    return folder, referee


def _plain(value: Any) -> float | int | str | None:
    """A number of any library as a plain one; what is not finite as None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
