"""Runs one command in its sandbox to its end: starts it, keeps its output, holds it to its limits.

Everything a command may do to its host ends here: when `supervise` returns, nothing of it runs.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .folder import start_ticks
from .limits import Breach, Watch, oom_kills
from .task import Limits

LAUNCHER = str(Path(__file__).with_name("launcher.py"))  # not imported: ctypes is slow to load
POLL_S = 0.1
HEAD_BYTES = TAIL_BYTES = 512 * 1024
START_S = 20.0  # until a launcher reports; it takes milliseconds
STOP_S = 15.0


@dataclass(frozen=True)
class Ending:
    """How a command ended: exactly one of the first seven says why."""

    code: int | None = None  # its exit status
    signal: str | None = None  # that it died of, by name
    breach: Breach | None = None
    timed_out: bool = False
    stopped: str | None = None  # why the caller's `stop` ended it
    failed: str | None = None  # the walls could not be built; nothing ran
    lost: str | None = None  # the launcher was killed from outside, or the command never started
    usage: Mapping[str, Any] = field(default_factory=dict)  # by the names of result.json
    tail: str = ""  # the last lines it printed
    oom_killed: bool = False  # the kernel killed for memory in this cgroup meanwhile


class Log:
    """A command's output on disk: head and tail are kept, the middle is counted.

    What the disk has no room for is only counted, too.
    """

    def __init__(self, path: Path):
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self.size = 0
        self._cut = 0

    def feed(self, data: bytes) -> None:
        room = max(0, HEAD_BYTES - self.size)
        self.size += len(data)
        if room:
            self._write(data[:room])
        if rest := data[room:]:
            self._tail.append(rest)
            self._tail_size += len(rest)
        while self._tail and self._tail_size - len(self._tail[0]) >= TAIL_BYTES:
            gone = len(self._tail.popleft())
            self._tail_size -= gone
            self._cut += gone

    def close(self) -> str:
        """Write the tail. Returns the last few lines of the output."""
        kept = b"".join(self._tail)
        if self._cut:
            self._write(b"\n[... %d bytes were cut here ...]\n" % self._cut)
        self._write(kept)
        self._file.close()
        with open(self._file.name, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return file.read().decode("utf-8", "replace")

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            while data:
                data = data[self._file.write(data) :]


class Command:
    """A launcher and what it runs, as seen by its supervisor."""

    def __init__(self, plan: Mapping[str, Any], env: Mapping[str, str], split_output: bool):
        self.status, theirs = os.pipe()
        told = {**plan, "status": theirs, "parent": os.getpid()}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if split_output else subprocess.STDOUT,
            env=dict(env),
            pass_fds=[theirs],
            start_new_session=True,  # Ctrl-C is the wrapper's
        )
        os.close(theirs)
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(marshal.dumps(told))
        os.set_blocking(self.status, False)
        self._walled = plan["walls"]
        self.cpu_s = 0.0
        self.peak_mb = 0.0  # of its largest process
        self._heard = b""

    def hear(self) -> dict[str, str]:
        """What the launcher has reported so far: word -> the rest of its line."""
        with contextlib.suppress(BlockingIOError):
            self._heard += os.read(self.status, 4096)
        lines = self._heard.decode("utf-8", "replace").split("\n")[:-1]
        heard = {word: rest for word, _, rest in (line.partition(" ") for line in lines)}
        self.peak_mb = int(heard.get("peak", 0)) / (2**20 if sys.platform == "darwin" else 2**10)
        return heard

    def ended(self) -> bool:
        """Whether the launcher is gone, and with it everything it started."""
        if self.process.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
                if pid:
                    self.process.returncode = os.waitstatus_to_exitcode(status)
                    self.cpu_s = usage.ru_utime + usage.ru_stime
        return self.process.returncode is not None

    def end(self, tree: set[int], patience_s: float) -> None:
        """End the command and wait until nothing of it is left.

        Args:
            tree: pids as last seen.
            patience_s: how long it may take to end by itself.
        """
        remembered = {} if self._walled else {pid: start_ticks(pid) for pid in tree}
        self._wait(patience_s)
        for number, limit_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            if not self.ended():
                self.process.send_signal(number)
                self._wait(limit_s)
        for pid, ticks in remembered.items():  # what outlived a launcher that was killed
            if ticks is not None and start_ticks(pid) == ticks and pid != self.process.pid:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _wait(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(0.001)


def supervise(
    plan: Mapping[str, Any],
    env: Mapping[str, str],
    *,
    log: Path,
    limits: Limits,
    scratch: str,
    ring: str | None,
    wall_limit_s: float,
    stop: Callable[[], str | None],
    output: Path | None = None,
) -> Ending:
    """Run a command to its end.

    Args:
        plan: what launcher.py is told, less what only this process knows.
        log: where its output goes; standard error alone when `output` is given.
        stop: asked at every poll; words end the command.
        output: where standard output goes when it is wanted by itself.
    """
    begun = time.monotonic()
    kills = oom_kills()
    command = Command(plan, env, output is not None)
    watch = Watch(command.process.pid, limits, scratch, ring)
    logs = {command.process.stdout: Log(output or log)}
    if output:
        logs[command.process.stderr] = Log(log)
    facts: dict[str, Any] = {}
    try:
        _await_start(command, begun, facts)
        if "exec_seconds" in facts:
            facts |= _follow(command, watch, logs, limits, begun + wall_limit_s, stop)
    finally:
        command.end(watch.seen, patience_s=2.0 if facts.keys() & {"code", "signal"} else 0.0)
        _drain(logs)
        tails = [one.close() for one in logs.values()]
        os.close(command.status)
    exec_seconds = facts.pop("exec_seconds", None)
    if facts.keys() & {"code", "signal", "stopped"} and (breach := watch.disk()):
        facts = {"breach": breach}
    usage = {
        "exit_code": facts.get("code"),
        "exit_signal": facts.get("signal"),
        "exec_seconds": exec_seconds,
        "program_seconds": round(time.monotonic() - begun, 6),
        "program_cpu_seconds": round(command.cpu_s, 4),
        "peak_memory_mb": round(max(watch.peak_mb, command.peak_mb), 1),
    }
    oom_killed = kills is not None and (oom_kills() or 0) > kills
    return Ending(**facts, usage=usage, tail="\n".join(tails), oom_killed=oom_killed)


def _await_start(command: Command, begun: float, facts: dict[str, Any]) -> None:
    """Until the launcher says that the command runs, or why it does not."""
    with selectors.DefaultSelector() as ready:
        ready.register(command.status, selectors.EVENT_READ)
        ready.select(START_S)
    heard = command.hear()
    if "started" in heard:
        facts["exec_seconds"] = round(time.monotonic() - begun, 6)
    elif "failed" in heard:
        facts["failed"] = heard["failed"]
    elif "missing" in heard:
        facts["lost"] = f"the command could not be started: {heard['missing']}"
    else:
        facts["lost"] = "the program's launcher was killed before it could start it"


def _follow(
    command: Command,
    watch: Watch,
    logs: Mapping[Any, Log],
    limits: Limits,
    deadline: float,
    stop: Callable[[], str | None],
) -> dict[str, Any]:
    """Keep the output and look at the limits until the command ends or must be ended."""
    with selectors.DefaultSelector() as ready:
        for pipe in logs:
            os.set_blocking(pipe.fileno(), False)
            ready.register(pipe, selectors.EVENT_READ)
        ready.register(command.status, selectors.EVENT_READ)
        next_poll = 0.0
        while True:
            for key, _ in ready.select(max(0.0, next_poll - time.monotonic())):
                if key.fileobj in logs and not _read(key.fileobj, logs[key.fileobj]):
                    ready.unregister(key.fileobj)
                elif key.fileobj == command.status and (how := _how(command)):
                    return how
            if sum(log.size for log in logs.values()) > limits.log_mb * 2**20:
                words = f"more than {limits.log_mb} MiB of output, the limit of the log"
                return {"breach": Breach("log", words)}
            if time.monotonic() < next_poll:
                continue
            next_poll = time.monotonic() + POLL_S
            if breach := watch.poll():
                return {"breach": breach}
            if words := stop():
                return {"stopped": words}
            if time.monotonic() > deadline:
                return {"timed_out": True}


def _how(command: Command) -> dict[str, Any] | None:
    """How the command ended, by its launcher's report or silence; None while it runs."""
    heard = command.hear()
    if "missing" in heard:
        return {"lost": f"the command could not be started: {heard['missing']}"}
    if "exit" in heard:
        return {"code": int(heard["exit"])}
    if "signal" in heard:
        return {"signal": signal_name(int(heard["signal"]))}
    if not command.ended():  # the descriptor closed a moment before the process went
        time.sleep(0.001)
        if not command.ended():
            return None
    return {"lost": "the program's launcher was killed from outside"}


def signal_name(number: int) -> str:
    """ "SIGKILL" for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(pipe: Any, log: Log) -> bool:
    """Take what is there. False: the pipe's end."""
    try:
        data = os.read(pipe.fileno(), 1 << 16)
    except BlockingIOError:
        return True
    log.feed(data)
    return bool(data)


def _drain(logs: Mapping[Any, Log]) -> None:
    """What the ended command left in its pipes."""
    for pipe, log in logs.items():
        os.set_blocking(pipe.fileno(), False)
        for _ in range(64):
            size = log.size
            if not _read(pipe, log) or log.size == size:
                break
        pipe.close()
