"""The screen: it may go away while a campaign runs."""

from __future__ import annotations

import io
import os

import pytest

from jobs import screen
from jobs.screen import Screen


def test_on_a_terminal_progress_stands_in_one_line_until_something_is_said() -> None:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    shown = Screen(out)
    for text in ("e0001 10 %", "e0001 20 %", "e0001 20 %"):
        shown.show(text)
    shown.say("kept")
    assert out.getvalue() == "\r\x1b[Ke0001 10 %\r\x1b[Ke0001 20 %\r\x1b[Kkept\n"


def test_what_a_model_or_a_program_said_moves_no_cursor_and_writes_no_clipboard() -> None:
    out = io.StringIO()
    shown = Screen(out)
    shown.say("main: no proposal now: \x1b]52;c;ZXZpbA==\x07\x1b[2J\nand more")
    assert out.getvalue() == "main: no proposal now:  ]52;c;ZXZpbA==  [2J\nand more\n"


def test_in_a_log_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    shown = Screen(out)
    shown.show("too soon")
    monkeypatch.setattr(screen, "QUIET_S", 0.0)
    shown.show("e0001 10 %")
    assert out.getvalue() == "  e0001 10 %\n"


def test_a_reader_that_has_left_is_no_trouble() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:  # closing it writes what is left in its buffer
        screen = Screen(out)
        screen.say("one")
        screen.say("two")
