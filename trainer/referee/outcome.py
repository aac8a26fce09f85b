"""How a run ended: from what was seen, its status and one line in words. Pure.

The statuses are PROTOCOL.md's: ok, crash, timeout, oom, invalid, infrastructure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .supervise import Ending, signal_name

# Signals that somebody else sent; any other a program earns by itself.
FROM_OUTSIDE = {"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"}
OUT_OF_MEMORY = re.compile(
    r"^(torch\.(cuda\.)?OutOfMemoryError|MemoryError|numpy\.\S*MemoryError"
    r"|RuntimeError: .*(CUDA|HIP|MPS|out of memory).*(out of memory|failed to allocate)"
    r"|.*DefaultCPUAllocator: (not enough|can't allocate) memory)",
    re.M,
)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
ACCOUNT_STATES = {
    "invalid": "invalid",
    "overtime": "timeout",
    "late": "crash",
    "nonfinite": "crash",
    "refused": "crash",
}


def of_training(
    ending: Ending,
    account: Mapping[str, Any] | None,
    referee_died: str | None,
    began: bool,
    memory_limit_mb: int | None,
    wall_limit_s: float,
) -> tuple[str, str]:
    """(status, reason) of a nanochat run.

    Args:
        account: the referee's score.json, None where it left none.
        referee_died: in words, when it ended before it was told to.
        began: the program itself ran, as far as is known; a container may fail before it.
    """
    state = account["state"] if account else None
    if ending.breach:
        return of_breach(ending)
    if state == "scored":
        assert account is not None
        return "ok", account["reason"] + after_the_score(ending)
    if state in ACCOUNT_STATES:
        assert account is not None
        return ACCOUNT_STATES[state], account["reason"]
    if ending.code and not began:  # for the same reason its referee may have died, too
        return of_command(ending, memory_limit_mb, began)
    if referee_died:
        return "infrastructure", referee_died
    if ending.timed_out:
        asked = account is not None and account["overrun_seconds"] is not None
        how = "was still being scored at" if asked else "never asked to be scored within"
        return "timeout", f"it {how} its limit of {wall_limit_s:g} s"
    status, reason = of_command(ending, memory_limit_mb)
    if status == "ok":
        return "crash", "the program ended by itself without asking to be scored"
    refusals = account["refusals"] if account else []
    if status == "crash" and refusals:
        return "crash", f"the referee refused: {refusals[-1]} ({reason})"
    return status, reason


def of_command(ending: Ending, memory_limit_mb: int | None, began: bool = True) -> tuple[str, str]:
    """(status, reason) of any command that has to end with status 0 by itself."""
    if ending.breach:
        return of_breach(ending)
    if ending.failed:
        return "infrastructure", f"its isolation could not be set up: {ending.failed}"
    if ending.stopped or ending.lost:
        return "infrastructure", ending.stopped or ending.lost or ""
    if ending.timed_out:
        return "timeout", "it did not end within its time limit"
    if ending.code == 0:
        return "ok", "ended with status 0"
    name = ending.signal
    if ending.code is not None and ending.code > 128:
        name = signal_name(ending.code - 128)  # as a shell reports what its child died of
    evidence = memory_evidence(ending, memory_limit_mb, killed=name == "SIGKILL")
    if evidence:
        return "oom", f"out of memory: {evidence}"
    if name in FROM_OUTSIDE:
        return "infrastructure", f"the program was killed from outside by {name}"
    if ending.signal:
        return "crash", f"the program died of {name}: {last_line(ending.tail)}"
    words = last_line(ending.tail)
    if not began:  # Apptainer ends with 255, or with 1 where the kernel refuses a namespace
        return "infrastructure", f"the container did not start{network_hint(words)}: {words}"
    return "crash", f"exit status {ending.code}: {words}"


def of_breach(ending: Ending) -> tuple[str, str]:
    """(status, reason) of a run that was ended at one of its limits."""
    assert ending.breach is not None
    status = {"memory": "oom", "disk": "infrastructure"}.get(ending.breach.kind, "invalid")
    return status, ending.breach.words


def memory_evidence(ending: Ending, limit_mb: int | None, killed: bool) -> str | None:
    """What shows that memory ran out: the program's own words, or the kernel's count and peak."""
    match = OUT_OF_MEMORY.search(ending.tail)
    if match:
        return match[0][:200]
    if not killed:
        return None
    if ending.oom_killed:
        return "the kernel killed for memory in this run's cgroup"
    peak = ending.usage.get("peak_memory_mb", 0)
    if limit_mb is not None and peak >= 0.9 * limit_mb:
        return f"killed at {peak:.0f} MiB, the limit is {limit_mb} MiB"
    return None


def after_the_score(ending: Ending) -> str:
    """A word on a program that was scored and then did not end well. Its score stands."""
    if ending.timed_out or ending.stopped:
        return f"; afterwards it was ended: {ending.stopped or 'its time was over'}"
    if ending.signal:
        return f"; afterwards it died of {ending.signal}"
    return f"; afterwards exit status {ending.code}" if ending.code else ""


def network_hint(words: str) -> str:
    """The setting that matters, where a container complains that it may not be without network."""
    hint = " (executor.allow_network leaves the host's network in)"
    return hint if re.search("network", words, re.IGNORECASE) else ""


def scored_value(line: str, metric: str) -> float:
    """The number under `metric` in a scorer's last line. Raises ValueError, in words."""
    try:
        value = json.loads(line)[metric]
        if type(value) in (int, float) and abs(value) < 1e300:
            return float(value)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"its last line gives no finite number for {metric}: {line:.150}")


def last_line(text: str) -> str:
    """The last line that says something, printable, at most 300 characters."""
    text = COLOURS.sub("", text)  # Apptainer's last line may be nothing but the end of one
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[-1]) if lines else "it printed nothing"


def printable(text: str) -> str:
    """Without control characters: reasons are shown in terminals, tables and prompts."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]
