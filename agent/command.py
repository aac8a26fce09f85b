"""Owns the researcher that is any coding agent's command line: copies in, the program back out."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import brief, edit, keys, money, program
from agent.researcher import Context, after
from jobs.errors import UserError
from jobs.history import add_usage
from jobs.model import Proposal, Unavailable, Usage
from jobs.text import lines, one_line

if TYPE_CHECKING:
    from jobs.history import State

REFUSALS = 3  # of one proposal
AGAIN_S = 60.0  # until the command is run again after it came to nothing
SHOWN = 12  # newest experiments whose diff and log lie in the scratch folder
LARGEST_OUTPUT = 2_000_000  # characters that are looked at
LIMIT_DOLLARS = 3.0  # of one proposal, where the agent can be told so

TASK = """\
You are in a scratch folder with copies of a training program and its history. Read BRIEF.md first:
it has your instructions, then the history. records/ holds diffs and logs of earlier experiments.
Edit {editable} and nothing else: no other change is taken back. Do not train and do not run it.
End with one line of JSON, after your edit:
{{"hypothesis": "why it should help", "description": "the change in one line", "tags": ["what"]}}
"""


@dataclass(frozen=True)
class Outcome:
    """How one run of the command ended; `trouble` is None if its edit may be looked at."""

    output: str
    trouble: str | None
    usage: Usage


class Command:
    """Runs a coding agent on copies in a scratch folder and takes back the editable files alone."""

    def __init__(self, settings: Any, campaign_caps: Any = None) -> None:
        """Raises UserError: the program is not on PATH."""
        self._settings, self._caps = settings, campaign_caps
        name = "claude" if settings.preset else settings.argv[0]
        if shutil.which(name) is None:
            raise UserError(
                f"agent.kind command: {name} is not on PATH; install it or name its path"
            )

    def reserve(self, state: State, branch: str) -> Usage:
        return Usage(dollars=LIMIT_DOLLARS) if self._settings.preset else Usage()

    def propose(self, state: State, branch: str, context: Context) -> Proposal | Unavailable:
        reserve = self.reserve(state, branch)
        if capped := money.at_cap(state, branch, self._settings, self._caps, reserve):
            return capped
        deadline, spent, trespasses = time.monotonic() + self._settings.deadline, Usage(), []
        refused: str | None = None
        with tempfile.TemporaryDirectory(prefix="autoresearch-") as name:
            folder = Path(name)
            try:
                originals = _fill(folder, state, branch, context)
                prompt = TASK.format(editable=", ".join(context.files))
                for _ in range(1 + REFUSALS):
                    left = LIMIT_DOLLARS - spent.dollars
                    if left <= 0:
                        refused = f"{refused} (and nothing is left of {LIMIT_DOLLARS:g} dollars)"
                        break
                    done = self._run(folder, prompt, deadline, context, left)
                    spent = add_usage(spent, done.usage)
                    trespasses += _changed(folder, originals, context)
                    files, told = _taken_back(folder, context), _told(done.output)
                    refused = done.trouble or self._refusal(context, files, told)
                    if refused is None:
                        return self._proposal(branch, context, files, told, spent, trespasses)
                    if done.trouble:
                        break
                    prompt = f"Your edit was refused: {refused}\nMend it in place.\n\n{prompt}"
            except (program.ProgramError, OSError, ValueError) as error:
                refused = str(error)
        beside = f" (it changed {', '.join(_first(trespasses))})" if trespasses else ""
        words = one_line(f"the coding agent: {refused}", 400) + one_line(beside, 200)
        return Unavailable(words, after(AGAIN_S), spent)

    def _refusal(
        self, context: Context, files: Mapping[str, str], told: Mapping[str, Any]
    ) -> str | None:
        said = {**files, "the last line": json.dumps(told, ensure_ascii=False)}
        for where, text in said.items():
            if any(secret in text for secret in self._credentials().values()):
                return f"{where} contains the API key: take it out"
        return edit.refusal(edit.of(context, files or context.files))

    def _proposal(
        self,
        branch: str,
        context: Context,
        files: Mapping[str, str],
        told: Mapping[str, Any],
        spent: Usage,
        trespasses: list[str],
    ) -> Proposal:
        name = "claude" if self._settings.preset else Path(self._settings.argv[0]).name
        tags = told.get("tags") if isinstance(told.get("tags"), list) else []
        words = [one_line(str(tag), 40).replace(":", "-") for tag in (tags or [])[:6]]
        refused = [f"refused:{path}" for path in _first(trespasses)]
        return Proposal(
            branch=branch,
            base=context.base,
            files=files,
            description=one_line(str(told.get("description") or f"edit by {name}"), brief.LONGEST),
            researcher=f"command:{one_line(name, 40)}",
            hypothesis=one_line(str(told.get("hypothesis") or ""), 600),
            tags=(brief.MODEL, *words, *refused),
            usage=spent,
        )

    # -- the process ------------------------------------------------------------------------------

    def _argv(self, context: Context, dollars: float) -> list[str]:
        if not self._settings.preset:
            return list(self._settings.argv)
        edits = [f"Edit(./{path})" for path in context.files]
        return [
            *("claude", "-p", "--bare", "--restricted", "--tools", "Read,Edit,Write"),
            *("--permission-mode", "dontAsk", "--allowedTools", "Read(./**)", *edits),
            *("--strict-mcp-config", "--no-session-persistence", "--output-format", "json"),
            *("--max-budget-usd", f"{dollars:.4f}", "--model", self._settings.model),
        ]

    def _credentials(self) -> dict[str, str]:
        if self._settings.preset and self._settings.key_file:
            return {keys.VARIABLES[0]: keys.load(self._settings.key_file)["api_key"]}
        return keys.found()

    def _run(
        self, folder: Path, prompt: str, deadline: float, context: Context, dollars: float
    ) -> Outcome:
        """Runs the command in `folder` until it ends, or its time, memory or the campaign does."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output:
            given.write(prompt.encode())
            given.seek(0)
            child = subprocess.Popen(
                self._argv(context, dollars),
                cwd=folder,
                # the one child that may need a key: in its environment, never in its argv
                env={**os.environ, **self._credentials()},
                stdin=given,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                trouble = self._watch(child, deadline, context)
            finally:
                _end(child)
            output.seek(0)
            text = output.read(LARGEST_OUTPUT).decode(errors="replace")
        text = keys.scrub(text, *self._credentials().values())
        return self._outcome(text, child.returncode, trouble, dollars)

    def _watch(
        self, child: subprocess.Popen[bytes], deadline: float, context: Context
    ) -> str | None:
        look = 0.0  # at its memory: once a second, for that reads every process of the machine
        while child.poll() is None:
            if context.stop.wait(0.1):
                return "stopping"
            now = time.monotonic()
            if now > deadline:
                return f"it ran beyond agent.deadline ({self._settings.deadline:g} s)"
            if now < look:
                continue
            look = now + 1.0
            if _memory_mb(child.pid) > self._settings.memory_mb:
                return f"it used more than agent.memory_mb ({self._settings.memory_mb})"
        return None

    def _outcome(self, text: str, code: int, trouble: str | None, dollars: float) -> Outcome:
        """Exit status 0 can hide an API error: the preset's own report is asked."""
        if not self._settings.preset:
            if code != 0 and trouble is None:
                trouble = f"exit status {code}: {text[-300:]}"
            return Outcome(text, trouble, Usage())
        report = _last_json(text)
        if "is_error" not in report:
            most = Usage(dollars=dollars, estimated=True)
            return Outcome("", trouble or f"no report (exit status {code})", most)
        said = report.get("result")
        said = said if isinstance(said, str) else ""
        if report["is_error"] or code != 0:
            trouble = trouble or f"exit status {code}: {said[:300]}"
        return Outcome(said, trouble, _usage(report))


def _usage(report: Mapping[str, Any]) -> Usage:
    """Tokens and dollars out of Claude Code's report."""
    told = report.get("usage") if isinstance(report.get("usage"), dict) else {}
    names = ["input_tokens", "output_tokens"]
    names += ["cache_creation_input_tokens", "cache_read_input_tokens"]
    fresh, output, write, read = (int((told or {}).get(name) or 0) for name in names)
    return Usage(fresh, output, write, read, float(report.get("total_cost_usd") or 0.0))


def _fill(folder: Path, state: State, branch: str, context: Context) -> dict[str, str]:
    """Copies for the agent; returns path -> text of everything that was written."""
    told = "\n\n".join([*brief.system(context)[:1], brief.digest(state, branch, context)])
    files = {"BRIEF.md": told, "program.md": context.program, **context.readable, **context.files}
    for record in state.recent(SHOWN, branch):
        files[f"records/{record.id}.diff"] = context.records.diff(record.id)
        files[f"records/{record.id}.log"] = lines(context.records.log(record.id, 80))
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, newline="")
    return files


