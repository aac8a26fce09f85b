"""Campaigns that have ended, for tests of what comes after: one toy, one of nanochat's kind."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from toylab import GIT, ROOT, Lab, change

from jobs import cli

sys.path[:0] = [str(ROOT / "trainer"), str(ROOT / "tests" / "trainer")]
import runs  # noqa: E402 - tiny data and programs for a real referee

BROKEN = {"description": "broken", "replace": [["NAP = 0.0", "NAP = None"]]}
DRIFTING = {
    "description": "drifting",
    "replace": [["NAP = 0.0", "NAP = 0.0\nimport time\nX = 9 + time.time() % 1"]],
}
LEARNER = f"""\
LOSS = 6.0
{runs.UNIFORM}
train()
evaluate(LOSS)
"""


def toy(root: Path) -> Lab:
    """e0001 baseline, e0002 kept, e0003 discarded, e0004 crashed, e0005 never twice the same."""
    lab = Lab(root, change(Y=2), change(X=5), BROKEN, DRIFTING, limits={"experiments": 5})
    lab.git("add", "campaign.yaml")
    lab.git("commit", "--quiet", "--message", "settings")
    lab.run()
    return lab


def tiny(root: Path, on_line: Callable[[str], None] = lambda line: None) -> Lab:
    """e0001 baseline, e0002 kept: real referee, real data, a program that does not need torch."""
    lab = Lab(
        root,
        change(LOSS=5.5),
        task={"kind": "nanochat"},
        data={"folder": str(runs.data_folder())},
        budget={"tokens": 2**13},
        limits={"experiments": 2},
        disk={"keep_free_mb": 1},
    )
    (root / "trainer").mkdir()
    lab.write("trainer/train.py", LEARNER)
    lab.git("add", "trainer", "campaign.yaml")
    lab.git("commit", "--quiet", "--message", "program")
    lab.run(on_line)
    return lab


def clone(lab: Lab, target: Path) -> Path:
    """Another clone that has what `push` sent: by way of a bare repository."""
    bare = target.with_name(f"{target.name}.git")
    for words in (
        ("init", "--quiet", "--bare", str(bare)),
        ("-C", str(lab.root), "push", "--quiet", str(bare), "main"),
        ("clone", "--quiet", "--branch", "main", str(bare), str(target)),
    ):
        subprocess.run(["git", *words], check=True, env={**os.environ, **GIT})
    assert autoresearch(lab.root, "push", str(bare))[0] == 0
    return target


def autoresearch(folder: Path, *words: str) -> tuple[int, str]:
    """`autoresearch WORDS` in `folder`: exit status, and what it printed."""
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        try:
            status = cli.main(list(words))
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
    return status, printed.getvalue()
