"""A campaign from its settings to its end: puts the controller together and lets it run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from agent.researcher import Researcher, researcher
from jobs import campaign, lab, materialise, submission
from jobs.config import agent_of
from jobs.controller import Controller
from jobs.errors import UserError
from jobs.history import State
from jobs.model import Experiment, Run
from jobs.records import Branch
from jobs.settings import Agent, Config, Data


def run(
    config: Config,
    root: Path,
    say: Callable[[str], None],
    show: Callable[[str], None] = lambda text: None,
) -> str:
    """Run or resume the campaign. Returns why it ended. Raises as `Controller.run`."""
    cast = _ready(config, root)
    wish = materialise.first_wish(config)
    submission.require(config.executor, campaign.folder(config, root), *wish)
    with campaign.opened(config, root, say) as opened:
        state = opened.state
        scale = "" if config.task.kind == "general" else f", scale {config.data.scale}"
        say(f"campaign {config.campaign}{scale}: {opened.site.campaign_dir}")
        if state.records:
            say(f"resumed at {len(state.records)} experiments")
        for branch in state.branches.values():
            if branch.retired is None:  # one that is may have lost its files
                cast(branch)  # those that were added while it ran
        for line in _announced(config):
            say(line)
        executor = submission.executor(config.executor, opened.site.campaign_dir)
        controller = Controller(opened, executor, cast, cast.understudy, say, show)
        return controller.run()


def _ready(config: Config, root: Path) -> Cast:
    """The researchers, and the default corpus prepared: seconds, nothing to fetch."""
    cast = Cast(config, root)
    for name, branch in config.branches.items():
        cast.of(name, branch.agent)  # raises UserError: there is nothing to make it from
    if config.task.kind != "general" and config.data == Data():
        lab.prepare(config.data.corpus, config.data.scale, campaign.data_folder(config))
    return cast


def _announced(config: Config) -> list[str]:
    """Who proposes at whose cost, and when it ends: what a night should not begin without."""
    limits = config.limits
    ends = [
        f"{limits.hours:g} hours" if limits.hours else "",
        f"until {limits.until}" if limits.until else "",
        f"{limits.experiments} experiments" if limits.experiments else "",
        f"a score of {limits.target:g}" if limits.target is not None else "",
    ]
    said = [f"limits: {', '.join(filter(None, ends)) or 'none, it goes on until it is stopped'}"]
    for name, branch in config.branches.items():
        agent = branch.agent
        who = f"{agent.kind} {agent.model}" if agent.kind == "anthropic" else agent.kind
        paid = agent.kind in ("anthropic", "command")
        said.append(f"{name}: proposals by {who}{_capped(config, agent) if paid else ''}")
    return said


def _capped(config: Config, agent: Agent) -> str:
    caps = {agent.caps: "here", config.agent.caps: "in all"}  # inherited ones hold for all together
    most = [f"{c.dollars:g} dollars {where}" for c, where in caps.items() if c.dollars is not None]
    most += [f"{c.tokens} tokens {where}" for c, where in caps.items() if c.tokens is not None]
    return f", at most {', '.join(most)}" if most else ", no cap on what they cost (agent.caps)"


class Cast:
    """Who proposes on each branch, made when first asked for. Scripts lie beside campaign.yaml."""

    def __init__(self, config: Config, root: Path) -> None:
        self._config, self._root = config, root
        self._researchers: dict[str, Researcher] = {}
        self._understudy: Researcher | None = None

    def __call__(self, branch: Branch) -> Researcher:
        """The branch's own researcher. Raises UserError for settings that do not make one."""
        return self.of(branch.name, self._settings(branch))

    def of(self, branch: str, settings: Agent) -> Researcher:
        """The same, by the name of the branch and the settings of its researcher."""
        if branch not in self._researchers:
            if settings.script is not None:
                script = str(self._root / settings.script)
                settings = dataclasses.replace(settings, script=script)
            self._researchers[branch] = researcher(settings, self._config.agent.caps)
        return self._researchers[branch]

    def understudy(self, branch: Branch) -> Researcher | None:
        """Who steps in while a branch's researcher is unavailable: the sweep, for a paid one."""
        if self._settings(branch).kind not in ("anthropic", "command"):
            return None
        if self._understudy is None:
            self._understudy = researcher(dataclasses.replace(Agent(), kind="sweep"))
        return self._understudy

    def _settings(self, branch: Branch) -> Agent:
        """As recorded. But records may come from elsewhere (`fetch`): what is run here, and who is
        told a key of this place, only campaign.yaml says. Raises UserError."""
        recorded = branch.settings.get("agent")
        named = self._config.branches.get(branch.name)
        here = named.agent if named else self._config.agent
        if recorded is None:
            return here
        agent = agent_of(recorded)
        if agent.argv and not here.argv:
            raise UserError(
                f"branch {branch.name}: its records name a command to propose with, campaign.yaml "
                f"does not: give it there (branches.{branch.name}.agent) if it is to run here"
            )
        argv = here.argv if agent.argv else ()
        return dataclasses.replace(agent, argv=argv, base_url=here.base_url, key_file=here.key_file)


def dry_run(config: Config, root: Path) -> str:
    """What the first run would be: its task, and the exact job where there is one."""
    from jobs.repository import Repository

    repository = Repository(root)
    problems = campaign.check(config, root, repository)
    _ready(config, root)
    site, start = campaign.site(config, root), repository.start("HEAD")
    experiment = Experiment(
        "e0001", next(iter(config.branches)), start, start, None, "baseline", "none", ""
    )
    run = Run("e0001", 1, 1, materialise.budget(config), config.data.scale)
    folder = site.campaign_dir / "runs" / run.folder
    task = materialise.task(site, State(), experiment, run, folder)
    lines = [
        f"campaign {config.campaign} would begin at {start[:10]} in {site.campaign_dir}",
        *problems,
        *_announced(config),
        f"budget: {run.budget.amount:g} {run.budget.kind}, at most {task.wall_limit_s:.0f} s a run",
        f"checked at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: settings, repository, data"
        + (", image" if config.executor.image else "")
        + "; `autoresearch doctor` asks Slurm and the API, too",
        f"its first run: {json.dumps(task.to_json(), indent=1)}",
        submission.preview(
            config.executor, f"{config.campaign}-{run.id}", folder, *materialise.first_wish(config)
        ),
    ]
    return "\n".join(lines)
