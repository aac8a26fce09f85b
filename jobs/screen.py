"""What people see while a campaign runs: lines that stay, and one line of progress."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

from jobs.text import lines, one_line

QUIET_S = 60.0  # between two lines of progress where no terminal overwrites them


class Screen:
    """Prints to a terminal or to a log. Safe to keep calling at any rate."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._terminal = self._out.isatty()
        self._shown, self._shown_at = "", time.monotonic()

    def say(self, line: str) -> None:
        """A line that stays, or several. What a model or a program said may be among it."""
        line = lines(line)
        self._print(f"\r\x1b[K{line}\n" if self._shown and self._terminal else f"{line}\n")
        self._shown, self._shown_at = "", time.monotonic()

    def show(self, text: str) -> None:
        """Progress: overwritten by what comes next; in a log, once a minute."""
        text = text if text.isprintable() else one_line(text)
        if text == self._shown or not text:
            return
        now = time.monotonic()
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._print(f"\r\x1b[K{text[:width]}")
        elif now - self._shown_at >= QUIET_S:
            self._print(f"  {text}\n")
            self._shown_at = now
        self._shown = text

    def _print(self, text: str) -> None:
        try:
            print(text, end="", file=self._out, flush=True)
        except OSError:
            # A closed terminal, a pipe that nobody reads: no reason to end a night. What comes
            # later, the interpreter's own last flush included, goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), self._out.fileno())
