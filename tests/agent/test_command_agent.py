"""Any coding agent by its command line: copies in, the program back out, nothing else."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from pathlib import Path

import pytest
from server import KEY
from tale import PATH, PROGRAM, Tale, settings

from agent.command import Command
from jobs.model import Proposal, Unavailable

LAST = """echo '{"hypothesis": "h", "description": "deeper", "tags": ["model"]}'"""
DEEPER = f"sed -i s/depth=2/depth=3/ {PATH}"


def ask(script: str, tale: Tale | None = None, **changes) -> Proposal | Unavailable:
    """What comes of an agent that is a shell script."""
    tale = tale or Tale()
    given = settings(argv=("bash", "-c", script), **{"deadline": 20.0, **changes})
    return Command(given).propose(tale.state, "main", tale.context())


def test_an_edit_is_taken_back_with_its_words():
    found = ask(f"cat > prompt; {DEEPER}; {LAST}")
    assert isinstance(found, Proposal), found.reason
    assert found.files == {PATH: PROGRAM.replace("depth=2", "depth=3")}
    assert (found.description, found.hypothesis) == ("deeper", "h")
    assert found.researcher == "command:bash"
    assert found.tags == ("model", "model", "refused:prompt")


def test_the_agent_sees_copies_of_program_brief_and_records(tmp_path):
    tale = Tale()
    name = tale.add({PATH: PROGRAM + "a = 1\n"}, 1.7, "discard", description="swish")
    tale.shelf.logs[name], tale.shelf.diffs[name] = "its log", "its diff"
    seen = tmp_path / "seen"
    ask(f"pwd > {seen}; cat BRIEF.md program.md trainer/prepare.py records/* - >> {seen}", tale)
    text = seen.read_text()
    for words in ("swish", "Lower val_bpb", "The frozen half", "its log", "its diff"):
        assert words in text
    assert "End with one line of JSON" in text
    assert not Path(text.split("\n")[0]).exists()  # the scratch folder is gone


def test_edits_of_other_files_come_to_nothing_and_are_recorded():
    script = (
        f"echo x >> trainer/prepare.py; echo y > new.py; ln -s /etc/passwd link; {DEEPER}; {LAST}"
    )
    found = ask(script)
    assert list(found.files) == [PATH]
    assert {"refused:link", "refused:new.py", "refused:trainer/prepare.py"} <= set(found.tags)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f"rm {PATH}; ln -s /etc/passwd {PATH}", "Too many levels"),
        (f"rm {PATH}", "No such file"),
        (f"rm {PATH}; mkfifo {PATH}", "no plain file"),
        (f"printf '\\xff' > {PATH}", "utf-8"),
        (f"echo 'import socket' >> {PATH}", "imports socket"),
        ("true", "nothing was changed"),
        (f"{DEEPER}; exit 3", "exit status 3"),
    ],
)
def test_what_cannot_be_run_is_told_in_words(script, words):
    found = ask(script)
    assert isinstance(found, Unavailable)
    assert words in found.reason
    assert found.until is not None


def test_a_refusal_goes_back_to_the_agent():
    mends = f"grep -q refused <&0 && sed -i '/socket/d' {PATH} || echo 'import socket' >> {PATH}"
    found = ask(f"{DEEPER}; {mends}; {LAST}")
    assert isinstance(found, Proposal), found.reason
    assert "socket" not in found.files[PATH]


def test_a_deadline_ends_the_whole_process_group(tmp_path):
    mark = tmp_path / "alive"
    began = time.monotonic()
    found = ask(f"(while sleep 0.1; do date > {mark}; done) & sleep 60", deadline=1.0)
    assert time.monotonic() - began < 5
    assert "agent.deadline" in found.reason
    mark.unlink(missing_ok=True)
    time.sleep(0.4)
    assert not mark.exists()


def test_memory_beyond_the_cap_ends_it():
    hog = "python3 -c 'x = bytearray(300_000_000); import time; time.sleep(30)'"
    found = ask(hog, memory_mb=100)
    assert "agent.memory_mb" in found.reason


def test_stop_ends_it_within_two_seconds():
    tale = Tale()
    threading.Timer(0.5, tale.stop.set).start()
    began = time.monotonic()
    assert ask("sleep 30", tale).reason.endswith("stopping")
    assert time.monotonic() - began < 2.5


def test_what_is_changed_removed_or_made_beside_is_told_also_where_nothing_comes_of_it():
    found = ask("echo x >> program.md; rm trainer/prepare.py; echo > records/new; exit 3")
    assert isinstance(found, Unavailable)
    assert "changed program.md, records/new, trainer/prepare.py" in found.reason


def test_a_record_that_was_changed_is_told():
    tale = Tale()
    name = tale.add({PATH: PROGRAM + "a = 1\n"}, 1.7, "discard")
    found = ask(f"echo x >> records/{name}.log; {DEEPER}; {LAST}", tale)
    assert f"refused:records/{name}.log" in found.tags


@pytest.mark.parametrize(
    "script",
    [
        f"""echo "x = '$ANTHROPIC_API_KEY'" >> {PATH}; {LAST}""",
        f"""{DEEPER}; printf '{{"description": "\\\\u006fwn-secret"}}\\n'""",
    ],
)
def test_a_proposal_that_holds_the_key_is_refused(script, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "own-secret")  # looks like no key
    found = ask(script)
    assert isinstance(found, Unavailable)
    assert "contains the API key" in found.reason


def test_a_key_is_taken_out_before_its_end_is_cut_off(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "an-own-secret")
    found = ask("printf '%s' $ANTHROPIC_API_KEY; printf 'x%.0s' {1..290}; exit 3")
    assert "[key]" in found.reason or "x" * 200 in found.reason
    assert "secret" not in found.reason


def fake_claude(tmp_path, monkeypatch, report: dict, code: int = 0) -> Path:
    """A `claude` on PATH that edits train.py and notes how it was called."""
    program = tmp_path / "claude"
    program.write_text(
        f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {tmp_path}/argv\n"
        f"cat /proc/$$/cmdline > {tmp_path}/cmdline\n{DEEPER}\n"
        f"cat <<'END'\n{json.dumps(report)}\nEND\nexit {code}\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_the_claude_preset_is_fenced_in_and_its_report_is_believed(tmp_path, monkeypatch):
    usage = {"input_tokens": 5, "output_tokens": 7, "cache_read_input_tokens": 100}
    said = 'Done.\n{"hypothesis": "h", "description": "deeper", "tags": []}'
    report = {"is_error": False, "result": said, "total_cost_usd": 0.25, "usage": usage}
    fake_claude(tmp_path, monkeypatch, report)
    tale = Tale()
    found = Command(settings(preset="claude")).propose(tale.state, "main", tale.context())
    assert isinstance(found, Proposal), found.reason
    assert (found.description, found.researcher) == ("deeper", "command:claude")
    assert (found.usage.dollars, found.usage.output_tokens) == (0.25, 7)
    argv = (tmp_path / "argv").read_text().split("\n")
    assert {"--bare", "--restricted", "--strict-mcp-config"} <= set(argv)
    assert argv[argv.index("--tools") + 1] == "Read,Edit,Write"
    assert f"Edit(./{PATH})" in argv
    assert KEY not in (tmp_path / "cmdline").read_text()


@pytest.mark.parametrize(("report", "code"), [({"is_error": True, "result": "529"}, 0), ({}, 1)])
def test_a_report_of_an_error_is_no_edit_whatever_the_exit_status(
    tmp_path, monkeypatch, report, code
):
    fake_claude(tmp_path, monkeypatch, report, code)
    tale = Tale()
    found = Command(settings(preset="claude")).propose(tale.state, "main", tale.context())
    assert isinstance(found, Unavailable)
    assert ("529" if report else "no report") in found.reason
    assert found.usage.dollars == (0.0 if report else 3.0)


def test_a_refused_edit_is_mended_with_what_is_left_of_the_money(tmp_path, monkeypatch):
    report = {"is_error": False, "result": "no edit", "total_cost_usd": 1.25}
    fake_claude(tmp_path, monkeypatch, report)
    claude = tmp_path / "claude"
    claude.write_text(
        f"#!/bin/bash\necho \"$@\" >> {tmp_path}/argvs\ncat <<'END'\n{json.dumps(report)}\nEND\n"
    )
    tale = Tale()
    found = Command(settings(preset="claude")).propose(tale.state, "main", tale.context())
    assert isinstance(found, Unavailable)
    told = (tmp_path / "argvs").read_text().split()
    caps = [float(told[i + 1]) for i, word in enumerate(told) if word == "--max-budget-usd"]
    assert caps == [3.0, 1.75, 0.5]
    assert "nothing is left" in found.reason
