"""Any commit again: in a fresh clone, against what was recorded, with a verdict."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import ended
import pytest
import toylab
import yaml
from ended import autoresearch
from toylab import Lab, change

from containers import images, remote, seal
from jobs import config, container, lease, mirror, process, recorded, reproduce, submission, verdict
from jobs import lab as labs
from jobs.errors import UserError
from jobs.history import State
from jobs.model import Result, Submission, to_json
from jobs.repository import Repository
from jobs.settings import Executor as Settings
from jobs.verdict import Spread


@pytest.fixture
def fresh(toy: Lab, tmp_path: Path) -> Path:
    """A clone that has fetched the toy campaign, and no campaign folder of its own."""
    folder = ended.clone(toy, tmp_path / "clone")
    assert autoresearch(folder, "fetch", "origin")[0] == 0
    return folder


# -- in a fresh clone -----------------------------------------------------------------------------


def test_a_kept_a_discarded_and_a_crashed_experiment_come_again(toy: Lab, fresh: Path) -> None:
    ledger = (fresh / "campaigns" / toy.name / "ledger.jsonl").read_bytes()
    commit = toy.state.record("e0003").commit
    for name, words in (("main", "identical"), (commit[:10], "identical"), ("e0004", "crash")):
        status, said = autoresearch(fresh, "reproduce", name)
        assert (status, said.splitlines()[-1][:11]) == (0, "reproduced:"), said
        assert words in said
    assert (fresh / "campaigns" / toy.name / "ledger.jsonl").read_bytes() == ledger
    assert (fresh / "campaigns" / toy.name / "reproductions" / "e0002" / "1").is_dir()


def test_another_score_is_told_against_the_known_spread(fresh: Path) -> None:
    status, said = autoresearch(fresh, "reproduce", "e0005", "--times", "2", "--json")
    (told,) = json.loads(said[said.index("[") :])
    assert (status, told["verdict"]) == (1, "not reproduced")
    assert "since no spread is known" in told["why"]
    metrics = [run["metric"] for run in told["runs"]]
    assert len(set(metrics)) == 2
    assert told["difference"] == pytest.approx(sum(metrics) / 2 - told["original"]["metric"])
    report = json.loads((Path(told["folder"]) / "report.json").read_text())
    assert report == told


def test_every_keep_is_rerun_by_one_command(fresh: Path) -> None:
    status, said = autoresearch(fresh, "reproduce", "--all-keeps")
    assert status == 0
    assert [line[:5] for line in said.splitlines() if line.startswith("e0")] == ["e0001", "e0002"]


def test_a_baseline_runs_once_beside_all_keeps_and_one_that_fails_stops_no_other(
    make_lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab(change(X=1.5), change(X=1.2), change(X=1), limits={"experiments": 4})
    lab.git("add", "campaign.yaml")
    lab.git("commit", "--quiet", "--message", "settings")
    lab.run()
    folder = ended.clone(lab, tmp_path / "clone")
    assert autoresearch(folder, "fetch", "origin")[0] == 0
    started, submit = [], submission.LocalExecutor.submit

    def counted(self, run, *rest):
        started.append(run.experiment)
        if run.experiment == "e0003":
            raise UserError("this one cannot start")
        return submit(self, run, *rest)

    monkeypatch.setattr(submission.LocalExecutor, "submit", counted)
    status, said = autoresearch(folder, "reproduce", "--all-keeps", "--set", "Y=2")
    assert started == ["e0002", "e0001", "e0003", "e0004"]
    assert (status, "failed: this one cannot start" in said) == (1, True), said
    assert said.count("reproduced: gain over its baseline: +") == 2
    assert said.count("\n  baseline") == 2


def test_changed_constants_run_with_the_baseline_beside(fresh: Path) -> None:
    status, said = autoresearch(fresh, "reproduce", "e0003", "--set", "Y=4", "--json")
    (told,) = json.loads(said[said.index("[") :])
    assert told["changed"] == ["Y 4"]
    assert [run["metric"] for run in told["runs"]] == [25.0]  # (5 - 1)^2 + (4 - 1)^2
    assert [run["metric"] for run in told["baseline"]] == [10.0]  # X is 3 there
    assert (status, told["verdict"]) == (1, "not reproduced")
    assert "-15" in told["why"]
    assert autoresearch(fresh, "reproduce", "e0003", "--set", "Q=4")[0] == 2


def test_what_infrastructure_kills_is_tried_again_and_then_not_comparable(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(submission.LocalExecutor):
        """Its first runs die without a word."""

        left = 1

        def submit(self, run, name, run_dir, *rest):
            if Dying.left:
                Dying.left -= 1
                return Submission(run.id, "local", f"4194305@0@{process.boot_id()}")
            return super().submit(run, name, run_dir, *rest)

    monkeypatch.setattr(submission, "executor", Dying)
    assert autoresearch(fresh, "reproduce", "e0002")[0] == 0
    Dying.left = 9
    status, said = autoresearch(fresh, "reproduce", "e0002")
    assert (status, "not comparable: infrastructure ended it" in said) == (4, True), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_of_a_rerun_and_then_the_command(
    toy: Lab, fresh: Path, number: int
) -> None:
    clone = toy.at(fresh)
    words = ("reproduce", "--all-keeps", "--set", "NAP=60", "--times", "2")
    with toylab.ended(clone.start(*words)) as process:
        again = f"{toy.name}/reproductions/*/*/runs/*/*/claim.json"
        toylab.eventually(lambda: list(fresh.glob(f"campaigns/{again}")))
        process.send_signal(number)
        said = process.communicate(timeout=30)[0]
    assert (process.returncode, "interrupted: its runs are ended" in said) == (130, True), said
    toylab.eventually(lambda: not clone.strays(), within=2)
    assert len(list(fresh.glob(f"campaigns/{again}"))) == 1  # and no other began


# -- where it runs --------------------------------------------------------------------------------


def test_beside_the_campaigns_own_runs_it_would_share_a_gpu_and_is_refused(
    fresh: Path, toy: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lease.acquire(fresh / "campaigns" / toy.name):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        status, said = autoresearch(fresh, "reproduce", "e0002")
        assert (status, f"is run here by process {os.getpid()}" in said) == (2, True), said
        assert "autoresearch stop, reproduce, autoresearch run" in said
        assert not list(fresh.glob("campaigns/*/reproductions"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        status, said = autoresearch(fresh, "reproduce", "e0002")
        assert (status, "its runs and these slow each other down" in said) == (0, True), said
    assert "slow" not in autoresearch(fresh, "reproduce", "e0002")[1]


class Elsewhere(submission.LocalExecutor):
    """Takes this machine for a cluster, and tells what was asked of it."""

    asked: list[tuple[Settings, Mapping[str, str]]]

    def __init__(self, settings: Settings, campaign_dir: Path) -> None:
        super().__init__(settings, campaign_dir)
        self.settings = settings

    def submit(self, run, name, run_dir, limit_s, avoid, place):
        self.asked.append((self.settings, place))
        return super().submit(run, name, run_dir, limit_s, avoid, place)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, Mapping[str, str]]]:
    monkeypatch.setattr(submission, "executor", Elsewhere)
    monkeypatch.setattr(submission, "require", lambda *asked: None)
    monkeypatch.setattr(Elsewhere, "asked", [], raising=False)
    return Elsewhere.asked


def test_an_allocation_holds_no_more_than_the_reruns_fill(
    toy: Lab, fresh: Path, asked: list
) -> None:
    held = {"kind": "allocation", "nodes": 3, "slots": 6, "poll_seconds": 0.2}
    (fresh / "campaign.yaml").write_text(yaml.safe_dump(toy.settings | {"executor": held}))
    for words, wanted in (((), (1, 1)), (("--times", "3"), (2, 3)), (("--times", "9"), (3, 6))):
        asked.clear()
        assert autoresearch(fresh, "reproduce", "e0002", *words)[0] == 0
        assert {(s.nodes, s.slots) for s, _ in asked} == {wanted}


def test_it_asks_for_its_branchs_feature_and_gpu_and_not_for_its_node(
    make_lab, asked: list
) -> None:
    place = {"node": "n1", "constraint": "fast", "gpu": "h100"}
    slurm = {"kind": "slurm", "poll_seconds": 0.2}
    lab = make_lab(branches={"main": place}, executor=slurm, limits={"experiments": 1})
    lab.run()
    for words in ((), ("--executor", "local")):
        assert autoresearch(lab.root, "reproduce", "e0001", *words)[0] == 0
    assert [found for _, found in asked] == [place, {"constraint": "fast", "gpu": "h100"}, {}]


# -- what is not an experiment, not here, not unique -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HEAD", "which is no experiment's"),
        ("e0099", "it has experiments e0001 to e0005"),
        ("nonsense", "is no experiment of campaign"),
        ("0000", "is no experiment of campaign"),
    ],
)
def test_what_is_no_experiment_is_told_in_words(fresh: Path, name: str, words: str) -> None:
    status, said = autoresearch(fresh, "reproduce", name)
    assert (status, words in said) == (2, True), said


def test_without_its_records_an_experiments_commit_says_what_to_fetch(
    toy: Lab, tmp_path: Path
) -> None:
    folder = ended.clone(toy, tmp_path / "clone")
    status, said = autoresearch(folder, "reproduce", "e0002")
    assert (status, "autoresearch fetch REMOTE" in said) == (2, True), said
    refs = [f"refs/autoresearch/{toy.name}/{name}" for name in ("e0002", "records")]
    fetch = ["git", "-C", str(folder), "fetch", "--quiet", "origin"]
    subprocess.run([*fetch, *(f"{ref}:{ref}" for ref in refs)], check=True)
    assert autoresearch(folder, "reproduce", "e0002")[0] == 0
    status, said = autoresearch(folder, "reproduce", "e0003")
    assert (status, "of e0003 is not in this clone" in said) == (2, True)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (("--times", "0"), "'0' is not a whole number from 1"),
        (("--times", "-2"), "'-2' is not a whole number from 1"),
        (("--times", "2.5"), "'2.5' is not a whole number from 1"),
        (("--budget", "-5"), "'-5' is not a number above 0"),
        (("--budget", "nan"), "'nan' is not a number above 0"),
        (("--budget", "inf"), "'inf' is not a number above 0"),
        (("--budget", "5"), "a task of your own has no --budget"),
        (("--scale", "small"), "a task of your own has no --budget, --scale"),
        (("--scale", "huge"), "invalid choice: 'huge'"),
        (("--data", "/tmp"), "or --data"),
        (("--image", "cpu"), "it ran in no image"),
        (("--executor", "cloud"), "invalid choice: 'cloud'"),
        (("--set", "X=nan"), "write NAME=NUMBER"),
        (("--set", "X"), "write NAME=NUMBER"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_before_anything_starts(
    fresh: Path, wish: tuple[str, ...], words: str
) -> None:
    status, said = autoresearch(fresh, "reproduce", "e0002", *wish)
    assert (status, words in said) == (2, True), said
    assert not list(fresh.glob("campaigns/*/reproductions"))


# -- the settings it ran with ----------------------------------------------------------------------


@pytest.fixture
def second(tiny: Lab) -> recorded.Original:
    """e0002 of the campaign with real runs."""
    clone = recorded.Clone(tiny.state, Repository(tiny.root), tiny.folder)
    return recorded.original(clone, tiny.state.record("e0002"))


def test_a_configured_wall_limit_holds_for_the_configured_length_alone(
    second: recorded.Original,
) -> None:
    run = dataclasses.replace(second.config.run, wall_limit=60.0)
    one = dataclasses.replace(second, config=dataclasses.replace(second.config, run=run))
    for wish, limit in (({}, 60.0), ({"budget": 2.0**20}, None), ({"scale": "small"}, None)):
        assert reproduce.Wish(**wish).settings(one, None).run.wall_limit == limit


def test_threads_and_budget_are_those_of_its_run_though_the_settings_changed_since(
    make_lab,
) -> None:
    lab = make_lab(change(X=1), executor={"threads": 3}, limits={"experiments": 1})
    lab.configure(budget={"tokens": 7000})
    lab.run()
    lab.configure(executor={"threads": 1, "slots": 2}, limits={"experiments": 2})
    lab.run()
    lab.configure(budget={"tokens": 5000})
    here = config.load(lab.root / "campaign.yaml")
    clone = recorded.Clone(lab.state, Repository(lab.root), lab.folder, here)
    for name, threads in (("e0001", 3), ("e0002", 1)):
        found = recorded.original(clone, lab.state.record(name)).settings(here)
        assert (found.executor.threads, found.budget.tokens) == (threads, 7000)
        assert found.executor.slots == 2  # where it runs is this place's


def test_a_gain_is_looked_for_at_another_scale_too(tiny: Lab, tmp_path: Path) -> None:
    folder, data = ended.clone(tiny, tmp_path / "clone"), tmp_path / "data"
    assert autoresearch(folder, "fetch", "origin")[0] == 0
    shutil.copytree(ended.runs.data_folder(), data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["scale"]["name"] = "small"
    (data / "manifest.json").write_text(json.dumps(manifest))
    wish = ("--scale", "small", "--budget", "1", "--data", str(data), "--json")
    status, said = autoresearch(folder, "reproduce", "e0002", *wish)
    (told,) = json.loads(said[said.index("[") :])
    assert (status, told["verdict"]) == (0, "reproduced"), said
    assert told["changed"] == ["budget 1.0", "scale small"]
    for run in Path(told["folder"]).glob("runs/*/*/result.json"):
        result = json.loads(run.read_text())
        assert (result["scale"], result["budget"]) == ("small", {"kind": "wall", "amount": 1.0})
    assert told["baseline"][0]["metric"] > told["runs"][0]["metric"]


# -- what must be the same ------------------------------------------------------------------------


def test_a_byte_in_the_evaluator_is_refused_with_both_hashes(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "trainer"
    shutil.copytree(labs.TRAINER, changed)
    (changed / "prepare.py").write_text((changed / "prepare.py").read_text() + "#")
    monkeypatch.setattr(labs, "TRAINER", changed)
    status, said = autoresearch(fresh, "reproduce", "e0002")
    assert status == 2
    assert said.count("sha256 ") == 2
    assert "another evaluator: recorded is" in said


def test_real_runs_come_again_and_changed_data_is_refused(tiny: Lab, tmp_path: Path) -> None:
    folder = ended.clone(tiny, tmp_path / "clone")
    assert autoresearch(folder, "fetch", "origin")[0] == 0
    status, said = autoresearch(folder, "reproduce", "e0002")
    assert (status, "reproduced: identical" in said) == (0, True), said

    status, said = autoresearch(folder, "reproduce", "e0002", "--budget", "0.5")
    assert (status, "tokens are whole" in said) == (2, True), said
    status, said = autoresearch(folder, "reproduce", "e0002", "--budget", "2047")
    assert (status, "a batch of scale cpu is 2048 tokens" in said) == (2, True), said
    status, said = autoresearch(folder, "reproduce", "e0002", "--budget", "4096", "--json")
    (told,) = json.loads(said[said.index("[") :])
    assert (status, told["changed"], told["verdict"]) == (0, ["budget 4096.0"], "reproduced")
    assert told["baseline"][0]["metric"] > told["runs"][0]["metric"]

    data = tmp_path / "data"
    shutil.copytree(ended.runs.data_folder(), data)
    shard = next(data.glob("shards/train*.parquet"), None) or next(data.glob("shards/*.parquet"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    status, said = autoresearch(folder, "reproduce", "e0002", "--data", str(data))
    assert (status, f"{shard.name} has sha256" in said) == (2, True)
    assert "its manifest says" in said

    manifest = data / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    status, said = autoresearch(folder, "reproduce", "e0002", "--data", str(data))
    assert status == 2
    assert "another data manifest in" in said
    assert said.count("sha256 ") == 2
    none = tmp_path / "none"
    status, said = autoresearch(folder, "reproduce", "e0002", "--data", str(none))
    command = f"autoresearch prepare -- --corpus stdlib --scale cpu --data {none}"
    assert (status, command in said) == (2, True), said
    recorded = hashlib.sha256((ended.runs.data_folder() / "manifest.json").read_bytes())
    assert f"its manifest must have sha256 {recorded.hexdigest()}" in said
    record = f"data-{recorded.hexdigest()[:16]}.json"
    repository = Repository(folder)
    mirror.save_records(repository, tiny.name, {record: b'{"training_shards": 7}'})
    (folder / "campaign.yaml").unlink()
    words = ("reproduce", "e0002", "--campaign", tiny.name, "--data", str(none))
    status, said = autoresearch(folder, *words)
    command = f"prepare --campaign {tiny.name} -- --corpus stdlib --scale cpu --shards 7 --data"
    assert (status, command in said) == (2, True), said


# -- the verdict ----------------------------------------------------------------------------------

THEN = Result("e0001-s1-a1", "ok", "", 2.0, gpu="NVIDIA H100 80GB HBM3")
CRASH = Result("e0001-s1-a1", "crash", "exit 1: IndexError: 7 is out of 0x7f12")


def metrics(*scores: float) -> list[Result]:
    return [dataclasses.replace(THEN, metric=score) for score in scores]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (THEN, metrics(2.0), "reproduced: identical"),
        (THEN, metrics(2.05, 1.95), "reproduced: within 0.1"),
        (THEN, metrics(2.05, 1.8), "not reproduced: 1 of 2 runs: off by 0.2"),
        (THEN, [CRASH], "not reproduced: it was ok (), it is crash"),
        (CRASH, metrics(2.0), "not reproduced: it was crash"),
        (
            CRASH,
            [dataclasses.replace(CRASH, reason="exit 1: IndexError: 9 is out of 0x7f34")],
            "reproduced: it ends",
        ),
        (
            CRASH,
            [dataclasses.replace(CRASH, reason="exit 1: KeyError: 7")],
            "not reproduced: it was",
        ),
        (THEN, [Result("r", "infrastructure", "node died")], "not comparable: infrastructure"),
    ],
)
def test_a_score_must_come_within_the_spread_and_a_crash_must_crash_alike(
    old: Result, new: list[Result], expected: str
) -> None:
    word, why = verdict.judge(old, new, Spread(0.1, "five times the spread"), [])
    assert f"{word}: {why}".startswith(expected)


def test_another_gpu_or_without_one_another_cpu_is_not_comparable() -> None:
    cpu = {"cpu": "Xeon", "versions": {"python": "3.11.2", "torch": "2.13"}}
    bare = dataclasses.replace(THEN, gpu=None, details=cpu)
    other = dataclasses.replace(THEN, gpu="NVIDIA A100")
    assert verdict.differences(THEN, other, True) == [f"GPU was {THEN.gpu}, is NVIDIA A100"]
    assert verdict.differences(bare, THEN, True) == [f"GPU was none, is {THEN.gpu}"]
    moved = dataclasses.replace(bare, details={"cpu": "EPYC", "versions": {"python": "3.12.0"}})
    assert verdict.differences(bare, moved, True) == ["CPU was Xeon, is EPYC"]
    told = verdict.differences(bare, moved, False)
    assert told == ["CPU was Xeon, is EPYC", "python was 3.11.2, is 3.12.0"]
    assert verdict.judge(THEN, metrics(2.0), Spread(0, ""), told)[0] == "not comparable"


def test_a_budget_of_tokens_that_the_clock_cut_is_no_measure() -> None:
    tokens, wall = ({"budget": {"kind": kind, "amount": 9.0}} for kind in ("tokens", "wall"))
    whole, cut = (THEN, dataclasses.replace(THEN, details=tokens | {"closed_by": "wall"}))
    assert verdict.differences(whole, cut, True) == [
        "its feed is closed by the time ceiling, short of tokens"
    ]
    assert "its feed was closed" in verdict.differences(cut, whole, True)[0]
    timed = dataclasses.replace(THEN, details=wall | {"closed_by": "wall"})
    assert verdict.differences(timed, timed, True) == []


@pytest.mark.parametrize(
    ("new", "first", "expected"),
    [
        (metrics(1.8), metrics(2.0), "reproduced: gain over its baseline: +0.2"),
        (metrics(2.2), metrics(2.0), "not reproduced: gain over its baseline: -0.2"),
        (metrics(1.95), metrics(2.0), "not comparable: gain over its baseline: +0.05, within 0.1"),
        (metrics(2.05), metrics(2.0), "not comparable: gain over its baseline: -0.05, within 0.1"),
        (metrics(1.8), [CRASH], "not comparable: without a score of its baseline"),
        (metrics(1.8), [], "not comparable: without a score of its baseline"),
        ([CRASH], metrics(2.0), "not reproduced: its baseline has a score, it ends as crash"),
        (
            [dataclasses.replace(THEN, gpu="NVIDIA A100", metric=1.8)],
            metrics(2.0),
            "not comparable: beside its baseline's run, GPU was",
        ),
        (
            [*metrics(1.8), Result("r", "infrastructure", "node died")],
            metrics(2.0),
            "not comparable: infrastructure ended r",
        ),
    ],
)
def test_a_gain_elsewhere_must_exceed_the_noise(
    new: list[Result], first: list[Result], expected: str
) -> None:
    noise = Spread(0.1, "twice the spread")
    word, why = verdict.transfer("minimise", new, first, noise, True)
    assert f"{word}: {why}".startswith(expected)


def test_a_gain_is_held_against_the_luck_of_seeds_where_that_is_known(toy: Lab) -> None:
    low, high = metrics(2.0, 2.2)
    one_seed = [("screen", 1, low), ("screen", 1, high)]
    seeds = [("confirm", 2, low), ("confirm", 3, high)]
    known = spread(toy.state, THEN, *one_seed, *seeds, seeds=True)
    assert (known.tolerance, "of seeds" in known.words) == (pytest.approx(2 * 0.02**0.5), True)
    assert "on one seed" in spread(toy.state, THEN, *one_seed, seeds=True).words


def spread(
    state: State, old: Result, *runs: tuple[str, int, Result], seeds: bool = False
) -> Spread:
    """What is known where e0002 had these runs: (purpose, seed, result)."""
    first = state.record("e0002").runs[0]
    again = tuple(
        first._replace(metric=r.metric, seed=seed, purpose=purpose, place={"result": to_json(r)})
        for purpose, seed, r in runs
    )
    records = state.records.thaw()
    records.replace(1, state.record("e0002")._replace(runs=again))
    return verdict.spread(dataclasses.replace(state, records=records), old, True, seeds)


def test_the_spread_is_of_one_seed_else_of_seeds_else_our_own(toy: Lab) -> None:
    own = spread(toy.state, THEN)
    assert (own.tolerance, "no spread" in own.words) == (pytest.approx(0.004), True)
    low, high = metrics(2.0, 2.2)
    known = spread(toy.state, THEN, ("confirm", 2, low), ("confirm", 3, high))
    assert (known.tolerance, "of seeds" in known.words) == (pytest.approx(2 * 0.02**0.5), True)
    known = spread(toy.state, THEN, ("screen", 1, low), ("screen", 1, high))
    assert (known.tolerance, "on one" in known.words) == (pytest.approx(5 * 0.02**0.5), True)
    assert spread(toy.state, THEN, ("screen", 1, low), ("screen", 1, low)).tolerance == 1e-6


@pytest.mark.parametrize(
    "other",
    [
        {"gpu": "NVIDIA A100"},
        {"details": {"budget": {"kind": "wall", "amount": 60.0}}},
        {"details": {"scale": "small"}},
        {"details": {"threads": 4}},
    ],
)
def test_runs_made_in_another_way_are_no_measure(toy: Lab, other: dict) -> None:
    low, high = metrics(2.0, 2.2)
    runs = [("screen", 1, low), ("screen", 1, dataclasses.replace(high, **other))]
    assert "no spread" in spread(toy.state, THEN, *runs).words
    runs += [("screen", 1, metrics(2.01)[0])]
    assert spread(toy.state, THEN, *runs).tolerance == pytest.approx(5 * 0.00005**0.5)


# -- the image ------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "images"


def put(store: Path, content: str, tag: str, *packages: str) -> images.Image:
    """A file in the store that passes for an image, with our evaluator sealed in it."""
    store.mkdir(exist_ok=True)
    file = store / "draft"
    file.write_text(content)
    labels = {"autoresearch.evaluator.sha256": seal.evaluator_sha256(labs.TRAINER)}
    labels["autoresearch.protocol"] = "1"
    facts = ("Bootstrap: none", labels, packages or (content,), "a test")
    bare = images.Image(images.sha256(file), "", 0, 0, *facts)
    made = images.add(store, file, bare)
    images.tag(store, made.sha256, tag)
    return made


def sought(image: images.Image, address: str | None = None) -> tuple[str, list[str]]:
    notes: list[str] = []
    ref = "refs/autoresearch/night/records"
    store = Path(image.path).parent
    return container.recorded(store, image.sha256, "cpu", address, ref, notes.append), notes


def test_the_recorded_sha256_decides_and_a_moved_tag_is_told(store: Path) -> None:
    first = put(store, "first", "cpu")
    assert sought(first) == (first.sha256, [])
    second = put(store, "second", "cpu")
    found, (note,) = sought(first)
    assert found == first.sha256
    assert note.startswith(f"the tag cpu means sha256 {second.sha256} now")


def test_an_image_that_is_gone_is_pulled_by_its_digest_or_its_like_is_built(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = put(store, "first", "cpu")
    Path(gone.path).unlink()
    name = f"refs/autoresearch/night/records:image-{gone.sha256[:16]}.def"
    with pytest.raises(images.ImageError, match=f"git show {name} >again.def"):
        sought(gone)

    def pull(store: Path, uri: str, tag: str) -> images.Image:
        return put(store, "first" if uri.endswith(":1") else "other", tag)

    monkeypatch.setattr(remote, "pull", pull)
    with pytest.raises(images.ImageError, match=f"recorded is sha256 {gone.sha256}"):
        sought(gone, "oras://host/name@sha256:0")
    address = "oras://host/name@sha256:1"
    assert sought(gone, address) == (gone.sha256, [f"image pulled by its digest from {address}"])
    assert images.tags(store)["cpu"] == gone.sha256


def test_records_keep_what_an_image_was_and_where_it_may_be_had(store: Path) -> None:
    image = put(store, "first", "cpu")
    assert container.pinned(image) is None
    image = images.note_registry(store, image, "oras://host/name", "sha256:1")
    assert container.pinned(image) == "oras://host/name@sha256:1"
    kept = container.records(image)
    assert kept[f"image-{image.sha256[:16]}.def"] == b"Bootstrap: none"
    assert json.loads(kept[f"image-{image.sha256[:16]}.json"])["packages"] == ["first"]
    assert container.records(None) == {}


def test_a_rebuilt_image_in_place_of_one_that_is_gone_is_flagged_and_its_packages_compared(
    fresh: Path, toy: Lab, store: Path
) -> None:
    here = config.parse({"campaign": toy.name, "executor": {"images": str(store)}})
    clone = recorded.Clone(toy.state, Repository(fresh), fresh / "campaigns" / toy.name, here)
    gone = put(store, "first", "cpu", "numpy 2.4", "torch 2.13")
    Path(gone.path).unlink()
    one = recorded.original(clone, toy.state.record("e0002"))
    trailers = {"Container-Tag": "cpu", "Container-SHA256": gone.sha256}
    one = dataclasses.replace(one, trailers={**one.trailers, **trailers})

    def beside(tag: str | None) -> tuple[str, bool]:
        wish = reproduce.Wish(image=tag)
        site = reproduce.checked_site(one, wish, wish.settings(one, here), clone, print)
        return reproduce._other_image(one, site, clone)

    with pytest.raises(UserError, match="build its like"):
        beside(None)
    same = put(store, "second", "again", "numpy 2.4", "torch 2.13")
    put(store, "third", "newer", "numpy 2.4", "torch 2.14")
    flag = f"image was {gone.sha256}, is {same.sha256}: "
    # of an image that nothing is recorded of, nothing is known to be the same
    assert beside("again") == (f"{flag}2 packages differ, numpy 2.4, torch 2.13", False)
    mirror.save_records(clone.repository, toy.name, container.records(gone))
    assert beside("again") == (f"{flag}0 packages differ", True)
    told, alike = beside("newer")
    assert (told.partition(": ")[2], alike) == ("2 packages differ, torch 2.13, torch 2.14", False)
