"""Numeric constants are found by syntax and replaced byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import constants

TRAIN = Path(__file__).parents[2] / "trainer" / "train.py"


def test_of_a_block_per_scale_only_the_active_one_counts():
    text = 'C = {"cpu": dict(depth=2, rate=0.04), "h100": dict(depth=8)}\nX = 3\n'
    assert constants.values(text, "cpu") == {"depth": 2, "rate": 0.04}
    assert constants.values(text, "h100") == {"depth": 8}


def test_without_blocks_all_numbers_at_the_top_level_count():
    text = "A = 1\nB: float = -3e-4\nC = 2**19\nD = 'x'\nE = True\nF = f(2)\n"
    text += "betas = (0.8, 0.95)\ncomplex = (-8)**0.5\n"
    found = {"A": 1, "B": -0.0003, "C": 524288, "betas[0]": 0.8, "betas[1]": 0.95}
    assert constants.values(text, "cpu") == found


def test_replacing_keeps_every_other_byte():
    text = '# é\r\nC = {"cpu": dict(a=1,  b = 2.50 , c=(0.8, 0.95))}  # two  spaces\r\n\x0cé = 1'
    changed = constants.replace(text, {"b": 0.031, "c[1]": 0.9}, "cpu")
    assert changed == text.replace("2.50", "0.031").replace("0.95", "0.9")


def test_constants_of_the_shipped_program_can_be_replaced_alone():
    text = TRAIN.read_text()
    for scale in ("cpu", "small", "h100"):
        before = constants.values(text, scale)
        assert {"depth", "matrix_rate", "warmdown"} <= before.keys()
        for name in list(before)[::5]:
            value = before[name]
            after = constants.values(constants.replace(text, {name: value + 1}, scale), scale)
            assert after == before | {name: value + 1}


def test_an_absent_constant_is_named_with_those_there_are():
    with pytest.raises(KeyError, match=r"no constant lr; there are depth"):
        constants.replace("depth = 2\n", {"lr": 1})


@pytest.mark.parametrize(
    "text",
    [
        *("def (:", "x = 1 / 0", "x = 9**9**9", "x = 1e999", "x = 1 << 2000", "x = 1 << (1 << 40)"),
        pytest.param(f"x = {'9' * 400}", id="400 digits"),
    ],
)
def test_what_has_no_value_is_no_constant(text):
    assert constants.values(text) == {}


def test_pieces_name_what_an_edit_changed():
    text = TRAIN.read_text()
    changed = constants.replace(text, {"depth": 7}, "cpu").replace('"SSSL"', '"L"', 1)
    changed = changed.replace("def rotate(", "def rotate(unused=1, *", 1)
    before, after = constants.pieces(text, "h100"), constants.pieces(changed, "h100")
    names = {name for name in before if before[name] != after[name]}
    assert names == {"window_pattern", "CONSTANTS", "rotate"}
