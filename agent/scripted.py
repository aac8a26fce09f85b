"""Owns the researcher that plays edits from a file, one after the other: tests, demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from agent import constants, edit, program
from agent.researcher import Context
from jobs.errors import UserError
from jobs.model import Proposal, Unavailable, Usage

if TYPE_CHECKING:
    from jobs.history import State


class Scripted:
    """Plays a list of edits (YAML or JSON), each a mapping of:

    description (required), hypothesis, tags, file (default: the first editable one), and
    `replace: [[old, new], ...]`, each old text being there exactly once, or
    `set: {NAME: number}` for constants of the active block. The n-th proposal of a branch is the
    n-th edit, so resuming needs nothing of its own; an edit that cannot be run ends the script.
    """

    def __init__(self, settings: Any) -> None:
        """Raises UserError: the file is missing, or an edit in it is malformed."""
        self._edits = _read(Path(settings.script or ""))

    def __len__(self) -> int:
        return len(self._edits)

    def reserve(self, state: State, branch: str) -> Usage:
        return Usage()

    def propose(self, state: State, branch: str, context: Context) -> Proposal | Unavailable:
        if context.number >= len(self._edits):
            return Unavailable(f"the script is at its end ({len(self._edits)} edits)")
        entry = self._edits[context.number]
        where = f"edit {context.number + 1} of the script ({entry['description']})"
        try:
            files = _apply(entry, context)
            refused = edit.refusal(edit.of(context, files))
        except (KeyError, ValueError, SyntaxError, program.ProgramError) as error:
            refused = str(error.args[0] if error.args else error)
        if refused:
            return Unavailable(f"{where} cannot be run: {refused}")
        return Proposal(
            branch=branch,
            base=context.base,
            files=files,
            description=entry["description"],
            researcher="scripted",
            hypothesis=str(entry.get("hypothesis", "")),
            tags=tuple(str(tag) for tag in entry.get("tags", ())),
        )


def _read(path: Path) -> list[Mapping[str, Any]]:
    try:
        edits = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        said = f"agent.script {path} could not be read: {error.strerror}"
        raise UserError(f"{said}. It lies beside campaign.yaml, or name its place") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"agent.script {path} could not be read: {error}") from error
    if not isinstance(edits, list):
        raise UserError(f"agent.script {path} must be a list of edits")
    for number, entry in enumerate(edits, 1):
        good = isinstance(entry, dict) and isinstance(entry.get("description"), str)
        if not good or not ("set" in entry or "replace" in entry):
            raise UserError(
                f"agent.script {path}: edit {number} needs a description and `set` or `replace`"
            )
    return edits


def _apply(entry: Mapping[str, Any], context: Context) -> dict[str, str]:
    path = entry.get("file") or next(iter(context.files))
    if path not in context.files:
        raise ValueError(f"{path} may not be changed: only {', '.join(context.files)} may")
    text = context.files[path]
    for old, new in entry.get("replace", ()):
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is in {path} {text.count(old)} times, not once")
        text = text.replace(old, new)
    if changes := entry.get("set"):
        text = constants.replace(text, changes, context.scale)
    return {path: text}
