"""Branches beside each other: their places, their troubles, and their way to other clones."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ended
import pytest
import yaml
from ended import autoresearch
from story import Story
from toylab import GIT, Lab, change, check_books, when

from agent import brief
from agent.researcher import Context
from jobs import compare, config, lease, mirror, plan, process, runs, submission
from jobs.errors import ConfigError, UserError
from jobs.evidence import Evidence
from jobs.history import fold
from jobs.model import Run, Submission
from jobs.repository import Repository
from jobs.settings import Executor
from jobs.submission import LocalExecutor
from slurm import script

MakeLab = Callable[..., Lab]


# -- their share of the slots ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "under_way", "wanted"),
    [
        ({"a": None}, {}, {"a": 8}),
        ({"a": None, "b": None}, {}, {"a": 4, "b": 4}),
        ({"a": None, "b": None}, {"a": 6}, {"b": 2}),
        ({"a": None, "b": 1}, {}, {"a": 7, "b": 1}),
        ({"a": 3}, {"a": 1}, {"a": 2}),
    ],
)
def test_slots_that_no_branch_has_to_itself_are_shared(
    slots: dict[str, int | None], under_way: dict[str, int], wanted: dict[str, int]
) -> None:
    story = Story(*slots)
    for name, own in slots.items():
        story.put("branch_added", branch=name, settings={"slots": own})
        story.experiment(2.0, name)
    for _ in range(9):
        story.experiment(3.0, "a")  # what came late has no claim for that
    for name, count in under_way.items():
        for _ in range(count):
            story.propose(name)
    settings = config.parse({"executor": {"slots": 8}}, environ={})
    assert Counter(plan.openings(story.state, settings)) == wanted


# -- their own places -----------------------------------------------------------------------------


class Choosy(LocalExecutor):
    """Remembers the places asked for, and knows no node n9."""

    asked: list[tuple[str, Mapping[str, str]]]

    def submit(self, run: Run, *rest: Any) -> Submission:
        place = rest[-1]
        self.asked.append((run.experiment, dict(place)))
        if place.get("node") == "n9":
            raise UserError("sbatch: Invalid node name specified")
        return super().submit(run, *rest)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Mapping[str, str]]]:
    """Runs go through Choosy, which is taken for Slurm; what it was asked for."""
    found: list[tuple[str, Mapping[str, str]]] = []

    def choose(settings: Executor, campaign_dir: Path) -> Choosy:
        made = Choosy(settings, campaign_dir)
        made.asked = found
        return made

    monkeypatch.setattr(submission, "executor", choose)
    monkeypatch.setattr(submission, "require", lambda *asked: None)
    return found


def test_each_branch_asks_for_its_own_node_feature_and_gpu(make_lab: MakeLab, asked: list) -> None:
    places = {"a": {"node": "n1"}, "b": {"constraint": "fast", "gpu": "h100"}, "c": {}}
    lab = make_lab(
        branches=places,
        executor={"kind": "slurm", "slots": 3, "poll_seconds": 0.2},
        limits={"experiments": 3},
    )
    lab.run()
    state = lab.state
    assert {state.record(name).branch: place for name, place in asked} == places
    check_books(lab)


def test_places_that_do_not_exist_pause_their_branches_alone(
    make_lab: MakeLab, asked: list
) -> None:
    lost = ("lost", "gone", "away")  # as many as would pause a campaign by their experiments
    lab = make_lab(
        change(X=1),
        branches={"main": {}} | {name: {"node": "n9"} for name in lost},
        executor={"kind": "slurm", "slots": 4, "poll_seconds": 0.2},
    )
    lab.run()
    for name in lost:
        first = next(iter(lab.state.experiments(name)))
        assert "Invalid node name" in lab.state.results(first.id)[0].reason
        assert "has no score" in (lab.state.branch(name).paused or "")
    assert lab.state.branch("main").best_metric == 9.0


def test_a_run_on_another_gpu_model_does_not_count(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lent(LocalExecutor):
        """Runs end at once, on the GPU that there is."""

        def submit(self, run: Run, name: str, run_dir: Path, *rest: Any) -> Submission:
            told = {"protocol": 1, "status": "ok", "reason": "done", "value": 1.0, "node": "n1"}
            told |= {"gpu": "NVIDIA A100-SXM4-40GB", "facts": {"run": run.id}}
            (run_dir / "result.json").write_text(json.dumps(told))
            return Submission(run.id, "local", f"4194305@0@{process.boot_id()}", "n1")

    monkeypatch.setattr(submission, "executor", Lent)
    branches = {"wrong": {"gpu": "h100"}, "right": {"gpu": "a100"}, "any": {}}
    lab = make_lab(branches=branches, limits={"experiments": 3})
    lab.run()
    state = lab.state
    assert [state.branch(name).best_metric for name in branches] == [None, 1.0, 1.0]
    wrong = next(iter(state.experiments("wrong")))
    reason = "it ran on NVIDIA A100-SXM4-40GB, its branch wants h100"
    assert {result.reason for result in state.results(wrong.id)} == {reason}
    assert wrong.verdict == "parked"
    assert state.branch("wrong").unfit == ("n1",)
    assert not any(run.died for run in state.nodes["n1"])


def test_a_branch_that_names_no_gpu_model_keeps_to_its_baselines(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mixed(LocalExecutor):
        """Only first attempts at an edit come to n2, which has other GPUs."""

        def submit(self, run: Run, name: str, run_dir: Path, *rest: Any) -> Submission:
            other = run.experiment != "e0001" and run.attempt == 1
            told = {"protocol": 1, "status": "ok", "reason": "done", "facts": {"run": run.id}}
            told |= {"value": 1.0 if other else 2.0 - run.seed, "node": "n2" if other else "n1"}
            told |= {"gpu": "NVIDIA H200" if other else "NVIDIA H100 80GB HBM3"}
            (run_dir / "result.json").write_text(json.dumps(told))
            return Submission(run.id, "local", f"4194305@0@{process.boot_id()}", told["node"])

    monkeypatch.setattr(submission, "executor", Mixed)
    lab = make_lab(change(X=1), limits={"experiments": 2})
    lab.run()
    first, second = lab.state.results("e0002")
    assert (first.status, first.details["misplaced"]) == ("infrastructure", True)
    assert first.reason == "it ran on NVIDIA H200, its branch wants NVIDIA H100 80GB HBM3"
    assert second.ok
    assert lab.state.branch("main").unfit == ("n2",)
    assert not any(run.died for seen in lab.state.nodes.values() for run in seen)


@pytest.mark.parametrize(
    ("wanted", "name", "fits"),
    [
        ("h100", "NVIDIA H100 80GB HBM3", True),
        ("nvidia_h100_80gb_hbm3", "NVIDIA H100 80GB HBM3", True),
        ("a100_80gb", "NVIDIA A100-SXM4-80GB", True),
        ("a100", "NVIDIA A100 80GB PCIe", True),
        ("rtx3090", "NVIDIA GeForce RTX 3090", True),
        ("A100_80gb", "NVIDIA A100-SXM4-40GB", False),
        ("h100", "NVIDIA A100-SXM4-80GB", False),
        ("a10", "NVIDIA A100-SXM4-80GB", False),
        ("h200", "NVIDIA GH200 480GB", False),
    ],
)
def test_a_gpus_type_in_slurm_is_told_from_its_name_by_the_driver(
    wanted: str, name: str, fits: bool
) -> None:
    assert runs._is_model(wanted, name) is fits


def test_a_job_has_its_branchs_node_feature_and_gpu() -> None:
    settings = Executor(constraint="ib", gpus="a100:2", exclude=("n1", "n2"))
    folder = Path("/x")
    place = {"node": "n1", "constraint": "fast", "gpu": "h100"}
    found = script.sbatch_parameters(settings, "night-e0001-s1-a1", folder, 60.0, {"n3"}, place)
    assert (found["nodelist"], found["exclude"]) == ("n1", "n2,n3")
    assert found["constraint"] == "ib&fast"
    assert found["additional_parameters"]["gres"] == "gpu:h100:2"
    plain = script.sbatch_parameters(settings, "night-e0001-s1-a1", folder, 60.0, {"n3"})
    assert "nodelist" not in plain
    assert plain["additional_parameters"]["gres"] == "gpu:a100:2"
    holder = script.holder_text(settings, folder, 60.0, {"n1", "n3"}, nodes={"n1"})
    assert "#SBATCH --nodelist=n1\n#SBATCH --exclude=n2,n3\n" in holder


def test_places_that_an_executor_does_not_have_are_told_at_once(make_lab: MakeLab) -> None:
    lab = make_lab(branches={"main": {"node": "n1"}})
    with pytest.raises(
        ConfigError, match=r"branches\.main: node and constraint need executor.kind"
    ):
        lab.run()
    lab.configure(executor={"kind": "allocation"}, branches={"main": {"constraint": "fast"}})
    with pytest.raises(ConfigError, match=r"branches\.main\.constraint"):
        lab.run()
    lab.configure(branches={"main": {"gpu": "h100"}})
    with pytest.raises(ConfigError, match=r"branches\.main\.gpu: an allocation has executor.gpus"):
        lab.run()
    lab.configure(branches={"a": {"node": "n1"}, "b": {"node": "n2"}})
    with pytest.raises(ConfigError, match=r"executor\.nodes: 1, but branches want 2 by name"):
        lab.run()


# -- their own troubles ---------------------------------------------------------------------------


def test_a_start_commit_that_does_not_exist_pauses_its_branch_alone(make_lab: MakeLab) -> None:
    branches = {"main": {}, "side": {"start": "nowhere"}}
    lab = make_lab(change(X=1), branches=branches, limits={"experiments": 2})
    lab.run()
    assert [line for line in lab.lines if "side is paused: no commit 'nowhere'" in line]
    assert lab.state.branch("main").best_metric == 9.0
    lab.git("branch", "nowhere", "main")
    lab.configure(limits={"experiments": 3})
    lab.run()
    assert lab.state.branch("side").baseline_metric == 10.0
    check_books(lab)


def test_a_pause_by_order_outlasts_the_failure_of_its_baseline(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), branches={"main": {}, "side": {"start": "broken"}})
    lab.git("checkout", "--quiet", "-b", "broken")
    lab.write("solution.py", "import time\ntime.sleep(1)\nX = 1 / 0\n")
    lab.git("commit", "--quiet", "--all", "--message", "broken")
    lab.git("checkout", "--quiet", "main")
    lab.configure(executor={"slots": 2}, limits={"experiments": 3})
    lab.run(when("e0001", lambda: lab.order("pause", branch="side")))
    side = lab.state.branch("side")
    assert (side.crashed, side.paused) == (1, "by order")
    lab.configure(limits={"experiments": 4})
    lab.run()
    assert lab.state.branch("side").experiments == 1
    check_books(lab)


def test_a_retired_branch_whose_files_are_gone_does_not_keep_the_others_from_a_start(
    make_lab: MakeLab,
) -> None:
    lab = make_lab(limits={"experiments": 2})
    lab.scripts(a=[change(X=1)], b=[])
    lab.run()
    assert autoresearch(lab.root, "branch", "retire", "b")[0] == 0
    lab.configure(limits={"experiments": 3})
    lab.run()
    (lab.root / "b.yaml").unlink()
    lab.scripts(a=[change(X=1), change(Y=1)])
    lab.configure(limits={"experiments": 4})
    lab.run()
    assert lab.state.branch("a").best_metric == 0.0
    check_books(lab)


def test_a_branch_added_without_a_researcher_has_the_campaigns(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 3})
    lab.run(lambda line: "e0001" in line and autoresearch(lab.root, "branch", "add", "side"))
    told = {row["branch"]: row["researcher"] for row in compare.rows(lab.state)}
    assert told == {"main": "scripted", "side": "scripted"}


def test_a_branch_added_at_night_has_a_researcher_of_its_own(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), executor={"slots": 2}, limits={"experiments": 4})
    once = []

    def add(line: str) -> None:
        if "e0001" in line and not once:
            once.append(line)
            autoresearch(lab.root, "branch", "add", "side", "--agent", "sweep", "--slots", "1")

    lab.run(add)
    side = lab.state.branch("side")
    assert side.settings["agent"]["kind"] == "sweep"
    assert side.settings["program"] == "program.md"
    researchers = {lab.state.experiment(r.id).researcher for r in lab.state.experiments("side")}
    assert researchers == {"none", "sweep"}
    lab.configure(limits={"experiments": 5})
    lab.run()  # campaign.yaml does not know the branch: the ledger does
    assert lab.state.branch("side").experiments > side.experiments
    check_books(lab)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tell", "gone", "hear me"], "branch gone is retired"),
        (["adopt", "e0001", "--into", "gone"], "branch gone is retired"),
        (["branch", "pause", "gone"], "branch gone is retired"),
        (["tell", "nobody", "hello"], "no branch 'nobody'; there are gone, main"),
        (["branch", "add", "a..b"], "git allows no '..' in a name"),
        (["branch", "add", "a/b"], "contains '/'"),
        (["branch", "add", "main"], "branch main exists already"),
        (["branch", "add", "x", "--start", "nowhere"], "no commit 'nowhere'"),
        (["branch", "add", "x", "--slots", "-3"], "branches.x.slots: -3 is not allowed"),
        (["branch", "add", "x", "--node", "n1"], "node and constraint need executor.kind"),
        (["tell", "main", "x" * 4001], "at most 4000 characters, this one has 4001"),
    ],
)
def test_an_order_that_cannot_be_obeyed_is_refused_when_it_is_given(
    shared: Lab, words: list[str], said: str
) -> None:
    status, text = autoresearch(shared.root, *words)
    assert (status, said in text) == (2, True), text
    assert list((shared.folder / "inbox").iterdir()) == []


def test_a_branch_that_starts_at_an_experiment_has_a_baseline_of_its_own(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab", change(X=1), limits={"experiments": 2})
    lab.run()
    start = f"autoresearch/{lab.name}/main"
    lab.configure(branches={"main": {}, "side": {"start": start}}, limits={"experiments": 3})
    lab.run()
    first = lab.state.record("e0003")
    assert (first.branch, first.parent, first.verdict) == ("side", None, "keep")
    assert lab.state.branch("side").baseline_metric == lab.state.branch("main").best_metric == 9.0
    check_books(lab)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(
        tmp_path_factory.mktemp("retired") / "lab",
        branches={"main": {}, "gone": {}},
        limits={"experiments": 2},
    )
    lab.run()
    lab.configure(limits={"experiments": 3})
    assert autoresearch(lab.root, "branch", "retire", "gone")[0] == 0
    lab.run()
    return lab


def test_a_branch_that_rests_gets_no_rebase_until_it_is_resumed(make_lab: MakeLab) -> None:
    lab = make_lab(
        change(X=1),
        change(Y=1, NAP=1.0),
        branches={"main": {"slots": 2}},
        executor={"slots": 2},
        limits={"experiments": 3},
    )
    lab.run(lambda line: "  X 1" in line and lab.order("retire", branch="main"))
    assert lab.state.decision("e0003").numbers["rebase"]
    lab.run()  # also not at a start
    assert len(lab.state.records) == 3
    lab.order("resume", branch="main")
    lab.run()
    assert list(lab.verdicts().values()) == ["keep", "keep", "discard", "keep"]
    assert lab.state.branch("main").best_metric == 0.0
    check_books(lab)


def test_an_old_conflict_is_not_tried_again_once_a_keep_is_better(make_lab: MakeLab) -> None:
    lab = make_lab(
        change(Y=3),
        change(Y=2, NAP=0.6),
        branches={"main": {"slots": 2}},
        executor={"slots": 2},
        limits={"experiments": 3},
    )
    said = "e0003 does not merge with the head of main: left as it is"
    lab.run()
    assert lab.lines.count(said) == 1
    lab.run()
    assert lab.lines.count(said) == 1  # it is still better than all that was kept
    lab.write("edits.yaml", yaml.safe_dump([change(), change(), change(Y=1)]))
    lab.configure(limits={"experiments": 4})
    lab.run()
    assert lab.state.branch("main").best_metric == 1.0
    lab.run()
    assert said not in lab.lines


def test_an_edit_that_conflicts_with_another_branch_is_refused_and_told(make_lab: MakeLab) -> None:
    lab = make_lab(executor={"slots": 2})
    lab.scripts(main=[change(Y=3)], side=[change(Y=1)])
    lab.run()
    found = next(r for r in lab.state.experiments("side") if r.description == "Y 1")
    before = lab.state.records
    assert autoresearch(lab.root, "adopt", found.id, "--into", "main")[0] == 0
    lab.run()
    why = f"{found.id} does not merge with the head of main: left as it is"
    assert [event["refused"] for event in lab.events("order")] == [why]
    assert f"the last order was refused: adopt: {why}" in autoresearch(lab.root, "status")[1]
    assert lab.state.records == before
    lab.order("tell", branch="side", text="well done")
    lab.run()
    assert "refused" not in autoresearch(lab.root, "status")[1]
    check_books(lab)


def test_a_retired_branch_that_is_resumed_goes_on(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(Y=1), limits={"experiments": 1})
    lab.run()
    autoresearch(lab.root, "branch", "retire", "main")
    lab.configure(limits={"experiments": 2})
    assert lab.run() == "every branch is retired"
    autoresearch(lab.root, "branch", "resume", "main")
    lab.run()
    assert lab.state.branch("main").retired is None
    assert lab.state.branch("main").kept == 2


def test_a_researcher_sees_what_the_keeps_of_other_branches_changed(make_lab: MakeLab) -> None:
    lab = make_lab(executor={"slots": 2}, limits={"experiments": 3})
    lab.scripts(one=[change(X=1)], two=[])
    lab.run()
    repository = Repository(lab.root)
    records = Evidence(lab.state, repository, lab.folder / "runs", ("solution.py",))
    context = Context("0" * 40, {}, "", "cpu", 0, 1, records=records)
    told = brief.digest(lab.state, "two", context)
    assert "one: best 9.00000, 2 kept" in told
    assert "\n-X = 2.0\n+X = 1\n" in told
    assert "+X = 1" not in brief.digest(lab.state, "one", context)


# -- to other clones ------------------------------------------------------------------------------


def test_a_campaign_reads_the_same_in_another_clone(toy: Lab, tmp_path: Path) -> None:
    clone = ended.clone(toy, tmp_path / "clone")
    status, said = autoresearch(clone, "log")
    assert (status, "autoresearch fetch REMOTE" in said) == (2, True)
    assert autoresearch(clone, "fetch", "origin")[0] == 0
    collect(clone)
    for words in (["log"], ["show", "e0002"], ["show", "e0004"], ["diff", "e0003"], ["compare"]):
        here, there = (autoresearch(folder, *words) for folder in (toy.root, clone))
        assert here == there
        assert here[0] == 0
    folder = clone / "campaigns" / toy.name
    for name in ("results.tsv", "branches/main/results.tsv", "ledger.jsonl"):
        assert (folder / name).read_bytes() == (toy.folder / name).read_bytes()
    for commit in toy.git("rev-list", f"autoresearch/{toy.name}/main", "--not", "main").split():
        notes = [
            git(f, "notes", "--ref", "autoresearch", "show", commit) for f in (toy.root, clone)
        ]
        assert notes[0] == notes[1] != ""


def test_notes_carry_every_fact_of_a_run(toy: Lab) -> None:
    repository = Repository(toy.root)
    assert mirror.noted(repository) >= {r.commit for r in toy.state.experiments()}
    submitted = {e["submission"]["run"]: e["submission"] for e in toy.events("run_submitted")}
    for name in ("e0002", "e0003", "e0004"):  # kept, discarded, crashed
        text = git(
            toy.root, "notes", "--ref", "autoresearch", "show", toy.state.record(name).commit
        )
        (result,) = toy.state.results(name)
        facts = dict(row.split(": ", 1) for row in text.splitlines() if ": " in row)
        told = {"seed": "1", "executor": "local", "job": submitted[result.run]["job"]}
        told |= {"job_name": f"{toy.name}-{result.run}", "node": result.node}
        told |= {"budget.kind": "tokens", "cpu": result.details["cpu"]}
        told |= {"versions.python": result.details["versions"]["python"]}
        assert {key: facts.get(key) for key in told} == told
        times = {"started", "ended", "total_s", "budget.amount"}
        assert times <= facts.keys()
        assert facts.get("metric") == (f"{result.metric:.6g}" if result.ok else None)
        assert "by greedy" in text


def test_records_in_git_are_enough_where_the_campaigns_folder_is_gone(
    toy: Lab, tmp_path: Path
) -> None:
    clone = ended.clone(toy, tmp_path / "clone")
    (clone / "campaign.yaml").unlink()
    assert autoresearch(clone, "fetch", "origin", "--campaign", toy.name)[0] == 0
    for path in sorted((clone / "campaigns").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    status, said = autoresearch(clone, "log", "--campaign", toy.name)
    assert (status, said) == autoresearch(toy.root, "log")
    assert git(clone, "status", "--porcelain").split() == ["D", "campaign.yaml"]


def test_a_fetch_leaves_a_checked_out_branch_alone_and_brings_all_else(
    make_lab: MakeLab, tmp_path: Path
) -> None:
    lab = make_lab(change(X=1), change(Y=1), limits={"experiments": 2})
    lab.git("add", "campaign.yaml")
    lab.git("commit", "--quiet", "--message", "settings")
    lab.run()
    clone, branch = ended.clone(lab, tmp_path / "clone"), f"autoresearch/{lab.name}/main"
    assert autoresearch(clone, "fetch", "origin")[0] == 0
    git(clone, "checkout", "--quiet", branch)
    before = git(clone, "rev-parse", branch)
    lab.configure(limits={"experiments": 3})
    lab.run()
    assert autoresearch(lab.root, "push", str(tmp_path / "clone.git"))[0] == 0
    for _ in range(2):
        status, said = autoresearch(clone, "fetch", "origin", "--campaign", lab.name)
        assert (status, f"3 experiments, in {clone}" in said) == (0, True), said
        assert f"{branch} is checked out in {clone} and stays at {before[:10]}" in said
        assert git(clone, "rev-parse", branch) == before
        assert git(clone, "status", "--porcelain", "--untracked-files=no") == ""
    assert git(clone, "notes", "--ref", "autoresearch", "list").count("\n") == 3
    git(clone, "checkout", "--quiet", "main")
    assert "checked out" not in autoresearch(clone, "fetch", "origin")[1]
    assert git(clone, "rev-parse", branch) == lab.git("rev-parse", branch) + "\n"


def test_a_campaign_goes_on_in_another_clone_and_comes_back(
    make_lab: MakeLab, tmp_path: Path
) -> None:
    lab = make_lab(change(X=1), change(Y=2), limits={"experiments": 2})
    lab.git("add", "campaign.yaml", "edits.yaml")
    lab.git("commit", "--quiet", "--message", "settings")
    lab.run()
    clone = ended.clone(lab, tmp_path / "clone")
    assert autoresearch(clone, "fetch", "origin")[0] == 0
    settings = yaml.safe_load((clone / "campaign.yaml").read_text())
    (clone / "campaign.yaml").write_text(yaml.safe_dump(settings | {"limits": {"experiments": 3}}))
    assert autoresearch(clone, "run")[0] == 0
    assert autoresearch(clone, "push", "origin")[0] == 0
    bare = str(tmp_path / "clone.git")
    assert autoresearch(lab.root, "fetch", bare)[0] == 0
    assert [r.id for r in lab.state.experiments()] == ["e0001", "e0002", "e0003"]
    assert fold(lab.events()) == lab.state

    lab.configure(limits={"experiments": 3}, confirm={"runs": 1})
    lab.run()  # both go on: neither is overwritten
    (clone / "campaign.yaml").write_text(yaml.safe_dump(lab.settings | {"confirm": {"runs": 2}}))
    assert autoresearch(clone, "run")[0] == 0
    assert autoresearch(clone, "push", "origin")[0] == 0
    status, said = autoresearch(lab.root, "push", bare)
    assert (status, "autoresearch fetch" in said) == (1, True), said
    status, said = autoresearch(lab.root, "fetch", bare)
    assert (status, "went on both here and elsewhere" in said) == (1, True), said


def test_no_fetch_into_a_campaign_that_runs_here(toy: Lab, tmp_path: Path) -> None:
    clone = ended.clone(toy, tmp_path / "clone")
    assert autoresearch(clone, "fetch", "origin")[0] == 0
    with lease.acquire(clone / "campaigns" / toy.name):
        status, said = autoresearch(clone, "fetch", "origin")
        assert (status, f"is run here by process {os.getpid()}" in said) == (1, True), said
    assert autoresearch(clone, "fetch", "origin")[0] == 0


def test_a_push_while_it_runs_sends_all_that_was_decided(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(change(X=1), change(Y=1), limits={"experiments": 3})
    lab.git("add", "campaign.yaml")
    lab.git("commit", "--quiet", "--message", "settings")
    lab.run(when("e0002", lambda: ended.clone(lab, tmp_path / "clone")))
    clone = tmp_path / "clone"
    assert autoresearch(clone, "fetch", "origin")[0] == 0
    told = autoresearch(clone, "log")[1].splitlines()
    assert [line.split()[2] for line in told[-2:]] == ["keep", "keep"]
    assert git(clone, "notes", "--ref", "autoresearch", "list").count("\n") == 2
    check_books(lab)


def collect(folder: Path) -> None:
    git(folder, "reflog", "expire", "--expire=now", "--all")
    git(folder, "gc", "--quiet", "--prune=now")
    git(folder, "fsck", "--connectivity-only", "--strict")


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        env={**os.environ, **GIT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
