"""The loop end to end: what is kept, what is discarded, who may tell it what, how it ends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from toylab import SOLUTION, Lab, change, check_books, ended, eventually

from agent import scripted
from jobs import proposals, submission
from jobs.errors import Paused, UserError
from jobs.model import Proposal, Unavailable, Usage

MakeLab = Callable[..., Lab]


def when(text: str, act: Callable[[], None]) -> Callable[[str], None]:
    """A listener that acts once, at the first line that holds `text`."""
    waiting = [act]

    def listen(line: str) -> None:
        if text in line and waiting:
            waiting.pop()()

    return listen


@contextlib.contextmanager
def later(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, act)
    timer.start()
    try:
        yield
    finally:
        timer.join()


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
        assert submission._visible_gpus() == seen


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


# -- orders ---------------------------------------------------------------------------------------


def test_stop_lets_what_runs_end_and_skips_the_closing_reruns(make_lab: MakeLab) -> None:
    lab = make_lab(
        change(X=1, NAP=0.4), change(Y=1), limits={"experiments": 3}, confirm={"runs": 1}
    )
    assert lab.run(when("e0001", lambda: lab.order("stop"))) == "stopped by order"
    assert lab.verdicts() in (
        {"baseline": "keep"},  # it was seen before the next proposal was asked for
        {"baseline": "keep", "X 1, NAP 0.4": "keep"},
    )
    check_books(lab)
    lab.run()
    assert lab.state.branch("main").best_metric == 0.0
    assert [e["run"]["seed"] for e in lab.events("run_intended")].count(2) == 2
    check_books(lab)


def test_a_paused_branch_gets_no_proposals_until_it_is_resumed(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(Y=1), limits={"experiments": 3})

    def pause() -> None:
        lab.order("pause", branch="main")
        timer.start()

    timer = threading.Timer(0.5, lambda: lab.order("resume", branch="main"))
    lab.run(when("e0001", pause))
    names = [e["event"] for e in lab.events()]
    paused, resumed = names.index("branch_paused"), names.index("branch_resumed")
    assert "proposal_requested" not in names[paused:resumed]
    assert lab.state.branch("main").experiments == 3
    check_books(lab)


def test_a_pause_by_order_outlasts_a_restart(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.scripts(main=[change(X=1)], other=[change(Y=1)])
    lab.run(when("e0001", lambda: lab.order("pause", branch="main")))
    before = lab.state.branch("main")
    assert before.paused == "by order"
    assert lab.run() == "no researcher has anything more to propose"
    assert lab.state.branch("main").experiments == before.experiments < 3
    check_books(lab)


def test_a_retired_branch_keeps_its_head_and_asks_no_more(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.scripts(main=[change(X=1), change(Y=1)], other=[change(X=0), change(Y=0)])
    lab.run(when("e0001", lambda: lab.order("retire", branch="main")))
    state = lab.state
    assert state.branch("main").retired == "by order"
    assert state.branch("main").experiments <= 2
    assert state.branch("other").experiments == 3
    lab.order("retire", branch="other")
    assert lab.run() == "every branch is retired"
    check_books(lab)


def test_a_branch_can_be_added_to_a_running_campaign(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(Y=1))
    lab.run(when("e0001", lambda: lab.order("add", branch="side", settings={"start": "main"})))
    state = lab.state
    assert state.branch("side").baseline_metric == 10.0
    assert state.branch("side").settings["start_commit"] == lab.git("rev-parse", "main")
    assert state.branch("main").experiments == 3
    check_books(lab)


def test_what_a_branch_is_told_reaches_its_researcher(make_lab: MakeLab) -> None:
    lab, seen = make_lab(limits={"experiments": 3}), []

    class Listener:
        def propose(self, state: Any, branch: str, context: Any) -> Any:
            seen.append(state.branch(branch).notes)
            text = context.files["solution.py"].replace("X = ", f"X = {len(seen)} + ")
            return Proposal(branch, context.base, {"solution.py": text}, "more", "listener")

    lab.run(when("e0001", lambda: lab.order("tell", branch="main", text="X!")), Listener())
    assert seen[-1] == ("X!",)


def test_an_edit_that_a_branch_has_already_is_not_adopted_again(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 2})
    lab.run()
    lab.order("adopt", experiment="e0002", into="main")
    lab.run()
    assert "e0002 is in main already" in lab.lines
    check_books(lab)


def test_an_adopted_edit_is_merged_onto_the_head_and_measured(make_lab: MakeLab) -> None:
    lab = make_lab(executor={"slots": 2})
    lab.scripts(main=[change(X=1)], side=[change(Y=1)])
    lab.run()
    found = next(r for r in lab.state.experiments("side") if r.description == "Y 1")
    lab.order("adopt", experiment=found.id, into="main")
    lab.run()
    adopted = lab.state.recent(1)[0]
    assert (adopted.description, adopted.branch) == (f"adopted {found.id}: Y 1", "main")
    assert (adopted.verdict, adopted.metric) == ("keep", 0.0)
    assert lab.state.experiment(adopted.id).rebased_from == found.id
    check_books(lab)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({"order": "pause", "branch": "nobody"}, "there is no branch 'nobody'"),
        ({"order": "tell"}, "there is no branch ''"),
        ({"order": "add", "branch": "../../etc"}, "contains '/'"),
        ({"order": "add", "branch": "main"}, "branch main exists already"),
        ({"order": "add", "branch": "x", "settings": {"start": "nowhere"}}, "no commit 'nowhere'"),
        ({"order": "adopt", "experiment": "e9999", "into": "main"}, "there is no 'e9999'"),
        ({"order": "adopt", "experiment": None, "into": 3}, "there is no 'None'"),
        ({"order": "fly"}, "an order is one of stop, tell"),
        ({"order": "add", "branch": "x", "settings": "abc"}, "settings are a mapping"),
        (
            {"order": "add", "branch": "x", "settings": {"slots": float("inf")}},
            "not JSON compliant",
        ),
    ],
)
def test_an_order_that_cannot_be_obeyed_is_told_recorded_and_gone(
    make_lab: MakeLab, order: dict[str, Any], words: str
) -> None:
    lab = make_lab(limits={"experiments": 1})
    lab.run(when(f"campaign {lab.name}", lambda: lab.order(**order)))
    assert [line for line in lab.lines if "refused" in line and words in line]
    assert len(lab.events("order")) == 1
    check_books(lab)


def test_an_order_brings_no_fields_of_its_own_into_the_ledger(make_lab: MakeLab) -> None:
    lab = make_lab(limits={"experiments": 1})
    odd = {"v": 9, "n": 0, "fence": 99, "event": "decided", "mono": 0, "time": "now"}
    order = {"order": "tell", "branch": "main", "text": "hm", **odd}
    lab.run(when(f"campaign {lab.name}", lambda: lab.order(**order)))
    (recorded,) = lab.events("order")
    assert (recorded["v"], recorded["event"], recorded["fence"]) == (1, "order", 1)
    check_books(lab)


def test_an_order_to_stop_that_nobody_heard_does_not_end_the_next_night(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 1})
    lab.run()
    lab.order("stop")
    lab.configure(limits={"experiments": 2})
    assert lab.run() != "stopped by order"
    assert any("from before this start is dropped" in line for line in lab.lines)
    assert lab.verdicts() == {"baseline": "keep", "X 1": "keep"}
    check_books(lab)


def test_a_stop_given_while_the_controller_is_starting_is_obeyed(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1))
    said = lab.run(when(f"campaign {lab.name}", lambda: lab.order("stop")))
    assert said == "stopped by order"
    assert lab.events("proposed", "run_intended") == []


def test_the_limit_of_experiments_binds_baselines(make_lab: MakeLab) -> None:
    lab = make_lab(limits={"experiments": 1})
    lab.scripts(one=[], two=[], three=[])
    lab.run()
    assert len(lab.state.records) == 1
    check_books(lab)


def test_rubbish_in_the_inbox_is_told_and_gone(make_lab: MakeLab) -> None:
    lab = make_lab(limits={"experiments": 1})

    def litter() -> None:
        for name, content in (("a", b"\xff\xfe"), ("b", b"[1]"), ("c", b""), ("d", b"{" * 99999)):
            (lab.folder / "inbox" / f"{name}.json").write_bytes(content)

    lab.run(when(f"campaign {lab.name}", litter))
    assert sum("refused" in line for line in lab.lines) == 4
    check_books(lab)


# -- signals --------------------------------------------------------------------------------------


def test_ctrl_c_hands_over_and_the_next_start_adopts_what_runs(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1, NAP=2), change(Y=1), limits={"experiments": 3})
    with ended(lab.start()) as controller:
        eventually(lambda: (lab.folder / "runs/e0002/s1-a1/claim.json").exists())
        controller.send_signal(signal.SIGINT)
        said, _ = controller.communicate(timeout=30)
        assert controller.returncode == 0
    assert "`autoresearch run` resumes" in said
    assert lab.state.stopped == "interrupted"
    assert list(lab.state.open_runs) == ["e0002-s1-a1"]
    assert lab.strays()
    lab.run()
    assert "adopted 1 running: e0002-s1-a1" in lab.lines
    assert [r.attempt for r in lab.state.record("e0002").runs] == [1]
    check_books(lab)


def test_ctrl_c_twice_leaves_at_once_and_loses_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1, NAP=1.5), change(Y=1), limits={"experiments": 3})
    with ended(lab.start()) as controller:
        eventually(lambda: (lab.folder / "runs/e0002/s1-a1/claim.json").exists())
        controller.send_signal(signal.SIGSTOP)  # so that both are there when it looks
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            controller.send_signal(number)
        said, _ = controller.communicate(timeout=30)
        assert controller.returncode == 130
    assert "left at once" in said
    lab.run()
    check_books(lab)


@pytest.mark.parametrize("what", ["thinking", "waiting"])
def test_sigterm_ends_it_within_two_seconds_while_a_researcher(
    make_lab: MakeLab, what: str
) -> None:
    agents = {
        "thinking": {"kind": "command", "argv": ["sleep", "600"]},
        "waiting": {"kind": "anthropic", "base_url": "http://127.0.0.1:9"},  # for the API
    }
    lab = make_lab(agent=agents[what])
    with ended(lab.start(ANTHROPIC_API_KEY="sk-ant-nobody")) as controller:
        eventually(lambda: (lab.folder / "ledger.jsonl").exists() and lab.state.requests)
        _until_idle(controller.pid)
        begun = datetime.now(UTC)
        controller.send_signal(signal.SIGTERM)
        controller.communicate(timeout=10)  # Python's own end takes long on a busy machine
        assert controller.returncode == 0
    stopped = datetime.fromisoformat(lab.events("stopped")[0]["time"])
    assert stopped - begun < timedelta(seconds=2)
    assert not lab.state.requests  # it said what it had cost: nothing
    (failed,) = lab.events("proposal_failed")
    assert failed["unavailable"]["reason"].endswith("stopping")
    assert lab.state.spent == Usage()
    lab.configure(agent={"kind": "scripted", "script": "edits.yaml"})
    lab.run()
    check_books(lab)


def _until_idle(pid: int) -> None:
    """Until a process uses less than a twentieth of a core: its imports are done."""
    ticks = os.sysconf("SC_CLK_TCK")

    def used() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def idle() -> bool:
        before = used()
        time.sleep(1.0)
        return used() - before < ticks / 20

    eventually(idle)


# -- researchers ----------------------------------------------------------------------------------


class Player:
    """Answers with what it was given, one after the other; calls what can be called."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def propose(self, state: Any, branch: str, context: Any) -> Any:
        if not self.answers:
            return Unavailable("at its end")
        answer = self.answers.pop(0)
        return answer(context) if callable(answer) else answer


