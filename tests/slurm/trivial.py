"""A payload that does what its run folder's work.json says, for tests of where runs execute."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path


def run(run_dir: str) -> None:
    """Claims, works, writes result.json by rename: as jobs.payload does, in milliseconds."""
    folder = Path(run_dir)
    claim = {
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "step": os.environ.get("SLURM_STEP_ID"),
        "node": os.environ.get("SLURMD_NODENAME"),
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "name": os.environ.get("AUTORESEARCH_RUN_NAME"),
        "time": time.time(),
        "pid": os.getpid(),
        "environment": sorted(os.environ),
    }
    draft = folder / f".claim-{os.getpid()}"
    draft.write_text(json.dumps(claim))
    try:
        os.link(draft, folder / "claim.json")
    except FileExistsError:
        (folder / "second").touch()
        return
    finally:
        draft.unlink()
    work = json.loads((folder / "work.json").read_text())
    time.sleep(work.get("sleep", 0))
    if number := work.get("kill"):
        os.kill(os.getpid(), getattr(signal, number))
    if "exit" in work:
        os._exit(work["exit"])
    (folder / ".result").write_text(json.dumps({"time": time.time()}))
    (folder / ".result").rename(folder / "result.json")
