"""program.md's front matter is read strictly, and enforced after a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import program
from jobs.model import Result

ROOT = Path(__file__).parents[2]


def test_all_limits_are_read():
    text = "---\nmay_change: [depth, Muon]\nmax_lines: 40\nmax_params: 50e6\n"
    text += "max_memory_gb: 70.5\n---\n# Goal\n"
    assert program.limits(text) == program.Limits(("depth", "Muon"), 40, 50_000_000, 70.5)


def test_without_front_matter_nothing_is_limited():
    assert program.limits("# Goal\n---\nmax_lines: 3\n") == program.Limits()


@pytest.mark.parametrize(
    ("front", "words"),
    [
        ("max_line: 3", "max_lines?"),
        ("max_lines: many", "must be a number"),
        ("max_lines: 2.5", "whole number"),
        ("max_params: -1", "above 0"),
        ("max_memory_gb: true", "above 0"),
        ("may_change: {a: 1}", "list of names"),
        ("- a\n- b", "`key: value`"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_front_matter_is_told_in_words(front, words):
    with pytest.raises(program.ProgramError) as error:
        program.limits(f"---\n{front}\n---\n# Goal\n")
    assert words in str(error.value)


def test_a_front_matter_that_never_closes_is_told():
    with pytest.raises(program.ProgramError, match="never closes"):
        program.limits("---\nmax_lines: 3\n")


def test_results_over_a_limit_are_named_and_unknown_ones_pass():
    demands = program.Limits(max_params=1000, max_memory_gb=2)
    assert program.check_result(program.Limits(max_memory_gb=2), Result("r", "ok", "", 1.0)) is None
    assert "left no" in program.check_result(demands, Result("r", "ok", "", 1.0))
    assert program.check_result(demands, Result("r", "ok", "", 1.0, params=1000)) is None
    assert "1,001" in program.check_result(demands, Result("r", "ok", "", 1.0, params=1001))
    on_gpu = Result("r", "ok", "", 1.0, params=1000, memory_mb=9000, gpu_memory_mb=2000)
    assert program.check_result(demands, on_gpu) is None
    large = Result("r", "ok", "", 1.0, params=1000, memory_mb=2100)
    assert "2.05 GB" in program.check_result(demands, large)


@pytest.mark.parametrize(
    "path", ["program.md", *sorted(p.name for p in ROOT.glob("programs/*.md"))]
)
def test_the_shipped_programs_can_be_read(path):
    file = ROOT / path if path == "program.md" else ROOT / "programs" / path
    program.limits(file.read_text())
    assert len(program.split(file.read_text())[1]) > 500
