"""What `autoresearch` can be asked, and how `--help` teaches it."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import VERSION

ABOUT = """\
A night of experiments by itself: a researcher proposes an edit of one file, a referee trains and
scores it under a fixed budget, and git remembers everything.

  autoresearch init LAB && cd LAB     a folder: program.md, trainer/train.py, campaign.yaml
  autoresearch prepare                the data, once
  autoresearch run                    go; Ctrl-C hands over, the same command resumes
  autoresearch status                 from another terminal, at any time
"""


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="autoresearch",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"autoresearch {VERSION}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    looking = argparse.ArgumentParser(add_help=False)
    looking.add_argument("--config", type=Path, default=Path("campaign.yaml"), help="campaign.yaml")
    looking.add_argument(
        "--campaign", dest="named", metavar="NAME", help="another campaign than campaign.yaml's"
    )
    asking = argparse.ArgumentParser(add_help=False, parents=[looking])
    asking.add_argument("--json", action="store_true", help="print JSON")

    def add(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=list(parents))

    one = add("init", "make a lab: a git repository with the shipped program and settings")
    one.add_argument(
        "folder", type=Path, nargs="?", default=Path("lab"), help="a new folder (default: lab)"
    )
    one.add_argument(
        "--from", dest="source", type=Path, help="campaign folder whose best to begin from"
    )
    one = add(
        "prepare",
        "prepare the corpus: shards, tokenizer, rows (once per corpus and scale)",
        looking,
    )
    one.add_argument("rest", nargs="*", help="after --: options of trainer/prepare.py")
    _run_options(commands.add_parser("run", help="run or resume the campaign", parents=[looking]))
    add("stop", "let the running experiments end, then stop the controller", looking)
    add("status", "how the campaign stands", asking)
    one = add("log", "every experiment in a line, newest first", asking)
    one.add_argument("--branch", help="only of this branch")
    one.add_argument("-n", type=_positive(int), help="only the last N")
    named = "e0042, a commit, or a branch (its last keep)"
    one = add("show", "all that is known of one experiment", asking)
    one.add_argument("experiment", help=named)
    one = add("diff", "what an experiment changed", looking)
    one.add_argument("experiment", help=named)
    add(
        "report",
        "write results.tsv, results.parquet, report/progress.png and report/index.html",
        asking,
    )
    one = add("clean", "remove what finished runs and their jobs left; records stay", asking)
    one.add_argument("--dry-run", action="store_true", help="only say what would go")
    one = add("demo", "a real campaign of 12 experiments on this machine, from the shipped program")
    one.add_argument("--detuned", action="store_true", help="begin from two constants made worse")
    one.add_argument("--folder", type=Path, help="its lab (default: autoresearch-demo)")
    told = "experiments beside the baseline"
    one.add_argument("--experiments", type=_positive(int), metavar="N", help=told)
    one = add("doctor", "whether this campaign can start, each check with its remedy", asking)
    one.add_argument("--job", action="store_true", help="also ask compute nodes, by two short jobs")
    _branch_options(add, looking)
    add("compare", "branches side by side: what each tried, found, and cost", asking)
    _again_options(add, looking, asking)
    from containers import cli as images

    images.add_parser(commands)
    return whole


def _run_options(one: argparse.ArgumentParser) -> None:
    one.description = (
        "Run the campaign of campaign.yaml until a limit, an order or Ctrl-C; resume it."
    )
    one.add_argument(
        "campaign", type=Path, nargs="?", help="campaign.yaml (default: ./campaign.yaml)"
    )
    one.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, repository, data and image; show the first job",
    )
    one.add_argument("--once", action="store_true", help="one run of one program, no campaign")
    one.add_argument("--train", type=Path, help="with --once: the program (default: the lab's)")
    one.add_argument("--seed", type=int, help="with --once: the run's seed (default: 1)")
    one.add_argument("--keep", type=Path, help="with --once: put the run folder here")
    one.add_argument("--json", action="store_true", help="with --once: print result.json")


def _branch_options(add: Callable[..., Any], looking: argparse.ArgumentParser) -> None:
    one = add("tell", "a note to a branch's researcher", looking)
    one.add_argument("branch", help="its name")
    one.add_argument("text", help="what its researcher is to know")
    one = add("branch", "add, pause, resume or retire a branch", looking)
    orders = ("add", "pause", "resume", "retire")
    one.add_argument("order", choices=orders, help="what becomes of it")
    one.add_argument("branch", help="its name")
    one.add_argument("--program", help="add: its program file")
    one.add_argument(
        "--slots", type=int, help="add: its runs in flight at once (default: its share)"
    )
    one.add_argument("--start", help="add: the commit to start from")
    kinds = ("sweep", "scripted", "anthropic", "command")
    one.add_argument("--agent", choices=kinds, help="add: its researcher")
    places = {"node": "this node", "constraint": "nodes of this feature", "gpu": "this GPU model"}
    for place, which in places.items():
        one.add_argument(f"--{place}", help=f"add: only on {which} (Slurm)")
    one = add("adopt", "try an experiment's edit on a branch", looking)
    one.add_argument("experiment", help="e0042, a commit, or a branch (its last keep)")
    one.add_argument("--into", required=True, metavar="BRANCH", help="where it is tried")


def _again_options(add: Callable[..., Any], looking: Any, asking: Any) -> None:
    for verb, what in (("push", "send a campaign to"), ("fetch", "get a campaign from")):
        one = add(verb, f"{what} another clone: branches, attempts, notes, records", looking)
        one.add_argument("remote", help="a remote's name, or its URL")
    named = "e0042, a commit, or a branch (its last keep)"
    one = add(
        "reproduce",
        "run an experiment again, and compare: exit status 0 reproduced, 1 not, 4 not comparable",
        asking,
    )
    one.add_argument("experiment", nargs="?", help=named)
    one.add_argument("--all-keeps", action="store_true", help="every keep (of the branch named)")
    one.add_argument("--times", type=_positive(int), default=1, metavar="N", help="how often")
    executors = ("local", "slurm", "allocation")
    one.add_argument("--executor", choices=executors, help="where (default: campaign.yaml's)")
    one.add_argument("--data", type=Path, metavar="DIR", help="the prepared data")
    one.add_argument("--image", metavar="TAG", help="another image than the recorded one")
    told = "seconds (tokens where the scale counts them); its baseline runs beside it"
    one.add_argument("--budget", type=_positive(float), help=told)
    one.add_argument(
        "--scale",
        choices=("cpu", "small", "h100"),
        help="at another size; its baseline runs beside it",
    )
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with another constant of train.py; likewise",
    )
    one = add("bundle", "an experiment as a folder that runs without this project", looking)
    one.add_argument("experiment", help=named)
    one.add_argument("--to", type=Path, metavar="DIR", help="a new folder")


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < kind(text) < math.inf:
                return kind(text)
        what = "a whole number from 1" if kind is int else "a number above 0"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return read
