"""A lab whose runs take a fraction of a second, and what must hold of its books at any end.

The task is general: solution.py holds two numbers, score.py says how far they are from 1. All is
real: git, the ledger, payloads in processes of their own, the referee's walls.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deciding
import yaml

from agent.researcher import Researcher
from jobs import campaign, config, inbox, ledger, mirror, names, night, process, submission
from jobs.controller import Controller
from jobs.history import State, fold
from jobs.repository import Repository

SOLUTION = """\
X = 2.0

# Y stands far enough from X that an edit of one
# merges with an edit of the other.

Y = 4.0
NAP = 0.0
"""  # its loss is 10
SCORE = """\
import json, os, signal, time
scope = {}
exec(open(os.environ["AUTORESEARCH_PROGRAM"] + "/solution.py").read(), scope)
time.sleep(scope["NAP"])
if scope["X"] < 0:  # as when the node dies
    os.kill(os.getpid(), signal.SIGKILL)
print(json.dumps({"loss": (scope["X"] - 1) ** 2 + (scope["Y"] - 1) ** 2}))
"""
ROOT = Path(__file__).parents[2]
GIT = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
WHO = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def change(**constants: float) -> dict[str, Any]:
    """An edit of the script: constants of solution.py set to new numbers."""
    return {"description": ", ".join(f"{k} {v:g}" for k, v in constants.items()), "set": constants}


def when(text: str, act: Callable[[], None]) -> Callable[[str], None]:
    """A listener that acts once, at the first line that holds `text`."""
    waiting = [act]

    def listen(line: str) -> None:
        if text in line and waiting:
            waiting.pop()()

    return listen


class Lab:
    """A lab in `root`, its script and its settings; every campaign has a name of its own."""

    def __init__(self, root: Path, *edits: Mapping[str, Any], **settings: Any) -> None:
        self.root, self.name = root, f"toy-{uuid.uuid4().hex[:8]}"
        self.uid: int | None = None  # whose processes it starts; None: the tests' own
        self.folder = root / "campaigns" / self.name
        self.settings = {
            "campaign": self.name,
            "task": {
                "kind": "general",
                "editable": ["solution.py"],
                "command": [],
                "scorer": {"command": ["python", "score.py"], "files": ["score.py"]},
                "metric": "loss",
            },
            "agent": {"kind": "scripted", "script": "edits.yaml"},
            "confirm": {"runs": 0},
            "disk": {"keep_free_mb": 1},
        }
        root.mkdir(parents=True, exist_ok=True)
        self.write("solution.py", SOLUTION)
        self.write("score.py", SCORE)
        self.write("program.md", "Lower the loss.\n")
        self.write("edits.yaml", yaml.safe_dump(list(edits)))
        self.configure(**settings)
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("add", "solution.py", "score.py", "program.md")
        self.git("commit", "--quiet", "--message", "start")

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def configure(self, **settings: Any) -> None:
        """Change top-level settings of campaign.yaml."""
        self.settings |= settings
        self.write("campaign.yaml", yaml.safe_dump(self.settings))

    def scripts(self, **edits: list[Mapping[str, Any]]) -> None:
        """A branch for each name, with a script of its own whose edits are tried in turn."""
        for name, entries in edits.items():
            self.write(f"{name}.yaml", yaml.safe_dump(entries))
        agents = {name: {"kind": "scripted", "script": f"{name}.yaml"} for name in edits}
        self.configure(branches={k: {"agent": agent, "slots": 1} for k, agent in agents.items()})

    def git(self, *words: str) -> str:
        environment = {**os.environ, **GIT, **WHO}
        done = subprocess.run(
            ["git", *words], cwd=self.root, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    # -- running ----------------------------------------------------------------------------------

    def run(
        self,
        on_line: Callable[[str], None] = lambda line: None,
        researcher: Researcher | None = None,
        understudy: Researcher | None = None,
    ) -> str:
        """The campaign in this process.

        Args:
            on_line: called with all it says, as it says it, on its thread.
            researcher: in place of the configured one; `understudy`: who stands in for it.
        """
        self.lines: list[str] = []

        def say(line: str) -> None:
            self.lines.append(line)
            on_line(line)

        settings = config.load(self.root / "campaign.yaml")
        if researcher is None:
            return night.run(settings, self.root, say)
        with campaign.opened(settings, self.root, say) as opened:
            executor = submission.executor(settings.executor, opened.site.campaign_dir)
            cast = (lambda branch: researcher), (lambda branch: understudy)
            return Controller(opened, executor, *cast, say).run()

    def order(self, order: str, **details: Any) -> None:
        """Leave an order in the inbox."""
        inbox.send(self.folder, order, **details)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """`autoresearch WORDS` as a process of its own (default: run)."""
        return subprocess.Popen(
            [python_of(self.uid), "-P", "-m", "jobs.cli", *(words or ("run",))],
            cwd=self.root,
            env={**os.environ, **environment, **self._home()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            user=self.uid,
            group=self.uid,
            extra_groups=None if self.uid is None else (),
        )

    def call(self, *words: str, **environment: str) -> tuple[int, str]:
        """`autoresearch WORDS` to its end: exit status, all it printed."""
        process = self.start(*words, **environment)
        said = process.communicate(timeout=120)[0]
        return process.returncode, said

    def _home(self) -> dict[str, str]:
        if self.uid is None:
            return {}
        paths = f"{ROOT}:{sysconfig.get_path('purelib')}"  # its interpreter may be another one
        return {"HOME": str(self.root), "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}

    def at(self, root: Path, name: str = "") -> Lab:
        """The same lab in a copy of its folder, or another campaign of it."""
        other = copy.copy(self)
        other.root, other.name = root, name or self.name
        other.folder = root / "campaigns" / other.name
        return other

    def belong_to(self, uid: int | None) -> None:
        """Give the lab to another user (None: back), where the tests are root's; else nothing."""
        if os.geteuid() != 0:
            return
        self.uid = uid
        for path in (self.root, *self.root.rglob("*")):
            os.chown(path, uid or 0, uid or 0, follow_symlinks=False)

    # -- looking ----------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return campaign.read(self.folder)

    def events(self, *wanted: str) -> list[dict[str, Any]]:
        """The ledger's events, of these names if any are given."""
        path = self.folder / "ledger.jsonl"
        return [e for e in ledger.read(path) if not wanted or e["event"] in wanted]

    def verdicts(self) -> dict[str, str | None]:
        """Description -> verdict, in the order of the proposals."""
        return {r.description: r.verdict for r in self.state.experiments()}

    def refs(self) -> dict[str, str]:
        """All refs, the user's included."""
        out = self.git("for-each-ref", "--format=%(refname) %(objectname)")
        return dict(line.split(" ") for line in out.splitlines())

    def strays(self) -> list[int]:
        """Processes that still run something of this lab."""
        mark = os.fsencode(f"{self.name}-e")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                seen = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
                if mark in seen or os.fsencode(str(self.root)) in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return [pid for pid in found if pid != os.getpid() and process.start_time(pid)]


