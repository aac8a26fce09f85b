"""Programs that fail, cheat or attack: each a real run, which ends as PROTOCOL.md says it does.

Every run is also checked to leave no process and no shared folder behind (see runs.Started).
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import runs
from runs import HONEST, run, start

# Root also runs as an ordinary user; an ordinary user already is one.
AS_BOTH = pytest.mark.parametrize("user", [None, runs.USER] if os.getuid() == 0 else [None])
WITH_AND_WITHOUT = pytest.mark.parametrize("isolation", ["namespaces", "none"])


@pytest.fixture(scope="module", autouse=True)
def data():
    runs.data_folder()
    yield
    runs.remove_data()


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    return runs.reachable(tmp_path_factory.mktemp("run"))


@AS_BOTH
@WITH_AND_WITHOUT
def test_an_honest_program_is_scored(folder, user, isolation):
    result = run(folder, HONEST, user, isolation=isolation)
    assert (result["status"], result["isolation"]) == ("ok", isolation)
    assert result["value"] == pytest.approx(runs.uniform_bpb(), rel=1e-6)
    assert result["tokens"] == runs.SCALE.budget_amount


def test_a_syntax_error_is_a_crash(folder):
    result = run(folder, "def broken(:\n")
    assert result["status"] == "crash"
    assert "SyntaxError" in result["reason"]
    assert result["value"] is None


def test_ending_without_a_score_is_a_crash(folder):
    result = run(folder, "train()")
    assert result["status"] == "crash"
    assert "without asking to be scored" in result["reason"]


def test_a_program_that_never_connects_is_a_crash(folder):
    result = run(folder, "", command=["python", "-c", "print('hello')"])
    assert result["status"] == "crash"


def test_losses_that_are_nan_are_a_crash(folder):
    result = run(folder, "train()\nevaluate(float('nan'))")
    assert result["status"] == "crash"
    assert "NaN" in result["reason"]
    assert result["value"] is None


def test_negative_losses_are_invalid(folder):
    result = run(folder, "train()\nevaluate(-1.0)")
    assert result["status"] == "invalid"
    assert "negative" in result["reason"]


@WITH_AND_WITHOUT
def test_an_endless_loop_is_a_timeout(folder, isolation):
    result = run(folder, "while True: pass", wall_limit_s=1.5, isolation=isolation)
    assert result["status"] == "timeout"
    assert result["total_seconds"] < 10


def test_leaving_the_session_and_training_on_is_a_timeout(folder):
    result = run(folder, "session.close()\nwhile True: pass", wall_limit_s=1.5)
    assert result["status"] == "timeout"
    assert "never asked to be scored" in result["reason"]


def test_a_scoring_without_end_is_a_timeout(folder):
    program = "import time\nfor rows, answer in session.score(8): time.sleep(60)"
    result = run(folder, program, scoring_limit_s=0.5)
    assert result["status"] == "timeout"
    assert "scoring took longer" in result["reason"]


def test_sleeping_past_the_close_is_a_crash_that_says_so(folder):
    program = "import time\ntrain()\ntime.sleep(1.5)\nevaluate()"
    budget = {"kind": "wall", "amount": 0.5}
    result = run(folder, program, budget=budget, startup_free_s=0)
    assert result["status"] == "crash"
    assert re.search(r"scoring was asked for \d\.\d s after the feed closed", result["reason"])
    assert result["overrun_seconds"] > 1
    assert result["value"] is None


@pytest.mark.parametrize(("amount", "places"), [(8192, 1), (16384, 2)])
def test_no_rows_lie_ready_that_a_budget_of_tokens_does_not_pay_for(folder, amount, places):
    program = """
        import os, time
        session.next(128, 64)  # more than the free warm-up
        time.sleep(0.3)  # for what the referee writes ahead
        print('ring', os.stat(os.environ['AUTORESEARCH_REFEREE'] + '/ring').st_size)
    """
    result = run(folder, program, budget={"kind": "tokens", "amount": amount})
    assert f"ring {places * 2**15}\n" in result["log"]


def test_rows_of_any_length_fill_no_folder_but_its_own(folder):
    program = "for length in (64, 31, 17, 9, 64): session.next(1, length)\nevaluate()"
    assert run(folder, program)["status"] == "ok"


@WITH_AND_WITHOUT
def test_ten_gigabytes_of_log_are_invalid_and_the_log_keeps_head_and_tail(folder, isolation):
    program = "import os\nprint('first')\nfor _ in range(10_000): os.write(1, b'x' * 2**20)"
    result = run(folder, program, isolation=isolation)
    assert result["status"] == "invalid"
    assert "log" in result["reason"]
    assert result["log"].startswith("first\n")
    assert "bytes were cut here" in result["log"]
    assert len(result["log"]) < 2 * 2**20


@pytest.mark.parametrize(
    ("where", "isolation"),
    [
        ("os.environ['AUTORESEARCH_SCRATCH']", "namespaces"),
        ("os.environ['AUTORESEARCH_SCRATCH']", "none"),
        ("'/tmp'", "namespaces"),
    ],
)
def test_a_filled_disk_is_invalid(folder, where, isolation):
    program = f"""
        import os
        for i in range(10_000):
            with open(os.path.join({where}, f'f{{i}}'), 'wb') as file:
                file.write(b'x' * 2**22)
    """
    result = run(folder, program, isolation=isolation)
    assert result["status"] == "invalid"
    assert "written to disk" in result["reason"]


def test_one_huge_file_is_invalid_even_if_the_program_ends_first(folder):
    program = "import os\nos.chdir(os.environ['HOME'])\nopen('big', 'wb').write(b'x' * 2**27)"
    result = run(folder, program)
    assert result["status"] == "invalid"


def test_a_disk_filled_by_deleted_files_is_invalid(folder):
    program = """
        import os, tempfile, time
        kept = []
        while True:
            kept.append(tempfile.TemporaryFile())
            kept[-1].write(b'x' * 2**22)
            time.sleep(0.01)
    """
    assert run(folder, program)["status"] == "invalid"


@AS_BOTH
@WITH_AND_WITHOUT
def test_a_fork_bomb_is_invalid(folder, user, isolation):
    program = "import os\nwhile True: os.fork()"
    result = run(folder, program, user, isolation=isolation)
    assert result["status"] == "invalid"
    assert "processes" in result["reason"]


@WITH_AND_WITHOUT
def test_a_memory_hog_is_out_of_memory(folder, isolation):
    program = "import time\nhog = []\nwhile True: hog.append(bytearray(2**25)); time.sleep(0.01)"
    limits = {"memory_mb": 400, "processes": 64, "log_mb": 4, "scratch_mb": 64}
    result = run(folder, program, limits=limits, isolation=isolation)
    assert result["status"] == "oom"
    assert "the limit is 400 MiB" in result["reason"]


def test_many_forked_children_are_not_taken_for_a_memory_hog(folder):
    program = """
        import os, time
        big = np.ones(2**24)  # 128 MiB, shared by all
        children = []
        for _ in range(8):
            child = os.fork()
            if not child:
                time.sleep(1)
                os._exit(0)
            children.append(child)
        for child in children: os.waitpid(child, 0)
        train(); evaluate()
    """
    limits = {"memory_mb": 600, "processes": 64, "log_mb": 4, "scratch_mb": 64}
    assert run(folder, program, limits=limits)["status"] == "ok"


def test_a_memory_error_of_its_own_is_out_of_memory(folder):
    result = run(folder, "raise MemoryError('no room')")
    assert result["status"] == "oom"
    assert "MemoryError" in result["reason"]


@WITH_AND_WITHOUT
def test_a_program_killed_from_outside_is_infrastructure(folder, isolation):
    started = start(folder, "import time\nprint('up')\ntime.sleep(60)", isolation=isolation)
    started.wait_for(lambda: "up" in started.log())
    (pid,) = started.wait_for(lambda: started.pids("\0train.py"))
    os.kill(pid, signal.SIGKILL)
    result = started.result()
    assert result["status"] == "infrastructure"
    assert "SIGKILL" in result["reason"]


def test_a_launcher_killed_from_outside_is_infrastructure(folder):
    started = start(folder, "import time\nprint('up')\ntime.sleep(60)")
    started.wait_for(lambda: "up" in started.log())
    os.kill(min(started.pids("launcher.py")), signal.SIGKILL)
    assert started.result()["status"] == "infrastructure"


def test_a_segmentation_fault_is_the_programs_own(folder):
    result = run(folder, "import ctypes\nctypes.string_at(0)")
    assert result["status"] == "crash"
    assert "SIGSEGV" in result["reason"]


def test_a_killed_child_is_the_programs_own_affair(folder):
    program = "import os\nif not os.fork(): os.kill(os.getpid(), 9)\nos.wait()\n" + HONEST
    assert run(folder, program)["status"] == "ok"


@WITH_AND_WITHOUT
def test_a_killed_referee_is_infrastructure(folder, isolation):
    started = start(folder, "import time\nprint('up')\ntime.sleep(60)", isolation=isolation)
    started.wait_for(lambda: "up" in started.log())
    os.kill(referee_of(started), signal.SIGKILL)
    result = started.result()
    assert result["status"] == "infrastructure"
    assert result["reason"] == "the referee was killed by SIGKILL"
    assert result["total_seconds"] < 20


def test_without_walls_a_program_that_kills_its_referee_gains_nothing(folder):
    program = """
        import os, signal
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                command = open(f'/proc/{pid}/cmdline').read()
                parent = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1]
                mine = open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[1]
                if 'referee.server' in command and parent == mine: os.kill(int(pid), 9)
            except OSError: pass
        print('val_bpb: 0.5')
    """
    result = run(folder, program, isolation="none")
    assert (result["status"], result["value"]) == ("infrastructure", None)


def test_a_printed_score_counts_for_nothing(folder):
    result = run(folder, "print('---\\nval_bpb: 0.100000')")
    assert (result["status"], result["value"]) == ("crash", None)


@WITH_AND_WITHOUT
def test_a_forged_result_counts_for_nothing(folder, isolation):
    program = """
        import json, os, pathlib, tempfile
        forged = json.dumps({'status': 'ok', 'value': 0.1, 'val_bpb': 0.1, 'state': 'scored'})
        scratch = pathlib.Path(os.environ['AUTORESEARCH_SCRATCH'])
        for place in (tempfile.gettempdir(), scratch, scratch.parent, session.folder):
            for name in ('result.json', 'score.json'):
                try: pathlib.Path(place, name).write_text(forged)
                except OSError: pass
    """
    result = run(folder, program + "\n        train(); evaluate()", isolation=isolation)
    assert result["status"] == "ok"
    assert result["value"] == pytest.approx(runs.uniform_bpb(), rel=1e-6)


@WITH_AND_WITHOUT
@pytest.mark.parametrize("stage", ["feed", "score"])
def test_a_shared_file_cut_short_is_invalid(folder, stage, isolation):
    cut = "import os\nos.truncate(session.folder / 'ring', 10)\n"
    program = {
        "feed": f"session.next(8, 64)\n{cut}train()\nevaluate()",
        "score": "train()\n" + cut + "evaluate()",
    }[stage]
    result = run(folder, program, isolation=isolation)
    assert result["status"] == "invalid"
    assert "shared file" in result["reason"]


def test_cutting_the_shared_file_under_its_own_map_harms_only_the_program(folder):
    program = "rows, _ = session.next(8, 64)\nimport os\nos.truncate(session.folder / 'ring', 0)\n"
    result = run(folder, program + "print(rows.sum())")
    assert result["status"] == "invalid"
    if result["exit_signal"] is None:  # the referee saw it first, and ended the program
        assert "shared file" in result["reason"]
    else:
        assert result["exit_signal"] == "SIGBUS"


def test_a_grown_shared_file_is_invalid(folder):
    result = run(folder, "import os\nos.truncate(session.folder / 'ring', 2**25)\ntrain()")
    assert result["status"] == "invalid"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("session.next(8, 64, 'val')", "'val' is not served"),
        ("session.next(8, 65)", "longer than MAX_SEQ_LEN = 64"),
        ("session.next(2**22, 64)", "MiB"),
        ("session.next(1024, 64)", "over the budget"),
        ("session.log({'x': 'y' * 1000})", "200 characters"),
    ],
    ids=["split val", "long T", "huge batch", "over the budget", "long text"],
)
def test_a_refusal_is_in_words_and_uncaught_it_is_a_crash(folder, program, words):
    result = run(folder, program)
    assert result["status"] == "crash"
    assert words in result["reason"] + result["log"]


def test_a_refusal_that_is_caught_costs_nothing(folder):
    program = "try: session.next(8, 64, 'val')\nexcept ValueError as e: print(e)\n" + HONEST
    result = run(folder, program)
    assert result["status"] == "ok"
    assert len(result["refusals"]) == 1


def test_a_second_score_is_refused_and_the_first_stands(folder):
    result = run(folder, "train()\nevaluate()\nevaluate(0.0)")
    assert result["status"] == "ok"
    assert result["value"] == pytest.approx(runs.uniform_bpb(), rel=1e-6)
    assert "final" in result["refusals"][0]


def test_a_second_score_after_nan_does_not_mend_it(folder):
    program = "train()\ntry: evaluate(float('inf'))\nexcept ValueError: pass\nevaluate()"
    result = run(folder, program)
    assert (result["status"], result["value"]) == ("crash", None)


@pytest.mark.parametrize(
    "garbage",
    [
        "b'\\xff' * 1000",
        "b'\\x05\\0\\0\\0hello'",
        "b'\\x02\\0\\0\\0[]'",
        "b'\\x10\\0\\0\\0{'",
        "(20000).to_bytes(4, 'little') + b'[' * 20000",
        'b\'\\x2b\\0\\0\\0{"type":"next","rows":-1,"length":8,"split":1}\'',
        'b\'\\x1d\\0\\0\\0{"type":"answer","index":1e99}\'',
    ],
    ids=["oversize", "no JSON", "no object", "half a frame", "deep", "negative", "unasked"],
)
def test_garbage_on_the_socket_is_invalid(folder, garbage):
    program = f"""
        import socket
        session._connection.sendall({garbage})
        session._connection.shutdown(socket.SHUT_WR)
        session._connection.recv(100)
    """
    assert run(folder, program)["status"] == "invalid"


def test_garbage_before_the_hello_is_invalid(folder):
    program = "import socket,os\ns = socket.socket(socket.AF_UNIX)\nimport time\ntime.sleep(1)\n"
    program += "s.connect(os.environ['AUTORESEARCH_REFEREE'] + '/socket')\ns.sendall(b'GET / HTTP')"
    result = run(folder, "", command=["python", "-c", program])
    assert result["status"] == "invalid"


def test_a_program_of_another_protocol_is_refused_in_words(folder):
    program = "from referee import protocol\nprotocol.VERSION = 7\n"
    program += "from referee.client import Session\nSession.open()"
    result = run(folder, "", command=["python", "-c", program])
    assert result["status"] == "crash"
    assert "protocol 1" in result["reason"]
    assert "protocol 7" in result["reason"]


def test_a_message_of_the_audit_to_come_is_refused_in_words(folder):
    program = "session._ask({'type': 'logits'})"
    assert "reserved for an audit" in run(folder, program)["reason"]


@WITH_AND_WITHOUT
def test_a_daemon_of_the_program_is_ended_with_it(folder, isolation):
    program = """
        import os, time
        if not os.fork():
            os.setsid()
            if not os.fork():
                for fd in range(100):
                    try: os.close(fd)
                    except OSError: pass
                time.sleep(600)
            os._exit(0)
        os.wait()
        time.sleep(0.2)
        train(); evaluate()
    """
    result = run(folder, program, isolation=isolation)
    assert result["status"] == "ok"
    assert result["total_seconds"] < 15


@AS_BOTH
@WITH_AND_WITHOUT
def test_a_killed_wrapper_leaves_nothing_running_and_its_folder_is_swept(folder, user, isolation):
    program = "import os, time\nos.fork()\nprint('up')\ntime.sleep(600)"
    started = start(folder, program, user, isolation=isolation)
    started.wait_for(lambda: "up" in started.log())
    referee = referee_of(started)
    left = [n for n in os.listdir("/dev/shm") if f"-{started.process.pid}." in n]
    started.process.kill()
    started.process.wait()
    deadline = time.monotonic() + 10
    while (started.pids() or alive(referee)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert started.pids() == []
    assert not alive(referee)
    assert not (started.run_dir / "result.json").exists()
    (folder / "next").mkdir()
    if user:
        os.chown(folder / "next", user, user)
    assert run(folder / "next", HONEST, user)["status"] == "ok"
    assert len(left) == 1
    assert left[0] not in os.listdir("/dev/shm")


@WITH_AND_WITHOUT
def test_a_cancelled_run_ends_as_infrastructure_with_its_result(folder, isolation):
    started = start(folder, "import time\nprint('up')\ntime.sleep(600)", isolation=isolation)
    started.wait_for(lambda: "up" in started.log())
    started.process.terminate()
    result = started.result()
    assert result["status"] == "infrastructure"
    assert "cancelled from outside by SIGTERM" in result["reason"]


def test_a_program_that_lingers_after_its_score_keeps_it(folder):
    started = start(folder, "train()\nevaluate()\nimport time\ntime.sleep(600)")
    started.wait_for(lambda: (started.run_dir / "score.json").exists())
    started.process.terminate()
    result = started.result()
    assert result["status"] == "ok"
    assert "afterwards" in result["reason"]


def referee_of(started) -> int:
    """Pid of the wrapper's referee."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == started.process.pid and "referee.server" in (
                entry / "cmdline"
            ).read_text(errors="replace"):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("the wrapper has no referee")


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
