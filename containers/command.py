"""The apptainer command lines, as pure functions: nothing here looks at the world or touches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Where the wrapper's roles stand inside (trainer/referee/sandbox.py says the same): fixed, so that
# no path of the host enters a compile cache. True: writable.
PROGRAM_ROLES = dict.fromkeys(("program", "shared", "files", "output"), False) | {"scratch": True}
REFEREE_ROLES = {"data": False, "shared": True, "private": True}
SEALED = "/opt/autoresearch/trainer"
PYTHON = "/opt/autoresearch/venv/bin/python"

# The last word on PATH is the image's: the wrapper's is its host's.
PATH = "/opt/autoresearch/venv/bin:/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin"

# The wrapper tells apptainer's failures from the program's by ".started" in its folder. A scorer
# works in its files.
START = (
    "cd /autoresearch/files 2>/dev/null || cd /autoresearch/program; "
    ': > /autoresearch/scratch/.started && exec "$@"'
)


def mount(source: str, target: str, writable: bool = False) -> str:
    """The option that puts a host folder at a place inside, read-only unless `writable`.

    It is --mount's comma-separated form, quoted as CSV: a path may hold commas, colons and quotes.
    """
    fields = ["type=bind", f"src={source}", f"dst={target}", *([] if writable else ["ro"])]
    return "--mount=" + ",".join('"' + field.replace('"', '""') + '"' for field in fields)


def program_template(
    image: str, *, gpu: bool = False, network: bool = False, binds: Sequence[str] = ()
) -> tuple[str, ...]:
    """What stands in front of a program's (or scorer's) command: task.program_argv.

    The wrapper puts host folders for "{program}", "{scratch}" and so on, leaves out the elements of
    roles that a side does not have, and puts the environment for "{env}".

    Args:
        gpu: --nv. CUDA_VISIBLE_DEVICES is always explicit, by the environment.
        network: leave the host's network in, for a setuid installation that refuses to take it
            away. Only by explicit choice of the site, and every result must say so.
        binds: more folders of the host, read-only and at the same paths.
    """
    temporary = [
        # Apptainer's own are 64 MB (/tmp) and half the memory (/dev/shm); this one is bounded.
        mount("{scratch}/tmp", place, writable=True)
        for place in ("/tmp", "/var/tmp", "/dev/shm")
    ]
    # All that it may write of the shared folder; the referee watches its size.
    ring = mount("{shared}/ring", "/autoresearch/shared/ring", writable=True)
    start = ["/usr/bin/env", "{env}", f"PATH={PATH}", "/bin/sh", "-c", START, "sh"]
    mounts = [*_roles(PROGRAM_ROLES), ring, *temporary, *(mount(path, path) for path in binds)]
    return _template(image, mounts, gpu, network, start)


def referee_template(image: str, *, network: bool = False) -> tuple[str, ...]:
    """What stands in front of the referee's command: task.referee_argv. It needs no GPU."""
    start = ["/usr/bin/env", "{env}", f"PATH={PATH}"]
    return _template(image, _roles(REFEREE_ROLES), False, network, start)


def bare(image: str, *, gpu: bool = False, network: bool = False) -> list[str]:
    """A run's container without its folders, in front of a command: what doctor tries."""
    return list(_template(image, (), gpu, network, ()))


def plain(image: str, command: Sequence[str]) -> list[str]:
    """Run a command in an image by itself: nothing of the host but its network, nothing to keep."""
    start = ("apptainer", "--quiet", "exec", "--containall", "--cleanenv", "--no-home")
    return [*start, "--pwd", "/", image, *command]


def build_options(arguments: Mapping[str, str], site: str) -> list[str]:
    """Options of `apptainer build`. %post finds `site` at /mnt, a place that every base has."""
    options = [("--build-arg", f"{name}={value}") for name, value in sorted(arguments.items())]
    # Against gzip, for the CPU image: a tenth of the work to pack (12 s, not 140), a third less to
    # import torch from, 3 % larger.
    packing = ("--mksquashfs-args", "-comp zstd -Xcompression-level 3")
    return [*(word for option in options for word in option), "--bind", f"{site}:/mnt:ro", *packing]


def _roles(roles: Mapping[str, bool]) -> list[str]:
    return [mount(f"{{{r}}}", f"/autoresearch/{r}", writable) for r, writable in roles.items()]


def _template(
    image: str, mounts: Sequence[str], gpu: bool, network: bool, start: Sequence[str]
) -> tuple[str, ...]:
    return (
        *("apptainer", "--quiet", "exec", "--containall", "--cleanenv", "--no-home"),
        *(() if network else ("--net", "--network", "none")),
        *(("--nv",) if gpu else ()),
        *("--pwd", "/", *mounts),
        *(image, *start),
    )
