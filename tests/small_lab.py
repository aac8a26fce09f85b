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
    who = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "start"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder
