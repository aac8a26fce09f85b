"""Owns a model's tools: a scratch copy that it edits, the records that it reads, and submit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from agent import brief, edit
from agent.researcher import Context
from jobs.text import one_line

if TYPE_CHECKING:
    from jobs.history import State

EDITOR = "str_replace_based_edit_tool"
LARGEST_VIEW = 60_000  # characters

_TEXT = {"type": "string"}
TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "text_editor_20250728", "name": EDITOR},
    {
        "name": "read_experiment",
        "description": "The log's tail, the diff or the telemetry of an earlier experiment.",
        "input_schema": {
            "type": "object",
            "properties": {
                "experiment": {"type": "string", "description": "its id, e.g. e0042"},
                "what": {"type": "string", "enum": ["log", "diff", "telemetry"]},
                "lines": {"type": "integer", "description": "of log or telemetry; at most 200"},
            },
            "required": ["experiment", "what"],
        },
    },
    {
        "name": "search_history",
        "description": "Experiments whose id, description, tags, status or reason hold all words.",
        "input_schema": {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]},
    },
    {
        "name": "submit",
        "description": "Hand in the edited program as the next experiment. Ends the conversation "
        "unless the edit is refused; then mend what the answer names and submit again.",
        "input_schema": {
            "type": "object",
            "properties": {
                "hypothesis": {"type": "string", "description": "why the metric should improve"},
                "description": {"type": "string", "description": "the change, in one line"},
                "tags": {
                    "type": "array",
                    "items": _TEXT,
                    "description": "what, which setting, which direction: "
                    '["optimiser", "matrix_rate", "up"]',
                },
            },
            "required": ["hypothesis", "description", "tags"],
        },
    },
)


class Refused(Exception):
    """A tool call that does nothing; the message goes back to the model."""


@dataclass(frozen=True)
class Submitted:
    """An edit that passed every check."""

    files: Mapping[str, str]  # changed ones only
    hypothesis: str
    description: str
    tags: tuple[str, ...]


class Workbench:
    """What one conversation works on. Nothing outside it changes."""

    def __init__(self, state: State, context: Context, start: Mapping[str, str]) -> None:
        self._state, self._context = state, context
        self.files = dict(start)
        self.refusals = 0  # of submit
        self.trespasses: list[str] = []  # other files that it tried to change
        self.submitted: Submitted | None = None

    def use(self, tool: str, given: Any) -> str:
        """The answer to one tool call. Raises Refused: with what is wrong with the call."""
        if not isinstance(given, dict):
            raise Refused("the input must be an object")
        if tool == EDITOR:
            return self._edit(given)
        if tool == "read_experiment":
            count = given.get("lines") if isinstance(given.get("lines"), int) else 80
            name, what = _text(given, "experiment"), _text(given, "what")
            found = brief.experiment(self._state, name, what, max(count or 1, 1), self._context)
            return brief.data(found)
        if tool == "search_history":
            return brief.data(brief.search(self._state, _text(given, "text")))
        if tool == "submit":
            return self._submit(given)
        raise Refused(f"there is no tool {one_line(tool, 60)}")

    # -- the editor -----------------------------------------------------------------------------

    def _edit(self, given: dict[str, Any]) -> str:
        command, path = _text(given, "command"), self._path(_text(given, "path"))
        if command == "view":
            return self._view(path, given.get("view_range"))
        if path not in self.files:
            self.trespasses.append(one_line(path, 80))
            raise Refused(f"{path} may not be edited; only {', '.join(self.files)} may")
        if command == "create":
            self.files[path] = _text(given, "file_text")
        elif command == "str_replace":
            self.files[path] = _replaced(self.files[path], _text(given, "old_str"), given)
        elif command == "insert":
            self.files[path] = _inserted(self.files[path], given)
        else:
            raise Refused(f"{one_line(command, 40)}: use view, create, str_replace or insert")
        return f"done; {path} has {len(self.files[path].splitlines())} lines now"

    def _path(self, path: str) -> str:
        """The file meant: its path, or its bare name where that says which."""
        every = [*self.files, *self._context.readable, "program.md"]
        wanted = str(PurePosixPath("/", path.strip()))[1:]
        matches = [known for known in every if known == wanted or wanted.endswith("/" + known)]
        matches = matches or [known for known in every if PurePosixPath(known).name == wanted]
        return matches[0] if len(matches) == 1 else wanted

    def _view(self, path: str, span: Any) -> str:
        known = {"program.md": self._context.program, **self._context.readable, **self.files}
        if path not in known:
            raise Refused(f"there is no {path} here; there are {', '.join(known)}")
        numbered = [f"{n:6}\t{line}" for n, line in enumerate(known[path].split("\n"), 1)]
        if isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span):
            numbered = numbered[max(span[0], 1) - 1 : span[1] if span[1] > 0 else None]
        return brief.data(brief.cut("\n".join(numbered), LARGEST_VIEW))

    # -- submit ---------------------------------------------------------------------------------

    def _submit(self, given: dict[str, Any]) -> str:
        description = one_line(_text(given, "description"), brief.LONGEST)
        hypothesis = one_line(_text(given, "hypothesis"), 600)
        if not description:
            raise Refused("description is empty: say in one line what was changed")
        tags = given.get("tags")
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise Refused('tags must be a list of words, e.g. ["optimiser", "matrix_rate", "up"]')
        changed = {p: t for p, t in self.files.items() if t != self._context.files[p]}
        if reason := edit.refusal(edit.of(self._context, changed or self.files)):
            self.refusals += 1
            raise Refused(f"refused: {reason}")
        words = tuple(one_line(tag, 40).replace(":", "-") for tag in tags[:6])
        self.submitted = Submitted(changed, hypothesis, description, words)
        return "submitted"


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise Refused(f"{name} is missing or no text: nothing was done")
    return value


def _replaced(text: str, old: str, given: Mapping[str, Any]) -> str:
    new = _text(given, "new_str") if given.get("new_str") is not None else ""
    count = text.count(old) if old else 0
    if count != 1:
        raise Refused(
            f"old_str was found {count} times, it must be there exactly once: "
            + ("add lines around it." if count else "view the file and copy it exactly.")
        )
    return text.replace(old, new)


def _inserted(text: str, given: Mapping[str, Any]) -> str:
    rows = (text if text.endswith("\n") else text + "\n").splitlines(keepends=True) if text else []
    place, new = given.get("insert_line"), given.get("insert_text", given.get("new_str"))
    if not isinstance(new, str) or type(place) is not int or not 0 <= place <= len(rows):
        raise Refused(f"insert needs insert_text and insert_line from 0 to {len(rows)}")
    return "".join([*rows[:place], new if new.endswith("\n") else new + "\n", *rows[place:]])
