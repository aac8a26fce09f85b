"""The test cluster itself: what it says where it cannot be had, and what it is where it can."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

import pytest
from rig import CLUSTER, ROOT, USER, slurm, switch


def run(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLUSTER, *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


@pytest.mark.cluster  # becomes an ordinary user, which takes root
def test_an_ordinary_user_is_told_that_it_takes_root():
    nobody = pwd.getpwnam("nobody")
    done = subprocess.run(
        ["bash", "-s", "up"],
        input=(ROOT / "slurm" / "cluster.sh").read_text(),
        capture_output=True,
        text=True,
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        check=False,
    )
    assert done.returncode == 1
    assert "needs root" in done.stderr


def test_without_a_verb_it_says_what_it_does():
    done = run()
    assert done.returncode == 2
    assert "up [--accounting]" in done.stdout


@pytest.mark.cluster
class TestUp:
    def test_up_again_changes_nothing(self, cluster):
        before = sorted(Path("/run/autoresearch-cluster/pid").glob("slurm*"))
        pids = [path.read_text() for path in before]
        done = run("up")
        assert done.returncode == 0, done.stderr
        assert "up: 4 nodes, each 2 CPUs and gpu:2, accounting off" in done.stdout
        assert [path.read_text() for path in before] == pids

    def test_accounting_is_switched_while_jobs_run(self, cluster):
        job = slurm("sbatch", "--parsable", f"--uid={USER}", "-o", "/dev/null", "--mem=50M",
                    "--wrap", "sleep 60").strip()  # fmt: skip
        try:
            switch(accounting=True)
            assert "accounting on" in run("status").stdout
            assert slurm("sacct", "-n", "-X", "-o", "cluster").strip() is not None
            assert slurm("squeue", "-h", "-j", job, "-o", "%T").strip() in ("RUNNING", "PENDING")
        finally:
            switch(accounting=False)
            slurm("scancel", job)
        assert "accounting off" in run("status").stdout

    def test_an_ordinary_user_can_start_a_container(self, cluster, home):
        subprocess.run(["runuser", "-u", USER, "--", "apptainer", "--version"], check=True)
        assert os.stat("/dev/fuse").st_mode & 0o666 == 0o666
