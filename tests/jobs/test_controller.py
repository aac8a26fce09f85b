"""The loop end to end: what is kept, what is discarded, what trouble does, how it ends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from toylab import SOLUTION, Lab, change, check_books, ended, eventually, when

from jobs import config, controller, mirror, night, submission
from jobs.errors import Paused, UserError
from jobs.repository import Repository

MakeLab = Callable[..., Lab]


# -- what is kept ---------------------------------------------------------------------------------


def test_better_is_kept_worse_is_not_and_a_crash_has_no_value(make_lab: MakeLab) -> None:
    broken = {"description": "broken", "replace": [["NAP = 0.0", "NAP = None"]]}
    lab = make_lab(change(Y=2), change(X=5), broken, change(X=1), limits={"experiments": 5})
    assert lab.run() == "5 experiments done, as limits.experiments says"
    assert lab.verdicts() == {
        "baseline": "keep",
        "Y 2": "keep",
        "X 5": "discard",
        "broken": "discard",
        "X 1": "keep",
    }
    assert [r.id for r in lab.state.chain("main")] == ["e0001", "e0002", "e0005"]
    assert lab.state.branch("main").best_metric == 1.0
    rows = [row.split("\t") for row in (lab.folder / "results.tsv").read_text().splitlines()]
    assert [(row[1], row[3]) for row in rows[1:]] == [
        ("10", "keep"),
        ("2", "keep"),
        ("17", "discard"),
        ("", "crash"),
        ("1", "keep"),
    ]
    check_books(lab)


def test_every_experiment_is_a_commit_on_the_head_it_was_made_from(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(X=9), change(Y=1), limits={"experiments": 4})
    lab.run()
    start, chain = lab.git("rev-parse", "main"), lab.state.chain("main")
    assert lab.git("rev-parse", f"{chain[0].commit}^", f"{chain[0].commit}^{{tree}}").split() == [
        start,
        lab.git("rev-parse", "main^{tree}"),
    ]
    assert [r.base for r in chain] == [start, chain[0].commit, chain[1].commit]
    assert lab.state.record("e0003").base == chain[1].commit
    assert lab.git("log", "--format=%s", f"autoresearch/{lab.name}/main").splitlines() == [
        "Y 1",
        "X 1",
        "baseline",
        "start",
    ]


def test_first_and_best_are_rerun_on_fresh_seeds_at_the_end(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(X=8), limits={"experiments": 3}, confirm={"runs": 2})
    lab.run()
    runs = [e["run"] for e in lab.events("run_intended")]
    assert [(r["experiment"], r["seed"]) for r in runs] == [
        ("e0001", 1),
        ("e0002", 1),
        ("e0003", 1),
        ("e0001", 2),
        ("e0001", 3),
        ("e0002", 2),
        ("e0002", 3),
    ]
    for run in lab.state.record("e0002").runs:  # run k has seed k
        result = lab.state.result(run)
        assert result.details["seed"] == run.seed
        assert f"-s{run.seed}-" in result.run
    assert "rerunning first and best on 2 fresh seeds each" in lab.lines
    check_books(lab)


def test_starting_a_finished_campaign_again_measures_nothing_twice(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 2}, confirm={"runs": 1})
    lab.run()
    runs = len(lab.events("run_intended"))
    assert lab.run() == "2 experiments done, as limits.experiments says"
    assert len(lab.events("run_intended")) == runs
    lab.configure(limits={"experiments": 3})
    assert "no researcher has anything more to propose" in lab.run()
    check_books(lab)


# -- the user's own -------------------------------------------------------------------------------


def test_checkout_index_branch_and_uncommitted_work_stay_as_they_are(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(X=7), limits={"experiments": 3})
    lab.write("solution.py", SOLUTION + "# unfinished\n")
    lab.write("staged.py", "staged = True\n")
    lab.write("untracked.txt", "mine\n")
    lab.git("add", "staged.py")
    lab.git("stash", "push", "--quiet", "--include-untracked", "--", "untracked.txt")
    before = (lab.root / ".git" / "index").read_bytes(), lab.refs(), lab.git("status", "--short")
    lab.run()
    refs = {k: v for k, v in lab.refs().items() if "autoresearch" not in k}
    after = (lab.root / ".git" / "index").read_bytes(), refs, lab.git("status", "--short")
    assert after == before
    assert (lab.root / "solution.py").read_text() == SOLUTION + "# unfinished\n"
    assert (lab.root / ".git" / "HEAD").read_text() == "ref: refs/heads/main\n"
    assert "unfinished" not in lab.git("show", f"autoresearch/{lab.name}/main:solution.py")
    assert any("2 uncommitted changes" in line for line in lab.lines)


def test_a_branch_that_the_user_checked_out_is_not_moved_under_them(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(Y=1), limits={"experiments": 3})
    branch = f"autoresearch/{lab.name}/main"
    lab.run(when("e0002", lambda: lab.git("checkout", "--quiet", branch)))
    assert any(f"{branch} is checked out" in line for line in lab.lines)
    assert lab.git("status", "--short", "--untracked-files=no") == ""
    lab.git("checkout", "--quiet", "main")
    lab.run()
    check_books(lab)


# -- several at once ------------------------------------------------------------------------------


def parallel(make_lab: MakeLab, *edits: dict[str, Any]) -> Lab:
    lab = make_lab(
        *edits,
        executor={"slots": 2},
        limits={"experiments": 1 + len(edits)},
    )
    lab.run()
    order = [
        (e["event"], (e.get("run") or e.get("result"))["experiment" if "run" in e else "run"][:5])
        for e in lab.events("run_intended", "run_ended")
    ]
    assert order.index(("run_intended", "e0003")) < order.index(("run_ended", "e0002"))
    return lab


def test_what_was_made_on_an_older_head_is_carried_over_and_measured_again(
    make_lab: MakeLab,
) -> None:
    lab = parallel(make_lab, change(X=1), change(Y=1, NAP=0.6))
    assert lab.verdicts() == {
        "baseline": "keep",
        "X 1": "keep",
        "Y 1, NAP 0.6": "discard",
        "rebased e0003: Y 1, NAP 0.6": "keep",
    }
    state = lab.state
    assert state.decision("e0003").reason.startswith("stale-base: better than 9 by 8")
    assert state.record("e0004").base == state.record("e0002").commit
    assert state.branch("main").best_metric == 0.0  # both edits are in it
    message = lab.git("log", "-1", "--format=%B", state.record("e0004").commit)
    assert "Rebased-From: e0003" in message
    check_books(lab)


def test_two_edits_of_the_same_line_conflict_and_the_later_one_is_discarded(
    make_lab: MakeLab,
) -> None:
    lab = parallel(make_lab, change(Y=3), change(Y=1, NAP=0.6))
    assert lab.verdicts() == {"baseline": "keep", "Y 3": "keep", "Y 1, NAP 0.6": "discard"}
    assert "e0003 does not merge with the head of main: left as it is" in lab.lines
    check_books(lab)


def test_two_branches_share_the_slots_and_go_their_own_way(make_lab: MakeLab) -> None:
    lab = make_lab(executor={"slots": 2}, limits={"experiments": 6}, confirm={"runs": 1})
    lab.scripts(one=[change(X=1), change(Y=1)], two=[change(Y=2), change(X=0)])
    lab.run()
    state = lab.state
    assert [state.branch(b).experiments for b in ("one", "two")] == [3, 3]
    assert [state.branch(b).best_metric for b in ("one", "two")] == [0.0, 2.0]
    assert not set(state.branch("one").kept_ids) & set(state.branch("two").kept_ids)
    assert (lab.folder / "branches" / "two" / "results.tsv").read_text().count("\n") == 4
    check_books(lab)


def test_campaigns_of_one_repository_do_not_disturb_each_other(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(Y=1), limits={"experiments": 3}, confirm={"runs": 1})
    both = [lab.at(lab.root, lab.name + letter) for letter in "ab"]
    for one in both:
        one.write(f"{one.name}.yaml", yaml.safe_dump(lab.settings | {"campaign": one.name}))
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(ended(one.start("run", f"{one.name}.yaml"))) for one in both]
        for controller in started:
            said, _ = controller.communicate(timeout=60)
            assert controller.returncode == 0, said
    for one in both:
        assert one.state.branch("main").best_metric == 0.0
        check_books(one)


def test_a_machine_whose_gpus_are_hidden_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for visible, seen in ((None, ["0"]), ("", []), ("4,7", ["4", "7"])):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert submission.visible_gpus() == seen


def test_each_run_has_a_gpu_of_its_own_also_after_a_restart(make_lab: MakeLab) -> None:
    lab = make_lab(
        change(X=1, NAP=2),
        *(change(Y=y, NAP=0.1) for y in range(5, 9)),
        executor={"slots": 2},
        branches={"main": {"slots": 2}},
        limits={"experiments": 6},
    )
    cards = {"CUDA_VISIBLE_DEVICES": "4,7"}
    status, _ = lab.call(**cards, AUTORESEARCH_KILL_AT="run.submit:after:2")
    assert status == -signal.SIGKILL
    assert lab.call(**cards)[0] == 0
    results = [lab.state.results(r.id)[0] for r in lab.state.experiments()]
    spans = [(r.started or "", r.ended or "", r.details["device"]) for r in results]
    pairs = combinations(spans, 2)
    together = [(a, b) for a, b in pairs if a[0] < b[1] and b[0] < a[1]]
    assert together
    assert all(a[2] != b[2] for a, b in together)
    check_books(lab)


# -- trouble --------------------------------------------------------------------------------------


def test_a_failing_baseline_pauses_in_words_and_a_mended_commit_goes_on(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 3})
    lab.write("solution.py", "X = 1 / 0\n")
    lab.git("commit", "--quiet", "--all", "--message", "broken")
    with pytest.raises(Paused, match="branch main cannot go on: its baseline e0001 has") as pause:
        lab.run()
    assert "ZeroDivisionError" in str(pause.value)
    assert lab.state.paused["remedy"].startswith("See `autoresearch log`")
    lab.write("solution.py", SOLUTION)
    lab.git("commit", "--quiet", "--all", "--message", "mended")
    lab.run()
    assert lab.state.branch("main").baseline == "e0002"
    assert lab.verdicts() == {"baseline": "keep", "X 1": "keep"}
    check_books(lab)


def test_a_branch_without_a_baseline_does_not_hold_up_the_others(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 3})
    lab.write("solution.py", "X = 1 / 0\n")
    lab.git("commit", "--quiet", "--all", "--message", "broken")
    lab.configure(branches={"main": {"start": "HEAD~"}, "broken": {}})
    lab.run()
    state = lab.state
    assert state.branch("broken").paused.startswith("its baseline e0001 has no score")
    assert state.branch("main").best_metric == 9.0
    check_books(lab)


def test_three_experiments_parked_in_a_row_pause_the_campaign(make_lab: MakeLab) -> None:
    lab = make_lab(*(change(X=-x) for x in (1, 2, 3, 4)))
    with pytest.raises(Paused, match="3 experiments in a row were parked"):
        lab.run()
    assert [r.verdict for r in lab.state.experiments()] == ["keep", "parked", "parked", "parked"]
    assert [r.attempt for r in lab.state.record("e0002").runs] == [1, 2]
    assert lab.state.paused
    lab.run()
    check_books(lab)


def test_a_run_whose_processes_are_killed_is_tried_again(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1, NAP=0.7), limits={"experiments": 2})

    def shoot() -> None:
        claim = lab.folder / "runs/e0002/s1-a1/claim.json"
        eventually(claim.exists)
        os.kill(int(next(iter(lab.state.open_runs.values())).submission.job.split("@")[0]), 9)

    shooter = threading.Thread(target=shoot)
    lab.run(when("e0001", shooter.start))
    shooter.join()
    runs = lab.state.record("e0002").runs
    assert [(r.attempt, r.status) for r in runs] == [(1, "infrastructure"), (2, "ok")]
    assert lab.state.record("e0002").verdict == "keep"
    assert not lab.strays()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_hangs_is_ended_and_tried_again(make_lab: MakeLab, damaged: bool) -> None:
    lab = make_lab(change(X=1, NAP=0.7), limits={"experiments": 2})

    def freeze() -> None:
        claim = lab.folder / "runs/e0002/s1-a1/claim.json"
        eventually(claim.exists)
        os.kill(int(json.loads(claim.read_text())["process"].split("@")[0]), signal.SIGSTOP)
        if damaged:
            claim.with_name("task.json").write_text("{")
        os.utime(claim, (0, 0))  # hours ago

    freezer = threading.Thread(target=freeze)
    lab.run(when("e0001", freezer.start))
    freezer.join()
    results = lab.state.results("e0002")
    assert [r.status for r in results] == ["infrastructure", "ok"]
    assert "beyond every limit" in results[0].reason
    check_books(lab)


def test_a_run_beyond_its_wall_limit_is_a_timeout(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1, NAP=60), limits={"experiments": 2}, run={"wall_limit": 2.0})
    lab.run()
    (result,) = lab.state.results("e0002")
    assert result.status == "timeout"
    assert lab.verdicts() == {"baseline": "keep", "X 1, NAP 60": "discard"}
    check_books(lab)


def test_an_edit_of_program_md_counts_from_the_next_proposal_and_its_hash_is_recorded(
    make_lab: MakeLab,
) -> None:
    lab = make_lab(change(X=1), change(Y=1))
    texts = {"before": (lab.root / "program.md").read_text(), "after": "Lower Y alone.\n"}

    def edit(line: str) -> None:
        if line.startswith("e0002"):  # decided: the next is asked for afterwards
            lab.write("program.md", texts["after"])

    lab.run(edit)
    told = [e["experiment"]["program_sha256"] for e in lab.events("proposed")]
    before, after = (hashlib.sha256(text.encode()).hexdigest() for text in texts.values())
    assert told == [before, before, after]


def test_a_program_md_that_is_gone_pauses_its_branch_alone(make_lab: MakeLab) -> None:
    branches = {"main": {}, "other": {"program": "other.md"}}
    lab = make_lab(change(X=1), branches=branches, limits={"experiments": 3})
    lab.run()
    assert [line for line in lab.lines if "other is paused" in line and "other.md" in line]
    assert lab.state.branch("main").best_metric == 9.0
    lab.write("other.md", "Lower the loss, otherwise.\n")
    lab.configure(limits={"experiments": 4})
    lab.run()
    assert lab.state.branch("other").baseline_metric == 10.0
    check_books(lab)


def test_a_program_md_that_is_gone_pauses_a_campaign_of_one_branch(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 1})
    (lab.root / "program.md").unlink()
    with pytest.raises(UserError, match=r"branch main: its program program\.md cannot be read"):
        lab.run()
    assert not lab.folder.exists()
    lab.write("program.md", "Lower it.\n")
    lab.run()
    (lab.root / "program.md").unlink()
    lab.configure(limits={"experiments": 2})
    with pytest.raises(Paused, match=r"branch main cannot go on: .*program\.md cannot be read"):
        lab.run()
    lab.write("program.md", "Lower it.\n")
    lab.run()
    check_books(lab)


def test_a_head_that_is_equal_and_simpler_keeps_its_weights_beside_the_best_ones(
    make_lab: MakeLab,
) -> None:
    lab = make_lab({"description": "no Z", "replace": [["Z = 0\n", ""]]}, change(X=1))
    weights = "import os\nopen(os.environ['AUTORESEARCH_SCRATCH'] + '/model.safetensors', 'w')\n"
    lab.write("solution.py", SOLUTION + "Z = 0\n" + weights)
    lab.git("commit", "--quiet", "--all", "--message", "it leaves weights")
    lab.configure(task={**lab.settings["task"], "command": ["python", "solution.py"]})
    for experiments, kept in ((2, ["e0001", "e0002"]), (3, ["e0003"])):
        lab.configure(limits={"experiments": experiments})
        lab.run()
        assert sorted(p.parent.name for p in lab.folder.rglob("model.safetensors")) == kept
    assert list(lab.verdicts().values()) == ["keep", "keep", "keep"]
    check_books(lab)


def test_an_unknown_start_of_a_branch_is_told_before_anything_runs(make_lab: MakeLab) -> None:
    lab = make_lab(branches={"main": {"start": "nowhere"}})
    with pytest.raises(UserError, match="no commit 'nowhere'"):
        lab.run()
    assert not (lab.folder / "runs").exists()


# -- limits ---------------------------------------------------------------------------------------


def test_it_ends_when_its_target_is_reached(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(Y=1), change(X=3), limits={"target": 9.5})
    assert lab.run() == "main reached 9, the target is 9.5"
    assert len(lab.state.records) in (2, 3)
    check_books(lab)


def test_it_ends_when_its_time_is_up(make_lab: MakeLab) -> None:
    naps = [change(X=x, NAP=0.2) for x in range(100, 140)]
    lab = make_lab(*naps, limits={"hours": 2.0 / 3600})
    begun = time.monotonic()
    assert lab.run().startswith("time is up (")
    assert 2.0 < time.monotonic() - begun < 20
    assert 1 < len(lab.state.records) < 40
    check_books(lab)


def test_hours_and_until_end_a_night_whichever_comes_first() -> None:
    began = datetime(2026, 11, 26, 22, 0).astimezone()
    for limits, hours in (
        ({"until": "07:30"}, 9.5),
        ({"hours": 3, "until": "07:30"}, 3),
        ({"hours": 12, "until": "07:30"}, 9.5),
    ):
        settings = config.parse({"campaign": "night", "limits": limits})
        end = controller._deadline(settings, began.isoformat())
        assert end == began + timedelta(hours=hours)


def test_a_night_that_was_cut_off_and_is_over_meanwhile_is_closed_in_words(
    make_lab: MakeLab,
) -> None:
    lab = make_lab(change(X=1, NAP=1), limits={"hours": 0.0005})
    assert lab.call(AUTORESEARCH_KILL_AT="run.submit:after:1")[0] == -signal.SIGKILL
    time.sleep(2)
    assert lab.run().startswith("time is up")
    assert any("the night that was cut off is over" in line for line in lab.lines)
    lab.configure(limits={"hours": 0.01})
    assert lab.run() != ""
    assert lab.verdicts() == {"baseline": "keep", "X 1, NAP 1": "keep"}


def test_how_far_the_runs_are_is_shown_while_they_run(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1, NAP=3), limits={"experiments": 2})
    shown: list[str] = []
    night.run(config.load(lab.root / "campaign.yaml"), lab.root, print, shown.append)
    assert "e0002 s1 starting" in shown


def test_changed_settings_of_a_branch_count_from_the_next_start(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1, NAP=0.3), change(Y=1, NAP=0.3), limits={"experiments": 1})
    lab.run()
    lab.configure(limits={"experiments": 3}, executor={"slots": 2}, branches={"main": {"slots": 2}})
    lab.run()
    names = [e["event"] for e in lab.events()]
    first = names.index("run_ended", names.index("config_changed"))
    assert names[:first].count("run_intended") == 3  # two at once
    check_books(lab)


def test_a_score_by_another_referee_is_not_compared(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab(limits={"experiments": 1})
    lab.run()
    monkeypatch.setattr("containers.seal.evaluator_sha256", lambda folder: "another")
    with pytest.raises(Paused, match="evaluator changed since this campaign began"):
        lab.run()


# -- its books ------------------------------------------------------------------------------------


def test_records_and_notes_reach_git_while_it_runs(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once what the start found; then after so many decisions, or when so much time is over."""
    monkeypatch.setattr(controller, "MIRROR_S", 0.0)
    lab = make_lab(change(X=1), limits={"experiments": 2})
    seen: list[tuple[int, int]] = []

    def look(line: str) -> None:
        if line.startswith(("e0001", "e0002")):
            repository = Repository(lab.root)
            seen.append(
                (len(mirror.load_ledger(repository, lab.name)), len(mirror.noted(repository)))
            )

    lab.run(look)
    assert [notes for _, notes in seen] == [0, 1]
    assert 0 < seen[0][0] < seen[1][0]


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("task", {"direction": "maximise"}),
        ("task", {"metric": "other"}),
        ("task", {"scorer": {"command": ["python", "score.py", "-v"], "files": ["score.py"]}}),
        ("budget", {"wall": 77}),
    ],
)
def test_another_measure_or_budget_is_no_successor_of_the_earlier_one(
    make_lab: MakeLab, part: str, changed: dict[str, object]
) -> None:
    lab = make_lab(change(X=1))
    lab.run()
    before = (lab.folder / "ledger.jsonl").read_bytes()
    lab.configure(**{part: lab.settings.get(part, {}) | changed})
    with pytest.raises(Paused, match=r"changed since this campaign began.*would not compare"):
        lab.run()
    assert b"config_changed" not in (lab.folder / "ledger.jsonl").read_bytes()[len(before) :]


def test_without_its_folder_a_campaign_goes_on_from_the_records_in_git(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(Y=1))
    lab.configure(limits={"experiments": 2})
    lab.run()
    shutil.rmtree(lab.folder)  # scratch was purged
    lab.configure(limits={})
    lab.run()
    assert [record.id for record in lab.state.records] == ["e0001", "e0002", "e0003"]
    assert set(lab.verdicts().values()) == {"keep"}
    assert [e["event"] for e in lab.events()].count("campaign_started") == 1


def test_the_name_of_a_campaign_without_records_is_not_taken_again(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1))
    lab.run()
    shutil.rmtree(lab.folder)
    lab.git("update-ref", "-d", f"refs/autoresearch/{lab.name}/records")
    refs = lab.git("for-each-ref")
    with pytest.raises(UserError, match="no records of it: get those"):
        lab.run()
    assert lab.git("for-each-ref") == refs
    assert not lab.folder.exists()
