"""campaign.yaml: what it may say, its defaults, and words for everything that is wrong in it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Hashable, Iterator, Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from agent import keys
from jobs.errors import ConfigError, UserError
from jobs.model import to_json
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
    if isinstance(value, str) and not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", value):
        raise ValueError("a time of day is '07:30'")
    return value


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

    corpus: str = _says("stdlib", "as given to autoresearch prepare")
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
    gpu: str | None = _says(None, "GPU model; a run on another one does not count")


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


# -- reading --------------------------------------------------------------------------------------


def load(path: Path, environ: Mapping[str, str] | None = None) -> Config:
    """The settings in the file at `path`.

    Raises:
        ConfigError: with every wrong value, its path in the file and what is allowed.
        UserError: the file is missing or cannot be read.
    """
    remedy = (
        "`autoresearch init` writes one; in a clone without one, --campaign NAME says which "
        "campaign is meant"
    )
    return parse(_yaml(path, remedy), str(path), environ)


def parse(
    data: Mapping[str, Any],
    name: str = "campaign.yaml",
    environ: Mapping[str, str] | None = None,
) -> Config:
    """The settings that `data` (the content of a campaign.yaml, {} for all defaults) gives.

    A branch's `agent` is completed by the campaign's; `executor` by `site:`, a mapping or the path
    of a YAML file that several campaigns share. `agent.kind: auto` is resolved by the key
    in `environ` (None: this process's).

    Raises:
        ConfigError: with every wrong value, its path and what is allowed.
    """
    data = _inherit({k: {} if v is None else v for k, v in data.items()}, name)
    try:
        # By way of JSON, since strict validation takes lists for tuples there only.
        config = TypeAdapter(Config).validate_json(_json(data, name))
    except ValidationError as error:
        found = _once(error.errors(include_url=False))
        raise ConfigError(_report(name, [_words(item) for item in found])) from None
    config = _resolve(config, environ)
    if problems := list(_conflicts(config)):
        raise ConfigError(_report(name, problems))
    return config


def _json(data: Any, name: str) -> str:
    try:
        return json.dumps(data, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from None


def added(config: Config, name: str, settings: Mapping[str, Any]) -> Config:
    """The settings with one more branch, as if campaign.yaml had named it. Raises ConfigError."""
    data = to_dict(config)
    return parse(data | {"branches": {**data["branches"], name: settings}}, f"branch {name}")


def agent_of(recorded: Mapping[str, Any]) -> Agent:
    """A branch's researcher, from the settings that the ledger has of it."""
    return TypeAdapter(Agent).validate_json(json.dumps(recorded))


def to_dict(config: Config | Branch) -> dict[str, Any]:
    """The settings as JSON, as the ledger records them; `parse` takes them back."""
    return typing.cast(dict[str, Any], to_json(config))


class _Loader(yaml.SafeLoader):
    """YAML that does not let a key's second value replace its first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is one word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# 1e-5 is a number to people, and a text to YAML 1.1, which wants 1.0e-5
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def _yaml(path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}. {remedy}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{path}{place} is not YAML: {problem}") from error
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{path} is a {type(data).__name__}, where 'name: value' lines belong")
    return data or {}


def _inherit(data: dict[str, Any], name: str) -> dict[str, Any]:
    """`data` with branches completed by the campaign's agent and the executor by the site."""
    data = dict(data)
    if "site" in data:
        site = _site(data.pop("site"), name)
        if isinstance(executor := data.get("executor", {}), dict):
            data["executor"] = site | executor
    branches, agent = data.get("branches"), data.get("agent", {})
    if branches is None:
        data["branches"] = branches = {"main": {}}
    if isinstance(branches, dict) and isinstance(agent, dict):
        data["branches"] = {key: _completed(value, agent) for key, value in branches.items()}
    return data


def _site(site: Any, name: str) -> dict[str, Any]:
    """What `site:` of the file `name` holds or names; its errors name the file they are in.

    Raises:
        ConfigError, UserError: as `load`.
    """
    place, path = name, "site."
    if isinstance(site, str):
        file = Path(name).parent / Path(site).expanduser()
        site = _yaml(file, f"`site:` in {name} names it, as seen from there")
        place, path = str(file), ""
    if not isinstance(site, dict):
        raise ConfigError(_report(name, [f"site: {site!r} is neither a file nor a mapping"]))
    try:
        TypeAdapter(Executor).validate_json(_json(site, place))
    except ValidationError as error:
        found = [path + _words(item, Executor) for item in error.errors(include_url=False)]
        raise ConfigError(_report(place, found)) from None
    return site


def _completed(branch: Any, agent: dict[str, Any]) -> Any:
    branch = {} if branch is None else branch
    own = branch.get("agent") or {} if isinstance(branch, dict) else None
    return branch | {"agent": agent | own} if isinstance(own, dict) else branch


def _resolve(config: Config, environ: Mapping[str, str] | None) -> Config:
    def resolved(agent: Agent) -> Agent:
        if agent.kind != "auto":
            return agent
        key = agent.key_file or keys.found(environ)
        return dataclasses.replace(agent, kind="anthropic" if key else "sweep")

    branches = {
        name: dataclasses.replace(branch, agent=resolved(branch.agent))
        for name, branch in config.branches.items()
    }
    return dataclasses.replace(config, agent=resolved(config.agent), branches=branches)


# -- words for what is wrong ----------------------------------------------------------------------


def _report(name: str, problems: list[str]) -> str:
    return "\n".join([f"{name} cannot be used:", *(f"  {problem}" for problem in problems)])


def _once(errors: list[Any]) -> list[Any]:
    """Without those that branches have only inherited from the campaign's agent."""
    own = {error["loc"] for error in errors}
    return [e for e in errors if not (e["loc"][0] == "branches" and e["loc"][2:] in own)]


def _words(error: Any, kind: Any = Config) -> str:
    """'executor.slots: 0 is not allowed: should be greater than or equal to 1'."""
    places = [p for p in error["loc"] if p != "[key]" and not str(p).startswith("function-")]
    path = ".".join(str(p) if str(p).isprintable() else repr(p) for p in places)
    if error["type"] == "unexpected_keyword_argument":
        allowed = _keys(places[:-1], kind)
        near = difflib.get_close_matches(str(places[-1]), allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed here: {', '.join(allowed)}"
        return f"{path}: there is no such setting; {hint}"
    if error["type"] == "missing":
        return f"{path}: is missing"
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{path}: {error['input']!r} is not allowed: {said}"


def _keys(path: list[Any], kind: Any) -> list[str]:
    """The settings that are allowed at `path` of a `kind`."""
    for place in path:
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if place in hints:  # else a name of one's own: dict[Name, Branch] is Branch already
            kind = next((k for k in _arms(hints[place]) if dataclasses.is_dataclass(k)), None)
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    return [*names, "site"] if kind is Config else names


def _arms(hint: Any) -> Iterator[Any]:
    """A type hint and all that it is made of."""
    yield hint
    for part in typing.get_args(hint):
        yield from _arms(part)


def _conflicts(config: Config) -> Iterator[str]:
    """What is wrong although each value is allowed."""
    if config.budget.wall and config.budget.tokens:
        yield "budget: has both wall and tokens; give one of them"
    task = config.task
    if task.kind == "general":
        given = {"command": task.command != Task().command, "scorer": task.scorer}
        given |= {"editable": task.editable != Task().editable, "metric": task.metric != "val_bpb"}
        for key, value in given.items():
            if not value:
                yield f"task.{key}: is missing; a general task has to say it"
        if task.scorer and not task.scorer.command:
            yield "task.scorer.command: is missing"
    elif task.direction != "minimise" or task.scorer:
        yield "task: direction and scorer are a general task's; nanochat's val_bpb is minimised"
    if not task.editable:
        yield "task.editable: is empty; nothing could be proposed"
    for name, branch in config.branches.items():
        if (branch.node or branch.constraint) and config.executor.kind == "local":
            yield f"branches.{name}: node and constraint need executor.kind slurm or allocation"
        for key, common in (("constraint", "constraint"), ("gpu", "gpus")):
            if getattr(branch, key) and config.executor.kind == "allocation":
                yield f"branches.{name}.{key}: an allocation has executor.{common}, for all"
    named = {branch.node for branch in config.branches.values() if branch.node}
    if config.executor.kind == "allocation" and len(named) > config.executor.nodes:
        yield f"executor.nodes: {config.executor.nodes}, but branches want {len(named)} by name"
    if config.executor.isolation == "apptainer" and not config.executor.image:
        yield "executor.isolation: apptainer needs executor.image, the image that runs are in"
    for path, agent in _agents(config):
        if agent.kind == "scripted" and not agent.script:
            yield f"{path}.script: is missing; a scripted researcher reads its edits from there"
        if agent.kind == "command" and bool(agent.argv) == bool(agent.preset):
            yield f"{path}: kind command needs either preset or argv"


def _agents(config: Config) -> Iterator[tuple[str, Agent]]:
    yield "agent", config.agent
    for name, branch in config.branches.items():
        if branch.agent != config.agent:
            yield f"branches.{name}.agent", branch.agent


# -- the commented file ---------------------------------------------------------------------------

_HEAD = """\
# Settings of this campaign. Every line below shows a default: remove its '#' to change it.
# Times are seconds unless a name says otherwise. `autoresearch run --dry-run` checks the file.
"""


def template() -> str:
    """A campaign.yaml in which every setting is there, commented out, with its default."""
    return _HEAD + "\n".join(_lines(Config(), 0)) + "\n"


def _lines(section: Any, depth: int) -> Iterator[str]:
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        about = getattr(f.default, "description", None) or ""
        name = "  " * depth + f.name
        if dataclasses.is_dataclass(value) and not (f.name in ("agent", "caps") and depth):
            yield f"#{name}:"
            yield from _lines(value, depth + 1)
        elif f.name == "branches":
            yield f"#{name}:"
            yield f"#{'  ' * (depth + 1)}main:"
            yield from _lines(value["main"], depth + 2)
        else:
            shown = {} if dataclasses.is_dataclass(value) else to_json(value)
            text = shown if isinstance(shown, str) and shown.isidentifier() else json.dumps(shown)
            yield f"#{name}: {text}".ljust(36) + (f"  # {about}" if about else "")


# -- time -----------------------------------------------------------------------------------------


def deadline(now: datetime, until: str, zone: tzinfo | None = None) -> datetime:
    """The next moment, in UTC, at which clocks in `zone` read `until`.

    A time that a clock skips when daylight saving begins counts as the same span after midnight
    (02:30 becomes 03:30); of one that it shows twice, the next one.

    Args:
        now: with a time zone.
        until: '07:30'.
        zone: None: this system's.
    """
    hour, minute = (int(part) for part in until.split(":"))
    today = now.astimezone(zone).replace(tzinfo=None)
    found = []
    for days in range(3):
        wall = (today + timedelta(days=days)).replace(
            hour=hour, minute=minute, second=0, microsecond=0
        )
        moments = [_local(wall.replace(fold=fold), zone) for fold in (0, 1)]
        shown = [m for m in moments if m.astimezone(zone).replace(tzinfo=None, fold=0) == wall]
        found += [moment for moment in shown or moments[:1] if moment > now]
    return min(found)


def _local(wall: datetime, zone: tzinfo | None) -> datetime:
    """UTC of a wall time; without a zone the system's rules of that day apply."""
    return (wall.replace(tzinfo=zone) if zone else wall).astimezone(UTC)
