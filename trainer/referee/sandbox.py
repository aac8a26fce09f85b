"""What a program sees: the plan of its file system and its environment. Decides, touches nothing.

Nothing is visible that is not listed: the system's programs and libraries, the Python
installation, the sealed trainer/, the experiment's snapshot, the shared folder and the run's
scratch folder. Data, results, homes, the host's sockets and its network are simply not there.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .protocol import RING_NAME

# Inside walls every run sees the same paths, so that compile caches fit from run to run.
ROLES = ("program", "scratch", "shared", "data", "private", "output", "files")
INSIDE = {role: f"/autoresearch/{role}" for role in ROLES}
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix", "/sys")
ETC = ("alternatives", "group", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime")
ETC += ("nsswitch.conf", "passwd", "OpenCL", "nvidia")
DEVICES = ("null", "zero", "full", "random", "urandom")
GPUS = ("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/dxg")
# The caller's variables that a program gets; any other may hold a key or make runs differ.
ALLOWED = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH")
ALLOWED += ("CUDA_VISIBLE_DEVICES", "CC", "CXX", "NVIDIA_VISIBLE_DEVICES")
SHM_MB = 1024  # of /dev/shm: memory that is no process's, so no look at the processes counts it
FOLDERS = ("PATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH")  # allowed, and name folders
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class View:
    """The folders of one side of a run, by role: where they are, and where the side sees them."""

    outside: Mapping[str, str]  # role ("program", "scratch", ...) -> path on the host
    inside: Mapping[str, str]

    @classmethod
    def of(cls, outside: Mapping[str, str], walled: bool) -> View:
        """A walled side sees the paths of INSIDE, any other the host's."""
        inside = {role: INSIDE[role] for role in outside}
        return cls(outside, inside if walled else outside)


