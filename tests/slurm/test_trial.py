"""What doctor hears from Slurm, by table; and doctor on the real test cluster, as its user."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import ROOT, as_user, interpreter, jobs_below
from test_campaign import Lab
from test_trainer import TrainerLab

sys.path.append(str(ROOT / "tests" / "containers"))
import accounts

from jobs.settings import Executor
from jobs.submission import JobState
from slurm import trial

SITE = Executor(kind="slurm", partition="gpu", account="lab", poll_seconds=20.0)


@pytest.mark.parametrize(
    ("accounts", "age", "status"),
    [(True, 2, "ok"), (False, 300, "ok"), (False, 60, "warning"), (False, None, "warning")],
)
def test_without_sacct_slurm_must_remember_jobs_for_a_few_looks(accounts, age, status):
    finding = trial.memory(accounts, age, SITE)
    assert finding.status == status
    assert bool(finding.remedy) == (status != "ok")
    if age == 60:
        assert "executor.poll_seconds: 15" in finding.remedy


def test_the_overnight_probe_has_that_scripts_own_settings_and_the_sites_place():
    own = (ROOT / "slurm" / "overnight.sbatch").read_text()
    text = trial.overnight_text(SITE, Path("/lab/.doctor-x y"), ["python", "-m", "jobs.doctor"])
    for option in ("--export=", "--mem=", "--cpus-per-task="):
        (line,) = re.findall(rf"#SBATCH {option}\S+", own)
        assert line in text
    assert "#SBATCH --partition=gpu\n#SBATCH --account=lab\n" in text
    assert "--requeue" not in text
    assert re.findall(r"--time=(\S+)", text) == ["5"]
    assert "#SBATCH --output='/lab/.doctor-x y/%j_0_log.out'\n" in text


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        (JobState("ended", "FAILED: No module named 'jobs'"), "failure", "executor.setup"),
        (JobState("pending", "AssocGrpBilling: used up", permanent=True), "failure", "used up"),
        (JobState("pending", "Priority"), "warning", "try again later"),
        (JobState("running", "RUNNING"), "failure", "after 900 s"),
    ],
)
def test_a_job_without_findings_is_judged_by_where_it_stands(state, status, words):
    finding = trial._without("7", state, 900.0)
    assert finding.status == status
    assert words in f"{finding.seen} {finding.remedy}"


# -- on the cluster -------------------------------------------------------------------------------


def ask(lab: Lab, *words: str, **more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """`autoresearch doctor` of the ordinary user: exit status, findings by their check."""
    done = subprocess.run(
        [interpreter(), "-P", "-m", "jobs.cli", "doctor", "--json", *words],
        cwd=lab.root,
        env={**lab.env, "ANTHROPIC_API_KEY": "", **more},
        **as_user(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert all(finding["remedy"] for finding in told if finding["status"] != "ok"), told
    return done.returncode, {finding["check"]: finding for finding in told}


@pytest.fixture
def lab(cluster: None, home: Path) -> Callable[..., Lab]:
    def make(kind: str, **executor: Any) -> Lab:
        return Lab(home / f"lab-{kind}", kind, executor=executor)

    return make


@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["slurm", "allocation"])
def test_a_partition_that_is_none_is_told_in_slurms_words_with_the_setting(lab, kind):
    night = lab(kind, partition="nope")
    status, told = ask(night)
    refused = told["sbatch --test-only"]
    assert (status, refused["status"]) == (1, "failure")
    assert "invalid partition specified: nope" in refused["seen"]
    assert "executor.partition" in refused["seen"]
    night.configure(executor={**night.settings["executor"], "partition": "gpu"})
    status, told = ask(night)
    assert (status, told["sbatch --test-only"]["status"]) == (0, "ok"), told
    assert "MinJobAge is 300 s" in told["accounting"]["seen"]


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_jobs_with_the_campaigns_settings_look_from_a_node_into_its_image(cluster, home):
    image = accounts.cpu_image()
    night = TrainerLab(home / "lab", "slurm", image, branches=1, each=1)
    night.configure(agent={"kind": "anthropic", "base_url": "http://127.0.0.1:9"})
    night.hand_over()
    status, told = ask(night, "--job", ANTHROPIC_API_KEY="sk-ant-of-the-login-node")
    assert status == 1
    assert told["API"]["status"] == "failure"
    names = ("python", "shared folder", "clock", "apptainer", "/dev/fuse", "user namespaces")
    for check in (*names, "container", "GPU", "attention", "compiler"):
        assert told.get(f"node: {check}", {}).get("status") == "ok", told
    assert "no network but lo" in told["node: container"]["seen"]
    assert "fa2 not here" in told["node: attention"]["seen"]
    assert "sdpa works" in told["node: attention"]["seen"]
    assert told["overnight: sbatch --test-only"]["status"] == "ok"
    api = told["overnight: API"]  # the job's environment holds no key
    assert api["status"] == "warning"
    assert "no API key" in api["seen"]
    assert "agent.key_file" in api["remedy"]
    assert "crontab" in api["remedy"]
    assert not list((night.root / "campaigns").iterdir())
    assert not jobs_below(home)


@pytest.mark.cluster
def test_a_node_that_does_not_find_the_project_is_told_with_its_last_words(lab):
    status, told = ask(lab("slurm", setup=["export PYTHONPATH=/nowhere"]), "--job")
    job = told["node: job"]
    assert (status, job["status"]) == (1, "failure")
    assert "No module named" in job["seen"]
    assert "executor.setup" in job["remedy"]
