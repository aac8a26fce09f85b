"""The command lines of containers, as text."""

from __future__ import annotations

from containers import command
from trainer.referee import sandbox
from trainer.referee.sandbox import View

ISOLATED = (
    *("apptainer", "--quiet", "exec", "--containall", "--cleanenv", "--no-home"),
    *("--net", "--network", "none", "--pwd", "/"),
)


def seen(argv: list[str]) -> dict[str, str]:
    """{place inside: host folder, with its mode} of a command line."""
    mounts = [word.replace('"', "").split(",") for word in argv if word.startswith("--mount=")]
    facts = [dict(field.split("=", 1) for field in m if "=" in field) for m in mounts]
    return {
        fact["dst"]: fact["src"] + (" ro" if "ro" in mount else " rw")
        for mount, fact in zip(mounts, facts, strict=True)
    }


def test_the_program_sees_its_own_three_folders_and_no_data():
    roles = {"program": "/h/p", "shared": "/h/s", "scratch": "/h/w"}
    env = {"HOME": "/autoresearch/scratch", "CUDA_VISIBLE_DEVICES": "1,2"}
    argv = sandbox.contained(command.program_template("/i.sif"), View.of(roles, True), env)
    assert tuple(argv[: len(ISOLATED)]) == ISOLATED
    assert seen(argv) == {
        "/autoresearch/program": "/h/p ro",
        "/autoresearch/shared": "/h/s ro",
        "/autoresearch/shared/ring": "/h/s/ring rw",
        "/autoresearch/scratch": "/h/w rw",
        **dict.fromkeys(("/tmp", "/var/tmp", "/dev/shm"), "/h/w/tmp rw"),
    }
    image = argv.index("/i.sif")
    assert argv[image + 1 :] == [
        *("/usr/bin/env", "HOME=/autoresearch/scratch", "CUDA_VISIBLE_DEVICES=1,2"),
        *(f"PATH={command.PATH}", "/bin/sh", "-c", command.START, "sh"),
    ]


def test_more_folders_are_bound_read_only_at_their_own_paths_for_the_program():
    bare, more = (
        command.program_template("/i.sif"),
        command.program_template("/i.sif", binds=["/a"]),
    )
    (added,) = set(more) - set(bare)
    assert seen([added]) == {"/a": "/a ro"}


def test_the_referee_sees_the_data_read_only_and_the_run_folder():
    roles = {"data": "/h/d", "shared": "/h/s", "private": "/h/run"}
    argv = sandbox.contained(command.referee_template("/i.sif"), View.of(roles, True), {})
    assert tuple(argv[: len(ISOLATED)]) == ISOLATED
    assert seen(argv) == {
        "/autoresearch/data": "/h/d ro",
        "/autoresearch/shared": "/h/s rw",
        "/autoresearch/private": "/h/run rw",
    }


def test_every_role_stands_where_the_wrapper_tells_the_program_that_it_stands():
    roles = [*command.PROGRAM_ROLES, *command.REFEREE_ROLES]
    inside = View.of(dict.fromkeys(roles, "/h"), walled=True).inside
    assert inside == {role: f"/autoresearch/{role}" for role in roles}


def test_the_network_is_left_in_and_gpus_are_let_in_only_when_asked_for():
    assert "--nv" not in command.program_template("/i.sif")
    assert "--nv" in command.program_template("/i.sif", gpu=True)
    for template in (command.program_template, command.referee_template):
        assert "none" in template("/i.sif")
        assert "--net" not in template("/i.sif", network=True)


def test_a_mount_is_read_only_unless_said_and_its_path_may_hold_anything():
    option = command.mount('/a,b:"c', "/t", True)
    assert option == '--mount="type=bind","src=/a,b:""c","dst=/t"'
    assert command.mount("/a", "/t").endswith(',"ro"')


def test_build_arguments_are_in_a_fixed_order_and_the_site_is_read_only():
    options = command.build_options({"B": "2", "A": "x y"}, "/site")
    assert options[:6] == [
        *("--build-arg", "A=x y", "--build-arg", "B=2", "--bind", "/site:/mnt:ro")
    ]
