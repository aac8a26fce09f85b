"""The command lines of containers, as text."""

from __future__ import annotations

import pytest

from containers import command
from containers.command import Mount


def prefix(**changes):
    settings = {"pwd": "/p", "env": {"A": "1"}, "marker": "/s/.started", "workdir": "/w"}
    return command.exec_prefix("/i.sif", [Mount("/h", "/c")], **{**settings, **changes})


def test_a_container_sees_nothing_of_its_host_unless_it_is_named():
    assert prefix() == [
        *("apptainer", "--quiet", "exec", "--containall", "--cleanenv", "--no-home"),
        *("--net", "--network", "none", "--workdir", "/w", "--pwd", "/p"),
        *("--mount", '"type=bind","src=/h","dst=/c","ro"', "/i.sif"),
        *("/usr/bin/env", "A=1", "/bin/sh", "-c", ': > /s/.started && exec "$@"', "sh"),
    ]


def test_the_network_is_left_in_only_when_asked_for():
    assert "--net" in prefix()
    assert "--net" not in prefix(network=True)


def test_a_gpu_without_a_chosen_device_is_refused():
    assert "--nv" in prefix(gpu=True, env={"CUDA_VISIBLE_DEVICES": "3"})
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        prefix(gpu=True)


def test_a_mount_is_read_only_unless_said_and_its_path_may_hold_anything():
    assert command._mount(Mount('/a,b:"c', "/t", True)) == '"type=bind","src=/a,b:""c","dst=/t"'


def test_apptainer_gets_neither_keys_nor_apptainerenv_nor_binds():
    host = {
        "PATH": "/bin",
        "HOME": "/home/u",
        "APPTAINER_TMPDIR": "/scratch",
        "ANTHROPIC_API_KEY": "k",
        "SSH_AUTH_SOCK": "/tmp/agent",
        "APPTAINERENV_TOKEN": "t",
        "APPTAINER_BIND": "/home",
        "SINGULARITY_BIND": "/home",
        "SLURM_JOB_ID": "7",
    }
    kept = {"PATH": "/bin", "HOME": "/home/u", "APPTAINER_TMPDIR": "/scratch"}
    assert command.clean_environ(host) == kept


def test_build_arguments_are_in_a_fixed_order_and_binds_read_only():
    options = command.build_arguments({"B": "2", "A": "x y"}, [Mount("/site", "/mnt")])
    assert options == [*("--build-arg", "A=x y", "--build-arg", "B=2"), "--bind", "/site:/mnt:ro"]
    with pytest.raises(ValueError, match="comma or colon"):
        command.build_arguments({}, [Mount("/a:b", "/mnt")])
