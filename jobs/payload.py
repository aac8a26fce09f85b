"""What runs on the node: claims the run folder, then lets the referee's wrapper run the program.

A run folder is claimed at most once, by an exclusive link: a payload that was submitted twice
(the controller was killed between sbatch and its record) finds the claim and leaves at once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from jobs import process


def claim(run_dir: Path) -> bool:
    """Take the folder for this process. False: another payload has it.

    The claim appears whole or not at all, so nobody ever reads half of one.
    """
    record = {
        "run": json.loads((run_dir / "task.json").read_text())["facts"]["run"],
        "name": os.environ.get("AUTORESEARCH_RUN_NAME", ""),
        "process": process.identity(),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    draft = run_dir / f".claim-{os.getpid()}-{socket.gethostname()}"
    draft.write_text(json.dumps(record))
    try:
        os.link(draft, run_dir / "claim.json")  # atomic, also on NFS
        return True
    except FileExistsError:  # NFS: also to one's own call, where its answer was lost
        return draft.stat().st_nlink == 2
    finally:
        draft.unlink()


def claimed(runs: Path, run: str) -> dict[str, Any]:
    """What the claim of a run says, by its id ('e0042-s1-a1'); {} where there is none."""
    try:
        found: dict[str, Any] = json.loads(
            (runs / run.replace("-", "/", 1) / "claim.json").read_text()
        )
        return found
    except (OSError, ValueError):  # none, or torn by a power cut
        return {}


def run_id(name: str) -> str:
    """'night-e0042-s1-a1' -> 'e0042-s1-a1'."""
    return "-".join(name.split("-")[-3:])


def run(run_dir: str) -> None:
    """Run what run_dir/task.json describes; run_dir/result.json is written last, whatever the end.

    Also the function that submitit pickles, by reference: nothing is ever unpickled from here.
    """
    folder = Path(run_dir)
    if not claim(folder):
        print(f"{run_dir} is claimed by another payload: nothing to do")
        return
    from trainer.referee import wrapper

    wrapper.run_folder(folder)


if __name__ == "__main__":
    run(sys.argv[1])