def edit(files: dict[str, str], **changes: Any) -> Callable[[Any], Proposal]:
    def answer(context: Any) -> Proposal:
        given = {"branch": "main", "base": context.base, "files": files, "description": "edit"}
        return Proposal(**{**given, "researcher": "player", **changes})

    return answer


def fail(context: Any) -> Proposal:
    raise RuntimeError("broken\nresearcher")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (fail, "the researcher failed: RuntimeError: broken"),
        (edit({"score.py": "print('{\"loss\": 0}')"}), "it edits score.py, which is not editable"),
        (edit({"solution.py": SOLUTION}), "it changes nothing"),
        (edit({}), "it changes nothing"),
        (edit({"solution.py": "X = 1"}, base="0" * 40), "another branch or commit"),
        (edit({"solution.py": "X = 1"}, branch="other"), "another branch or commit"),
    ],
)
def test_what_a_researcher_may_not_propose_is_refused_and_it_is_asked_again(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch, answer: Any, words: str
) -> None:
    monkeypatch.setattr(proposals, "NAP_S", 0.1)
    monkeypatch.setattr(proposals, "AFTER_REFUSAL_S", 0.1)
    lab = make_lab(limits={"experiments": 2})
    better = SOLUTION.replace("2.0", "1.0")
    lab.run(researcher=Player(answer, edit({"solution.py": better})))
    assert words in lab.events("proposal_failed")[0]["unavailable"]["reason"]
    assert lab.verdicts() == {"baseline": "keep", "edit": "keep"}
    check_books(lab)


