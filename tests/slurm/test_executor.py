"""Runs as Slurm jobs of their own, on the real test cluster, as an ordinary user."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import ROOT, USER, count_calls, jobs_below, slurm, switch, wait_for

pytestmark = pytest.mark.cluster

RUN = "e0001-s1-a1"


def job_pids(job: str) -> list[int]:
    """Processes of a job, by the environment that Slurm gave them."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_JOB_ID={job}".encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def no_controller(cluster: None) -> Iterator[None]:
    """slurmctld is down during the test, and up again after it."""
    pid = int(Path("/run/autoresearch-cluster/pid/slurmctld").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 20, "for slurmctld to stop")
    yield
    switch(accounting=False)


def test_a_run_is_a_job_of_its_own_and_leaves_its_result(controller):
    night = controller("slurm")
    submission = night("submit", RUN)
    assert submission == {
        "run": RUN,
        "executor": "slurm",
        "job": submission["job"],
        "node": None,
    }
    assert submission["job"].isdigit()
    wait_for(lambda: night.finished(RUN), why="for the result")
    claim = night.claim(RUN)
    assert claim["slurm_job"] == submission["job"]
    assert claim["name"] == f"night-{RUN}"
    assert claim["device"] == "0"


def test_a_job_sees_nothing_of_the_controllers_environment_but_what_it_needs(controller):
    night = controller("slurm", environ={"SBATCH_PARTITION": "short", "SLURM_JOB_ID": "4711"})
    job = night("submit", RUN, sleep=2)["job"]
    claim = wait_for(lambda: night.claim(RUN), why="for the claim")
    names = {n for n in claim["environment"] if not n.startswith(("SLURM", "SUBMITIT"))}
    assert "ANTHROPIC_API_KEY" not in names
    assert names <= {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "PYTHONPATH", "AUTORESEARCH_RUN_NAME"),
        *("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"),
        *("ENVIRONMENT", "HOSTNAME", "PWD", "OLDPWD", "SHLVL", "TMPDIR", "LC_CTYPE", "_"),
    }
    shown = slurm("scontrol", "show", "job", job)
    assert "Partition=gpu" in shown, "SBATCH_PARTITION of an outer job must not count"
    assert "Requeue=0" in shown
    assert "secret" not in slurm("scontrol", "write", "batch_script", job, "-")


def test_the_script_is_the_one_that_a_dry_run_shows(controller):
    from jobs.settings import Executor
    from slurm import script

    night = controller("slurm")
    job = night("submit", RUN, sleep=1)["job"]
    submitted = (night.folder / "submitit" / f"night-{RUN}" / f"{job}_submission.sh").read_text()
    settings = Executor(kind="slurm", cpus=1, memory="200M", margin=30.0)
    shown = script.sbatch_text(settings, f"night-{RUN}", night.folder, 30.0)
    ours, theirs = shown.splitlines(), submitted.splitlines()
    assert ours[:-1] == theirs[:-1]
    assert ours[-1].split()[1:] == theirs[-1].split()[1:]  # but for the tests' interpreter


def test_phases_queue_wait_and_node_are_told(controller):
    night = controller("slurm")
    night("submit", "e0001-s1-a1", sleep=4)
    night("submit", "e0002-s1-a1", sleep=60)
    running = night.until("e0001-s1-a1", "running")
    assert running["node"].startswith("n")
    assert running["queue_s"] is not None
    night("cancel", "e0002-s1-a1")
    ended = night.until("e0002-s1-a1", "ended")
    assert "CANCELLED" in ended["reason"]
    wait_for(lambda: night.finished("e0001-s1-a1"), why="for the first")


def test_one_query_a_tick_whatever_the_number_of_jobs(controller, home):
    counted = count_calls(home)
    night = controller("slurm", environ={"PATH": counted.path})
    calls = []
    known = 0
    for count in (1, 8, 64):
        for number in range(known, count):
            night("submit", f"e{number:04d}-s1-a1", sleep=300)
        known = count
        counted.clear()
        assert len(night("survey")) == count
        calls.append(counted.calls())
    assert calls == [["squeue"]] * 3


def test_a_killed_job_ends_in_slurms_words(controller):
    night = controller("slurm")
    night("submit", "e0001-s1-a1", exit=3)
    night("submit", "e0002-s1-a1", kill="SIGKILL")
    assert "FAILED" in night.until("e0001-s1-a1", "ended")["reason"]
    assert "FAILED" in night.until("e0002-s1-a1", "ended")["reason"]


