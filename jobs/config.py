"""campaign.yaml: reading and writing it, and words for everything that is wrong in it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from agent import keys
from jobs.errors import ConfigError, UserError
from jobs.model import to_json
from jobs.settings import Agent, Branch, Config, Executor, Task


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
    of a YAML file that several campaigns share. `agent.kind: auto` is resolved by the key in
    `environ` (None: this process's). Raises ConfigError: with every wrong value, its path and what
    is allowed.
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

    Raises ConfigError, UserError: as `load`.
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
        below = [name for name in allowed if places[-1] in _keys([*places[:-1], name], kind)]
        hint = f"did you mean {near[0]!r}?" if near else f"allowed here: {', '.join(allowed)}"
        if below:  # the '#' of the line above was left
            hint = f"it belongs under {' or '.join(below)}: is the '#' of that line still there?"
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
# Settings of this campaign. Every line below shows a default: remove its '#', and that of the
# section it stands in, to change it.
# Times are seconds unless a name says otherwise. `autoresearch run --dry-run` checks the file.
"""


def template() -> str:
    """A campaign.yaml in which every setting is there, commented out, with its default."""
    site = (
        "#site: null".ljust(36) + "  # executor settings that campaigns share: a YAML file's path"
    )
    return _HEAD + "\n".join([site, *_lines(Config(), 0)]) + "\n"


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
