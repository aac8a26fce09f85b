"""The process between the wrapper and the program: builds the walls, starts it, ends its tree.

Run as a plain script by a bare interpreter, in the program's own scrubbed environment, with a plan
(see wrapper.py; marshalled, since the json module takes 8 ms to import) on its standard input.
What happens goes to the plan's status descriptor, a line each: "started", then "peak KIB" (of the
largest process) and "exit CODE" or "signal NUMBER"; or "failed WORDS" (the walls could not be
built, nothing ran) or "missing WORDS" (the command could not be started).

With walls it is the parent of the init of new user, mount, PID, network and IPC namespaces: when
that init ends, the kernel ends everything inside, fork bombs and daemons included. Without, it is
the subreaper of its descendants and ends them one by one.
"""

import contextlib
import ctypes
import fcntl
import marshal
import os
import resource
import select
import signal
import struct
import sys
import time

CLONE = {"NEWNS": 0x00020000, "NEWUSER": 0x10000000, "NEWPID": 0x20000000}
CLONE |= {"NEWNET": 0x40000000, "NEWIPC": 0x08000000}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_SLAVE = 4096, 16384, 1 << 19
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
# One number on every architecture; Linux >= 5.12. pivot_root has no libc function, and its number
# differs (x86-64: 155; arm64, riscv64: 41).
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """A libc function that returns -1 on failure. Raises OSError naming it."""
    plain = [os.fsencode(a) if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*plain) == -1:
        code = ctypes.get_errno()
        said = " ".join(str(a) for a in arguments if isinstance(a, str))
        raise OSError(code, f"{name} {said}: {os.strerror(code)}")


def die_with_parent(parent, by=signal.SIGKILL):
    """Be sent `by` when the thread that started this process ends. `parent` is its pid, or 0."""
    if sys.platform != "linux":
        return
    call("prctl", PR_SET_PDEATHSIG, int(by), 0, 0, 0)
    if parent and os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), by)


# --- walls ----------------------------------------------------------------------------------------


def enter_namespaces():
    """New namespaces, as an unprivileged user of this one."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", sum(CLONE.values()))
    # Root becomes an ordinary user inside, so that starting the program drops every capability:
    # with them it could take the mounts away again.
    inside = (uid or 1000, gid or 1000)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside[0]} {uid} 1"),
        ("gid_map", f"{inside[1]} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(mounts):
    """Make the plan's mounts the whole file system, in a new root. Runs as PID 1 of its namespace.

    Each mount is [source, destination, kind]: kind "ro", "rw" or "dev" binds source, "tmpfs:SIZE"
    makes an empty one, "proc" the process table, "link" a symbolic link to source.
    """
    call("mount", "none", "/", None, MS_REC | MS_SLAVE, None)
    base = "/tmp"  # exists everywhere; what is below it stays reachable as /old/tmp
    call("mount", "root", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir(f"{base}/old")
    os.mkdir(f"{base}/new")
    os.chdir(base)
    call("syscall", SYS_PIVOT_ROOT, base, f"{base}/old")
    call("mount", "new", "/new", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source, destination, kind in mounts:
        put("/old" + (source or ""), source, "/new" + destination, kind)
    call("umount2", "/old", MNT_DETACH)
    os.chdir("/new")
    call("syscall", SYS_PIVOT_ROOT, ".", ".")  # puts the old root over the new one
    call("umount2", ".", MNT_DETACH)
    os.chdir("/")
    for path in ("/", "/dev"):
        restrict(path, MS_RDONLY, recursive=False)


def put(outside, source, destination, kind):
    """One mount of the plan."""
    if kind == "link":
        os.makedirs(os.path.dirname(destination), exist_ok=True)
        os.symlink(source, destination)
        return
    if kind in ("ro", "rw", "dev") and not os.path.isdir(outside):
        os.makedirs(os.path.dirname(destination), exist_ok=True)
        if not os.path.exists(destination):
            os.close(os.open(destination, os.O_CREAT | os.O_WRONLY, 0o600))
    else:
        os.makedirs(destination, exist_ok=True)
    if kind == "proc":
        call("mount", "proc", destination, kind, 15, None)  # read-only, nosuid, nodev, noexec
    elif kind.startswith("tmpfs"):
        size = kind.partition(":")[2]
        call("mount", "none", destination, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=755,size={size}")
    else:
        call("mount", outside, destination, None, MS_BIND | MS_REC, None)
        if kind == "ro":
            restrict(destination, MS_RDONLY | MS_NOSUID, recursive=True)


def restrict(path, flags, recursive):
    """Set mount flags on a mount, and on those below it."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)  # set, clear, propagation, user namespace
    buffer = ctypes.create_string_buffer(attributes)
    depth = AT_RECURSIVE if recursive else 0
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path, depth, buffer, len(attributes))


