"""What campaigns, branches and experiments are called in git, and what their commits say."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jobs import text
from jobs.errors import UserError

# Every experiment's commit carries all of these, in this order; "none" where there is nothing.
TRAILERS = (
    "Campaign",
    "Branch",
    "Parent-Experiment",
    "Rebased-From",
    "Researcher",
    "Program-SHA256",
    "Container-Tag",
    "Container-SHA256",
    "Registry-Digest",
    "Data-Manifest-SHA256",
    "Evaluator-SHA256",
)
LONGEST = 64  # a name becomes part of paths, of job names and of refs


def attempt_ref(campaign: str, experiment: str) -> str:
    """The ref that keeps an experiment's commit for ever."""
    return f"refs/autoresearch/{campaign}/{experiment}"


def branch_ref(campaign: str, branch: str) -> str:
    """The branch whose tip is the last keep."""
    return f"refs/heads/autoresearch/{campaign}/{branch}"


def check_name(kind: str, name: str) -> str:
    """`name`, if git, file systems and Slurm all take it as the name of a campaign or branch.

    Raises UserError: what is wrong with it.
    """
    wrong = None
    if not name:
        wrong = "it is empty"
    elif len(name) > LONGEST:
        wrong = f"it has {len(name)} characters; at most {LONGEST} are allowed"
    elif bad := re.search(r"[^A-Za-z0-9._-]", name):
        wrong = f"it contains {bad.group()!r}; letters, digits and . _ - are allowed"
    elif not name[0].isalnum():
        wrong = f"it begins with {name[0]!r}; begin with a letter or a digit"
    elif ".." in name or name.endswith((".", ".lock")):
        wrong = "git allows no '..' in a name, and neither '.' nor '.lock' at its end"
    if wrong:
        raise UserError(f"{kind} name {name[:80]!r}: {wrong}")
    return name


def records_ref(campaign: str) -> str:
    """The ref whose commit's tree holds a campaign's records."""
    return f"refs/autoresearch/{campaign}/records"


def commit_message(message: str, trailers: Mapping[str, str | None]) -> str:
    """A commit's text: subject, body, and a last paragraph of trailers that nothing can forge."""
    subject, _, body = text.lines(message).strip().partition("\n")
    rows = {key: trailers.get(key) for key in (*TRAILERS, *trailers)}
    block = "\n".join(
        f"{key}: {text.one_line(value or '') or 'none'}" for key, value in rows.items()
    )
    return "\n\n".join(p for p in (subject or "experiment", body.strip(), block) if p) + "\n"
