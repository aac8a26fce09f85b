"""The rules: what is kept, what is tried again, which node is at fault; the same answer twice."""

from __future__ import annotations

from typing import Any

import deciding
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from story import Story

from jobs import history, policy
from jobs.model import to_json
from jobs.policy import Crash, Park, Retry

# -- keeping --------------------------------------------------------------------------------------


def greedy(**keep: Any) -> Story:
    """A campaign whose baseline scored 2.0."""
    story = Story(keep=keep)
    assert story.experiment(2.0).verdict == "keep"
    return story


def test_a_baseline_with_a_score_is_kept_and_one_without_is_not() -> None:
    story = Story("main", "wide")
    assert story.experiment(None).verdict == "discard"
    assert story.state.branch("main").head is None
    assert story.experiment(2.0).reason == "baseline 2"  # a second start of the branch
    assert story.experiment(2.5, branch="wide").verdict == "keep"  # has its own baseline


def test_lower_is_kept_and_higher_is_not() -> None:
    story = greedy()
    assert story.experiment(1.9).verdict == "keep"
    assert story.experiment(1.95).reason == "worse than 1.9 by 0.05"
    assert story.experiment(1.9).verdict == "discard"


def test_higher_is_kept_where_the_task_says_so() -> None:
    story = Story(task={"kind": "general", "direction": "maximise"})
    assert [story.experiment(m).verdict for m in (10.0, 9.0, 11.0)] == ["keep", "discard", "keep"]
    assert story.state.branch("main").best_metric == 11.0


def test_equal_with_fewer_lines_is_kept() -> None:
    story = greedy(tie=0.001)
    assert story.experiment(2.0005, lines_added=1, lines_removed=3).verdict == "keep"
    assert story.experiment(2.0005, lines_added=3, lines_removed=3).verdict == "discard"
    assert story.experiment(1.9995, lines_added=4, lines_removed=3).verdict == "discard"
    assert story.experiment(2.0, lines_removed=1).verdict == "keep"


def test_ties_do_not_creep_uphill() -> None:
    story = greedy(tie=0.001)
    for step in range(1, 5):
        story.experiment(2.0 + 0.0009 * step, lines_removed=1)
    assert story.state.branch("main").best_metric == 2.0
    assert [r.verdict for r in story.state.experiments()] == ["keep", "keep"] + ["discard"] * 3


def test_added_lines_demand_a_gain_and_the_decision_shows_how() -> None:
    story = greedy(per_line=0.001)
    refused = story.experiment(1.99, lines_added=20)
    assert refused.verdict == "discard"
    assert refused.numbers["required"] == pytest.approx(0.02)
    assert refused.numbers["gain"] == pytest.approx(0.01)
    assert "20 added lines demand more than 0.02" in refused.reason
    assert story.experiment(1.97, lines_added=20).verdict == "keep"
    assert story.experiment(1.969, lines_removed=100).verdict == "keep"


def test_a_decision_says_what_it_rests_on() -> None:
    story = greedy(tie=0.001, per_line=0.002)
    decision = story.experiment(1.9)
    assert (decision.rule, decision.rule_version) == ("greedy", 1)
    assert decision.settings == {"tie": 0.001, "per_line": 0.002, "direction": "minimise"}
    assert (decision.head, decision.runs) == ("e0001", ("e0002-s1-a1",))
    assert decision.numbers["best"] == 2.0


def test_lines_cost_nothing_in_another_metrics_unit_unless_asked() -> None:
    state = Story(task={"kind": "general"}).state
    assert policy.settings_of(state)["per_line"] == 0.0
    assert policy.settings_of(Story().state)["per_line"] == policy.PER_LINE


@pytest.mark.parametrize("status", ["crash", "timeout", "oom", "invalid", "unheard-of"])
def test_whatever_ends_without_a_score_is_discarded_by_its_status(status: str) -> None:
    story = greedy()
    experiment = story.propose()
    story.run(experiment, status=status)
    decision = story.decide(experiment)
    assert (decision.verdict, decision.numbers) == ("discard", {"status": status})


def test_ok_without_a_metric_is_not_taken_for_the_best_score_there_is() -> None:
    story = greedy()
    experiment = story.propose()
    story.run(experiment, None, status="ok")
    assert story.decide(experiment).numbers["status"] == "invalid"


