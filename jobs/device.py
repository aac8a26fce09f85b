"""GPU, driver, torch and attention as train.py meets them, in the image where runs have one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs import lab
from jobs.model import Finding
from jobs.settings import Executor

PROBE_S = 240.0  # torch from a cold file system, and what a GPU's backends compile
# Oldest NVIDIA driver for each major version of CUDA, by NVIDIA's table of minor compatibility.
DRIVERS = {"11": 450, "12": 525, "13": 580}


def findings(executor: Executor, image: str | None) -> list[Finding]:
    """What containers/probe.py finds, in `image` (a SIF) if one is given."""
    cards, prefix = _cards(), list[str]()
    python, given = executor.python or sys.executable, {"PYTHONPATH": str(lab.TRAINER)}
    if image:
        from containers import command

        prefix = command.bare(image, gpu=bool(cards), network=executor.allow_network)
        python, given = command.PYTHON, {"PYTHONPATH": command.SEALED, "HOME": "/tmp"}
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        given["CUDA_VISIBLE_DEVICES"] = visible  # --containall drops it
    given |= {"USER": "autoresearch", "PYTHONSAFEPATH": "1"}
    argv = [*prefix, "/usr/bin/env", *(f"{k}={v}" for k, v in given.items()), python, "-c"]
    probe = (lab.PROJECT / "containers" / "probe.py").read_text()
    program = (lab.TRAINER / "train.py").read_text()
    said, failed = output([*argv, probe], program, PROBE_S)
    if failed:
        remedy = "pip install -e 'CHECKOUT[trainer]' for executor.python, or executor.image"
        return [Finding("torch", "failure", f"train.py does not start: {said[-400:]}", remedy)]
    told = json.loads(said.splitlines()[-1])
    wanted = executor.kind != "local" and executor.gpu_syntax != "none"
    return [gpu(cards, told, wanted), attention(told), compiler(told)]


def gpu(cards: Sequence[tuple[str, str]], told: Mapping[str, Any], wanted: bool) -> Finding:
    """Cards (model, driver) against what torch sees (containers/probe.py).

    Args:
        wanted: a job asked for them.
    """
    models, drivers = {model for model, _ in cards}, {driver for _, driver in cards}
    cuda, sees = told["cuda"], told["gpu"] or "no GPU"
    oldest = DRIVERS.get((cuda or "").partition(".")[0], 0)
    old = any(int(driver.partition(".")[0]) < oldest for driver in drivers)
    seen = f"{', '.join(sorted(models)) or 'none'}, driver {', '.join(drivers) or 'none'}; torch is"
    seen += f" built for {f'CUDA {cuda}' if cuda else 'CPUs'} and sees {sees}"
    needed = f"a driver of {oldest} or newer (an administrator)" if cards else "executor.gpu_syntax"
    unseen = cuda and told["device"] != "cuda" and (wanted or cards)
    several = "one model for each branch: branches.NAME.gpu, or executor.gpus: 'MODEL:1'"
    unused = "to train on it, executor.image: one of trainer.def (or torch for CUDA)"
    return Finding.of(
        "GPU",
        seen,
        failure=(old or unseen, f"See {needed}, or take an image of an older CUDA or of none"),
        warning=(len(models) > 1 or (cards and not cuda), several if cuda else unused),
    )


def attention(told: Mapping[str, Any]) -> Finding:
    """What train.py's backends did with one bf16 attention; it uses the first that is there."""
    said = told["attention"]
    present = {name: words for name, words in said.items() if not words.startswith("not here")}
    first = next(iter(present))
    poor = set(present.values()) != {"works"} or (first == "sdpa" and told["device"] == "cuda")
    remedy = f"train.py uses {first} here: an image with torch and flash-attn for this GPU"
    seen = f"{told['device']}: {'; '.join(f'{name} {words}' for name, words in said.items())}"
    failed = present[first] != "works"
    return Finding.of("attention", seen, failure=(failed, remedy), warning=(poor, remedy))


def compiler(told: Mapping[str, Any]) -> Finding:
    """What torch.compile needs."""
    why = told["compile"]
    remedy = "Install gcc, g++ and Python's headers; uncompiled runs see less in their budget"
    return Finding.of("compiler", why or "torch.compile has one", warning=(why, remedy))


def output(argv: Sequence[str], given: str = "", limit_s: float = 20.0) -> tuple[str, bool]:
    """What a command prints, or where it fails its words and True."""
    try:
        done = subprocess.run(
            argv, input=given, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error), True
    return (done.stderr.strip() if done.returncode else done.stdout), done.returncode != 0


def _cards() -> list[tuple[str, str]]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return re.findall(r"^(.+), (\d+\..*)$", output(query)[0], re.MULTILINE)