def test_of_two_slots_with_the_same_idea_one_is_refused(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "AFTER_REFUSAL_S", 0.1)
    lab = make_lab(
        limits={"experiments": 3}, executor={"slots": 2}, branches={"main": {"slots": 2}}
    )
    both_asked = threading.Barrier(2)

    def answer(context: Any) -> Proposal:
        if not both_asked.broken:
            with contextlib.suppress(threading.BrokenBarrierError):
                both_asked.wait(timeout=5)
        return edit({"solution.py": SOLUTION.replace("2.0", "1.0")})(context)

    other = edit({"solution.py": SOLUTION.replace("2.0", "1.5")}, description="other")
    lab.run(researcher=Player(answer, answer, other))
    (refused,) = lab.events("proposal_failed")
    assert "it is the program of e0002" in refused["unavailable"]["reason"]
    assert lab.verdicts() == {"baseline": "keep", "edit": "keep", "other": "discard"}
    check_books(lab)


def test_what_a_proposal_cost_is_booked_whether_it_came_or_not(make_lab: MakeLab) -> None:
    lab = make_lab()
    half, whole = Usage(output_tokens=5, dollars=0.5), Usage(output_tokens=10, dollars=1.0)
    better = edit({"solution.py": SOLUTION.replace("2.0", "1.0")}, usage=whole)
    lab.run(researcher=Player(better, Unavailable("no idea", None, half)))
    assert (lab.state.spent.dollars, lab.state.spent.output_tokens) == (1.5, 15)
    assert "1.50 dollars, 0.750 an experiment, 0.750 a keep" in lab.call("status")[1]