def test_a_win_on_an_older_base_asks_for_a_rebase_and_loses_no_keep() -> None:
    story = greedy()
    late, first = story.propose(), story.propose()
    story.run(first, 1.9)
    assert story.decide(first).verdict == "keep"
    story.run(late, 1.8)
    decision = story.decide(late)
    assert (decision.verdict, decision.numbers["rebase"]) == ("discard", True)
    assert decision.reason.startswith("stale-base")
    assert story.state.branch("main").head == first


@pytest.mark.parametrize(("metric", "removed"), [(1.95, 0), (1.9, 9)])
def test_what_does_not_beat_the_present_best_is_not_rebased(metric: float, removed: int) -> None:
    story = greedy()
    late, first = story.propose(lines_removed=removed), story.propose()
    story.run(first, 1.9)
    story.decide(first)
    story.run(late, metric)
    assert "rebase" not in story.decide(late).numbers


def test_an_undecided_run_is_measured_on() -> None:
    story = greedy()
    experiment = story.propose()
    assert policy.decide(story.state, experiment).verdict == "measure"
    assert story.dies(experiment, "n1") == Retry(2, frozenset({"n1"}))
    assert story.decide(experiment).verdict == "measure"
    assert story.state.in_flight == (experiment,)
    story.run(experiment, 1.9, node="n2")
    assert story.decide(experiment).verdict == "keep"


# -- infrastructure -------------------------------------------------------------------------------


def cluster(*nodes: str) -> Story:
    """A campaign in which an experiment of its own ran on each of `nodes`."""
    story = Story()
    for node in nodes:
        story.experiment(2.0, node=node)
    return story


def test_an_end_of_its_own_asks_for_no_retry() -> None:
    story = cluster("n1")
    assert policy.after(story.state, story.state.record("e0001"), 1) is None


def test_a_death_is_tried_again_on_another_node() -> None:
    story = cluster("n1", "n2")
    assert story.dies(story.propose(), "n1") == Retry(2, frozenset({"n1"}))


def test_two_deaths_where_others_ran_are_the_ideas_fault() -> None:
    story = cluster("n1", "n2")
    experiment = story.propose()
    story.dies(experiment, "n1")
    assert isinstance(story.dies(experiment, "n2"), Crash)
    decision = story.decide(experiment)
    assert (decision.verdict, decision.numbers["status"]) == ("discard", "crash")
    assert "n1 and n2" in decision.reason
    assert policy.excluded_nodes(story.state) == frozenset()


def test_deaths_where_nothing_else_ever_ran_say_nothing_about_the_idea() -> None:
    story = cluster("n1")
    experiment = story.propose()
    story.dies(experiment, "n1")
    assert isinstance(story.dies(experiment, "n2"), Retry)
    assert isinstance(story.dies(experiment, "n3"), Park)  # the last attempt
    assert story.decide(experiment).verdict == "parked"
    assert story.state.branch("main").parked == 1


def test_the_number_of_attempts_is_configured() -> None:
    story = Story(executor={"max_attempts": 5})
    experiment = story.propose()
    fates = [story.dies(experiment, f"n{i}") for i in range(5)]
    assert [type(fate) for fate in fates] == [Retry] * 4 + [Park]


def test_a_single_node_gets_one_retry_and_an_idea_that_dies_again_is_parked() -> None:
    story = cluster("only")
    experiment = story.propose()
    assert isinstance(story.dies(experiment, "only"), Retry)
    assert isinstance(story.dies(experiment, "only"), Park)


def test_on_a_single_node_another_experiment_in_between_shows_that_the_idea_is_at_fault() -> None:
    story = cluster("only")
    experiment, other = story.propose(), story.propose()
    story.dies(experiment, "only")
    story.run(other, None, node="only")  # even one that crashed by itself ran
    assert isinstance(story.dies(experiment, "only"), Crash)


def test_a_run_lost_without_a_node_counts_as_an_attempt_only() -> None:
    story = cluster("n1")
    experiment = story.propose()
    fates = [story.dies(experiment, None) for _ in range(3)]
    assert fates[:2] == [Retry(2, frozenset()), Retry(3, frozenset())]
    assert isinstance(fates[2], Park)


