"""campaign.yaml: defaults for everything, and words for every mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from jobs import config
from jobs.errors import ConfigError, UserError
from jobs.settings import Config


def parsed(environ: dict[str, str] | None = None, **data: Any) -> Config:
    return config.parse(data, environ=environ or {})


def problems(**data: Any) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        parsed(**data)
    first, *rest = str(refusal.value).splitlines()
    assert first == "campaign.yaml cannot be used:"
    return [line.strip() for line in rest]


def file(folder: Path, text: str) -> Path:
    path = folder / "campaign.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_is_a_campaign_on_a_laptop(tmp_path: Path) -> None:
    settings = config.load(file(tmp_path, ""), {})
    assert settings.executor.kind == "local"
    assert (settings.data.corpus, settings.data.scale) == ("stdlib", "cpu")
    assert settings.agent.kind == "sweep"
    assert list(settings.branches) == ["main"]
    assert settings == parsed()


@pytest.mark.parametrize("name", ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"])
def test_a_key_makes_the_language_model_the_researcher(name: str) -> None:
    settings = parsed({name: "secret"})
    assert settings.agent.kind == settings.branches["main"].agent.kind == "anthropic"
    assert "secret" not in str(config.to_dict(settings))
    assert parsed({name: "secret"}, agent={"kind": "sweep"}).agent.kind == "sweep"


def test_the_ledgers_copy_reads_back_as_the_same_settings() -> None:
    settings = parsed(
        branches={"a": {"slots": 2, "agent": {"seed": 7}}, "b": {}},
        budget={"tokens": 5000},
        agent={"prices": {"m": {"input": 1, "output": 2, "cache_write": 3, "cache_read": 4}}},
        executor={"setup": ["module load cuda"]},
    )
    assert config.parse(config.to_dict(settings), environ={}) == settings


def test_the_template_shows_every_setting_with_its_default(tmp_path: Path) -> None:
    text = config.template()
    assert config.load(file(tmp_path, text), {}) == parsed()
    bare = re.sub(r"(?m)^#(\s*[a-z_]+:)", r"\1", text)
    assert config.load(file(tmp_path, bare), {}) == parsed()
    for section in ("campaign", "executor", "branches", "keep", "limits", "confirm", "lease"):
        assert re.search(rf"(?m)^{section}:", bare)
    assert max(map(len, text.splitlines())) <= 120


def test_a_gpu_model_alone_is_one_of_them() -> None:
    assert parsed(executor={"gpus": "h100"}).executor.gpus == "h100:1"
    for gpus in ("1", "h100:4", "a100_1g.5gb:2", "1g.5gb:1"):
        assert parsed(executor={"gpus": gpus}).executor.gpus == gpus


def test_branches_take_what_they_do_not_say_from_the_campaigns_agent() -> None:
    settings = parsed(
        agent={"kind": "scripted", "script": "edits.yaml", "seed": 3},
        branches={"a": None, "b": {"agent": {"kind": "sweep", "seed": 4}}},
    )
    assert (settings.branches["a"].agent.kind, settings.branches["a"].agent.seed) == ("scripted", 3)
    assert (settings.branches["b"].agent.kind, settings.branches["b"].agent.seed) == ("sweep", 4)


def test_a_site_is_shared_by_campaigns_and_overruled_by_the_executor(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("partition: long\naccount: physics\n")
    path = file(tmp_path, "site: site.yaml\nexecutor: {kind: slurm, partition: short}\n")
    executor = config.load(path, {}).executor
    assert (executor.kind, executor.partition, executor.account) == ("slurm", "short", "physics")
    assert parsed(site={"qos": "night"}).executor.qos == "night"
    assert problems(site=3) == ["site: 3 is neither a file nor a mapping"]


def test_what_is_wrong_in_a_site_is_told_by_the_file_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("cpus: many\nmodules: [apptainer]\n")
    path = file(tmp_path, "site: site.yaml\nexecutor: {cpus: 2}\n")
    with pytest.raises(ConfigError) as error:
        config.load(path, {})
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path}/site.yaml cannot be used:"
    assert lines[1].startswith("  cpus: 'many' is not allowed")
    assert lines[2].startswith("  modules: there is no such setting; ")
    assert problems(site={"modules": []})[0].startswith("site.modules: there is no such setting")


def test_a_site_file_that_is_not_there_is_told_as_that(tmp_path: Path) -> None:
    path = file(tmp_path, "site: gone.yaml\n")
    with pytest.raises(UserError) as error:
        config.load(path, {})
    assert str(error.value).startswith(f"{tmp_path}/gone.yaml could not be read")
    assert f"`site:` in {path} names it" in str(error.value)
    assert "init" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"exectuor": {}}, "exectuor: there is no such setting; did you mean 'executor'?"),
        (
            {"executor": {"slot": 2}},
            "executor.slot: there is no such setting; did you mean 'slots'?",
        ),
        (
            {"branches": {"x": {"agent": {"modle": "m"}}}},
            "branches.x.agent.modle: there is no such setting; did you mean 'model'?",
        ),
        (
            {"confirm": {"zzz": 1}},
            "confirm.zzz: there is no such setting; allowed here: runs",
        ),
        (
            {"target": 1.5},
            "target: there is no such setting; it belongs under limits: is the '#' of that line "
            "still there?",
        ),
        (
            {"data": {"corpus": "climbmx"}},
            "data.corpus: 'climbmx' is not allowed: a corpus is stdlib, climbmix, tinystories or "
            "dir:PATH",
        ),
        (
            {"executor": {"kind": "slrm"}},
            "executor.kind: 'slrm' is not allowed: should be 'local', 'slurm' or 'allocation'",
        ),
        (
            {"executor": {"slots": 0}},
            "executor.slots: 0 is not allowed: should be greater than or equal to 1",
        ),
        (
            {"executor": {"slots": "two"}},
            "executor.slots: 'two' is not allowed: should be a valid integer",
        ),
        (
            {"executor": {"slots": True}},
            "executor.slots: True is not allowed: should be a valid integer",
        ),
        (
            {"executor": {"gpus": "h100:a100"}},
            "executor.gpus: 'h100:a100' is not allowed: a number of GPUs, or a model and a number: "
            "'1', 'h100:1'",
        ),
        (
            {"executor": {"memory": "1.5G"}},
            "executor.memory: '1.5G' is not allowed: a whole number with K, M, G or T: "
            "'32G', '1536M'",
        ),
        (
            {"executor": {"isolation": "apptainer"}},
            "executor.isolation: apptainer needs executor.image, the image that runs are in",
        ),
        ({"executor": 3}, "executor: 3 is not allowed: should be an object"),
        ({"branches": []}, "branches: [] is not allowed: should be an object"),
        (
            {"keep": {"tie": float("nan")}},
            "keep.tie: nan is not allowed: should be a finite number",
        ),
        (
            {"limits": {"until": "25:00"}},
            "limits.until: '25:00' is not allowed: a time of day is '07:30'",
        ),
        ({"limits": {"hours": -1}}, "limits.hours: -1 is not allowed: should be greater than 0"),
        (
            {"limits": {"hours": 1e8}},
            "limits.hours: 100000000.0 is not allowed: should be less than or equal to 87600",
        ),
        ({"limits": {"until": 7}}, "limits.until: 7 is not allowed: a time of day is '07:30'"),
        (
            {"limits": {"until": True}},
            "limits.until: True is not allowed: a time of day is '07:30'",
        ),
        (
            {"budget": {"wall": 300, "tokens": 5}},
            "budget: has both wall and tokens; give one of them",
        ),
        (
            {"agent": {"kind": "scripted"}},
            "agent.script: is missing; a scripted researcher reads its edits from there",
        ),
        ({"agent": {"kind": "command"}}, "agent: kind command needs either preset or argv"),
        (
            {"task": {"direction": "maximise"}},
            "task: direction and scorer are a general task's; nanochat's val_bpb is minimised",
        ),
        ({"agent": {"model": 3}}, "agent.model: 3 is not allowed: should be a valid string"),
        (
            {"task": {"editable": ["../outside.py"]}},
            "task.editable.0: '../outside.py' is not allowed: must be a path below the "
            "repository's root, without '..'",
        ),
    ],
)
def test_each_mistake_is_named_by_its_path_and_what_is_allowed(
    data: dict[str, Any], problem: str
) -> None:
    assert problems(**data) == [problem]


def test_all_mistakes_are_told_at_once() -> None:
    found = problems(
        executor={"kind": "x", "slots": 0}, limits={"hours": -1}, lease={"stale_after": 1}
    )
    assert [line.split(":")[0] for line in found] == [
        "executor.kind",
        "executor.slots",
        "limits.hours",
        "lease.stale_after",
    ]


@pytest.mark.parametrize(
    "name", ["../x", "a b", "-rf", "a..b", "x.lock", ".hidden", "", "é", "a/b", "x" * 65, "a\nb"]
)
def test_names_that_git_or_a_shell_would_mind_are_refused(name: str) -> None:
    assert "is not allowed" in problems(branches={name: {}})[0]
    assert problems(campaign=name)[0].startswith("campaign: ")


def test_a_general_task_has_to_say_what_it_is() -> None:
    assert [line.split(":")[0] for line in problems(task={"kind": "general"})] == [
        "task.command",
        "task.scorer",
        "task.editable",
        "task.metric",
    ]
    task = {
        "kind": "general",
        "editable": ["sort.py"],
        "command": ["python", "sort.py"],
        "scorer": {"command": ["python", "score.py"], "files": ["score.py"]},
        "metric": "seconds",
        "direction": "maximise",
    }
    assert parsed(task=task).task.scorer.files == ("score.py",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keep: {tie: 0.1\n", "line 2, column 1 is not YAML"),
        ("a: b: c\n", "line 1, column 5 is not YAML"),
        ("- one\n- two\n", "is a list, where 'name: value' lines belong"),
        ("just words\n", "is a str, where"),
        (
            "keep: {tie: 1}\nkeep: {tie: 2}\n",
            "line 2, column 1 is not YAML: the key 'keep' is there twice",
        ),
        ("keep:\n  tie: 1\n  tie: 2\n", "line 3, column 3"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        config.load(file(tmp_path, text), {})


def test_a_missing_or_unreadable_file_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No such file or directory.*autoresearch init"):
        config.load(tmp_path / "campaign.yaml", {})
    (tmp_path / "campaign.yaml").write_bytes(b"\xff\xfe\x00\x00")
    with pytest.raises(ConfigError, match="is not YAML"):
        config.load(tmp_path / "campaign.yaml", {})


def test_numbers_and_times_mean_what_people_write(tmp_path: Path) -> None:
    settings = config.load(file(tmp_path, "keep: {tie: 1e-4}\nlimits: {until: 22:30}\n"), {})
    assert settings.keep.tie == 0.0001
    assert settings.limits.until == "22:30"
    assert parsed(limits={"until": "7:05"}).limits.until == "7:05"


@pytest.mark.parametrize(
    "text",
    [
        "? [a]\n: 1\n",
        "a: &a [*a]\n",
        "a: " + "[" * 3000 + "]" * 3000,
        "limits: {hours: " + "9" * 5000 + "}",
    ],
)
def test_what_yaml_allows_and_settings_do_not_is_refused_in_words(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        config.load(file(tmp_path, text), {})
    assert str(tmp_path / "campaign.yaml") in str(refusal.value)


def test_a_site_file_that_holds_itself_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("setup: &a [*a]\n")
    with pytest.raises(ConfigError) as refusal:
        config.load(file(tmp_path, "site: site.yaml\n"), {})
    assert str(tmp_path / "site.yaml") in str(refusal.value)
