"""What researchers propose: taken, refused, booked, and what program.md demands of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from toylab import SOLUTION, Lab, change, check_books

from agent import scripted
from jobs import proposals
from jobs.model import Proposal, Unavailable, Usage

MakeLab = Callable[..., Lab]


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
