"""What campaign.yaml may say, and its defaults: frozen values, each with its text for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from jobs.errors import UserError
from jobs.names import check_name

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _name(text: str) -> str:
    """A name that is safe as part of a git ref, a folder and a Slurm job's name."""
    try:
        return check_name("The", text)
    except UserError as error:
        raise ValueError(str(error)) from None


def _time_of_day(value: Any) -> Any:
    """'07:30'; YAML 1.1 reads an unquoted 22:30 as the number 1350 (base 60)."""
    if isinstance(value, int) and 60 <= value < 1440:  # below, it was no time: 'until: 7'
        value = f"{value // 60:02d}:{value % 60:02d}"
    if not (isinstance(value, str) and re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", value)):
        raise ValueError("a time of day is '07:30'")
    return value


def _corpus(text: str) -> str:
    if not re.fullmatch(r"stdlib|climbmix|tinystories|dir:.+", text):
        raise ValueError("a corpus is stdlib, climbmix, tinystories or dir:PATH")
    return text


def _relative(text: str) -> str:
    """A path below the repository's root."""
    if not text or text.startswith("/") or ".." in Path(text).parts:
        raise ValueError("must be a path below the repository's root, without '..'")
    return text


def _gpus(text: str) -> str:
    """'h100' -> 'h100:1'."""
    found = re.fullmatch(r"[1-9]\d*|([\w.-]*[A-Za-z][\w.-]*)(:[1-9]\d*)?", text)
    if not found:
        raise ValueError("a number of GPUs, or a model and a number: '1', 'h100:1'")
    return f"{text}:1" if found[1] and not found[2] else text


def _memory(text: str) -> str:
    if not re.fullmatch(r"(?i)\d+[KMGT]?B?", text):
        raise ValueError("a whole number with K, M, G or T: '32G', '1536M'")
    return text


Name = Annotated[str, AfterValidator(_name)]
TimeOfDay = Annotated[str, BeforeValidator(_time_of_day)]
RepoPath = Annotated[str, AfterValidator(_relative)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def _says(default: Any, text: str) -> Any:
    """A field with its default and the line that `template` prints beside it."""
    if isinstance(default, dict):
        return Field(default_factory=lambda: dict(default), description=text)
    return Field(default, description=text)


@dataclass(frozen=True, config=_STRICT)
class Scorer:
    """How a general task is scored. Its files come from the campaign's start commit."""

    command: tuple[str, ...] = _says((), "prints {metric: value} as the last line of its output")
    files: tuple[RepoPath, ...] = _says((), "from the start commit, out of the program's reach")


@dataclass(frozen=True, config=_STRICT)
class Task:
    """What is optimised."""

    kind: Literal["nanochat", "general"] = _says("nanochat", "nanochat, or general: your own")
    editable: tuple[RepoPath, ...] = _says(("trainer/train.py",), "files that proposals may change")
    command: tuple[str, ...] = _says(("python", "trainer/train.py"), "argv of one run")
    scorer: Scorer | None = _says(None, "general: {command: [...], files: [...]}")
    metric: str = _says("val_bpb", "what the score is called")
    direction: Literal["minimise", "maximise"] = _says("minimise", "minimise or maximise")


@dataclass(frozen=True, config=_STRICT)
class Data:
    """What is trained on (nanochat)."""

    corpus: Annotated[str, AfterValidator(_corpus)] = _says(
        "stdlib", "stdlib, climbmix, tinystories or dir:PATH"
    )
    scale: Literal["cpu", "small", "h100"] = _says("cpu", "cpu, small or h100")
    folder: str | None = _says(None, "where prepared data lies; null: the user's cache folder")


@dataclass(frozen=True, config=_STRICT)
class Budget:
    """How long a run trains; nothing said: as the scale has it. One of the two."""

    wall: Positive | None = _says(None, "seconds by the referee's clock (GPUs)")
    tokens: Count | None = _says(None, "tokens (CPU, tests)")
    startup_free: Positive | None = _says(None, "seconds of start-up and warm-up that are free")


@dataclass(frozen=True, config=_STRICT)
class Executor:
    """Where runs run."""

    kind: Literal["local", "slurm", "allocation"] = _says("local", "local, slurm or allocation")
    slots: Count = _says(1, "runs in flight at once, all branches together")
    image: str | None = _says(None, "the container image's tag; null: no container")
    images: str | None = _says(None, "image store; null: $AUTORESEARCH_IMAGES, else in the home")
    python: str | None = _says(None, "interpreter of the runs; null: the controller's own")
    threads: Count | None = _says(None, "CPU threads of a run; null: its share of the cores")
    isolation: Literal["auto", "namespaces", "none", "apptainer"] = _says(
        "auto", "auto, namespaces, apptainer or none"
    )
    allow_network: bool = _says(False, "only where a setuid apptainer refuses --network none")
    max_attempts: Count = _says(3, "of a run that infrastructure kills; then it is parked")
    poll_seconds: Positive = _says(15.0, "between two queries of Slurm; one asks for all jobs")
    margin: NotNegative = _says(180.0, "seconds of a job's time limit beyond what a run may take")
    partition: str | None = _says(None, "Slurm's --partition")
    account: str | None = _says(None, "Slurm's --account")
    qos: str | None = _says(None, "Slurm's --qos")
    constraint: str | None = _says(None, "Slurm's --constraint")
    reservation: str | None = _says(None, "Slurm's --reservation")
    exclude: tuple[str, ...] = _says((), "nodes never to be used")
    gpu_syntax: Literal["gres", "gpus", "gpus-per-node", "none"] = _says(
        "gres", "gres, gpus, gpus-per-node or none, as the site has it"
    )
    gpus: Annotated[str, AfterValidator(_gpus)] = _says(
        "1", "GPUs of a run: '1', or with the model 'h100:1'"
    )
    cpus: Count = _says(4, "CPU cores of a run")
    memory: Annotated[str, AfterValidator(_memory)] | None = _says(
        "32G", "memory of a run; null where the site refuses --mem"
    )
    nodes: Count = _says(1, "allocation: nodes to hold")
    hold_hours: Positive = _says(12.0, "allocation: how long one holder keeps its nodes")
    setup: tuple[str, ...] = _says((), "shell lines before a run: modules, proxy, PATH")
    binds: tuple[str, ...] = _says((), "more folders that the program may read, at their own paths")
    scratch: str | None = _says(
        None, "folder on the node's own disk for scratch files ($TMPDIR); null: run folder"
    )


@dataclass(frozen=True, config=_STRICT)
class Run:
    """What one run may use; more of it ends the run as oom or invalid."""

    memory_mb: Count | None = _says(None, "host memory; null: what the machine or the job has")
    processes: Count = _says(256, "processes of the program at once")
    log_mb: Count = _says(16, "of train.log; its middle is cut out beyond")
    scratch_mb: Count = _says(4096, "files that the program writes")
    wall_limit: Positive | None = _says(None, "seconds of a whole run; null: from the budget")


@dataclass(frozen=True, config=_STRICT)
class Prices:
    """Dollars per million tokens of one model."""

    input: NotNegative
    output: NotNegative
    cache_write: NotNegative
    cache_read: NotNegative


@dataclass(frozen=True, config=_STRICT)
class Caps:
    """What proposals may cost, counting those in flight; null: no cap."""

    dollars: NotNegative | None = _says(None, "")
    tokens: Annotated[int, Field(ge=0)] | None = _says(None, "")


@dataclass(frozen=True, config=_STRICT)
class Agent:
    """Who proposes."""

    kind: Literal["auto", "sweep", "scripted", "anthropic", "command"] = _says(
        "auto", "anthropic, sweep, scripted, command; auto: anthropic with a key, or sweep"
    )
    seed: int = _says(0, "of the search, never of a run")
    sampler: Literal["tpe", "random"] = _says("tpe", "sweep: tpe or random")
    constants: tuple[str, ...] = _says((), "sweep: only these constants; empty: all found")
    script: str | None = _says(None, "scripted: file of edits")
    model: str = _says("claude-opus-5-5", "anthropic: model")
    effort: Literal["low", "medium", "high", "xhigh", "max"] = _says(
        "high", "anthropic: low, medium, high, xhigh or max"
    )
    max_tokens: Count = _says(32000, "anthropic: of one reply")
    provider: Literal["anthropic", "bedrock", "vertex"] = _says(
        "anthropic", "anthropic, bedrock or vertex"
    )
    base_url: str | None = _says(None, "anthropic: another address of the API")
    key_file: str | None = _says(None, "anthropic: file with the key, mode 600; null: environment")
    prices: dict[str, Prices] = _says({}, "{MODEL: {input, output, cache_write, cache_read}}")
    caps: Caps = _says(Caps(), "{dollars: 50, tokens: 20000000}; null: none")
    at_cap: Literal["fallback", "end"] = _says("fallback", "fallback (sweep goes on) or end")
    outage_patience: NotNegative = _says(600.0, "seconds without the API before sweep steps in")
    fix_attempts: Annotated[int, Field(ge=0)] = _says(
        2, "how often a crash with a plain cause goes back"
    )
    preset: Literal["claude"] | None = _says(None, "command: claude (Claude Code), or give argv")
    argv: tuple[str, ...] = _says((), "command: the agent's command line")
    deadline: Positive = _says(1200.0, "seconds of one proposal")
    memory_mb: Count = _says(8192, "command: memory of the agent's processes")


@dataclass(frozen=True, config=_STRICT)
class Branch:
    """One line of work, driven by one program file."""

    program: RepoPath = _says("program.md", "what its researcher is told to do")
    agent: Agent = _says(Agent(), "what differs from the campaign's agent")
    slots: Count | None = _says(None, "its runs in flight at once; null: an equal share of all")
    start: str | None = _says(None, "commit to start from; null: the checked-out one")
    node: str | None = _says(None, "only on this node")
    constraint: str | None = _says(None, "only on nodes with this feature (Slurm)")
    gpu: str | None = _says(None, "GPU model, null: its baseline's; runs on another do not count")


@dataclass(frozen=True, config=_STRICT)
class Keep:
    """When an experiment is kept."""

    rule: Literal["greedy"] = _says("greedy", "whatever is better is kept")
    tie: NotNegative = _says(0.0, "metrics this close are equal; equal with fewer lines is kept")
    per_line: NotNegative | None = _says(
        None, "gain that each added line demands; null: 0.00005 (general: 0)"
    )


@dataclass(frozen=True, config=_STRICT)
class Limits:
    """When the campaign ends; whichever comes first, null: never."""

    experiments: Count | None = _says(None, "experiments, baselines included")
    hours: Annotated[float, Field(gt=0, le=87_600)] | None = _says(
        None, "hours from the start of autoresearch run"
    )
    until: TimeOfDay | None = _says(None, "time of day, '07:30'")
    target: float | None = _says(None, "the metric to reach")


@dataclass(frozen=True, config=_STRICT)
class Confirm:
    """The closing reruns of the first and the best on fresh seeds."""

    runs: Annotated[int, Field(ge=0)] = _says(3, "of each; 0: none")


@dataclass(frozen=True, config=_STRICT)
class Disk:
    """What the campaign may fill."""

    cache_mb: Count = _says(1024, "compile cache")
    keep_free_mb: Count = _says(1024, "less than this free on the disk pauses the campaign")


@dataclass(frozen=True, config=_STRICT)
class Lease:
    """How controllers keep out of each other's way."""

    stale_after: Annotated[float, Field(ge=5)] = _says(
        120.0, "seconds without a heartbeat, then another host takes over"
    )


@dataclass(frozen=True, config=_STRICT)
class Config:
    """A whole campaign.yaml."""

    campaign: Name = _says("main", "its name, in git and on disk")
    folder: str = _says("campaigns", "keeps what is not in git; not on purged scratch")
    task: Task = _says(Task(), "")
    data: Data = _says(Data(), "")
    budget: Budget = _says(Budget(), "")
    executor: Executor = _says(Executor(), "")
    run: Run = _says(Run(), "")
    agent: Agent = _says(Agent(), "")
    branches: Annotated[dict[Name, Branch], Field(min_length=1)] = Field(
        default_factory=lambda: {"main": Branch()}
    )
    keep: Keep = _says(Keep(), "")
    limits: Limits = _says(Limits(), "")
    confirm: Confirm = _says(Confirm(), "")
    disk: Disk = _says(Disk(), "")
    lease: Lease = _says(Lease(), "")
