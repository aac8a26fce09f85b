"""The exact text of jobs, compared with files that people can read."""

from __future__ import annotations

import difflib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.settings import Executor
from slurm import commands, script

GOLDEN = Path(__file__).with_name("golden")
CAMPAIGN = Path("/lab/campaigns/night")
NAME = "night-e0042-s1-a1"
PLAIN = Executor(kind="slurm")
SITE = Executor(
    kind="allocation",
    slots=8,
    nodes=2,
    hold_hours=11.5,
    partition="gpu",
    account="lab",
    qos="long",
    constraint="a100",
    reservation="course",
    exclude=("bad1", "bad2"),
    gpu_syntax="gpus-per-node",
    gpus="h100:1",
    cpus=6,
    memory="48G",
    setup=("module load apptainer", "export http_proxy=http://proxy:3128"),
)


def check(text: str, name: str) -> None:
    """Compare with tests/slurm/golden/NAME, after putting PYTHON for this interpreter."""
    text = text.replace(shlex.quote(sys.executable), "PYTHON")
    path = GOLDEN / name
    if os.environ.get("ACCEPT_GOLDEN"):
        path.write_text(text)
    known = path.read_text() if path.exists() else ""
    if text != known:
        diff = difflib.unified_diff(
            known.splitlines(), text.splitlines(), str(path), "now", "", "", 3, ""
        )
        pytest.fail(
            "\n".join(diff) + "\n\nIf this change is meant, accept it and commit the file:\n"
            "  ACCEPT_GOLDEN=1 python -m pytest tests/slurm/test_script.py",
            pytrace=False,
        )


def test_the_script_of_a_run_with_default_settings():
    check(script.sbatch_text(PLAIN, NAME, CAMPAIGN, 600.0), "run.sbatch")


def test_the_script_of_a_run_at_a_site_with_all_settings():
    check(script.sbatch_text(SITE, NAME, CAMPAIGN, 600.0, {"bad3"}), "run-at-site.sbatch")


def test_the_script_that_holds_nodes():
    check(script.holder_text(SITE, CAMPAIGN, 600.0, {"bad3"}), "holder.sbatch")


@pytest.mark.parametrize(("settings", "name"), [(PLAIN, "step"), (SITE, "step-at-site")])
def test_the_srun_of_a_step(settings: Executor, name: str):
    argv = script.step_argv(settings, NAME, CAMPAIGN, 600.0, "8123", "n2", 1)
    text = "\n".join(shlex.quote(word) for word in argv[:-1])
    check(f"{text}\n{argv[-1]}\n", f"{name}.txt")


def test_no_secret_of_the_environment_is_in_any_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    monkeypatch.setenv("SBATCH_ACCOUNT", "other")
    step = script.step_argv(SITE, NAME, CAMPAIGN, 600.0, "8123", "n2", 1)
    texts = [
        script.sbatch_text(SITE, NAME, CAMPAIGN, 600.0),
        script.holder_text(SITE, CAMPAIGN, 1.0),
    ]
    for text in [*texts, *step, *commands.environment(), *commands.environment().values()]:
        assert "secret" not in text
        assert "other" not in text
    assert "SBATCH_ACCOUNT" not in commands.environment()


def test_no_workload_key_is_sent():
    assert "wckey" not in script.sbatch_text(PLAIN, NAME, CAMPAIGN, 600.0)


def test_a_time_limit_is_for_the_whole_run_and_its_margin():
    assert script.minutes(600.0, 180.0) == 13
    assert script.minutes(601.0, 180.0) == 14
    assert script.minutes(1.0, 0.0) == 1


def test_a_holder_asks_for_what_all_its_runs_need():
    text = script.holder_text(Executor(slots=8, nodes=4, gpus="2", memory="500M"), CAMPAIGN, 60.0)
    assert "#SBATCH --ntasks-per-node=2\n" in text
    assert "#SBATCH --gres=gpu:4\n" in text
    assert "#SBATCH --mem=1000M\n" in text
    total = Executor(slots=8, nodes=4, gpus="h100:1", gpu_syntax="gpus", memory=None)
    text = script.holder_text(total, CAMPAIGN, 60.0)
    assert "#SBATCH --gpus=h100:8\n" in text
    assert "--mem" not in text