def test_preemption_does_not_count() -> None:
    story = cluster("n1", "n2")
    experiment = story.propose()
    for attempt in range(2, 12):
        fate = story.dies(experiment, f"n{attempt % 2 + 1}", details={"preempted": True})
        assert fate == Retry(attempt, frozenset())
    assert isinstance(story.dies(experiment, "n1"), Retry)
    assert isinstance(story.dies(experiment, "n2"), Crash)


def test_a_cancelled_run_counts_as_an_attempt_and_blames_neither_node_nor_idea() -> None:
    """As when somebody ends all jobs at once, and then once more."""
    nodes = ("n1", "n2", "n3", "n4")
    story, all_at_once = cluster(*nodes), {"cancelled": True}
    ideas = [story.propose() for _ in range(8)]
    for attempt in (2, 3):
        for number, idea in enumerate(ideas):
            node = nodes[(number + attempt) % 4]
            assert story.dies(idea, node, details=all_at_once) == Retry(attempt, frozenset())
    for idea in ideas[1:]:
        story.run(idea, 1.9, node="n1")
    assert policy.excluded_nodes(story.state) == frozenset()
    assert not any(run.died for runs in story.state.nodes.values() for run in runs)
    assert isinstance(story.dies(ideas[0], "n1", details=all_at_once), Park)  # not for ever


def test_another_gpu_model_is_neither_the_nodes_nor_the_ideas_fault() -> None:
    story, wrong = cluster("n1", "n2", "n3"), {"misplaced": True}
    story.put("branch_added", branch="choosy", settings={"gpu": "h100"})
    for node in ("n1", "n1", "n3"):
        experiment = story.propose("choosy")
        assert isinstance(story.dies(experiment, node, details=wrong), Retry)
        story.run(experiment, 1.9, node="n2")
        story.decide(experiment)
    assert policy.excluded_nodes(story.state) == frozenset()
    fresh = story.propose("choosy")
    assert policy.avoided_nodes(story.state, story.state.record(fresh), seed=1) == {"n1", "n3"}
    assert story.dies(story.propose("choosy"), "n2").avoid == {"n1", "n2", "n3"}
    assert story.dies(story.propose(), "n2").avoid == {"n2"}  # the others' runs may go there


def test_attempts_that_find_no_right_gpu_are_bounded() -> None:
    story = cluster("n1", "n2", "n3")
    experiment = story.propose()
    fates = [story.dies(experiment, f"n{n}", details={"misplaced": True}) for n in (1, 2, 3)]
    assert [type(fate) for fate in fates] == [Retry, Retry, Park]


def test_a_node_is_excluded_after_two_different_experiments_that_others_ran() -> None:
    story = cluster("good")
    for number in (1, 2):
        assert policy.excluded_nodes(story.state) == frozenset()
        experiment = story.propose()
        assert isinstance(story.dies(experiment, "bad"), Retry)
        story.run(experiment, 1.9 / number, node="good")
        story.decide(experiment)
    assert policy.excluded_nodes(story.state) == {"bad"}
    assert story.dies(story.propose(), "n3").avoid == {"bad", "n3"}


def test_one_experiment_that_dies_twice_excludes_no_node() -> None:
    story = cluster("good")
    experiment = story.propose()
    story.dies(experiment, "bad")
    story.dies(experiment, "worse")
    story.run(experiment, 1.9, node="good")
    assert policy.excluded_nodes(story.state) == frozenset()


def test_rare_deaths_in_a_long_campaign_exclude_no_node() -> None:
    story = cluster("n1", "n2")
    for i in range(60):
        experiment = story.propose()
        if i % 25 == 0:
            story.dies(experiment, "n1")
            story.run(experiment, 3.0, node="n2")
        else:
            story.run(experiment, 3.0, node="n1")
        story.decide(experiment)
    assert policy.excluded_nodes(story.state) == frozenset()


def test_three_parked_in_a_row_pause_the_campaign_and_resuming_counts_anew() -> None:
    story = cluster("only")
    for number in range(3):
        assert policy.pause_reason(story.state) is None, number
        experiment = story.propose()
        story.dies(experiment, "only")
        story.dies(experiment, "only")
        story.decide(experiment)
    assert "3 experiments in a row" in (policy.pause_reason(story.state) or "")
    story.put("resumed")
    assert policy.pause_reason(story.state) is None


