"""The ledger file: durable lines, a torn end, and disks that refuse."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from faults import ordinary_user

from jobs import ledger
from jobs.errors import Displaced, LedgerBroken, Paused

ROOT = Path(__file__).parents[2]


def a_ledger(folder: Path, events: int = 3, fence: int = 1) -> Path:
    path = folder / "ledger.jsonl"
    book = ledger.Ledger(path, fence)
    for i in range(events):
        book.append("told", branch="main", text=f"line {i}")
    book.close()
    return path


def texts(path: Path) -> list[str]:
    return [event["text"] for event in ledger.read(path)]


def in_process(
    code: str, folder: Path, user: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `code` with `book`, a writer of the ledger in `folder`, that already holds one line."""
    prelude = f"""
        import errno, os, resource, signal, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        from pathlib import Path
        from faults import deny
        from jobs import ledger
        from jobs.errors import Paused
        path = Path({str(folder)!r}) / "ledger.jsonl"
        def open_book():
            return ledger.Ledger(path, 1)
    """
    whole = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", whole],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_line_carries_its_number_writer_times_and_name(tmp_path: Path) -> None:
    (line, *_) = (json.loads(text) for text in a_ledger(tmp_path, 1).read_text().splitlines())
    assert {"v": 1, "n": 0, "fence": 1, "event": "told", "text": "line 0"}.items() <= line.items()
    assert line["time"].endswith("Z")
    assert isinstance(line["mono"], float)
    assert "at" not in line


def test_several_events_are_one_write_and_numbered_on(tmp_path: Path) -> None:
    book = ledger.Ledger(a_ledger(tmp_path), 1)
    made = book.append_all([("told", {"text": "a"}), ("told", {"text": "b"})])
    assert [event["n"] for event in made] == [3, 4]
    assert list(ledger.read(book.path))[3:] == made


def test_an_event_is_found_again_by_its_place_however_long_its_line(tmp_path: Path) -> None:
    book = ledger.Ledger(tmp_path / "ledger.jsonl", 1)
    long, short = book.append("told", text="é" * 100_000), book.append("told", text="short")
    lines = ledger.Lines(book.path)
    assert lines(short["at"]) == short
    assert lines(long["at"]) == long


def test_a_torn_last_line_is_no_event_and_is_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    path = a_ledger(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"v": 1, "n": 3, "fen')
    tail = ledger.Tail()
    assert len(list(ledger.read(path, tail=tail))) == 3
    assert (tail.offset, tail.torn) == (len(whole), b'{"v": 1, "n": 3, "fen')
    assert path.read_bytes() != whole  # reading repairs nothing
    book = ledger.Ledger(path, 1)
    assert book.torn == b'{"v": 1, "n": 3, "fen'
    assert path.read_bytes() == whole
    assert book.append("told", text="next")["n"] == 3


def test_every_cut_of_a_ledger_reads_as_the_whole_lines_before_it(tmp_path: Path) -> None:
    path = a_ledger(tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        book = ledger.Ledger(path, 1)
        assert len(list(ledger.read(path))) == whole[:size].count(b"\n")
        book.append("told", branch="main", text="on")
        book.close()
        assert texts(path)[-1] == "on"


@pytest.mark.parametrize("broken", [b"{]\n", b"[1]\n", b'{"v": 1}\n', b"\n", b"\xff\xfe\n"])
def test_a_broken_line_elsewhere_is_named_by_its_number(tmp_path: Path, broken: bytes) -> None:
    path = a_ledger(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], broken, *lines[1:]]))
    with pytest.raises(LedgerBroken, match=r"line 2 is no ledger event.*head -n 1"):
        list(ledger.read(path))


def test_a_newer_version_is_refused_in_words(tmp_path: Path) -> None:
    path = a_ledger(tmp_path, 1)
    path.write_text(path.read_text().replace('"v":1', '"v":2'))
    with pytest.raises(LedgerBroken, match="newer autoresearch"):
        list(ledger.read(path))


def test_a_number_that_json_does_not_know_is_refused_before_it_is_written(tmp_path: Path) -> None:
    book = ledger.Ledger(a_ledger(tmp_path), 1)
    with pytest.raises(ValueError, match="JSON"):
        book.append("told", text=float("nan"))
    assert book.append("told", text="fine")["n"] == 3


def test_the_writer_is_checked_before_each_append(tmp_path: Path) -> None:
    def check() -> None:
        raise Displaced("gone")

    path = a_ledger(tmp_path)
    book = ledger.Ledger(path, 1, check)
    with pytest.raises(Displaced):
        book.append("told", text="late")
    assert len(texts(path)) == 3


