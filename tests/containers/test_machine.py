"""What doctor says of machines, without changing this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from containers import apptainer, machine
from containers.apptainer import ImageError


def program(folder: Path, name: str, text: str = "exit 0") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_machine_without_apptainer_is_told_where_it_comes_from(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = machine.programs()
    assert finding.status == "failure"
    assert "module" in finding.remedy


def test_a_missing_link_named_singularity_is_a_warning_with_the_command(tmp_path, monkeypatch):
    program(tmp_path, "apptainer", "echo apptainer version 1.4.5")
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = machine.programs()
    assert (finding.status, finding.seen) == (
        "warning",
        "apptainer version 1.4.5; no link 'singularity'",
    )
    assert "ln -s apptainer singularity" in finding.remedy
    program(tmp_path, "singularity")
    assert machine.programs().status == "ok"


def test_user_namespaces_refused_by_the_kernel_are_a_failure_with_the_sysctls(
    tmp_path, monkeypatch
):
    program(tmp_path, "unshare", "echo Operation not permitted >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = machine.user_namespaces()
    assert finding.status == "failure"
    assert "Operation not permitted" in finding.seen
    assert "user.max_user_namespaces" in finding.remedy


def test_the_slow_squashfuse_alone_is_a_warning(tmp_path, monkeypatch):
    program(tmp_path, "squashfuse")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "slow" in machine.squashfuse().seen


REFUSES_NET = """\
case "$*" in *" --net "*) echo "FATAL: --network none is not allowed" >&2; exit 255 ;; esac
case "$*" in *--version*) echo apptainer version 1.4.5 ;; *) echo lo eth0 ;; esac"""


@pytest.mark.parametrize(("allowed", "status"), [(True, "warning"), (False, "failure")])
def test_a_setuid_apptainer_without_user_namespaces_will_do_where_the_network_is_allowed(
    tmp_path, monkeypatch, allowed, status
):
    for name in ("apptainer", "singularity"):
        program(tmp_path, name, REFUSES_NET)
    program(tmp_path, "unshare", "echo Operation not permitted >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    told = {finding.check: finding for finding in machine.examine("/i.sif", allowed)}
    assert told["container"].status == told["user namespaces"].status == status
    assert "not allowed" in told["container"].seen
    assert "executor.allow_network" in told["user namespaces" if allowed else "container"].remedy


def test_an_image_that_does_not_start_at_all_is_told_in_apptainers_words(tmp_path, monkeypatch):
    program(tmp_path, "apptainer", "echo FATAL: no such image >&2; exit 255")
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = machine.isolation("/i.sif", network=True)
    assert (finding.status, finding.seen) == ("failure", "FATAL: no such image")


def test_every_finding_that_is_not_ok_has_a_remedy():
    for finding in machine.examine():
        assert finding.status == "ok" or finding.remedy


def test_without_a_program_named_singularity_the_link_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="ln -s apptainer"):
        apptainer.inspect(tmp_path / "x.sif")
