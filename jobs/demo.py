"""The demonstration: a real campaign from the shipped program, with nothing set up."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from jobs import campaign, config, lab, night, report
from jobs.errors import UserError
from jobs.history import State
from jobs.repository import Repository

CAMPAIGN = "demo"
EXPERIMENTS = 12  # beside the baseline
EXPERIMENTS_DETUNED = 24  # finding two constants again takes longer
TOKENS = 200 * 2048  # half the scale's budget: the whole demonstration in a quarter of an hour
RERUNS = 3  # of first and best, on fresh seeds
FACTOR = 3.0
# What the sweep moves: rates and schedule, since other sizes would not fit the time of a demo.
SWEPT = ["embedding_rate", "head_rate", "scalar_rate", "matrix_rate", "weight_decay", "warmdown"]
# Named constants of train.py and which way is worse for them.
DETUNED = {"matrix_rate": 1 / FACTOR, "embedding_rate": 1 / FACTOR}


def run(
    folder: Path | None,
    detuned: bool,
    experiments: int | None,
    say: Callable[[str], None],
    show: Callable[[str], None],
) -> int:
    """Make the lab (or find it again), prepare the data, run the campaign, say what came of it.

    Raises UserError: the folder holds something that is no demonstration.
    """
    begun = time.monotonic()
    folder = (
        folder or Path("autoresearch-demo-detuned" if detuned else "autoresearch-demo")
    ).absolute()
    if not (folder / "campaign.yaml").exists():
        _make(folder, detuned, experiments or (EXPERIMENTS_DETUNED if detuned else EXPERIMENTS))
        say(f"a lab in {folder}: the shipped trainer/train.py, program.md, campaign.yaml")
    else:
        say(f"resuming the demonstration in {folder}")
    settings = config.load(folder / "campaign.yaml")
    if settings.campaign != CAMPAIGN:
        raise UserError(f"{folder} is a lab of its own: name another folder (--folder)")
    data = campaign.data_folder(settings)
    say(f"corpus: Python's own standard library, prepared in {data}")
    lab.prepare(settings.data.corpus, settings.data.scale, data)
    reason = night.run(settings, folder, say, show)
    if reason == "interrupted":
        say("handed over; the same command resumes")
        return 0
    directory = campaign.folder(settings, folder)
    state = campaign.read(directory)
    files = report.write_all(directory, state, Repository(folder))
    say("")
    for line in summary(state):
        say(line)
    say(f"took {report.duration(time.monotonic() - begun)}")
    say(f"table:  {files['results.tsv']}")
    say(f"report: {files['index.html']}")
    here = Path(sys.executable).with_name("autoresearch")  # maybe on nobody's PATH
    say(f"more:   cd {folder} && {here} log")
    return 0


def summary(state: State) -> list[str]:
    """The closing reruns in words: first against best on fresh seeds, gain or none."""
    branch, best = state.branch("main"), state.best("main")
    if branch.baseline is None or best is None:
        return ["nothing was scored: `autoresearch log` says why"]
    first, again = state.record(branch.baseline), report.closing(state, branch)
    if again is None:
        return [f"first {first.id} and best {best.id} were not run again: it was stopped before"]
    if best.id == first.id:
        mean = statistics.fmean(again.first)
        return [f"nothing better than the first was found; on fresh seeds it has {mean:.4f}"]
    lines = [f"on fresh seeds ({len(again.first)} each):"]
    for name, record, scores in (("first", first, again.first), ("best", best, again.best)):
        lines.append(f"  {name:5s} {record.id}  {_spread(scores)}   {record.description}")
    told = f"gain {again.gain:.4f} val_bpb"
    if not again.real:
        told = f"no gain beyond noise: {again.gain:+.4f} +- {again.noise:.4f}"
    claimed = (first.metric or 0.0) - (best.metric or 0.0)
    lines.append(f"  {told} (the campaign's own seed said {claimed:.4f})")
    reference = state.branches.get("reference")
    if reference is not None and reference.baseline is not None:
        shipped = report.confirmed(state.record(reference.baseline))
        lines += _recovered(shipped, again.first, again.best) if shipped else []
    return lines


def _recovered(shipped: list[float], first: list[float], best: list[float]) -> list[str]:
    """How much of the gap between the detuned and the shipped program was closed."""
    gap = statistics.fmean(first) - statistics.fmean(shipped)
    said = f"  detuning cost {gap:.4f}"
    if gap > 0:
        share = (statistics.fmean(first) - statistics.fmean(best)) / gap
        said += f"; the campaign recovered {share:.0%} of it"
    return [f"  shipped  {_spread(shipped)}", said]


def _spread(values: list[float]) -> str:
    mean, sd = report.mean_sd(values)
    return f"{mean:.4f}" + ("" if sd is None else f" +- {sd:.4f}")


def _make(folder: Path, detuned: bool, experiments: int) -> None:
    """The lab, whole or not at all: a kill on the way leaves nothing that stands in its way."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"making a lab in {folder}: it is not empty; name a new folder (--folder)")
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    lab.make(draft)
    _settle(draft, detuned, experiments)
    draft.rename(folder)


def _settle(folder: Path, detuned: bool, experiments: int) -> None:
    """campaign.yaml of the demonstration; detuned: the lab's program made worse in a commit."""
    settings = {
        "campaign": CAMPAIGN,
        "budget": {"tokens": TOKENS},
        "agent": {"kind": "sweep", "constants": SWEPT},
        "limits": {"experiments": experiments + 1},
        "confirm": {"runs": RERUNS},
    }
    if detuned:
        shipped = Repository(folder).start("HEAD")
        path = folder / lab.PROGRAM
        path.write_text(worsened(path.read_text()))
        lab.commit(folder, "Two constants made three times worse")
        (folder / "nothing.yaml").write_text("[]\n")  # the reference is only measured
        settings["limits"] = {"experiments": experiments + 2}
        settings["branches"] = {
            "main": {},
            "reference": {
                "start": shipped,
                "agent": {"kind": "scripted", "script": "nothing.yaml"},
            },
        }
    (folder / "campaign.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    lab.commit(folder, "Settings of the demonstration")


def worsened(train_py: str) -> str:
    """The program with the constants of DETUNED changed in the block of scale cpu.

    Raises UserError: a constant is not there.
    """
    from agent import constants

    values = constants.values(train_py, "cpu")
    try:
        changes = {name: values[name] * factor for name, factor in DETUNED.items()}
    except KeyError as error:
        raise UserError(f"trainer/train.py has no constant {error}") from None
    return constants.replace(train_py, changes, "cpu")