def test_a_line_of_a_higher_writer_displaces_the_lower_one(tmp_path: Path) -> None:
    path = a_ledger(tmp_path)
    old, new = ledger.Ledger(path, 1), ledger.Ledger(path, 2)
    new.append("told", text="new")
    with pytest.raises(Displaced, match="writer 2"):
        old.append("told", text="old")


def test_late_lines_of_a_displaced_writer_do_not_disturb_the_numbers(tmp_path: Path) -> None:
    path = a_ledger(tmp_path)
    new = ledger.Ledger(path, 2)
    new.append("told", text="new")
    late = dict(json.loads(path.read_text().splitlines()[0]), n=77, text="late")
    with open(path, "a") as file:
        file.write(json.dumps(late) + "\n")
    assert new.append("told", text="newer")["n"] == 4
    assert ledger.Ledger(path, 3).append("told", text="newest")["n"] == 5


def test_a_late_line_before_the_new_writers_first_is_not_overlooked(tmp_path: Path) -> None:
    path = a_ledger(tmp_path)
    old, new = ledger.Ledger(path, 1), ledger.Ledger(path, 2)
    old.append("told", text="readers will see this")
    with pytest.raises(Paused, match="by a displaced controller while this one started"):
        new.append("told", text="decided without it")
    assert new.append("told", text="after looking again")["n"] == 4


def test_a_disk_that_is_full_pauses_and_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    # A file size limit cuts a write short first, and refuses the rest: a torn line, for real.
    a_ledger(tmp_path)
    done = in_process(
        """
        book = open_book()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = os.path.getsize(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, resource.RLIM_INFINITY))
        try:
            book.append("told", text="does not fit")
        except Paused as error:
            print(error)
        assert os.path.getsize(path) == size
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        print(book.append("told", text="fits")["n"])
        """,
        tmp_path,
    )
    assert "could not be appended to: File too large" in done.stdout, done.stderr
    assert done.stdout.endswith("3\n")
    assert texts(tmp_path / "ledger.jsonl")[-1] == "fits"


def test_a_write_that_fails_after_another_took_over_cuts_off_none_of_that_ones_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync, writers = a_ledger(tmp_path), os.fsync, [1]

    def check() -> None:
        if writers[-1] > 1:
            raise Displaced("another holds it")

    def hangs(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        writers.append(2)
        new = ledger.Ledger(path, 2)
        for text in ("of the new writer", "of the new writer, too"):
            new.append("told", text=text)
        raise OSError(errno.EIO, "the server came back without it")

    book = ledger.Ledger(path, 1, check)
    monkeypatch.setattr(os, "fsync", hangs)
    with pytest.raises(Displaced):
        book.append("told", text="late")
    assert texts(path)[-2:] == ["of the new writer", "of the new writer, too"]


def test_a_ledger_that_something_has_cut_pauses_before_anything_is_added(tmp_path: Path) -> None:
    path = a_ledger(tmp_path)
    book = ledger.Ledger(path, 1)
    os.truncate(path, before := path.stat().st_size // 2)
    with pytest.raises(Paused, match=r"was cut"):
        book.append("told", text="after the gap")
    assert path.stat().st_size == before


@pytest.mark.parametrize(("call", "error"), [("fsync", "EIO"), ("write", "ENOSPC")])
def test_a_disk_that_fails_pauses_and_nothing_half_recorded_is_read_back(
    tmp_path: Path, call: str, error: str
) -> None:
    path = a_ledger(tmp_path)
    before = path.read_bytes()
    done = in_process(
        f"""
        book = open_book()
        deny({call!r}, errno.{error})
        try:
            book.append("told", text="lost")
        except Paused as error:
            print(error, error.exit_code)
        """,
        tmp_path,
    )
    assert f"{os.strerror(getattr(errno, error))} ({error})" in done.stdout, done.stderr
    assert "everything recorded before is intact" in done.stdout
    assert done.stdout.endswith(" 3\n")
    assert path.read_bytes() == before


@pytest.mark.parametrize(("target", "mode"), [("ledger.jsonl", 0o444), (".", 0o555)])
def test_a_ledger_that_may_not_be_written_pauses_in_words(target: str, mode: int) -> None:
    with ordinary_user() as folder:
        path = a_ledger(folder)
        if target == ".":
            path.unlink()
        (folder / target).chmod(mode)
        with pytest.raises(Paused, match=r"opened: Permission denied \(EACCES\).*write permission"):
            ledger.Ledger(path, 1)
        folder.chmod(0o755)


def test_recorded_ledgers_replay_for_ever() -> None:
    recorded = sorted((Path(__file__).parent / "ledgers").glob("v*.jsonl"))
    assert recorded
    for path in recorded:
        tail = ledger.Tail()
        assert len(list(ledger.read(path, tail=tail))) > 20
        assert tail.offset == path.stat().st_size
