"""Branches side by side: counts, gains, and what a gain cost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from ended import autoresearch
from toylab import Lab

from jobs import compare
from jobs.model import Usage


def test_branches_stand_side_by_side_with_what_a_gain_cost(toy: Lab) -> None:
    state = toy.state
    spent = Usage(dollars=2.0)
    agent = {"kind": "anthropic", "model": "some-model"}
    main = replace(state.branch("main"), allocated_s=7200.0, spent=spent)
    settings = {"program": "programs/other.md", "agent": agent}
    other = replace(main, name="other", settings=settings, best_metric=None, paused="by order")
    first, second = compare.rows(replace(state, branches={"main": main, "other": other}))
    assert first["researcher"] == "scripted"
    assert [first[key] for key in ("experiments", "kept", "crashed")] == [5, 2, 1]
    assert [first[key] for key in ("first", "best", "best_experiment")] == [10.0, 2.0, "e0002"]
    assert first["gain"] == 8.0
    assert first["gain_per_gpu_hour"] == pytest.approx(4.0)
    assert first["gain_per_dollar"] == pytest.approx(4.0)
    assert (second["program"], second["researcher"]) == (
        "programs/other.md",
        "anthropic:some-model",
    )
    assert second["gain"] is second["gain_per_gpu_hour"] is second["gain_per_dollar"] is None
    assert second["state"] == "paused"


def test_hours_count_each_gpu_of_a_run(toy: Lab) -> None:
    state = toy.state
    main = replace(state.branch("main"), allocated_s=7200.0)
    executor = state.config["executor"] | {"kind": "slurm", "gpus": "h100:2"}
    found = replace(state, branches={"main": main}, config={**state.config, "executor": executor})
    assert compare.rows(found)[0]["gpu_hours"] == 4.0


def test_the_table_has_a_line_for_each_branch(toy: Lab) -> None:
    status, said = autoresearch(toy.root, "compare")
    header, line = said.splitlines()
    assert status == 0
    assert header.split()[:4] == ["branch", "program", "researcher", "experiments"]
    assert line.split()[:7] == ["main", "program.md", "scripted", "5", "2", "1", "10"]
    assert json.loads(autoresearch(toy.root, "compare", "--json")[1])[0]["branch"] == "main"
