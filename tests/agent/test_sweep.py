"""The search without a model: deterministic, resumable, within its ranges."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from tale import PATH, PROGRAM, Tale, settings

from agent import constants, sweep
from agent.sweep import Sweep
from jobs.model import Proposal, Unavailable

TRAIN = (Path(__file__).parents[2] / "trainer" / "train.py").read_text()


def propose(tale: Tale, **given) -> Proposal | Unavailable:
    return Sweep(settings(**given)).propose(tale.state, "main", tale.context())


def loss(files: dict[str, str]) -> float:
    """A bowl whose bottom is at matrix_rate 0.1, warmdown 0.8."""
    found = constants.values(files[PATH], "cpu")
    rate, warmdown = math.log(found["matrix_rate"] / 0.1), found["warmdown"] - 0.8
    return 1.5 + 0.05 * rate**2 + 0.2 * warmdown**2


def night(tale: Tale, count: int, **given) -> list[str]:
    """A greedy campaign by the sweep: descriptions."""
    best, said = loss(tale.heads["main"]), []
    for _ in range(count):
        found = propose(tale, **given)
        assert isinstance(found, Proposal), found.reason
        metric = loss(dict(found.files))
        tale.accept(found, metric, "keep" if metric < best else "discard")
        best, said = min(best, metric), [*said, found.description]
    return said


def test_a_proposal_moves_constants_of_the_active_block_and_says_so():
    found = propose(Tale())
    assert isinstance(found, Proposal)
    before, after = constants.values(PROGRAM, "cpu"), constants.values(found.files[PATH], "cpu")
    moved = [name for name in before if before[name] != after[name]]
    assert 1 <= len(moved) <= 2
    assert constants.values(found.files[PATH], "h100") == constants.values(PROGRAM, "h100")
    for name in moved:
        said = f"{name} {constants.spell(before[name])} -> {constants.spell(after[name])}"
        assert said in found.description
        assert name in found.tags
    assert found.researcher == "sweep"


def test_the_same_history_gives_the_same_proposal_in_a_new_process():
    one, two = Tale(), Tale()
    assert night(one, 8) == night(two, 8)
    again = [Sweep(settings()).propose(one.state, "main", one.context()) for _ in range(2)]
    assert again[0] == again[1]


def test_another_seed_gives_another_search():
    tale = Tale()
    first = Sweep(settings()).propose(tale.state, "main", tale.context(seed=1))
    assert first != Sweep(settings()).propose(tale.state, "main", tale.context(seed=2))


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_it_finds_its_way_down(sampler):
    tale = Tale()
    start = loss(tale.heads["main"])
    said = night(tale, 40, sampler=sampler)
    assert len(tale.known) == 1 + len(said) == 41  # no program twice
    assert loss(tale.heads["main"]) - 1.5 < 0.5 * (start - 1.5)


def test_crashed_running_and_foreign_experiments_are_history_like_any_other():
    tale = Tale()
    for number in range(12):
        files = {PATH: constants.replace(PROGRAM, {"matrix_rate": 0.01 + number / 50}, "cpu")}
        crash, running = number % 3 == 1, number % 3 == 2
        metric = None if crash or running else 1.7 + number / 100
        tale.add(files, metric, None if running else "discard", status="crash" if crash else "ok")
    tale.add({PATH: PROGRAM.replace("matrix_rate=0.04,  # of the", "x=1,  # of")}, 1.9, "discard")
    tale.add({PATH: "def broken(:"}, None, "discard", status="crash")
    assert isinstance(propose(tale), Proposal)


def test_a_crash_is_worse_than_any_score_and_a_run_in_flight_is_not_repeated():
    states = []
    for metric, verdict, status in ((1.5, "discard", "ok"), (None, "discard", "crash")):
        tale = Tale()
        name = tale.add({PATH: PROGRAM}, metric, verdict, status=status)
        states.append(sweep._as_optuna(tale.state.record(name), {}, {}).state.name)
    tale = Tale()
    name = tale.add({PATH: PROGRAM}, None, None)
    running = tale.state.record(name)
    states.append(sweep._as_optuna(running, {}, {}).state.name)
    assert states == ["COMPLETE", "PRUNED", "RUNNING"]


def test_values_that_repeat_end_in_words_not_in_a_loop():
    tale = Tale(source="depth = 2\nprint(depth)\n")
    for depth in (1, 3, 4):
        tale.add({PATH: f"depth = {depth}\nprint(depth)\n"}, 1.7, "discard")
    found = propose(tale)
    assert isinstance(found, Unavailable)
    assert found.until is None
    assert "none may be run" in found.reason


def test_a_program_without_numbers_is_told():
    found = propose(Tale(source="print('nothing')\n"))
    assert isinstance(found, Unavailable)
    assert "no number to move" in found.reason


def test_only_the_constants_allowed_are_moved():
    tale = Tale(program="---\nmay_change: [warmdown, beta]\n---\n")
    said = night(tale, 5, constants=("warmdown", "depth"))
    assert all(text.startswith("warmdown") for text in said)


def test_a_head_that_moved_keeps_the_ranges_of_the_baseline():
    tale = Tale()
    tale.add({PATH: PROGRAM.replace("0.04", "0.119")}, 1.5, "keep")
    for _ in range(12):
        found = propose(tale, constants=("matrix_rate",))
        rate = constants.values(found.files[PATH], "cpu")["matrix_rate"]
        assert 0.04 / 3.01 <= rate <= 0.04 * 3.01
        tale.accept(found, 1.6, "discard")


@pytest.mark.parametrize(
    ("name", "shipped", "low", "high"),
    [
        ("matrix_rate", 0.04, 0.0133, 0.12),
        ("embedding_rate", 0.6, 0.2, 1.8),
        ("share", 0.4, 0.1333, 1.0),
        ("beta", 0.95, 0.85, 0.984),
        ("depth", 8, 4, 16),
        ("width", 128, 64, 256),
        ("steps", 300, 100, 900),
        ("layers", 5, 2, 10),
        ("cap", -15.0, -45.0, -5.0),
    ],
)
def test_ranges_are_sensible(name, shipped, low, high):
    found = sweep.range_of(name, shipped)
    ends = []
    for end in ("low", "high"):
        trial = type("Trial", (), {})()
        trial.suggest_float = lambda label, low, high, end=end: low if end == "low" else high
        trial.suggest_int = trial.suggest_float
        ends.append(found.suggest(trial, "x", shipped))
    assert sorted(ends) == pytest.approx(sorted([low, high]), rel=0.01)
    assert isinstance(ends[0], type(shipped))


@pytest.mark.parametrize(("name", "shipped"), [("seed", 42), ("decay", 0.0), ("layers", -3)])
def test_what_has_no_scale_stays(name, shipped):
    assert sweep.range_of(name, shipped) is None


def test_every_constant_has_its_turn():
    keys = [("t.py", f"c{n}") for n in range(7)]
    first = {key for turn in range(4) for key in sweep.chosen(keys, 0, turn, turn)}
    assert first == set(keys)
    later = [sweep.chosen(keys, 0, turn, turn) for turn in range(14, 21)]
    assert sorted(key for one in later for key in one) == keys


def test_a_long_history_costs_no_more_than_its_best_and_newest():
    (one,) = Tale().state.experiments()
    records = [one._replace(id=f"e{n}", metric=random.random()) for n in range(5000)]
    kept = sweep.remembered(records, "lower")
    assert len(kept) <= sweep.REMEMBERED
    assert records[-1] in kept
    assert min(records, key=lambda record: record.metric) in kept


def test_the_shipped_program_can_be_swept_at_every_scale():
    for scale in ("cpu", "small", "h100"):
        tale = Tale(source=TRAIN)
        context = tale.context(scale=scale)
        found = Sweep(settings()).propose(tale.state, "main", context)
        assert isinstance(found, Proposal), found.reason
