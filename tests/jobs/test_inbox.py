"""Orders to a running campaign: who may tell it what, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from toylab import Lab, change, check_books, when

from jobs.model import Proposal

MakeLab = Callable[..., Lab]


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
