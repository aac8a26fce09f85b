"""The screen: it may go away while a campaign runs."""

from __future__ import annotations

import os

from jobs.screen import Screen


def test_a_reader_that_has_left_is_no_trouble() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:  # closing it writes what is left in its buffer
        screen = Screen(out)
        screen.say("one")
        screen.say("two")
