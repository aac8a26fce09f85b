"""The fold: what the campaign's state is after its events, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import deciding
import pytest
from story import Story

from jobs import history, ledger, policy
from jobs.errors import LedgerBroken
from jobs.history import fold
from jobs.model import Usage, to_json
from jobs.records import Chunk, Record, Vector

RECORDED = Path(__file__).parent / "ledgers" / "v1.jsonl"


def test_an_experiment_gains_facts_event_by_event() -> None:
    story = Story()
    experiment = story.propose(hypothesis="more is more")
    assert story.state.in_flight == (experiment,)
    run = story.intend(experiment)
    assert story.state.open_runs[run].submission is None
    story.submit(run, "n7")
    assert story.state.open_runs[run].submission.node == "n7"
    story.end(run, 2.0, total_s=30.0, training_s=20.0)
    assert story.state.running() == []
    decision = story.decide(experiment)
    state = story.state
    assert state.in_flight == ()
    assert (state.record(experiment).verdict, state.record(experiment).metric) == ("keep", 2.0)
    assert state.record(experiment).runs[0].node == "n7"  # the submission knew it
    assert state.experiment(experiment).hypothesis == "more is more"
    assert state.results(experiment)[0].training_s == 20.0
    assert state.decision(experiment) == decision
    assert (state.allocated_s, state.branch("main").training_s) == (30.0, 20.0)


def test_a_state_stays_as_it_was_while_the_campaign_goes_on() -> None:
    story = Story()
    story.experiment(2.0)
    before, kept = story.state, to_json(story.state.branch("main"))
    for i in range(2 * Vector.CHUNK):
        story.experiment(3.0 + i)
    assert len(before.records) == 1
    assert to_json(before.branch("main")) == kept
    assert len(story.state.records) == 2 * Vector.CHUNK + 1
    assert [r.id for r in story.state.experiments()][-1] == story.state.recent(1)[0].id


def test_two_futures_of_one_state_do_not_mix() -> None:
    story = Story()
    story.experiment(2.0)
    past, number = story.state, len(story.events)
    story.experiment(1.0)
    one, story.state = story.state, past
    story.experiment(3.0)
    other = story.state
    assert [r.verdict for r in one.experiments()] == ["keep", "keep"]
    assert [r.verdict for r in other.experiments()] == ["keep", "discard"]
    assert fold(story.events[:number]) == past


def test_folding_in_pieces_is_folding_at_once() -> None:
    events = list(ledger.read(RECORDED))
    pieces = history.State()
    for event in events:
        pieces = fold([event], pieces)
    assert pieces == fold(events)


def test_branches_count_and_lead_from_their_baseline_to_their_head() -> None:
    story = Story("main", "wide")
    for metric in (2.0, 1.9, 1.95, None):
        story.experiment(metric)
    story.experiment(2.5, branch="wide")
    main = story.state.branch("main")
    assert (main.experiments, main.kept, main.discarded, main.crashed) == (4, 2, 1, 1)
    assert [r.metric for r in story.state.chain("main")] == [2.0, 1.9]
    assert (main.baseline_metric, main.best_metric, main.since_keep) == (2.0, 1.9, 2)
    assert story.state.best("wide").metric == 2.5
    assert [r.id for r in story.state.experiments("wide")] == ["e0005"]
    assert [r.id for r in story.state.recent(2, "main")] == ["e0003", "e0004"]


def test_money_in_flight_counts_until_its_proposal_comes() -> None:
    story = Story()
    reserve = to_json(Usage(input_tokens=9000, dollars=0.5))
    story.put("proposal_requested", proposal="p1", branch="main", slot=0, reserve=reserve)
    assert story.state.committed("main").dollars == 0.5
    assert story.state.spent.dollars == 0.0
    failed = {"reason": "overloaded", "usage": to_json(Usage(100, dollars=0.1, estimated=True))}
    story.put("proposal_failed", proposal="p1", unavailable=failed)
    story.propose(usage=Usage(200, 10, dollars=0.2))
    assert story.state.requests == {}
    assert story.state.committed() == story.state.spent == story.state.branch("main").spent
    assert story.state.spent == Usage(300, 10, 0, 0, pytest.approx(0.3), True)


@pytest.mark.parametrize(
    ("before", "job", "goes_on"),
    [
        (None, None, True),  # it was killed
        ("stopped", None, False),
        ("paused", None, False),
        ("stopped", "7", True),  # handed over, requeued as the same job
        ("stopped", "8", False),
    ],
)
def test_a_night_goes_on_through_kills_and_requeues_and_no_further(
    before: str | None, job: str | None, goes_on: bool
) -> None:
    story = Story()
    story.put("lease_taken", host="a", pid=1, job="7")
    began = story.state.time
    if before:
        story.put(before, reason="as told")
    story.put("lease_taken", host="a", pid=2, job=job)
    assert story.state.night == (job, began if goes_on else story.state.time)


def test_lines_of_a_displaced_writer_are_ignored() -> None:
    story = Story(fence=1)
    story.fence = 2
    story.put("lease_taken", host="b", pid=1)
    late = {"n": story.state.events, "fence": 1, "event": "stopped", "reason": "late"}
    assert fold([late], story.state) == story.state


def test_lines_written_before_a_takeover_was_noticed_are_numbered_twice_but_counted_once() -> None:
    story = Story(fence=1)
    taken = {"n": story.state.events, "fence": 2, "event": "told", "branch": "main", "text": "new"}
    story.put("told", branch="main", text="just before")
    assert fold([taken], story.state).branch("main").notes == ("just before", "new")


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_or_doubled_line_is_refused(lost: int) -> None:
    story = Story("main", "wide", "deep")
    with pytest.raises(LedgerBroken, match=rf"has event {lost + 1} where event {lost} was due"):
        fold(story.events[:lost] + story.events[lost + 1 :])
    with pytest.raises(LedgerBroken, match="where event"):
        fold([*story.events[: lost + 1], story.events[lost]])


@pytest.mark.parametrize(
    "event",
    [
        {"event": "run_submitted", "submission": {"run": "e0001-s1-a1"}},
        {"event": "run_ended", "result": {"run": "e0009-s1-a1", "status": "ok"}},
        {"event": "proposed", "experiment": {"id": "e0005"}},
        {"event": "told", "branch": "nobody", "text": "x"},
        {"event": "decided", "decision": {"experiment": "e0001", "verdict": "keep"}},
        {"event": "proposal_failed", "proposal": "p9"},
    ],
)
def test_an_event_that_does_not_fit_is_refused_by_name(event: dict[str, object]) -> None:
    with pytest.raises(LedgerBroken, match=rf"Event 2 \({event['event']}, .* does not fit"):
        fold([event], Story().state)


def test_a_run_is_recorded_once() -> None:
    story = Story()
    run = story.run(story.propose(), 2.0)
    with pytest.raises(LedgerBroken, match=run):
        story.end(run, 1.0)
    again = next(e for e in story.events if e["event"] == "run_intended")
    with pytest.raises(LedgerBroken, match="has ended already"):
        fold([{**again, "n": story.state.events}], story.state)
    story.decide("e0001")
    with pytest.raises(LedgerBroken, match="decided already"):
        story.put("decided", decision=to_json(policy.decide(story.state, "e0001")))


def test_unknown_events_and_verdicts_of_a_later_release_are_met_with_respect() -> None:
    story = Story()
    story.put("weather", sky="blue")
    story.experiment(2.0)
    experiment = story.propose()
    story.run(experiment, 1.0)
    decision = to_json(policy.decide(story.state, experiment)) | {"verdict": "quarantine"}
    story.put("decided", decision=decision)
    assert story.state.branch("main").head == "e0001"  # an unknown verdict is not a keep
    assert story.state.in_flight == ()


def test_orders_pauses_and_notes_are_remembered() -> None:
    story = Story()
    story.put("order", name="0001.json")
    story.put("paused", reason="disk full", remedy="free some")
    story.put("branch_paused", branch="main", reason="tired")
    story.put("told", branch="main", text="try less")
    assert "0001.json" in story.state.orders
    assert story.state.paused == {"reason": "disk full", "remedy": "free some"}
    assert not story.state.branch("main").active
    story.put("resumed")
    story.put("branch_resumed", branch="main")
    assert story.state.paused is None
    assert story.state.branch("main").active
    assert story.state.branch("main").notes == ("try less",)


def test_details_are_read_from_the_ledger_when_asked_for() -> None:
    source = ledger.Lines(RECORDED)
    state = fold(ledger.read(RECORDED), source=source)
    assert state.experiment("e0003").hypothesis == "larger steps early"
    assert state.results("e0003")[0].details == {"isolation": "namespaces"}
    assert state.decision("e0006").numbers["lines"] == 40
    assert isinstance(state.record("e0003").proposed, int)
    with pytest.raises(KeyError):
        state.record("e0099")
    with pytest.raises(KeyError):
        state.record("main")


def test_the_recorded_ledger_says_for_ever_what_it_said() -> None:
    state = fold(ledger.read(RECORDED))
    assert [(r.branch, r.verdict, r.status) for r in state.experiments()] == [
        ("main", "keep", "ok"),
        ("wide", "keep", "ok"),
        ("main", "keep", "ok"),
        ("main", "discard", "ok"),
        ("main", "keep", "ok"),
        ("main", "discard", "ok"),
        ("main", "discard", "crash"),
        ("main", "keep", "ok"),
        ("wide", "discard", "ok"),
        ("wide", "keep", "ok"),
        ("wide", "keep", "ok"),
        ("main", "keep", "ok"),
        ("main", "discard", "crash"),
        ("main", None, None),
    ]
    assert state.branch("main").kept_ids == ("e0001", "e0003", "e0005", "e0008", "e0012")
    assert state.branch("wide").retired == "enough"
    assert state.branch("wide").notes == ("try fewer heads",)
    assert (state.fence, state.stopped, list(state.open_runs)) == (2, None, ["e0014-s1-a1"])
    assert policy.excluded_nodes(state) == {"n3"}
    assert deciding.verify(ledger.read(RECORDED)) == []


def test_the_ledger_of_a_real_controller_says_for_ever_what_it_said() -> None:
    """A toy campaign: killed once, resumed with another limit, an order refused, closing reruns."""
    path = RECORDED.with_name("toy.jsonl")
    state = fold(ledger.read(path))
    assert [(r.branch, r.description, r.verdict, r.metric) for r in state.experiments()] == [
        ("main", "baseline", "keep", 10.0),
        ("side", "baseline", "keep", 10.0),
        ("main", "X 1, NAP 0.1", "keep", 9.0),
        ("side", "Y 1", "keep", 1.0),
        ("side", "X 1.5", "keep", 0.25),
        ("main", "X 6", "discard", 34.0),
        ("main", "broken", "discard", None),
        ("main", "X -1", "parked", None),
        ("main", "Y 2", "keep", 1.0),
    ]
    assert [r.id for r in state.chain("main")] == ["e0001", "e0003", "e0009"]
    assert state.branch("main").notes == ("try it",)
    assert [run.status for run in state.record("e0008").runs] == ["infrastructure"] * 2
    assert not state.open_runs
    assert not state.requests
    assert deciding.verify(ledger.read(path)) == []


def test_chunks_read_back_as_they_were_written() -> None:
    story = Story()
    story.experiment(2.0, tags=("a", "b"))
    (chunk,) = story.state.records.chunks
    again = Vector([Chunk(text=chunk.text)], 1)
    assert isinstance(again[0], Record)
    assert again[0] == story.state.records[0]
    with pytest.raises(IndexError):
        again[1]
