"""Owns RESULTS.md: one section a measurement, each saying when, where and on which commit.

    from tests.bench.results import record

    record("Feed", [{"batch": "128 x 2048", "tokens/s": 1.2e9}], "Against upstream's loader.")

Recording a section again replaces it in place. Safe among processes. Run the scripts from the
repository's root: `python -m tests.bench.bench_constants`.
"""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("RESULTS.md")
MEASURED = ("jobs", "agent", "trainer", "containers", "slurm")
TITLE = (
    "# Results\n\nFigures measured by the scripts beside this file; each section is replaced when"
    " its script runs again.\n"
)


def record(
    section: str, rows: Sequence[Mapping[str, Any]], note: str = "", path: Path = RESULTS
) -> str:
    """Write one section: a note in Markdown, and a table whose columns are the keys of `rows`.

    A missing key is an empty cell, None is "not run" and floats show four significant digits.
    Returns the section's text, which is printed too.
    """
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [f"## {section}", f"*{stamp}, commit {_commit(path)}, {_machine()}*", note.strip()]
    text = "\n\n".join(part for part in [*parts, _table(rows)] if part)
    print(text)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        old = path.read_text() if path.exists() else TITLE
        draft = path.with_name(f".{path.name}.tmp")
        draft.write_text(_replace(old, section, text))
        os.replace(draft, path)
    finally:
        os.close(folder)
    return text


def _replace(old: str, section: str, text: str) -> str:
    head, *sections = old.split("\n## ")
    body = text.removeprefix("## ").rstrip() + "\n"
    for index, existing in enumerate(sections):
        if existing.split("\n", 1)[0].strip() == section:
            sections[index] = body
            break
    else:
        sections.append(body)
    return "\n## ".join([head.rstrip() + "\n", *(s.rstrip() + "\n" for s in sections)])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row[key]) if key in row else "" for key in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "not run"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _commit(path: Path) -> str:
    """Short hash of HEAD, with a word where files other than the results differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
        return done.stdout

    commit = git("rev-parse", "--short", "HEAD").strip() or "none"
    changed = [line[3:] for line in git("status", "--porcelain", "-uno").splitlines()]
    return commit + (" with local changes" if set(changed) - {f"tests/bench/{path.name}"} else "")


def _machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
        model = names[0] if names else model
    parts = [f"{model}, {os.cpu_count()} cores"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        cards = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
        parts += [cards[0]] if cards[0] else []
    parts.append(f"Python {platform.python_version()}")
    try:
        parts.append(f"torch {importlib.metadata.version('torch')}")
    except importlib.metadata.PackageNotFoundError:
        parts.append("no torch")
    return ", ".join(parts)


def stale(path: Path = RESULTS) -> list[str]:
    """The sections that were measured on code older than what is here, by their commits."""
    found = []
    for section in path.read_text().split("\n## ")[1:] if path.exists() else []:
        title, commit = section.split("\n", 1)[0], re.search(r"commit (\w+)", section)
        words = ["git", "log", "--oneline", f"{commit[1] if commit else ''}..HEAD", "--", *MEASURED]
        newer = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if newer.returncode or newer.stdout:
            found.append(title)
    return found


if __name__ == "__main__":
    if old := stale():
        print(f"RESULTS.md: {len(old)} sections are older than the code: {'; '.join(old)}")
        print("`make proof` measures them again")
