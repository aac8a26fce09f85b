"""One run, from its task to its result.json: starts referee and program, and settles the account.

`run(task)` returns what it wrote; `python -m referee.wrapper RUN_DIR` is the same as a process.
Whatever the end, result.json is written, last and whole, and nothing of the run is left running.
Call it from the main thread of a process: the kernel ends what it started when that thread ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import folder, limits, outcome, protocol, sandbox
from .supervise import Ending, signal_name, supervise
from .task import Scorer, Task, load

LINGER_S = 60.0  # what a program may still do once it is scored: save weights, a summary
REFEREE_END_S = 10.0
MODEL, SAMPLE = "model.safetensors", "sample.txt"
SAMPLE_BYTES = 65536
NVIDIA = Path("/proc/driver/nvidia")
# With the node's name: should the disk be shared, no node sweeps another's.
SCRATCH = f"autoresearch-{os.uname().nodename}-"


class Run:
    """A run in progress, and its folders. `train` or `measure` gives what is particular to it."""

    def __init__(self, task: Task):
        self.task = task
        self.dir = Path(task.run_dir)
        self.scratch = self.dir / "scratch"
        if task.scratch:
            self.scratch = folder.owned(Path(os.path.expandvars(task.scratch)), SCRATCH)
        self.trainer = task.trainer or str(Path(__file__).resolve().parent.parent)
        self.python = task.python or sys.executable
        self.isolation = task.isolation
        if task.isolation == "auto":
            self.isolation = "namespaces" if sys.platform == "linux" else "none"
        self.isolation_reason: str | None = None
        self.cancelled: str | None = None  # set by a signal
        self.shared: Path | None = None
        self.referee: subprocess.Popen | None = None
        self._referee_died: str | None = None
        self._scored_at: float | None = None
        self._untouched = 0  # when the scratch folder had last changed before the command

    # --- nanochat ---------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """The program and its referee, to the end of both."""
        task = self.task
        self.shared = folder.make()
        roles = {"shared": str(self.shared), "scratch": str(self.scratch), "program": task.program}
        for name in ("score.json", ".score.json"):  # whoever left them, they are not this run's
            remove(self.dir / name)
        begun = time.monotonic()
        # Before there is a program: it could put links in the way of the copy.
        copy_cache(task.cache, self.scratch / "cache")
        self._start_referee(begun)
        ending = self._command(roles, task.command, "program")
        account = self._end_referee()
        status, reason = outcome.of_training(
            ending,
            account,
            self._referee_died,
            self._began(self.scratch),
            task.limits.memory_mb,
            task.wall_limit_s,
        )
        told = {k: v for k, v in (account or {}).items() if k not in ("protocol", "state")}
        value = told.get("val_bpb") if status == "ok" else None
        facts = {"status": status, "reason": reason, "metric": "val_bpb", "value": value}
        return told | facts | claims(told, gpu(task.device)) | ending.usage

    def _start_referee(self, begun: float) -> None:
        task, contained = self.task, self.isolation == "apptainer"
        assert task.data is not None
        outside = {"shared": str(self.shared), "data": task.data, "private": str(self.dir)}
        view = sandbox.View.of(outside, contained)
        granted = dataclasses.asdict(task)
        names = ("scale", "seed", "budget", "startup_free_s", "feed_ceiling_s", "scoring_limit_s")
        spec = {**view.inside, **{name: granted[name] for name in names}, "begun": begun}
        spec["parent"] = None if contained else os.getpid()
        spec["accept_s"] = task.wall_limit_s
        env = dict.fromkeys(sandbox.THREADS, "1") | {"PYTHONPATH": self.trainer}
        argv = [self.python, "-m", "referee.server"]
        if contained:
            argv = sandbox.contained(task.referee_argv, view, env) + argv
        env |= sandbox.of_container(os.environ) if contained else sandbox.allowed(os.environ)
        with (self.dir / "referee.log").open("wb") as log:
            self.referee = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=env,
                cwd="/",
                start_new_session=True,
            )
        assert self.referee.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.referee.stdin as pipe:
            pipe.write(json.dumps(spec).encode())

    def _end_referee(self) -> dict[str, Any] | None:
        """Let the referee close its books; its account."""
        if self.referee is None:
            return None
        # Heeded while nobody is connected; else it reads to the program's end, which is there.
        self.referee.terminate()
        try:
            code = self.referee.wait(REFEREE_END_S)
        except subprocess.TimeoutExpired:
            self.referee.kill()
            code = self.referee.wait()
        if code not in (0, -signal.SIGTERM) and not self._referee_died:
            self._referee_died = self._why_referee_died(code)
        return self._account()

    def _account(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.dir / "score.json").read_text())
        return None

    def _why_referee_died(self, code: int) -> str:
        if code < 0:
            return f"the referee was killed by {signal_name(-code)}"
        words = outcome.last_line((self.dir / "referee.log").read_text(errors="replace"))
        return f"the referee failed{outcome.network_hint(words)}: {words}"

    def _stop(self) -> str | None:
        """Whether the program has to be ended, asked at every poll."""
        if self.cancelled:
            return f"the run was cancelled from outside by {self.cancelled}"
        if self._scored_at is not None:
            over = time.monotonic() - self._scored_at > LINGER_S
            return f"it did not end within {LINGER_S:.0f} s of its score" if over else None
        code = self.referee.poll() if self.referee else None
        if code:
            self._referee_died = self._why_referee_died(code)
            return self._referee_died
        account = self._account()  # there once the score is made, or the session over
        if account and account["state"] in outcome.ACCOUNT_STATES:
            return "the referee ended the session"
        if account and account["state"] == "scored":
            self._scored_at = time.monotonic()
        return None

    # --- a general task ---------------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """The task's command, then its scorer over what the command left."""
        task, scorer = self.task, self.task.scorer
        assert scorer is not None
        facts: dict[str, Any] = {"metric": scorer.metric}
        if task.command:
            roles = {"scratch": str(self.scratch), "program": task.program}
            ending = self._command(roles, task.command, "program")
            status, reason = outcome.of_command(
                ending, task.limits.memory_mb, self._began(self.scratch)
            )
            facts |= {"status": status, "reason": reason} | gpu(task.device) | ending.usage
            if status != "ok":
                return facts
        return facts | self._score(scorer)

    def _score(self, scorer: Scorer) -> dict[str, Any]:
        """Run the scorer in a sandbox of its own; it reads the program and its scratch folder."""
        own = self.dir / "scorer"
        make_scratch(own)
        roles = {
            "scratch": str(own),
            "program": self.task.program,
            "output": str(self.scratch),
            "files": scorer.files_dir,
        }
        ending = self._command(roles, scorer.command, "files")
        status, reason = outcome.of_command(ending, self.task.limits.memory_mb, self._began(own))
        if status != "ok":
            return {"status": status, "reason": f"the scorer: {reason}"}
        try:
            value = outcome.scored_value(last_output_line(self.dir / "scorer.out"), scorer.metric)
        except ValueError as error:
            return {"status": "crash", "reason": f"the scorer: {error}"}
        facts = {"status": "ok", "reason": f"{scorer.metric} {value:g}", "value": value}
        return facts | {"scoring_seconds": ending.usage["program_seconds"]}

    # --- both -------------------------------------------------------------------------------------

    def _command(self, roles: Mapping[str, str], command: tuple[str, ...], cwd: str) -> Ending:
        """Run one command, its working directory at role `cwd`; without walls where that may be."""
        ending = self._attempt(roles, command, cwd)
        if ending.failed and self.task.isolation == "auto":
            self.isolation, self.isolation_reason = "none", ending.failed
            ending = self._attempt(roles, command, cwd)
        return ending

    def _attempt(self, roles: Mapping[str, str], command: tuple[str, ...], cwd: str) -> Ending:
        task = self.task
        contained, walled = self.isolation == "apptainer", self.isolation == "namespaces"
        view = sandbox.View.of(roles, walled or contained)
        env = sandbox.environment(view, self.trainer, task.threads, task.device, os.environ)
        env["AUTORESEARCH_SEED"] = str(task.seed)  # a general task's; ours comes from the referee
        argv = [self.python if word == "python" else word for word in command[:1]]
        argv += command[1:]
        if contained:
            argv = sandbox.contained(task.program_argv, view, env) + argv
            env = sandbox.of_container(os.environ)
        mounts = []
        if walled:
            readable = sandbox.readable_folders(self.python, self.trainer, task.readable, env)
            hidden = [task.data] if task.data else []
            hidden.append(str(self.dir))
            mounts = sandbox.mounts(view, readable, task.limits.scratch_mb, hidden)
        scorer = cwd == "files"
        self._untouched = changed(roles["scratch"])
        plan = {
            "argv": argv,
            "cwd": "/" if contained else view.inside[cwd],
            "walls": walled,
            "mounts": mounts,
            "file_bytes": task.limits.scratch_mb * 2**20,
        }
        return supervise(
            plan,
            env,
            log=self.dir / ("scorer.log" if scorer else "train.log"),
            output=self.dir / "scorer.out" if scorer else None,
            limits=task.limits,
            scratch=roles["scratch"],
            ring=f"{self.shared}/{protocol.RING_NAME}" if self.shared else None,
            wall_limit_s=task.scoring_limit_s if scorer else task.wall_limit_s,
            stop=self._stop,
        )

    def _began(self, scratch: Path) -> bool:
        """Whether the command itself ran: a container says so by a file in its scratch folder,
        whose change no program can take back, as it could the file."""
        return self.isolation != "apptainer" or changed(scratch) != self._untouched

    def walls(self) -> dict[str, Any]:
        """What stood between the program and its host, for the result."""
        without = self.isolation == "namespaces" or (
            self.isolation == "apptainer" and "--net" in self.task.program_argv
        )
        return {
            "isolation": self.isolation,
            "isolation_reason": self.isolation_reason,
            "network": "none" if without else "host",
            "scratch_bound": "polling, RLIMIT_FSIZE",
        }

    def keep(self) -> None:
        """Move what outlives the run out of the scratch folder."""
        take_file(self.scratch / MODEL, self.dir / MODEL)
        take_file(self.scratch / SAMPLE, self.dir / SAMPLE, SAMPLE_BYTES)
        take_cache(self.scratch / "cache", self.dir / "cache", self.task.cache_mb)

    def clear(self) -> None:
        """Remove what does not: on a full disk this makes room for the result."""
        for path in (self.scratch, self.dir / "scorer", self.dir / ".score.json"):
            remove(path)
        for name in ("telemetry.jsonl", "scorer.out", "scorer.log", "referee.log"):
            with contextlib.suppress(OSError):
                if (self.dir / name).stat().st_size == 0:
                    (self.dir / name).unlink()


