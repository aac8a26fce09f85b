"""What of a machine stands in Apptainer's way, each with its remedy. Changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from containers import command
from jobs.model import Finding


def examine(image: str | None = None, network: bool = False) -> list[Finding]:
    """What running images needs.

    Args:
        image: a SIF, of which a container is started as for a run.
        network: as executor.allow_network has it.
    """
    findings = [programs(), fuse(), squashfuse(), user_namespaces()]
    if image and findings[0].status != "failure":
        tried = isolation(image, network)
        if tried.status != "failure":  # a setuid installation does without
            findings = [_optional(f) if f.check == "user namespaces" else f for f in findings]
        findings.append(tried)
    return findings


def _optional(finding: Finding) -> Finding:
    if finding.status == "ok":
        return finding
    remedy = f"None where executor.allow_network: true will do. {finding.remedy}"
    return Finding(finding.check, "warning", finding.seen, remedy)


def programs() -> Finding:
    """apptainer, and the name that spython calls it by."""
    if not shutil.which("apptainer"):
        remedy = (
            "Load the site's module (for runs: executor.setup). On a machine of your own: the "
            "project's releases, EPEL or conda-forge. Only on compute nodes: doctor --job"
        )
        return Finding("apptainer", "failure", "no program apptainer on PATH", remedy)
    version = _output(["apptainer", "--version"])
    if not shutil.which("singularity"):
        remedy = "spython needs it: ln -s apptainer singularity, in any folder on PATH"
        return Finding("apptainer", "warning", f"{version}; no link 'singularity'", remedy)
    return Finding("apptainer", "ok", version)


def fuse() -> Finding:
    """An image is mounted through /dev/fuse; without it each start unpacks gigabytes."""
    if os.access("/dev/fuse", os.R_OK | os.W_OK):
        return Finding("/dev/fuse", "ok", "readable and writable")
    seen = "not writable for this user" if Path("/dev/fuse").exists() else "absent"
    remedy = "modprobe fuse; chmod 666 /dev/fuse (an administrator). Without it every start is slow"
    return Finding("/dev/fuse", "warning", seen, remedy)


def squashfuse() -> Finding:
    """The mounting program; the one without _ll is single-threaded and slow."""
    # Upstream's packages bring their own under libexec, where PATH does not reach.
    bundled = Path("/usr/libexec/apptainer/bin/squashfuse_ll")
    found = shutil.which("squashfuse_ll") or (str(bundled) if bundled.exists() else None)
    if found:
        return Finding("squashfuse", "ok", found)
    slow = shutil.which("squashfuse")
    seen = f"only {slow}, which is slow" if slow else "absent: images may be unpacked at each start"
    return Finding("squashfuse", "warning", seen, "Install squashfuse_ll (Debian: squashfuse)")


def user_namespaces() -> Finding:
    """An ordinary user's container, and one without network, needs them."""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return Finding("user namespaces", "ok", "a user may make one, with a network of its own")
    remedy = (
        "An administrator: sysctl user.max_user_namespaces=15000, and where they exist "
        "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0"
    )
    return Finding("user namespaces", "failure", f"refused: {done.stderr.strip()}", remedy)


def isolation(image: str, network: bool = False) -> Finding:
    """A container as a run has it: no network. A setuid installation refuses that to users."""
    started, seen = _interfaces(image, network=False)
    if started and seen == "lo":
        return Finding("container", "ok", "starts, with no network but lo")
    if not _interfaces(image, network=True)[0]:
        remedy = "See that `apptainer exec` works here; autoresearch image verify tries the image"
        return Finding("container", "failure", seen, remedy)
    seen = f"starts, but not without the host's network: {seen}"
    remedy = "Ask for an Apptainer that is not setuid, and user namespaces"
    if network:
        return Finding("container", "warning", seen, f"{remedy}; every result says so till then")
    remedy = f"executor.allow_network: true, and every result says so. Better: {remedy}"
    return Finding("container", "failure", seen, remedy)


def _interfaces(image: str, network: bool) -> tuple[bool, str]:
    """Whether a container starts, and its network interfaces or why it does not."""
    probe = "import socket; print(*(name for _, name in socket.if_nameindex()))"
    argv = [*command.bare(image, network=network), command.PYTHON, "-c", probe]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return True, done.stdout.strip()
    return False, (done.stderr or done.stdout).strip()[-300:] or f"exit status {done.returncode}"


def _output(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
