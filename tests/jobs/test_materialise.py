"""What a run may take, from what the branch's baseline took."""

from pathlib import Path

import pytest
from story import Story

from jobs import config, materialise


def after_a_baseline(**times: float) -> Story:
    story = Story()
    baseline = story.propose()
    story.run(baseline, 2.0, **times)
    story.decide(baseline)
    return story


@pytest.mark.parametrize(("took", "allowed"), [(4.0, 60.0), (20.0, 100.0), (500.0, 600.0)])
def test_scoring_may_take_five_times_as_long_as_the_baselines(took: float, allowed: float) -> None:
    state = after_a_baseline(scoring_s=took).state
    assert materialise.scoring_limit_s(state, "main") == allowed
    assert materialise.scoring_limit_s(state, "new") == 600.0


@pytest.mark.parametrize(("took", "allowed"), [(4.0, 30.0), (20.0, 60.0)])
def test_the_feed_of_a_token_budget_closes_after_three_times_the_baselines_training(
    took: float, allowed: float
) -> None:
    tokens, wall = (config.parse({"budget": b}) for b in ({"tokens": 10**6}, {"wall": 300}))
    state = after_a_baseline(training_s=took).state
    assert materialise.feed_ceiling_s(state, tokens, "main") == allowed
    assert materialise.feed_ceiling_s(state, tokens, "new") == 3600.0
    assert materialise.feed_ceiling_s(state, wall, "main") is None


def test_a_commit_names_its_image_by_tag_by_bytes_and_by_what_a_registry_calls_it() -> None:
    address = "oras://host/name@sha256:1"
    facts = {"container_tag": "cpu", "container_sha256": "a" * 64, "registry_digest": address}
    site = materialise.Site(config.parse({"campaign": "night"}), Path("/night"), None, facts)
    told = materialise.trailers(site, {"Branch": "main"})
    assert (told["Campaign"], told["Branch"]) == ("night", "main")
    image = (told["Container-Tag"], told["Container-SHA256"], told["Registry-Digest"])
    assert image == ("cpu", "a" * 64, address)
    assert told["Data-Manifest-SHA256"] is None


def test_a_runs_limit_holds_no_more_time_for_scoring_than_scoring_may_take() -> None:
    five_minutes = config.parse({"budget": {"wall": 300, "startup_free": 60}})
    state = after_a_baseline(scoring_s=4.0).state
    limits = [materialise.wall_limit_s(state, five_minutes, name) for name in ("main", "new")]
    assert limits == [60 + 300 + 3 + scoring + 30 for scoring in (60, 600)]