def test_parked_baselines_pause_their_own_branches_and_not_the_campaign() -> None:
    story = cluster("only")
    for number in range(4):
        story.put("branch_added", branch=f"b{number}", settings={})
        baseline = story.propose(f"b{number}")
        story.dies(baseline, "only")
        story.dies(baseline, "only")
        assert story.decide(baseline).verdict == "parked"
    assert policy.pause_reason(story.state) is None


def test_a_confirming_run_that_dies_is_tried_again_too() -> None:
    story = cluster("n1", "n2")
    assert story.dies("e0001", "n1", seed=2, purpose="confirm") == Retry(2, frozenset({"n1"}))
    assert story.state.record("e0001").verdict == "keep"


# -- deciding again -------------------------------------------------------------------------------


def test_a_decision_that_was_altered_is_found() -> None:
    story = greedy()
    story.experiment(2.5)
    altered = [dict(event) for event in story.events]
    altered[-1]["decision"] = {**altered[-1]["decision"], "verdict": "keep"}
    (difference,) = deciding.verify(altered)
    assert difference.experiment == "e0002"
    assert "verdict was 'keep', again 'discard'" in str(difference)


def test_a_displaced_writers_decision_is_not_judged() -> None:
    story = greedy()
    story.experiment(2.5)
    late = {**story.events[-1], "fence": 0, "n": story.state.events}
    assert deciding.verify([*story.events, late]) == []


def test_a_changed_configuration_changes_later_decisions_only() -> None:
    story = greedy(per_line=0.1)
    assert story.experiment(1.95, lines_added=1).verdict == "discard"
    story.put("config_changed", config={"keep": {"per_line": 0.0}})
    assert story.experiment(1.95, lines_added=1).verdict == "keep"
    assert deciding.verify(story.events) == []


ENDS = st.sampled_from(["ok", "ok", "ok", "ok", "crash", "infrastructure", "preempted", "lost"])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_deciding_again_from_every_prefix_gives_what_was_decided(data: st.DataObject) -> None:
    """Parallel runs on two branches that end, die and are retried in any order."""
    story = Story("main", "wide", keep={"tie": 0.02, "per_line": 0.01})
    for _ in range(data.draw(st.integers(5, 40))):
        _one_step(story, data)
    assert deciding.verify(story.events) == []
    for cut in range(len(story.events)):
        prefix = history.fold(story.events[:cut])
        event = story.events[cut]
        if event["event"] == "decided":
            recorded = event["decision"]
            assert to_json(policy.decide(prefix, recorded["experiment"])) == recorded
    ended = [e["result"]["run"] for e in story.events if e["event"] == "run_ended"]
    assert len(ended) == len(set(ended))


def _one_step(story: Story, data: st.DataObject) -> None:
    """What a controller might do next: propose, end a run, or change the rule's settings."""
    running = story.state.running()
    choices = ["propose"] * (len(running) < 5) + ["end"] * 2 * bool(running) + ["config"]
    choice = data.draw(st.sampled_from(choices))
    if choice == "config":
        tie = data.draw(st.sampled_from([0.0, 0.02]))
        story.put("config_changed", config={"keep": {"tie": tie, "per_line": 0.01}})
    elif choice == "propose":
        branch = data.draw(st.sampled_from(["main", "wide"]))
        added, removed = (data.draw(st.integers(0, 5)) for _ in range(2))
        experiment = story.propose(branch, lines_added=added, lines_removed=removed)
        _start(story, story.intend(experiment), data)
    else:
        run = data.draw(st.sampled_from(running)).run
        _end(story, run.id, data)
        if isinstance(
            policy.after(story.state, story.state.record(run.experiment), run.seed), Retry
        ):
            _start(story, story.intend(run.experiment), data)
        else:
            story.decide(run.experiment)


def _start(story: Story, run: str, data: st.DataObject) -> None:
    story.submit(run, data.draw(st.sampled_from(["n1", "n2", "n3"])))


def _end(story: Story, run: str, data: st.DataObject) -> None:
    how = data.draw(ENDS)
    if how == "ok":
        story.end(run, data.draw(st.integers(150, 210)) / 100)
    elif how in ("preempted", "lost"):
        story.end(run, None, "infrastructure", details={"preempted": how == "preempted"})
    else:
        story.end(run, None, how)