def _taken_back(folder: Path, context: Context) -> dict[str, str]:
    """The editable files that changed. Links are not followed: they could point anywhere.

    Raises OSError, ValueError: a file is gone, no plain file, too large or no text.
    """
    changed = {}
    for path, before in context.files.items():
        handle = os.open(folder / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ValueError(f"{path} is no plain file any more")
            text = file.read(4 * edit.LARGEST + 1).decode("utf-8")
        if text != before:
            changed[path] = text
    return changed


def _first(trespasses: list[str]) -> list[str]:
    return list(dict.fromkeys(trespasses))[:3]


def _changed(folder: Path, originals: Mapping[str, str], context: Context) -> list[str]:
    """Files that the agent changed, removed or made beside the editable ones: recorded."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or (path.is_file() and name not in originals):
            found.append(one_line(name, 80))
    for name in originals.keys() - context.files.keys():
        if _text(folder / name) != originals[name]:
            found.append(name)
    return sorted(found)


def _text(path: Path) -> str | None:
    """None: it is gone, no plain file or no text."""
    if path.is_symlink() or not path.is_file():
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_bytes().decode()
    return None


def _told(output: str) -> Mapping[str, Any]:
    found = _last_json(output)
    return found if "description" in found else {}


def _last_json(text: str) -> Mapping[str, Any]:
    """The last line that is a JSON object; {} if none is."""
    for line in reversed(text.strip().splitlines()):
        with contextlib.suppress(ValueError):
            found = json.loads(line.strip().strip("`"))
            if isinstance(found, dict):
                return found
    return {}


def _memory_mb(session: int) -> float:
    """Resident memory of a session's processes; 0 where there is no /proc."""
    pages = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the process group, also what outlives its leader."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
