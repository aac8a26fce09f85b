"""Owns program.md's front matter: the limits that code enforces, before a run and after it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from jobs.model import Result


class ProgramError(ValueError):
    """The front matter of program.md cannot be read; the message says which key and why."""


@dataclass(frozen=True)
class Limits:
    """What program.md demands of every experiment; None and () mean no limit."""

    may_change: tuple[str, ...] = ()  # constants, or top-level functions and classes
    max_lines: int | None = None  # that one edit may add
    max_params: int | None = None  # of the model, from its saved weights
    max_memory_gb: float | None = None  # peak, from the wrapper (GPU's where there is one)


def split(text: str) -> tuple[str, str]:
    """(front matter, body) of a program.md; the front matter is "" where there is none."""
    lines = text.replace("\r\n", "\n").removeprefix("\ufeff").split("\n")
    if lines[0].strip() != "---":
        return "", text
    for number, line in enumerate(lines[1:], 1):
        if line.strip() == "---":
            return "\n".join(lines[1:number]), "\n".join(lines[number + 1 :])
    raise ProgramError("program.md opens a front matter with --- and never closes it")


def limits(text: str) -> Limits:
    """The limits in a program.md.

    Raises ProgramError: no YAML, an unknown key (the nearest is named), a value of the wrong kind.
    """
    try:
        data = yaml.safe_load(split(text)[0]) or {}
    except yaml.YAMLError as error:
        raise ProgramError(f"the front matter of program.md is not YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise ProgramError("the front matter of program.md must be `key: value` lines")
    known = tuple(Limits.__dataclass_fields__)
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise ProgramError(f"program.md's front matter has {key!r}, which is no limit{hint}")
    return Limits(
        may_change=_names(data.get("may_change")),
        max_lines=_count("max_lines", data.get("max_lines"), whole=True),
        max_params=_count("max_params", data.get("max_params"), whole=True),
        max_memory_gb=_count("max_memory_gb", data.get("max_memory_gb"), whole=False),
    )


def check_result(demands: Limits, result: Result) -> str | None:
    """Why a finished run is over a limit of program.md (its status is then `invalid`), or None.

    A memory that was not measured is not held against a run; weights that it should have left are.
    """
    if demands.max_params and result.params is None:
        return (
            f"it left no model.safetensors that can be read; program.md's max_params "
            f"{demands.max_params:,} is checked on the saved weights"
        )
    if demands.max_params and result.params and result.params > demands.max_params:
        return (
            f"the model has {result.params:,} parameters; program.md allows "
            f"max_params {demands.max_params:,}"
        )
    peak = result.gpu_memory_mb if result.gpu_memory_mb else result.memory_mb
    if demands.max_memory_gb and peak and peak > demands.max_memory_gb * 1024:
        return (
            f"the run's peak memory was {peak / 1024:.2f} GB; program.md allows "
            f"max_memory_gb {demands.max_memory_gb:g}"
        )
    return None


def _names(value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProgramError(f"program.md: may_change must be a list of names, not {value!r}")
    return tuple(names)


def _count(key: str, value: Any, *, whole: bool) -> Any:
    if value is None:
        return None
    if isinstance(value, str):  # YAML 1.1 reads 50e6 as a string
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            raise ProgramError(f"program.md: {key} must be a number, not {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ProgramError(f"program.md: {key} must be a number above 0, not {value!r}")
    if whole and value != int(value):
        raise ProgramError(f"program.md: {key} must be a whole number, not {value!r}")
    return int(value) if whole else float(value)