class Dear(Player):
    def reserve(self, state: Any, branch: str) -> Usage:
        return Usage(dollars=2.0)


def test_a_researcher_that_fails_may_have_spent_all_that_was_set_aside(make_lab: MakeLab) -> None:
    lab = make_lab(limits={"hours": 0.0002})
    lab.run(researcher=Dear(fail))
    assert lab.events("proposal_failed")[0]["unavailable"]["usage"]["estimated"]
    assert lab.state.spent.dollars == 2.0


def test_an_edit_that_cannot_even_be_checked_is_refused(make_lab: MakeLab) -> None:
    lab = make_lab(limits={"hours": 0.0002})
    paid = Usage(dollars=0.5)
    lab.run(researcher=Dear(edit({"solution.py": None}, usage=paid)))  # type: ignore[dict-item]
    assert "the researcher failed" in lab.events("proposal_failed")[0]["unavailable"]["reason"]
    assert lab.state.spent.dollars == 0.5


def test_an_understudy_at_its_end_does_not_end_the_campaign(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "NAP_S", 0.1)
    lab = make_lab(limits={"experiments": 2})

    def away(context: Any) -> Unavailable:
        return Unavailable("an outage", (datetime.now(UTC) + timedelta(seconds=0.5)).isoformat())

    better = edit({"solution.py": SOLUTION.replace("2.0", "1.0")})
    lab.run(researcher=Player(away, better), understudy=Player())
    said = [e["unavailable"]["reason"] for e in lab.events("proposal_failed")]
    assert said[:2] == ["an outage", "at its end"]
    assert lab.verdicts() == {"baseline": "keep", "edit": "keep"}
    check_books(lab)


