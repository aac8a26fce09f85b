"""A lab of given files, for whole campaigns that a process of its own runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


def lab(folder: Path, files: dict[str, str], settings: dict[str, Any]) -> Path:
    """A git repository with these files and a campaign.yaml."""
    folder.mkdir()
    for path, text in {**files, "campaign.yaml": json.dumps(settings)}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return as_repository(folder)


def as_repository(folder: Path) -> Path:
    """Make a folder a git repository of one commit, by a user of its own: git may know none."""
    for words in (
        "init -q -b main",
        "config user.name t",
        "config user.email t@localhost",
        "add -A",
        "commit -qm start",
    ):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    return folder
