"""The commands: what each shows, and a clear word with the right exit status for wrong input."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toylab
from toylab import Lab, change, check_books

from jobs import cli, lab, options

MakeLab = Callable[..., Lab]
Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def autoresearch(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process: exit status, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main(list(words))
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def inside(make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab that has not begun, as the present folder."""
    made = make_lab(change(X=1), change(X=6), limits={"experiments": 3})
    monkeypatch.chdir(made.root)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A campaign that has come to its end: a keep, a discard, a crash, closing reruns."""
    broken = {"description": "broken", "replace": [["NAP = 0.0", "NAP = None"]]}
    root = tmp_path_factory.mktemp("finished") / "lab"
    made = Lab(root, change(X=1), change(X=6), broken, limits={"experiments": 4})
    made.configure(confirm={"runs": 2})
    made.run()
    yield made
    toylab.remove(root)


@pytest.fixture
def looking(finished: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.chdir(finished.root)
    return finished


# -- help -----------------------------------------------------------------------------------------


def parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Any]:
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from parsers(below, (*path, name))


def test_every_command_and_every_option_says_what_it_is_for() -> None:
    found = list(parsers(options.parser()))
    assert {path[0] for path, _ in found if path} == set(cli.COMMANDS)
    for path, parser in found:
        assert parser.description, path
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), (path, action)


@pytest.mark.parametrize("words", [(), *((name,) for name in sorted(cli.COMMANDS))])
def test_help_is_shown(autoresearch: Run, words: tuple[str, ...]) -> None:
    status, out, err = autoresearch(*words, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: autoresearch")


HEAVY = "anthropic git matplotlib numpy optuna pyarrow pydantic spython submitit torch yaml"


def loaded_by(folder: Path, *words: str) -> set[str]:
    """The heavy libraries that a command loads."""
    code = (
        "import sys\nfrom jobs import cli\n"
        "try:\n cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.split()) & set(HEAVY.split())


def test_help_loads_nothing_heavy_and_is_quick(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert loaded_by(tmp_path, "--help") == set()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_looking_loads_only_what_it_needs(finished: Lab) -> None:
    assert loaded_by(finished.root, "status", "--json") <= {"yaml", "pydantic", "git"}
    assert loaded_by(finished.root, "log") <= {"yaml", "pydantic", "git"}


# -- looking --------------------------------------------------------------------------------------


def test_status_as_json_has_what_scripts_rely_on(looking: Lab, autoresearch: Run) -> None:
    status, out, _ = autoresearch("status", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["campaign"], found["state"]) == (looking.name, "stopped")
    assert found["experiments"] == 4
    assert found["controller"] is None
    best = looking.state.record("e0002")
    assert (
        found["branches"]["main"].items()
        >= {
            "head": best.commit,
            "baseline": {"experiment": "e0001", "value": 10.0},
            "best": {"experiment": "e0002", "commit": best.commit, "value": 9.0},
            "experiments": 4,
            "kept": 2,
            "discarded": 1,
            "crashed": 1,
            "running": 0,
        }.items()
    )
    assert found["gpu_seconds"]["allocated"] > 0


def test_status_log_show_and_diff_in_words(looking: Lab, autoresearch: Run) -> None:
    assert "4 experiments done" in autoresearch("status")[1]
    lines = autoresearch("log")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["e0004", "e0003", "e0002", "e0001"]
    assert autoresearch("log", "-n", "1")[1] == lines[0] + "\n"
    assert len(autoresearch("log", "--branch", "main", "--json")[1].splitlines()) == 4
    for name in ("e0002", "2", "main", looking.state.record("e0002").commit[:8]):
        assert "better than 10 by 1" in autoresearch("show", name)[1]
        assert "-X = 2.0\n+X = 1" in autoresearch("diff", name)[1]
    found = json.loads(autoresearch("show", "e0004", "--json")[1])
    assert found["decision"]["numbers"]["status"] == "crash"
    assert "NoneType" in found["results"][0]["reason"]


def test_report_writes_the_files_that_scripts_rely_on(looking: Lab, autoresearch: Run) -> None:
    status, out, _ = autoresearch("report", "--json")
    assert status == 0
    named = {Path(path).relative_to(looking.folder).as_posix() for path in json.loads(out).values()}
    assert named == {
        "results.tsv",
        "results.parquet",
        "report/index.html",
        "report/progress.png",
    }
    assert all((looking.folder / name).stat().st_size > 100 for name in named)
    assert (looking.folder / "branches/main/results.tsv").exists()
    for run in ("e0001/s1-a1", "e0002/s3-a1"):
        assert (looking.folder / "runs" / run / "result.json").exists()


def test_clean_says_what_would_go_and_removes_only_that(looking: Lab, autoresearch: Run) -> None:
    weights = looking.folder / "runs/e0003/s1-a1/model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    before = sorted(p for p in looking.folder.rglob("*") if p.is_file())
    said = autoresearch("clean", "--dry-run")[1]
    assert "3.0 MB  runs/e0003/s1-a1/model.safetensors" in said
    assert "3.0 MB would be free" in said
    assert weights.exists()
    assert json.loads(autoresearch("clean", "--json")[1]) == {
        "runs/e0003/s1-a1/model.safetensors": 3 << 20
    }
    assert sorted(p for p in looking.folder.rglob("*") if p.is_file()) == [
        p for p in before if p != weights
    ]


def test_looking_writes_nothing(looking: Lab, autoresearch: Run) -> None:
    before = {p: p.stat().st_mtime_ns for p in looking.root.rglob("*")}
    for words in (
        ["status"],
        ["log"],
        ["show", "e0001"],
        ["diff", "e0002"],
        ["clean", "--dry-run"],
    ):
        assert autoresearch(*words)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in looking.root.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "e9999"], "'e9999' is no experiment of campaign"),
        (["diff", "; rm -rf /"], "is no experiment of campaign"),
        (["log", "--branch", "side"], "no branch 'side'; there are main"),
        (["tell", "side", "x"], "no branch 'side'; there are main"),
        (["branch", "pause", "../.."], "no branch '../..'; there are main"),
        (["branch", "add", "../.."], "begins with '.'|contains '/'"),
        (["adopt", "e9999", "--into", "main"], "'e9999' is no experiment"),
        (["adopt", "e0001", "--into", "side"], "no branch 'side'"),
        (["init", "new", "--from", "campaigns"], "no campaign in campaigns"),
        (["prepare"], "a task of your own has no corpus"),
        (["run", "--once"], "campaign.yaml has a task of your own"),
        (["run", "--seed", "3"], "belong to run --once"),
        (["status", "--campaign", "../x"], "campaign.*begins with '.'|contains '/'"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_what_is_not_there_is_said(
    looking: Lab, autoresearch: Run, words: list[str], said: str
) -> None:
    status, out, err = autoresearch(*words)
    assert (status, out) == (2, "")
    assert any(part in err for part in said.split("|"))
    assert not (looking.root / "new").exists()


@pytest.mark.parametrize("words", [["status"], ["log"], ["stop"], ["report"], ["clean"]])
def test_a_campaign_that_has_not_begun_is_said(
    inside: Lab, autoresearch: Run, words: list[str]
) -> None:
    status, _, err = autoresearch(*words)
    assert status == 2
    assert f"no campaign in {inside.folder}: start one with `autoresearch run`" in err
    assert not inside.folder.exists()


# -- beginning ------------------------------------------------------------------------------------


def test_init_makes_a_lab_that_can_be_begun(
    tmp_path: Path, autoresearch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "pre-commit").write_text("#!/bin/sh\nexit 1\n")
    (hooks / "pre-commit").chmod(0o755)
    # a user with habits, but without a name
    (tmp_path / "config").write_text(f"[core]\nhooksPath={hooks}\n[commit]\ngpgSign=true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    folder = tmp_path / "a lab"
    status, out, _ = autoresearch("init", str(folder))
    assert status == 0
    assert "autoresearch run" in out
    shipped = (lab.TRAINER / "train.py").read_bytes()
    assert (folder / "trainer/train.py").read_bytes() == shipped
    git = ["git", "-C", str(folder)]
    assert subprocess.check_output([*git, "status", "--porcelain"]) == b""
    assert subprocess.check_output([*git, "show", "HEAD:trainer/train.py"]) == shipped
    status, _, err = autoresearch("init", str(folder))
    assert status == 2
    assert "is not empty; name a new folder" in err


def test_init_from_a_task_of_ones_own_says_how_to_go_on(looking: Lab, autoresearch: Run) -> None:
    status, _, err = autoresearch("init", "new", "--from", str(looking.folder))
    assert status == 2
    assert f"git switch autoresearch/{looking.name}/main" in err


def test_init_from_a_campaign_begins_with_its_best_program(
    finished: Lab, tmp_path: Path, autoresearch: Run
) -> None:
    shutil.copytree(finished.root, tmp_path / "lab", symlinks=True)
    made = finished.at(tmp_path / "lab")
    book = made.folder / "ledger.jsonl"
    book.write_text(book.read_text().replace('"kind":"general"', '"kind":"nanochat"'))
    (made.folder / "snapshot.json").unlink()
    assert autoresearch("init", str(tmp_path / "new"), "--from", str(made.folder))[0] == 0
    text = (tmp_path / "new/trainer/train.py").read_text()
    assert text == toylab.SOLUTION.replace("X = 2.0", "X = 1")


def test_a_campaign_kept_outside_its_repository_is_where_it_was_said_and_can_be_begun_from(
    inside: Lab, tmp_path: Path, autoresearch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inside.configure(folder="~/lasting")
    assert autoresearch("run")[0] == 0
    kept = tmp_path / "home" / "lasting" / inside.name
    assert not (inside.root / "campaigns").exists()
    book = kept / "ledger.jsonl"
    book.write_text(book.read_text().replace('"kind":"general"', '"kind":"nanochat"'))
    (kept / "snapshot.json").unlink()
    assert autoresearch("init", str(tmp_path / "new"), "--from", str(kept))[0] == 0
    text = (tmp_path / "new/trainer/train.py").read_text()
    assert text == toylab.SOLUTION.replace("X = 2.0", "X = 1")
    monkeypatch.chdir(tmp_path)
    status, _, err = autoresearch("init", str(tmp_path / "other"), "--from", str(kept))
    assert status == 2
    assert "call this inside the campaign's lab" in err


def test_a_night_ends_with_its_report_and_so_does_one_that_pauses(
    inside: Lab, autoresearch: Run
) -> None:
    index = inside.folder / "report" / "index.html"
    inside.configure(disk={"keep_free_mb": 10**9})
    status, out, _ = autoresearch("run")
    assert status == 3
    assert f"report: {index}" in out
    index.unlink()
    inside.configure(disk={"keep_free_mb": 1})
    assert f"report: {index}" in autoresearch("run")[1]
    for name in ("report/index.html", "report/progress.png", "results.parquet", "results.tsv"):
        assert (inside.folder / name).stat().st_size > 0
    assert "e0002" in index.read_text()


def test_a_report_that_cannot_be_written_fails_no_night(inside: Lab, autoresearch: Run) -> None:
    (inside.folder / "report" / "progress.png").mkdir(parents=True)  # where a file is to be
    status, out, _ = autoresearch("run")
    assert status == 0
    assert "no report was written" in out
    assert "done: 3 experiments" in out


def test_dry_run_checks_everything_and_leaves_nothing(inside: Lab, autoresearch: Run) -> None:
    before = inside.refs()
    status, out, _ = autoresearch("run", "--dry-run")
    assert status == 0
    assert f"campaign {inside.name} would begin at {inside.git('rev-parse', 'main')[:10]}" in out
    assert "main: proposals by scripted" in out
    assert '"command": [\n   "python",\n   "score.py"\n  ]' in out
    assert "-P -m jobs.payload" in out
    assert inside.refs() == before
    assert not (inside.root / "campaigns").exists()


@pytest.mark.parametrize("kind", ["slurm", "allocation"])
def test_dry_run_shows_the_place_that_the_first_branch_names(
    inside: Lab, autoresearch: Run, kind: str
) -> None:
    place = {"node": "n3"} | ({"constraint": "fast", "gpu": "h100"} if kind == "slurm" else {})
    inside.configure(executor={"kind": kind, "nodes": 2}, branches={"main": place})
    status, out, _ = autoresearch("run", "--dry-run")
    assert status == 0
    assert "#SBATCH --nodelist=n3\n" in out
    if kind == "slurm":
        assert "#SBATCH --constraint=fast\n" in out
        assert "#SBATCH --gres=gpu:h100:1\n" in out
    else:
        assert " --nodelist=n3 " in out.partition("$ srun ")[2]


def test_dry_run_refuses_nodes_that_are_held_for_less_than_a_run(
    inside: Lab, autoresearch: Run
) -> None:
    inside.configure(executor={"kind": "allocation", "hold_hours": 0.1})
    status, _, err = autoresearch("run", "--dry-run")
    assert status == 2
    assert "executor.hold_hours: 0.1" in err


@pytest.mark.parametrize(
    ("branch", "told"),
    [({"start": "deadbeef"}, "deadbeef"), ({"program": "gone.md"}, "gone.md")],
)
def test_what_cannot_begin_is_told_by_dry_run_doctor_and_run_and_leaves_nothing(
    inside: Lab, autoresearch: Run, branch: dict[str, str], told: str
) -> None:
    inside.configure(branches={"main": branch})
    for command in (["run", "--dry-run"], ["run"]):
        status, _, err = autoresearch(*command)
        assert status == 2
        assert "branch main" in err
        assert told in err
    status, out, _ = autoresearch("doctor")
    assert status == 1
    assert told in out
    assert not (inside.root / "campaigns").exists()


def test_dry_run_says_what_proposals_may_cost_on_a_branch_and_in_all(
    inside: Lab, autoresearch: Run
) -> None:
    paid = {"kind": "anthropic", "caps": {"dollars": 50}}
    side = {"agent": {"caps": {"dollars": 5, "tokens": 1000}}}
    inside.configure(agent=paid, branches={"main": {}, "side": side}, limits={"until": "07:30"})
    status, out, _ = autoresearch("run", "--dry-run")
    assert status == 0
    assert "limits: until 07:30\n" in out
    assert re.search(r"main: proposals by anthropic \S+, at most 50 dollars in all\n", out)
    assert re.search(
        r"side: .*, at most 5 dollars here, 50 dollars in all, 1000 tokens here\n", out
    )


def test_a_branch_that_cannot_begin_beside_others_is_named_by_dry_run(
    inside: Lab, autoresearch: Run
) -> None:
    inside.configure(branches={"main": {}, "side": {"start": "deadbeef"}})
    status, out, _ = autoresearch("run", "--dry-run")
    assert status == 0
    assert "branch side cannot begin: no commit 'deadbeef'" in out


def test_a_campaign_named_on_the_command_line_runs_from_elsewhere(
    make_lab: MakeLab, tmp_path: Path, autoresearch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_lab(change(X=1), limits={"experiments": 2})
    monkeypatch.chdir(tmp_path)
    status, out, _ = autoresearch("run", "lab/campaign.yaml")
    assert status == 0
    assert out.endswith("done: 2 experiments done, as limits.experiments says\n")
    assert "stopped" in autoresearch("status", "--config", "lab/campaign.yaml")[1]
    check_books(made)


def test_an_order_without_a_controller_waits_for_the_next_start(
    inside: Lab, autoresearch: Run
) -> None:
    inside.configure(limits={"experiments": 1})
    assert autoresearch("run")[0] == 0
    status, out, _ = autoresearch("tell", "main", "mind the gap")
    assert status == 0
    assert "obeyed when `autoresearch run` starts" in out
    assert autoresearch("run")[0] == 0
    assert inside.state.branch("main").notes == ("mind the gap",)


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("limit: {experiments: 3}", "limit: there is no such setting; did you mean 'limits'?"),
        ("limits: {experiment: 3}", "limits.experiment: there is no such setting"),
        ("executor: {slots: 0}", "executor.slots: 0 is not allowed"),
        ("executor: {kind: pbs}", "executor.kind: 'pbs' is not allowed"),
        ("limits: {until: 25:00}", "limits.until"),
        ("limits: {hours: -1}", "limits.hours: -1 is not allowed"),
        ("budget: {wall: 5, tokens: 5}", "budget: has both wall and tokens"),
        ("budget: {wall: .nan}", "budget.wall"),
        ("agent: {kind: scripted}", "agent.script: is missing"),
        ("agent: {kind: scripted, script: gone.yaml}", "gone.yaml could not be read"),
        ("agent: {kind: command, argv: [no-such-agent]}", "no-such-agent is not on PATH"),
        ("agent: {kind: anthropic, model: gpt}", "no price is known for gpt"),
        ("task: {kind: general, metric: loss}", "task.scorer: is missing"),
        ("task: {editable: [../../etc/passwd]}", "task.editable"),
        ("campaign: ../../up", "campaign: '../../up' is not allowed"),
        ("campaign: night.lock", "campaign: 'night.lock' is not allowed"),
        ("branches: {'../x': {}}", "branches.../x"),
        ("branches: {'a b': {}}", "contains ' '"),
        ("branches: {'-x': {}}", "begins with '-'"),
        ("branches: {main: {start: gone}}", "no commit 'gone'"),
        ("branches: {}", "branches"),
        ("[]", "is a list"),
        ("a: b: c", "is not YAML"),
        ("campaign: a\ncampaign: b", "'campaign' is there twice"),
        ("\x00", "is not YAML"),
    ],
)
def test_each_mistake_in_campaign_yaml_is_a_clear_word(
    inside: Lab, autoresearch: Run, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-nobody")
    settings = dict(inside.settings)
    if text.split(":")[0] in settings:
        del settings[text.split(":")[0]]
    whole = toylab.yaml.safe_dump(settings) if text.isprintable() and text[0] != "[" else ""
    inside.write("campaign.yaml", whole + text + "\n")
    status, _, err = autoresearch("run")
    assert status == 2, err
    assert words in err
    assert not (inside.folder / "runs").exists()


def test_image_looks_into_the_store_that_campaign_yaml_names(
    inside: Lab, autoresearch: Run, tmp_path: Path
) -> None:
    inside.configure(executor={"images": str(tmp_path / "group")})
    assert autoresearch("image", "list")[1] == f"no images in {tmp_path}/group\n"
    told = autoresearch("image", "list", "--store", str(tmp_path / "other"))
    assert told[1] == f"no images in {tmp_path}/other\n"


def test_a_missing_campaign_yaml_is_said(
    tmp_path: Path, autoresearch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["run"], ["status"], ["prepare"]):
        status, _, err = autoresearch(*words)
        assert status == 2
        assert "campaign.yaml could not be read: No such file or directory" in err
        assert "autoresearch init" in err


# -- data -----------------------------------------------------------------------------------------


def nanochat(inside: Lab, data: Path) -> None:
    del inside.settings["task"]
    (inside.root / "trainer").mkdir()
    inside.write("trainer/train.py", "X = 1\n")
    inside.git("add", "trainer/train.py")
    inside.git("commit", "--quiet", "--message", "program")
    inside.configure(data={"folder": str(data)}, agent={"kind": "sweep"})


def test_data_that_was_not_prepared_is_said_with_the_command(
    inside: Lab, autoresearch: Run, tmp_path: Path
) -> None:
    nanochat(inside, tmp_path / "nowhere")
    status, _, err = autoresearch("run")
    assert status == 2
    assert "nowhere holds no prepared data: run `autoresearch prepare`" in err
    assert "corpus stdlib, scale cpu" in err


@pytest.mark.parametrize("harm", ["short", "gone", "manifest"])
def test_data_that_was_cut_short_is_said_before_anything_runs(
    inside: Lab, autoresearch: Run, tmp_path: Path, harm: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.u16").write_bytes(bytes(100))
    manifest = json.dumps({"format": 1, "files": {"train.u16": {"bytes": 100, "sha256": "0"}}})
    (data / "manifest.json").write_text(manifest if harm != "manifest" else manifest[:30])
    if harm == "short":
        os.truncate(data / "train.u16", 60)
    if harm == "gone":
        (data / "train.u16").unlink()
    nanochat(inside, data)
    status, _, err = autoresearch("run")
    assert status == 2
    assert "is damaged: " in err
    assert "run `autoresearch prepare` again" in err


# -- repositories ---------------------------------------------------------------------------------


def test_a_folder_that_is_no_repository_is_said(inside: Lab, autoresearch: Run) -> None:
    shutil.rmtree(inside.root / ".git")
    status, _, err = autoresearch("run")
    assert status == 2
    assert "is not in a git repository: autoresearch init makes a lab" in err


def test_a_repository_without_a_commit_is_said(inside: Lab, autoresearch: Run) -> None:
    shutil.rmtree(inside.root / ".git")
    inside.git("init", "--quiet")
    status, _, err = autoresearch("run")
    assert status == 2
    assert "has no commit yet: git add" in err


def test_a_missing_git_is_said(inside: Lab) -> None:
    status, said = inside.call(PATH=str(inside.root))
    assert status == 2
    assert "git is not on PATH: install it" in said
    assert "Traceback" not in said


def test_an_editable_file_that_is_not_committed_is_said(inside: Lab, autoresearch: Run) -> None:
    inside.settings["task"]["editable"] = ["solution.py", "other.py"]
    inside.configure()
    inside.write("other.py", "A = 1\n")
    status, _, err = autoresearch("run")
    assert status == 2
    assert "has no file 'other.py'" in err


@pytest.mark.parametrize(
    ("folder", "scratch", "told"),
    [("scratch/me", "", True), ("mine", "{}", True), ("mine", "/elsewhere", False)],
)
def test_a_campaign_that_a_site_may_purge_is_told_of(
    make_lab: MakeLab,
    autoresearch: Run,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    scratch: str,
    told: bool,
) -> None:
    made = make_lab(limits={"experiments": 1}, folder=folder)
    monkeypatch.setenv("SCRATCH", scratch.format(made.root))
    monkeypatch.chdir(made.root)
    status, said, _ = autoresearch("run")
    assert status == 0
    assert ("looks like scratch" in said) == told


def test_a_shallow_clone_with_a_detached_head_is_told_of_and_works(
    make_lab: MakeLab, tmp_path: Path, autoresearch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_lab(change(X=1), limits={"experiments": 2})
    made.write("more.txt", "more\n")
    made.git("add", "more.txt")
    made.git("commit", "--quiet", "--message", "more")
    made.git("clone", "--quiet", "--depth", "1", f"file://{made.root}", str(tmp_path / "shallow"))
    clone = made.at(tmp_path / "shallow")
    for name in ("campaign.yaml", "edits.yaml"):
        shutil.copy(made.root / name, clone.root)
    clone.git("checkout", "--quiet", "--detach")
    monkeypatch.chdir(clone.root)
    status, out, _ = autoresearch("run")
    assert status == 0
    assert "shallow clone: " in out
    assert "detached HEAD: " in out
    check_books(clone)


def test_a_submodule_is_told_of_and_left_out(
    make_lab: MakeLab, autoresearch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, part = make_lab(change(X=1), limits={"experiments": 2}), make_lab()
    allow = ("-c", "protocol.file.allow=always")
    made.git(*allow, "submodule", "--quiet", "add", str(part.root), "part")
    made.git("commit", "--quiet", "--message", "a submodule")
    monkeypatch.chdir(made.root)
    status, out, _ = autoresearch("run")
    assert status == 0
    assert "submodules: experiments carry them over unchanged" in out
    assert made.git("ls-tree", made.state.record("e0002").commit, "part").startswith("160000")
    check_books(made)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_path_with_spaces_and_other_alphabets_works(tmp_path: Path, locale: str) -> None:
    made = Lab(tmp_path / "läb mit  Räumen 実験 {shared} 'x'", change(X=1))
    made.configure(limits={"experiments": 2})
    status, said = made.call(LC_ALL=locale)
    assert status == 0, said
    check_books(made)
    assert made.call("log", LC_ALL=locale)[0] == 0


def test_a_path_that_gits_library_would_misread_is_refused(
    tmp_path: Path, autoresearch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Lab(tmp_path / "$HOME").root)
    status, _, err = autoresearch("run")
    assert status == 2
    assert "holds a $ that git's library takes for a variable" in err


def test_a_read_only_disk_is_said_and_can_be_looked_at(finished: Lab, tmp_path: Path) -> None:
    shutil.copytree(finished.root, tmp_path / "lab", symlinks=True)
    made = finished.at(tmp_path / "lab")
    python = f"{sys.executable} -P -m jobs.cli"
    script = (
        f"mount --bind {made.root} {made.root} && mount -o remount,bind,ro {made.root} && "
        f"cd {made.root} && {{ {python} run; echo status $?; {python} status; echo status $?; }}"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert "status 3\n" in done.stdout, said
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("status 0\n")


# -- a pause is exit status 3 ----------------------------------------------------------------------


def test_a_pause_is_exit_status_3_and_shown_with_its_remedy(inside: Lab, autoresearch: Run) -> None:
    inside.configure(disk={"keep_free_mb": 1 << 40})
    status, _, err = autoresearch("run")
    assert status == 3
    assert "MB are free on its disk" in err
    out = autoresearch("status")[1]
    assert "paused (" in out
    assert "autoresearch clean shows what can go" in out
    assert json.loads(autoresearch("status", "--json")[1])["state"] == "paused"