def test_two_campaigns_of_one_name_hold_nodes_under_two_names():
    assert script.holder_name(Path("/a/night")) != script.holder_name(Path("/b/night"))


# -- how a holder ends itself: its script is run here, with a squeue that tells of steps -----------


SHORT = Executor(margin=0, poll_seconds=1)


class Holder:
    def __init__(self, folder: Path, stale_s: float, idle_s: float, limit_s: float = 600.0) -> None:
        self.folder = folder
        (folder / "submitit").mkdir()
        (folder / "squeue").write_text(f"#!/bin/sh\ncat {folder}/steps 2>/dev/null\n")
        (folder / "squeue").chmod(0o755)
        self.count = 0
        text = script.holder_text(SHORT, folder, limit_s, (), stale_s, idle_s)
        self.beat()
        self.process = subprocess.Popen(
            ["bash", "-c", text],
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"},
        )

    def beat(self, busy: int = 0) -> None:
        self.count += 1
        (self.folder / "submitit" / "heartbeat").write_text(f"{self.count} {busy}\n")

    def ended(self, within_s: float, beating: bool = False) -> bool:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self.process.poll() is None:
            if beating:
                self.beat()
            time.sleep(0.2)
        return self.process.poll() is not None


def test_a_holder_stays_while_there_is_a_heartbeat_and_goes_when_it_is_idle(tmp_path: Path):
    (tmp_path / "steps").write_text("1.batch\n1.extern\n")
    holder = Holder(tmp_path, stale_s=2, idle_s=3)
    assert not holder.ended(3, beating=True)
    assert holder.ended(9, beating=True)
    assert "nothing to run for 3 s" in holder.process.communicate()[0]


def test_a_holder_without_heartbeat_ends_where_squeue_knows_of_no_steps_at_all(tmp_path: Path):
    (tmp_path / "steps").touch()
    holder = Holder(tmp_path, stale_s=1, idle_s=900)
    assert holder.ended(9)


def test_a_holder_that_is_idle_waits_for_its_steps_but_not_for_ever(tmp_path: Path):
    (tmp_path / "steps").write_text("1.batch\n1.4\n")
    holder = Holder(tmp_path, stale_s=900, idle_s=1, limit_s=3.0)
    assert holder.ended(9, beating=True)
    assert "nothing to run" in holder.process.communicate()[0]


def test_a_holder_without_heartbeat_waits_for_its_steps_but_not_for_ever(tmp_path: Path):
    (tmp_path / "steps").write_text("1.batch\n1.4\n")
    holder = Holder(tmp_path, stale_s=1, idle_s=900, limit_s=3.0)
    assert not holder.ended(3)
    assert holder.ended(9), "a squeue that always shows steps must not keep the nodes for ever"
    assert "no heartbeat" in holder.process.communicate()[0]


# -- the controller's own job: its script is run here, with an scontrol that fails at first --------

OVERNIGHT = Path(script.__file__).with_name("overnight.sbatch")


@pytest.mark.parametrize(("failures", "status"), [(3, 0), (99, 1)])
def test_a_controller_that_ends_at_once_is_requeued_as_soon_as_slurm_takes_it(
    tmp_path: Path, failures: int, status: int
):
    programs = {
        "autoresearch": f"trap 'exit 0' TERM; touch {tmp_path}/up; while :; do /bin/sleep .1; done",
        "scontrol": f'echo "$*" >>{tmp_path}/asked; [ $(wc -l <{tmp_path}/asked) -gt {failures} ]',
        "sleep": "",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    # The controller is gone before the script looks for it again.
    slow_kill = '() { builtin kill "$@"; local s=$?; /bin/sleep 0.5; return $s; }'
    process = subprocess.Popen(
        ["bash", OVERNIGHT],
        stdout=subprocess.PIPE,
        text=True,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "BASH_FUNC_kill%%": slow_kill,
        },
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == status, said
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["requeue 7"] * min(failures + 1, 20)
    assert ("submit this script again" in said) == (status == 1)
