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
    assert done.returncode == 77
    assert "needs root" in done.stderr


@pytest.mark.parametrize(
    ("up", "status", "said"),
    [(0, 0, "tests"), (77, 0, "NOT RUN: make test-cluster"), (1, 1, ""), (127, 127, "")],
)
def test_only_a_machine_that_can_have_no_cluster_excuses_a_change_from_its_tests(
    tmp_path, up, status, said
):
    made = {
        ".ci/run": (ROOT / ".ci" / "run").read_text(),
        "slurm/cluster.sh": f"exit {up}",
        "bin/make": '#!/bin/sh\n[ "$1" != test-cluster ] || echo tests',
    }
    for name, text in made.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    argv = [tmp_path / ".ci" / "run"]
    done = subprocess.run(argv, env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.strip().partition(",")[0] == said


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
            slurm("sacct", "-n", "-X")  # answers
            known = slurm("sacctmgr", "-nP", "show", "cluster", "format=cluster")
            assert known.split() == ["autoresearch"]
            assert slurm("squeue", "-h", "-j", job, "-o", "%T").strip() in ("RUNNING", "PENDING")
        finally:
            switch(accounting=False)
            slurm("scancel", job)
        assert "accounting off" in run("status").stdout

    def test_an_ordinary_user_can_start_a_container(self, cluster, home):
        subprocess.run(["runuser", "-u", USER, "--", "apptainer", "--version"], check=True)
        assert os.stat("/dev/fuse").st_mode & 0o666 == 0o666
