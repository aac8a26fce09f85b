"""One run of one program under the referee, without a campaign: `autoresearch run --once`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import campaign, disk, lab, materialise, text
from jobs.errors import UserError
from jobs.evidence import tail
from jobs.history import State
from jobs.model import Experiment, Run
from jobs.settings import Config

LOG_LINES = 30  # of a run that failed, shown


def run(
    config: Config,
    train: Path | None,
    seed: int,
    keep: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run `train` (None: the lab's, else the shipped program). Returns what result.json says.

    Args:
        keep: where the run folder goes; None: it is removed.
        say: is told what runs, and the end of the log if it fails.

    Raises:
        UserError: no such program, or `keep` exists already.
    """
    from trainer.referee import wrapper

    if config.task.kind == "general":
        raise UserError("--once runs a nanochat program; campaign.yaml has a task of your own")
    source = train or (
        Path(lab.PROGRAM) if Path(lab.PROGRAM).exists() else lab.TRAINER / "train.py"
    )
    if not source.is_file():
        raise UserError(f"there is no program {source}; name one with --train")
    if keep is not None and keep.exists():
        raise UserError(f"{keep} exists already; name a new folder for the run")
    data = campaign.data_folder(config)
    lab.prepare(config.data.corpus, config.data.scale, data, said=sys.stderr)
    folder = Path(keep or tempfile.mkdtemp(prefix="autoresearch-once-")).absolute()
    try:
        program = folder / "program" / lab.PROGRAM
        program.parent.mkdir(parents=True)
        shutil.copyfile(source, program)
        site = materialise.Site(config, folder, data, {})
        length = materialise.budget(config)
        one = Run("once", seed, 1, length, config.data.scale)
        nothing = Experiment("once", "once", "", "", None, str(source), "person", "")
        task = materialise.task(site, State(), nothing, one, folder)
        task.save()
        say(
            f"running {source}: scale {config.data.scale}, "
            f"{length.amount:g} {length.kind}, seed {seed}"
        )
        result = wrapper.run(task)
        if result["status"] != "ok":
            say(text.lines(tail(folder / "train.log", LOG_LINES)))
        return result
    finally:
        if keep is None:
            disk.remove(folder)
        else:
            disk.remove(folder / "program")