def test_a_payload_that_cannot_even_start_is_told_with_its_last_words(controller):
    night = controller("slurm", settings={"setup": ["unset PYTHONPATH"]})
    night("submit", RUN)
    assert "No module named" in night.until(RUN, "ended")["reason"]


def test_scancel_from_outside_ends_a_run_at_once(controller):
    night = controller("slurm")
    job = night("submit", RUN, sleep=60)["job"]
    wait_for(lambda: night.claim(RUN), why="for the start")
    slurm("scancel", job)
    assert "CANCELLED" in night.until(RUN, "ended", 30)["reason"]


def test_the_time_limit_ends_a_run(controller):
    night = controller("slurm", settings={"margin": 0.0})
    night("submit", RUN, limit_s=30.0, sleep=300)
    started = time.monotonic()
    assert "TIMEOUT" in night.until(RUN, "ended", 150)["reason"]
    assert time.monotonic() - started > 30


def test_runs_may_not_be_requeued(controller):
    night = controller("slurm")
    job = night("submit", RUN, sleep=60)["job"]
    night.until(RUN, "running")
    refused = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert night.state(RUN)["phase"] == "running"


def test_preemption_is_told_as_such(controller):
    night = controller("slurm", settings={"gpus": "2"})
    night("submit", RUN, sleep=120)
    node = night.until(RUN, "running")["node"]
    slurm("sbatch", "-p", "urgent", "-w", node, "--gres=gpu:2", "--mem=100M", "-o", "/dev/null",
          f"--uid={USER}", "--wrap", "sleep 20")  # fmt: skip
    ended = night.until(RUN, "ended", 60)
    assert ended["preempted"]


def test_nodes_to_avoid_are_avoided(controller):
    night = controller("slurm", settings={"exclude": ["n1"]})
    night("submit", RUN, avoid=["n2", "n3"], sleep=5)
    assert night.until(RUN, "running")["node"] == "n4"


def test_a_node_that_dies_ends_its_run(controller):
    night = controller("slurm", settings={"exclude": ["n1", "n2", "n3"]})
    job = night("submit", RUN, sleep=300)["job"]
    assert night.until(RUN, "running")["node"] == "n4"
    try:
        os.kill(int(Path("/run/autoresearch-cluster/pid/slurmd-n4").read_text()), signal.SIGKILL)
        ended = night.until(RUN, "ended", 90)
        assert "NODE_FAIL" in ended["reason"]
    finally:
        for pid in job_pids(job):
            os.kill(pid, signal.SIGKILL)
        switch(accounting=False)


# -- the controller is killed ---------------------------------------------------------------------


def test_jobs_are_adopted_by_name_after_a_kill(controller):
    night = controller("slurm")
    job = night("submit", RUN, sleep=5)["job"]
    night.restart()
    assert night("adopt", RUN, "e0002-s1-a1") == [RUN], "the other was never submitted"
    assert night.state(RUN)["phase"] in ("pending", "running")
    wait_for(lambda: night.finished(RUN), why="for the result")
    assert night.claim(RUN)["slurm_job"] == job


def test_a_run_that_is_submitted_twice_runs_once(controller):
    night = controller("slurm")
    night("submit", RUN, sleep=3)
    night("submit", RUN, sleep=3)
    wait_for(lambda: (night.run_dir(RUN) / "second").exists(), why="for the second to leave")
    wait_for(lambda: night.finished(RUN), why="for the first")


def test_a_job_that_slurm_has_forgotten_is_absent_or_found_by_its_claim(controller):
    night = controller("slurm")
    night("know", RUN, "slurm", "999999")
    assert night.state(RUN)["phase"] == "absent"
    folder = night.run_dir("e0002-s1-a1")
    subprocess.run(["runuser", "-u", USER, "--", "mkdir", "-p", str(folder)], check=True)
    (folder / "claim.json").write_text(json.dumps({"slurm_job": "999998"}))
    assert night("adopt", "e0002-s1-a1") == [RUN, "e0002-s1-a1"]


# -- Slurm itself has trouble ---------------------------------------------------------------------


def test_without_slurmctld_nothing_is_known_and_nothing_is_lost(controller, no_controller):
    night = controller("slurm")
    job = night("submit", RUN)
    assert "error" not in job
    assert night("survey") is None, "a failed query is no information"
    second = night("submit", "e0002-s1-a1")
    assert "error" not in second
    switch(accounting=False)
    wait_for(lambda: night("survey") is not None and night.finished(RUN), 90, "for the first run")
    wait_for(
        lambda: night("survey") is not None and night.finished("e0002-s1-a1"),
        90,
        "for the second run",
    )


