"""Text that others wrote (descriptions, logs, git's messages), made safe to print and to store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def one_line(text: str | bytes, limit: int | None = None) -> str:
    """One line of printable characters: breaks, tabs and control characters become one space.

    Bidirectional marks and half surrogates count as control characters; `limit` is in characters.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def lines(text: str) -> str:
    """The same for text of several lines: line breaks (as \\n) and tabs stay."""
    return "\n".join(
        "".join(c if c.isprintable() or c == "\t" else " " for c in line).rstrip()
        for line in text.splitlines()
    )


def columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Rows of cells as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join(["", name.ljust(widths[0]), *aligned]).rstrip()