def run(task: Task) -> dict[str, Any]:
    """Run a task to its end. Returns the content of run_dir/result.json.

    Raises OSError only where the run folder itself cannot be written.
    """
    begun, started = time.monotonic(), utc_now()
    one = Run(task)
    facts: dict[str, Any] = {}
    with signals_noted(one):
        try:
            folder.sweep()
            if task.scratch:
                folder.sweep(one.scratch.parent, SCRATCH)
            make_scratch(one.scratch)
            facts = one.train() if task.kind == "nanochat" else one.measure()
            if facts["status"] == "ok":
                one.keep()
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
            words = f"the wrapper failed: {type(error).__name__}: {error}"
            facts |= {"status": "infrastructure", "reason": words, "value": None}
        finally:
            if one.referee is not None and one.referee.poll() is None:
                one.referee.kill()
                one.referee.wait()
            if one.shared is not None:
                shutil.rmtree(one.shared, ignore_errors=True)
            one.clear()
        result = blank() | of_task(task) | facts | {"started": started, "ended": utc_now()}
        result["reason"] = outcome.printable(result["reason"])
        result |= one.walls()
        result["total_seconds"] = round(time.monotonic() - begun, 3)
        write_result(one.dir, result)
    return result


def run_folder(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Run run_dir/task.json. A task that cannot be read ends as infrastructure, in words."""
    try:
        task = load(run_dir)
    except (OSError, ValueError) as error:
        words = outcome.printable(f"task.json: {error}")
        result = blank() | {"status": "infrastructure", "reason": words}
        result |= {"started": utc_now(), "ended": utc_now()}
        write_result(Path(run_dir), result)
        return result
    return run(task)


# --- the result -----------------------------------------------------------------------------------


def blank() -> dict[str, Any]:
    """Every name that scripts rely on, unknown; see result.schema.json."""
    names = (
        "experiment run status reason metric value val_bpb seed scale tokens steps startup_seconds"
        " training_seconds overrun_seconds scoring_seconds total_seconds peak_memory_mb"
        " gpu_memory_mb tokens_per_second node device gpu rows_scored budget isolation network"
        " scratch_bound started ended"
    )
    versions = {"python": sys.version.split()[0], "protocol": protocol.VERSION}
    return {
        "protocol": protocol.VERSION,
        **dict.fromkeys(names.split()),
        # Slurm's name of it, where there is one: that is what --exclude takes.
        "node": os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
        "cpu": cpu_model(),
        "versions": versions,
    }


def of_task(task: Task) -> dict[str, Any]:
    """What was known before the run."""
    known = ("experiment", "run", "commit", "campaign")
    device = task.device if task.device is not None else os.environ.get("CUDA_VISIBLE_DEVICES")
    return {
        **{name: task.facts[name] for name in known if name in task.facts},
        "facts": dict(task.facts),
        "seed": task.seed,
        "budget": task.budget and dataclasses.asdict(task.budget),
        "device": device or None,
        "threads": task.threads,
    }


def claims(account: Mapping[str, Any], gpu: Mapping[str, str | None]) -> dict[str, Any]:
    """What the program itself told by log(), and what follows from the account."""
    reported = account.get("reported") or {}
    steps, memory = reported.get("step"), reported.get("memory_mb")
    tokens, seconds = account.get("tokens"), account.get("training_seconds")
    return {
        "steps": counted(steps),
        **gpu,
        "gpu_memory_mb": counted(round(memory)) if gpu and type(memory) in (int, float) else None,
        "tokens_per_second": round(tokens / seconds, 1) if tokens and seconds else None,
    }


def counted(value: Any) -> int | None:
    """A count that a program told, if every reader can hold it; else it counts as not told."""
    return value if type(value) is int and 0 <= value < 2**53 else None


def gpu(device: str | None) -> dict[str, str | None]:
    """Model, UUID and driver of the run's first GPU as the driver tells them, without loading CUDA.

    `device`: CUDA_VISIBLE_DEVICES, where None stands for this process's. Empty without a GPU.
    """
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "") if device is None else device
    wanted, cards = device.split(",")[0], cards_of_node()
    if wanted.startswith("GPU-"):
        cards = [card for card in cards if (card["gpu_uuid"] or "").startswith(wanted)]
    elif len(cards) != 1 and (seen := cards_of_job()):
        # A job's numbers are its own: under ConstrainDevices every one has a device 0.
        cards = seen[int(wanted or 0) :][:1] if wanted.isdecimal() or not wanted else seen
    first = cards[0] if cards else {}  # of several: what they have in common
    return {k: fact if all(c[k] == fact for c in cards) else None for k, fact in first.items()}


def cards_of_job() -> list[dict[str, str | None]]:
    """The GPUs that this job may use, as CUDA_DEVICE_ORDER counts them, by nvidia-smi."""
    argv = ["nvidia-smi", "--query-gpu=name,uuid,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True)
        rows = [line.rsplit(", ", 2) for line in done.stdout.splitlines()]
        names = ("gpu", "gpu_uuid", "driver")
        return [dict(zip(names, row, strict=True)) for row in rows if len(row) == 3]
    return []


def cards_of_node() -> list[dict[str, str | None]]:
    """All GPUs of the node, whoever may use them, as the kernel's driver lists them."""
    found: list[dict[str, str | None]] = []
    with contextlib.suppress(OSError):
        version = re.search(r"\d+(\.\d+)+", (NVIDIA / "version").read_text())
        driver = version and version[0]
        for card in sorted((NVIDIA / "gpus").iterdir()):
            facts = dict(
                map(str.strip, line.split(":", 1))
                for line in (card / "information").read_text().splitlines()
                if ":" in line
            )
            uuid = facts.get("GPU UUID")
            found.append({"gpu": facts.get("Model"), "gpu_uuid": uuid, "driver": driver})
    return found


def cpu_model() -> str:
    """The processor by its name, where the kernel tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


def write_result(run_dir: Path, result: Mapping[str, Any]) -> None:
    """result.json, whole or not at all, and on disk: readers act on its being there."""
    draft = run_dir / ".result.json"
    with draft.open("w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.rename(run_dir / "result.json")


def utc_now() -> str:
    seconds, fraction = divmod(time.time_ns() // 10**6, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction:03d}Z"


# --- files that a program could write -------------------------------------------------------------


def make_scratch(path: Path) -> None:
    """An empty scratch folder with its tmp; what an earlier attempt left is removed."""
    remove(path)
    (path / "tmp").mkdir(parents=True)


def changed(folder: str | os.PathLike[str]) -> int:
    """When a folder last changed, by the kernel's own count (ns); a program cannot set it."""
    return os.stat(folder).st_ctime_ns


def copy_cache(source: str | None, target: Path) -> None:
    """The run's own copy of a compile cache; nothing where there is none yet."""
    if source and os.path.isdir(source):
        shutil.copytree(source, target, symlinks=True)


def take_file(source: Path, target: Path, most_bytes: int | None = None) -> None:
    """Move a plain file that the program wrote. A link could lead anywhere: it is left behind."""
    with contextlib.suppress(OSError):
        found = source.lstat()
        if stat.S_ISREG(found.st_mode) and (most_bytes is None or found.st_size <= most_bytes):
            shutil.move(source, target)  # scratch may be another disk


def take_cache(source: Path, target: Path, limit_mb: int) -> None:
    """Move the compile cache, if it is within its size and holds plain files and folders only."""
    if source.is_symlink() or not source.is_dir():
        return
    size, _ = limits.folder_size(str(source))
    if not 0 < size <= limit_mb * 2**20:
        return
    for parent, folders, files in os.walk(source):
        for name in (*folders, *files):
            mode = os.lstat(os.path.join(parent, name)).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                os.unlink(os.path.join(parent, name))
    remove(target)
    shutil.move(source, target)


def remove(path: Path) -> None:
    """Remove a folder, however deep it is and whatever modes were set in it."""
    if not path.is_symlink() and not path.exists():
        return
    for command in (["rm", "-rf", "--"], ["chmod", "-R", "u+rwx", "--"], ["rm", "-rf", "--"]):
        subprocess.run([*command, str(path)], stderr=subprocess.DEVNULL, check=False)
        if not path.is_symlink() and not path.exists():
            return


def last_output_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


# --- signals --------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_noted(one: Run) -> Iterator[None]:
    """SIGTERM (a scheduler), SIGINT and SIGHUP end the run in good order, with its result."""

    def note(number: int, _frame: Any) -> None:
        one.cancelled = signal.Signals(number).name

    chosen = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in chosen}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    result = run_folder(sys.argv[1])
    print(f"{result['status']}: {result['reason']}")


if __name__ == "__main__":
    main()
