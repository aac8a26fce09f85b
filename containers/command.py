"""The apptainer command lines, as pure functions: nothing here looks at the world or touches it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Where things stand inside. The same for every run, so that no host path enters a compile cache.
PROGRAM = "/autoresearch/program"
SCRATCH = "/autoresearch/scratch"
SHARED = "/autoresearch/shared"
DATA = "/autoresearch/data"
OUT = "/autoresearch/out"
SEALED = "/opt/autoresearch/trainer"
PYTHON = "/opt/autoresearch/venv/bin/python"

STARTED = ".started"  # written inside, first of all: a 255 without it is Apptainer's own failure

# Of the caller's environment, apptainer needs this much. Everything else stays out, for
# APPTAINERENV_* goes through --containall --cleanenv and APPTAINER_BIND adds mounts.
KEPT = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "XDG_RUNTIME_DIR", "LD_LIBRARY_PATH"),
    *("APPTAINER_TMPDIR", "APPTAINER_CACHEDIR", "APPTAINER_CONFIGDIR"),
    *("APPTAINER_USERNS", "APPTAINER_NO_PRIVS"),
)


@dataclass(frozen=True)
class Mount:
    """A host folder at a place inside; read-only unless `writable`."""

    source: str
    target: str
    writable: bool = False


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What of `environ` may reach apptainer: no key, token, agent socket or APPTAINERENV_*."""
    return {name: environ[name] for name in KEPT if name in environ}


def exec_prefix(
    image: str,
    mounts: Iterable[Mount],
    *,
    pwd: str,
    env: Mapping[str, str],
    marker: str,
    workdir: str,
    gpu: bool = False,
    network: bool = False,
    apptainer: str = "apptainer",
) -> list[str]:
    """What stands in front of a command to run it alone in a container of `image`.

    Args:
        pwd: working directory inside.
        env: the command's own variables, literally (apptainer's --env would let a shell evaluate
            them and split them at commas; it also refuses HOME).
        marker: file inside that is made when the container is up.
        workdir: host folder that holds the container's /tmp and /var/tmp (not apptainer's 64 MB).
        gpu: --nv; `env` must then say CUDA_VISIBLE_DEVICES, for --containall drops it.
        network: leave the host's network in: a setuid installation refuses to take it away.
    """
    if gpu and "CUDA_VISIBLE_DEVICES" not in env:
        raise ValueError("a container with a GPU needs CUDA_VISIBLE_DEVICES: else it takes all")
    return [
        *(apptainer, "--quiet", "exec", "--containall", "--cleanenv", "--no-home"),
        *([] if network else ["--net", "--network", "none"]),
        *(["--nv"] if gpu else []),
        *("--workdir", workdir, "--pwd", pwd),
        *(part for mount in mounts for part in ("--mount", _mount(mount))),
        image,
        *("/usr/bin/env", *(f"{name}={value}" for name, value in sorted(env.items()))),
        *("/bin/sh", "-c", f': > {marker} && exec "$@"', "sh"),
    ]


def _mount(mount: Mount) -> str:
    """--mount's comma-separated form, quoted as CSV: paths may hold commas, colons and quotes."""
    fields = ["type=bind", f"src={mount.source}", f"dst={mount.target}"]
    fields += [] if mount.writable else ["ro"]
    return ",".join('"' + field.replace('"', '""') + '"' for field in fields)


def build_arguments(arguments: Mapping[str, str], binds: Sequence[Mount]) -> list[str]:
    """Options of `apptainer build`. Raises ValueError for paths that its --bind cannot take."""
    options = []
    for name, value in sorted(arguments.items()):
        options += ["--build-arg", f"{name}={value}"]
    for bind in binds:
        if set(bind.source) & set(",:"):
            raise ValueError(f"apptainer build cannot bind {bind.source!r}: a comma or colon")
        options += ["--bind", f"{bind.source}:{bind.target}:ro"]
    return options


def sign(image: str, key: str) -> list[str]:
    """Sign with a PEM private key. Changes the file: hash it afterwards."""
    return ["apptainer", "sign", "--key", key, image]


def verify(image: str, key: str) -> list[str]:
    """Check the signature with a PEM public key."""
    return ["apptainer", "verify", "--key", key, image]


def push(image: str, uri: str) -> list[str]:
    """Push to an oras:// address."""
    return ["apptainer", "push", image, uri]
