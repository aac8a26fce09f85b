"""A lab: a git repository with a program to edit, a program.md and a campaign.yaml."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import trainer
from jobs.errors import UserError

TRAINER = Path(trainer.__file__).parent  # the frozen half, as installed
PROJECT = TRAINER.parent  # holds program.md in a checkout
PROGRAM = "trainer/train.py"

IGNORED = """\
# what campaigns leave behind; their history is in git all the same (refs/autoresearch)
/campaigns/
/data/
"""


def make(folder: Path, train_py: str | None = None) -> Path:
    """Make a lab of its own in `folder`: the shipped program, or the text given, committed.

    Raises UserError: the folder holds something already.
    """
    from jobs import config

    if not (PROJECT / "program.md").exists():
        raise UserError(
            f"making a lab in {folder}: {PROJECT} has no program.md, so this was installed without "
            "it; install a checkout as it stands: pip install -e CHECKOUT"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"making a lab in {folder}: it is not empty; name a new folder")
    (folder / "trainer").mkdir(parents=True)
    if train_py is None:
        shutil.copyfile(TRAINER / "train.py", folder / PROGRAM)  # byte for byte
    else:
        (folder / PROGRAM).write_text(train_py)
    _copy_programs(folder)
    (folder / "campaign.yaml").write_text(config.template())
    (folder / ".gitignore").write_text(IGNORED)
    _git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder, "A lab: where the night begins")
    return folder


def commit(folder: Path, message: str) -> None:
    """Commit everything in a lab that this module made."""
    _git(folder, "add", "--all")
    quietly = ("--quiet", "--no-verify", "--no-gpg-sign")  # the user's hooks know other projects
    _git(folder, *_identity(folder), "commit", *quietly, "--message", message)


def _copy_programs(folder: Path) -> None:
    for source in [PROJECT / "program.md", *sorted((PROJECT / "programs").glob("*.md"))]:
        target = folder / source.relative_to(PROJECT)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def _identity(folder: Path) -> list[str]:
    """Options that name a committer where the user has none configured."""
    known = subprocess.run(
        ["git", "-C", str(folder), "config", "user.email"], capture_output=True, check=False
    )
    if known.returncode == 0:
        return []
    return ["-c", "user.name=autoresearch", "-c", "user.email=autoresearch@localhost"]


def _git(folder: Path, *arguments: str) -> None:
    try:
        subprocess.run(
            ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise UserError("git is not on PATH: install it (Debian: apt-get install git)") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"git {arguments[-1]} in {folder}: {error.stderr.strip()}") from None


def prepare(
    corpus: str, scale: str, data: Path, extra: tuple[str, ...] = (), said: IO[str] | None = None
) -> None:
    """Prepare a corpus for a scale, unless it is there already: trainer/prepare.py does the work.

    Args:
        said: where its report goes; None: standard output.

    Raises:
        UserError: it failed; its own words are on the screen.
    """
    if (data / "manifest.json").exists() and not extra:
        return
    argv = [sys.executable, str(TRAINER / "prepare.py")]
    argv += ["--corpus", corpus, "--scale", scale, "--data", str(data), *extra]
    if subprocess.run(argv, stdout=said, check=False).returncode != 0:
        raise UserError(f"preparing {corpus} for scale {scale} in {data} failed (see above)")
