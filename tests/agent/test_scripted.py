"""Edits from a file, played in their order."""

from __future__ import annotations

import json

import pytest
from tale import PATH, PROGRAM, Tale, settings

from agent.scripted import Scripted
from jobs.errors import UserError
from jobs.model import Proposal, Unavailable


def script(tmp_path, *edits) -> Scripted:
    path = tmp_path / "edits.yaml"
    path.write_text(json.dumps(list(edits)))
    return Scripted(settings(script=str(path)))


def test_edits_are_played_in_order_and_then_it_is_at_its_end(tmp_path):
    asked = script(
        tmp_path,
        {"description": "longer", "set": {"warmdown": 0.7}, "tags": ["schedule"]},
        {"description": "deeper", "replace": [["depth=2", "depth=3"]], "hypothesis": "capacity"},
    )
    tale, found = Tale(), []
    for _ in range(3):
        found.append(asked.propose(tale.state, "main", tale.context()))
        if isinstance(found[-1], Proposal):
            tale.accept(found[-1], 1.7, "discard")
    assert found[0].files == {PATH: PROGRAM.replace("warmdown=0.5", "warmdown=0.7")}
    assert found[1].files == {PATH: PROGRAM.replace("depth=2", "depth=3")}
    assert (found[1].description, found[1].hypothesis) == ("deeper", "capacity")
    assert isinstance(found[2], Unavailable)
    assert found[2].until is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"replace": [["nothing like it", "x"]]}, "0 times, not once"),
        ({"set": {"rate": 1}}, "no constant rate"),
        ({"set": {"depth": 3}, "file": "x.py"}, "x.py may not be changed"),
        ({"replace": [["import torch", "import socket"]]}, "imports socket"),
    ],
)
def test_an_edit_that_cannot_be_run_is_told_in_words(tmp_path, entry, words):
    tale = Tale()
    asked = script(tmp_path, {"description": "bad", **entry})
    found = asked.propose(tale.state, "main", tale.context())
    assert isinstance(found, Unavailable)
    assert words in found.reason
    assert "edit 1 of the script (bad)" in found.reason


@pytest.mark.parametrize("text", ["{}", "- 3", "- {description: x}", "[", "- {set: {a: 1}}"])
def test_a_malformed_script_is_refused_at_once(tmp_path, text):
    path = tmp_path / "edits.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"edits\.yaml"):
        Scripted(settings(script=str(path)))


def test_a_missing_script_is_told():
    with pytest.raises(UserError, match="could not be read"):
        Scripted(settings(script="/no/such/file"))