@functools.cache
def python_of(uid: int | None) -> str:
    """An interpreter that this user may start: root's own can lie in root's home."""
    if uid is None:
        return sys.executable
    system = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin:/usr/local/bin")
    for python in (sys.executable, system or ""):
        with contextlib.suppress(OSError):
            subprocess.run([python, "-V"], user=uid, check=True, capture_output=True)
            return python
    raise AssertionError(f"user {uid} may start neither {sys.executable} nor a system's python")


def eventually(condition: Callable[[], Any], within: float = 30.0) -> Any:
    """Wait until `condition` gives something true; returns it."""
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def ended(controller: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A controller that is not left running, whatever the test finds."""
    try:
        yield controller
    finally:
        if controller.poll() is None:
            controller.send_signal(signal.SIGKILL)
        controller.wait()
        if controller.stdout:
            controller.stdout.close()


def check_books(lab: Lab) -> None:
    """What must hold of a campaign that has come to its end, however often it was killed."""
    events, state = lab.events(), lab.state
    assert fold(events) == state  # the snapshot says what the ledger says
    assert not state.open_runs
    assert not state.in_flight
    assert not state.requests
    _check_runs(lab, events)
    assert deciding.verify(events) == []
    decided = Counter(e["decision"]["experiment"] for e in events if e["event"] == "decided")
    assert decided == Counter(r.id for r in state.experiments())
    _check_git(lab, state)
    rows = (lab.folder / "results.tsv").read_text().splitlines()[1:]
    assert len(rows) == len(state.records)
    assert list((lab.folder / "inbox").iterdir()) == []
    eventually(lambda: not lab.strays(), within=5)


def _check_runs(lab: Lab, events: list[dict[str, Any]]) -> None:
    """Each run was intended once, ended once, claimed by one process, and told what it wrote."""
    intended = Counter(
        "{experiment}-s{seed}-a{attempt}".format(**e["run"])
        for e in events
        if e["event"] == "run_intended"
    )
    results = [e["result"] for e in events if e["event"] == "run_ended"]
    assert set(intended.values()) == {1}
    assert Counter(result["run"] for result in results) == intended
    for result in results:
        experiment, _, attempt = result["run"].partition("-")
        folder = lab.folder / "runs" / experiment / attempt
        assert json.loads((folder / "claim.json").read_text())["run"] == result["run"]
        assert "is claimed" not in (folder / "payload.log").read_text()
        if result["status"] != "infrastructure":
            assert json.loads((folder / "result.json").read_text())["value"] == result["metric"]
        assert not (folder / "program").exists()
        assert len(list(folder.iterdir())) <= 12


def _check_git(lab: Lab, state: State) -> None:
    """Refs, commits, notes and records agree with the ledger."""
    refs, repository = lab.refs(), Repository(lab.root)
    expected = {names.attempt_ref(lab.name, r.id): r.commit for r in state.experiments()}
    for branch in state.branches.values():
        if branch.head_commit:
            expected[names.branch_ref(lab.name, branch.name)] = branch.head_commit
    records = names.records_ref(lab.name)
    ours = (f"refs/autoresearch/{lab.name}/", f"refs/heads/autoresearch/{lab.name}/")
    assert {k: v for k, v in refs.items() if k.startswith(ours) and k != records} == expected
    for record in state.experiments():
        assert lab.git("rev-parse", f"{record.commit}^") == record.base
        trailers, experiment = repository.trailers(record.commit), state.experiment(record.id)
        told = {
            "Campaign": lab.name,
            "Branch": record.branch,
            "Parent-Experiment": record.parent or "none",
            "Rebased-From": experiment.rebased_from or "none",
            "Researcher": experiment.researcher,
            "Program-SHA256": experiment.program_sha256,
        }
        assert {name: trailers[name] for name in told} == told
    assert mirror.noted(repository) >= {r.commit for r in state.experiments()}
    assert mirror.load_ledger(repository, lab.name) == (lab.folder / "ledger.jsonl").read_bytes()
    repository.close()


def remove(root: Path) -> None:
    """Delete labs, read-only snapshots included."""
    subprocess.run(["chmod", "-R", "u+w", root], check=False)
    shutil.rmtree(root, ignore_errors=True)