def test_what_waits_for_slurm_survives_a_kill(controller, no_controller):
    night = controller("slurm")
    night("submit", RUN)
    night.kill()
    switch(accounting=False)
    night.start()
    assert night("adopt", RUN) == [RUN]
    wait_for(lambda: night("survey") is not None and night.finished(RUN), 60, "for the run")


def test_wrong_settings_are_told_in_slurms_words_with_the_settings_name(controller, home):
    cases = {
        "partition": ({"partition": "nowhere"}, "Invalid partition name"),
        "constraint": ({"constraint": "moon"}, "Invalid feature"),
        "gpus": ({"gpu_syntax": "gpus-per-node", "gpus": "h100:1"}, "node configuration"),
        "memory": ({"memory": "900T"}, "Memory specification"),
        "reservation": ({"reservation": "none-such"}, "reservation is invalid"),
    }
    for setting, (settings, words) in cases.items():
        answer = controller("slurm", settings=settings)("submit", RUN)
        assert answer["error"] == "UserError", answer
        assert words in answer["words"]
        assert f"executor.{setting}" in answer["words"] or setting in answer["words"]
    assert not jobs_below(home), "nothing may be half started"


def test_time_over_the_partitions_limit_waits_for_ever_and_says_so(controller):
    night = controller("slurm", settings={"partition": "short", "margin": 600.0})
    night("submit", RUN)
    state = wait_for(lambda: (s := night.state(RUN)) and s["permanent"] and s, 30)
    assert re.search("PartitionTimeLimit|PartitionConfig", state["reason"])
    assert "executor.margin" in state["reason"]


def test_a_host_without_sbatch_is_told(controller):
    night = controller("slurm", environ={"PATH": "/nowhere"})
    night.process.wait(20)
    assert night.process.returncode != 0


# -- with accounting ------------------------------------------------------------------------------


def test_sacct_answers_for_jobs_that_slurmctld_has_forgotten(accounting, controller):
    night = controller("slurm", settings={"account": "lab"})
    job = night("submit", RUN, exit=3)["job"]
    night.until(RUN, "ended")
    wait_for(lambda: "FAILED" in slurm("sacct", "-n", "-X", "-j", job, "-o", "state"), 30)
    conf = Path("/run/autoresearch-cluster/etc/slurm.conf")
    conf.write_text(conf.read_text().replace("MinJobAge=300", "MinJobAge=2"))
    slurm("scontrol", "reconfigure")  # the fixture writes the file anew
    wait_for(lambda: job not in slurm("squeue", "-h", "-t", "all", "-o", "%i").split(), 150)
    state = night.state(RUN)
    assert state["phase"] == "ended"
    assert "FAILED" in state["reason"]


def test_limits_of_the_account_hold_runs_back_or_pause(accounting, controller):
    slurm("sacctmgr", "-i", "modify", "user", USER, "set", "MaxSubmitJobs=1")
    try:
        night = controller("slurm", settings={"account": "lab"})
        night("submit", "e0001-s1-a1", sleep=4)
        night("submit", "e0002-s1-a1")
        second = night.state("e0002-s1-a1")
        assert second["phase"] == "pending"
        assert not second["permanent"]
        assert "no more jobs" in second["reason"]
        wait_for(lambda: night("survey") is not None and night.finished("e0002-s1-a1"), 60)
    finally:
        slurm("sacctmgr", "-i", "modify", "user", USER, "set", "MaxSubmitJobs=-1")
    slurm("sacctmgr", "-i", "modify", "account", "lab", "set", "GrpTRES=gres/gpu=0")
    try:
        night("submit", "e0003-s1-a1")
        state = wait_for(lambda: (s := night.state("e0003-s1-a1")) and s["permanent"] and s, 30)
        assert "AssocGrp" in state["reason"]
        assert "executor.account" in state["reason"]
    finally:
        slurm("sacctmgr", "-i", "modify", "account", "lab", "set", "GrpTRES=gres/gpu=-1")
    refused = controller("slurm", settings={"account": "rich"})("submit", "e0004-s1-a1")
    assert refused["error"] == "UserError"
    assert "executor.account" in refused["words"]


def test_the_cluster_is_idempotent(cluster):
    done = subprocess.run(["bash", str(ROOT / "slurm/cluster.sh"), "up"], capture_output=True,
                          text=True, timeout=60, check=True)  # fmt: skip
    assert "accounting off" in done.stdout