def test_a_program_that_was_tried_is_known_after_a_restart_without_parsing_it_again(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab(change(X=1), change(X=6), limits={"experiments": 2})
    lab.run()
    parsed: list[str] = []
    monkeypatch.setattr(proposals.edit, "fingerprint", lambda files: parsed.append("!") or "0" * 32)
    monkeypatch.setattr(scripted.edit, "refusal", lambda edit: seen.update(edit.known))
    seen: dict[str, str] = {}
    lab.configure(limits={"experiments": 3})
    lab.run()
    assert sorted(seen.values()) == ["e0001", "e0002"]
    assert len(parsed) == 2  # both of e0003: the check and the record


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


def test_a_run_that_hangs_is_ended_and_tried_again(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1, NAP=0.7), limits={"experiments": 2})

    def freeze() -> None:
        claim = lab.folder / "runs/e0002/s1-a1/claim.json"
        eventually(claim.exists)
        os.kill(int(json.loads(claim.read_text())["process"].split("@")[0]), signal.SIGSTOP)
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


# -- what program.md demands ----------------------------------------------------------------------

MODEL = (
    SOLUTION
    + """
if __name__ == "__main__":
    import json, os

    memory = b"x" * int(NAP * 2**30)
    shapes = {"a": {"shape": [int(X), 10]}, "b": {"shape": [5]}, "__metadata__": {"c": "a"}}
    header = json.dumps(shapes).encode()
    if Y > 0:
        with open(os.environ["AUTORESEARCH_SCRATCH"] + "/model.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
"""
)


def test_a_model_beyond_the_limits_of_program_md_is_invalid(make_lab: MakeLab) -> None:
    lab = make_lab(change(X=1), change(X=3), change(Y=-1), change(NAP=0.5))
    lab.write("solution.py", MODEL)
    lab.write("program.md", "---\nmax_params: 25\nmax_memory_gb: 0.4\n---\nLower the loss.\n")
    lab.git("commit", "--quiet", "--all", "--message", "a model")
    lab.configure(task=lab.settings["task"] | {"command": ["python", "solution.py"]})
    lab.run()
    results = [lab.state.results(f"e000{n}")[-1] for n in range(1, 6)]
    assert [result.status for result in results] == ["ok", "ok", "invalid", "invalid", "invalid"]
    assert [result.params for result in results[:4]] == [25, 15, 35, None]
    assert "35 parameters; program.md allows max_params 25" in results[2].reason
    assert "left no model.safetensors" in results[3].reason
    assert "program.md allows max_memory_gb 0.4" in results[4].reason
    check_books(lab)