def raise_loopback():
    """`lo` up: some libraries talk to themselves over it."""
    AF_INET, SOCK_DGRAM, SIOCSIFFLAGS, IFF_UP = 2, 2, 0x8914, 1
    any_socket = libc.socket(AF_INET, SOCK_DGRAM, 0)
    if any_socket >= 0:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
        os.close(any_socket)


# --- the program ----------------------------------------------------------------------------------


def start_program(plan, report):
    """Fork and become the program in the child; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        limit = plan["file_bytes"]  # the one limit that binds root and does not disturb CUDA
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        os.chdir(plan["cwd"])
        report("started")
        os.execvp(plan["argv"][0], plan["argv"])
    except OSError as error:
        report(f"missing {plan['argv'][0]}: {error}")
    os._exit(127)


def reap_until(pid):
    """Wait for `pid`, reaping orphans meanwhile; how it ended, in lines of the status."""
    peak = 0
    while True:
        ended, status, usage = os.wait4(-1, 0)
        peak = max(peak, usage.ru_maxrss)  # what came and went between two looks from outside
        if ended == pid:
            killed = os.WIFSIGNALED(status)
            how = f"signal {os.WTERMSIG(status)}" if killed else f"exit {os.WEXITSTATUS(status)}"
            return f"peak {peak}", how


def run_walled(plan, report):
    """Run the program in namespaces. Returns after everything in them has ended."""
    try:
        enter_namespaces()
    except OSError as error:
        report(f"failed {error}")
        return
    die_with_parent(plan["parent"])  # again: a change of credentials forgets it
    parent_lives, held = os.pipe()
    init = os.fork()
    if init == 0:
        try:
            die_with_parent(0)
            os.close(held)
            if select.select([parent_lives], [], [], 0)[0]:  # its end: the parent is gone already
                os._exit(1)
            # The program could otherwise look into its init, which still has all capabilities.
            call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
            build_root(plan["mounts"])
            raise_loopback()
        except OSError as error:
            report(f"failed {error}")
            os._exit(1)
        report(*reap_until(start_program(plan, report)))
        os._exit(0)

    # An init is reaped only when all of its namespace is: whoever waits for this process knows.
    def end(*_):
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    os.waitpid(init, 0)


def run_open(plan, report):
    """Run the program without walls, and end what it leaves behind."""
    if sys.platform == "linux":
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid = start_program(plan, report)

    def end(*_):
        kill_descendants(pid)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    die_with_parent(plan["parent"], signal.SIGTERM)
    report(*reap_until(pid))
    kill_descendants(pid)


def kill_descendants(pid):
    """SIGKILL every descendant until none is left. Stopped first, or a fork bomb outruns it."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = descendants(os.getpid())
        if not found:
            return
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for one in found:
                with contextlib.suppress(OSError):
                    os.kill(one, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def descendants(root):
    """Pids below `root`, by one look at /proc; empty where there is none."""
    children = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                    children.setdefault(parent, []).append(int(name))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def main():
    plan = marshal.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = plan["status"]
    os.set_inheritable(status, False)
    die_with_parent(plan["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report(*lines):
        os.write(status, "".join(line.replace("\n", " ") + "\n" for line in lines).encode())

    (run_walled if plan["walls"] else run_open)(plan, report)


if __name__ == "__main__":
    main()
