"""A definition that builds in a second what passes for an image of the project, on a tiny root."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LABELS = {"autoresearch.protocol": "1", "autoresearch.evaluator.sha256": "e" * 64}
LABELS |= {"autoresearch.flash_attn": "none"}
DEFINITION = """\
Bootstrap: localimage
From: {root}

%arguments
    CONTEXT=.
    RECIPE=by-hand
    WORD=hello

%files
    {{{{ CONTEXT }}}}/containers/seal.py /seal.py

%post
    echo "{{{{ WORD }}}}" > /word
    echo "autoresearch.definition.sha256 {{{{ RECIPE }}}}" >> "$APPTAINER_LABELS"
    {post}

%labels
    {labels}
"""


def make_root(folder: Path, call: Callable[..., Any]) -> Path:
    """A root file system of a shell and a program that answers as an image of the project does.

    Args:
        call: runs a command (its words) as the folder's owner.
    """
    root = folder / "root"
    script = """
        mkdir -p "$1/bin" "$1/opt/autoresearch/venv/bin" "$1/tmp" "$1/mnt" && cd "$1"
        cp /bin/sh /bin/cat bin/
        for library in $(ldd /bin/sh /bin/cat | grep -o '/lib[^ ]*' | sort -u); do
            cp --parents "$library" .
        done
        printf '#!/bin/sh\\ncat /report.json\\n' > opt/autoresearch/venv/bin/python
        chmod 755 opt/autoresearch/venv/bin/python
    """
    call("sh", "-ec", script, "sh", str(root))
    report = json.dumps({"labels": LABELS, "packages": ["torch==9", "deb:gcc=12"]})
    (root / "report.json").write_text(report + "\n")
    return root


def write(root: Path, post: str = ":", labels: Mapping[str, str] = LABELS) -> Path:
    """A definition on that root, beside it."""
    path = root.parent / "small.def"
    lines = "\n    ".join(f"{name} {text}" for name, text in labels.items())
    path.write_text(DEFINITION.format(root=root, post=post, labels=lines))
    return path