def environment(
    view: View, trainer: str, threads: int | None, device: str | None, caller: Mapping[str, str]
) -> dict[str, str]:
    """All that a program finds in its environment."""
    scratch = view.inside["scratch"]
    chosen = allowed(caller) | {
        "PATH": caller.get("PATH", "/usr/local/bin:/usr/bin:/bin"),
        "HOME": scratch,
        "USER": "autoresearch",  # torch names folders after it; the uid may have no name inside
        "LOGNAME": "autoresearch",
        "TMPDIR": f"{scratch}/tmp",
        # The sealed prepare.py comes before one of the experiment's.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": f"{trainer}:{view.inside['program']}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # Threads that spin at OpenMP's barriers make a run on a busy machine 6 times slower: the
        # scheduler may put them on one core. Sleeping costs nothing measurable on a quiet one.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/cache/inductor",
        # Else each start makes one of 100 MB in its TMPDIR, which no cache outlives.
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "TRITON_CACHE_DIR": f"{scratch}/cache/triton",
        "AUTORESEARCH_SCRATCH": scratch,
    }
    names = {"shared": "REFEREE", "program": "PROGRAM", "output": "OUTPUT"}
    chosen |= {f"AUTORESEARCH_{n}": view.inside[r] for r, n in names.items() if r in view.inside}
    if threads is not None:
        chosen |= dict.fromkeys(THREADS, str(threads))
    if device is not None:
        chosen["CUDA_VISIBLE_DEVICES"] = device
    chosen["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi and Slurm count
    return chosen


def allowed(caller: Mapping[str, str]) -> dict[str, str]:
    """The caller's variables that a walled program or a referee may see."""
    return {name: caller[name] for name in ALLOWED if name in caller}


def of_container(caller: Mapping[str, str]) -> dict[str, str]:
    """The environment of a container's command itself: its settings, but no folders to bind.

    APPTAINERENV_X would reach the inside even through --containall --cleanenv, and APPTAINER_BIND,
    which sites' modules set, would mount their folders there.
    """
    names = ("PATH", "HOME", "USER", "TMPDIR", "XDG_RUNTIME_DIR", "LANG", "LD_LIBRARY_PATH")
    settings = ("TMPDIR", "CACHEDIR", "CONFIGDIR", "USERNS", "NO_PRIVS")
    names += tuple(f"APPTAINER_{setting}" for setting in settings)
    return {name: caller[name] for name in names if name in caller}


def mounts(
    view: View, readable: Sequence[str], scratch_mb: int, hidden: Iterable[str]
) -> list[tuple[str | None, str, str]]:
    """The file system of a walled program, see launcher.build_root; parents before children."""
    plan: list[tuple[str | None, str, str]] = [
        (None, "/proc", "proc"),
        (None, "/dev", "tmpfs:1m"),
        (None, "/dev/shm", f"tmpfs:{min(scratch_mb, SHM_MB)}m"),
        ("/proc/self/fd", "/dev/fd", "link"),
        ("/proc/self/fd/1", "/dev/stdout", "link"),
        ("/proc/self/fd/2", "/dev/stderr", "link"),
        (os.path.realpath(f"{view.outside['scratch']}/tmp"), "/tmp", "rw"),
    ]
    nodes = [f"/dev/{name}" for name in DEVICES] + [p for g in GPUS for p in glob.glob(g)]
    plan += [(path, path, "dev") for path in nodes]
    roots = outermost([*SYSTEM, *readable])
    visible = [*roots, *(f"/etc/{name}" for name in ETC)]
    plan += [bind(path) for path in visible if os.path.lexists(path)]
    plan += [
        (None, path, "tmpfs:4k") for path in hidden if any(below(path, root) for root in roots)
    ]
    for role, path in view.outside.items():
        kind = "rw" if role == "scratch" else "ro"
        plan.append((os.path.realpath(path), view.inside[role], kind))
    if "shared" in view.outside:  # the socket needs no writing to its folder, the ring does
        outside, inside = view.outside["shared"], view.inside["shared"]
        plan.append((f"{outside}/{RING_NAME}", f"{inside}/{RING_NAME}", "rw"))
    return sorted(plan, key=lambda mount: mount[1].count("/") if mount[1] != "/" else 0)


def bind(path: str) -> tuple[str, str, str]:
    """A readable path as it is: a symbolic link stays one, so that what it points to is judged."""
    if os.path.islink(path):
        return os.readlink(path), path, "link"
    return os.path.realpath(path), path, "ro"


def python_folders(python: str) -> list[str]:
    """What must be readable for this process's interpreter to run elsewhere.

    `python` is another interpreter's path, or this one's. Of another one only its prefix is known:
    the folder above its bin, and those of the interpreters it links to, one after the other.
    """
    folders = [os.path.dirname(os.path.dirname(p)) for p in (python, os.path.realpath(python))]
    link = python
    while os.path.islink(link):
        link = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
        folders.append(os.path.dirname(os.path.dirname(link)))
    if python == sys.executable:
        folders += [sys.prefix, sys.base_prefix, sys.exec_prefix]
        folders += [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    return folders


def readable_folders(
    python: str, trainer: str, more: Sequence[str], env: Mapping[str, str]
) -> list[str]:
    """Every folder a program may read beside the system's: Python, trainer/, what PATH names."""
    named = [folder for name in FOLDERS for folder in env.get(name, "").split(":")]
    home = os.path.realpath(os.path.expanduser("~"))
    folders = [
        path
        for path in map(os.path.abspath, [*python_folders(python), *filter(None, named)])
        if not below(home, os.path.realpath(path))  # neither a home nor what holds it
    ]
    folders += [trainer, *more]
    return [path for folder in folders for path in (folder, os.path.realpath(folder))]


def outermost(paths: Sequence[str]) -> list[str]:
    """The paths without those that lie below another of them, links apart."""
    there = sorted(filter(os.path.lexists, set(paths)), key=len)
    kept: list[str] = []
    for path in there:
        if not any(below(path, other) for other in kept if not os.path.islink(other)):
            kept.append(path)
    return kept


def below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it, by name."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def contained(prefix: Sequence[str], view: View, env: Mapping[str, str]) -> list[str]:
    """A container's command line from its template, to stand before the command that runs inside.

    "{shared}", "{scratch}" and so on become paths on the host, which must appear inside as INSIDE
    says; an element that names a role this side does not have is left out. The element "{env}"
    becomes NAME=VALUE words, as env(1) takes them: no container passes the environment on.
    """
    argv: list[str] = []
    for element in prefix:
        if element == "{env}":  # the host's folders mean nothing inside
            argv += [f"{name}={value}" for name, value in env.items() if name not in FOLDERS]
            continue
        for role, path in view.outside.items():
            element = element.replace("{" + role + "}", path)
        if not any("{" + role + "}" in element for role in ROLES):
            argv.append(element)
    return argv
