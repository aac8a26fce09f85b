"""The wrapper: what a run leaves, what a program can see and reach, general tasks, schemas."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import runs
from runs import HONEST, REPO, run, start

from jobs import outcome
from referee import folder as shared
from referee import sandbox, wrapper
from referee.task import Task

REFEREE = REPO / "trainer" / "referee"


@pytest.fixture(scope="module", autouse=True)
def data():
    runs.data_folder()
    yield
    runs.remove_data()


@pytest.fixture
def folder(tmp_path) -> Path:
    return runs.reachable(tmp_path)


def schema(name: str) -> dict:
    return json.loads((REFEREE / name).read_text())


# --- what a run leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "status"), [(HONEST, "ok"), ("1 / 0", "crash")], ids=["ok", "crash"]
)
def test_result_and_score_follow_their_schemas(folder, program, status):
    result = run(folder, program)
    assert result["status"] == status
    jsonschema.validate(result, schema("result.schema.json"))
    score = json.loads((folder / "run" / "score.json").read_text())
    jsonschema.validate(score, schema("score.schema.json"))


def test_the_names_that_scripts_rely_on_are_always_there(folder):
    names = (
        "protocol experiment run status metric value seed tokens steps startup_seconds reason"
        " training_seconds overrun_seconds scoring_seconds total_seconds peak_memory_mb"
        " tokens_per_second node device"
    )
    assert set(names.split()) <= set(schema("result.schema.json")["required"])
    (folder / "task.json").write_text("{}")
    subprocess.run(
        [sys.executable, "-m", "trainer.referee.wrapper", str(folder)], cwd=REPO, check=True
    )
    result = json.loads((folder / "result.json").read_text())
    assert set(names.split()) <= set(result)
    assert result["status"] == "infrastructure"
    assert "task.json" in result["reason"]
    jsonschema.validate(result, schema("result.schema.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"walls": 3}, "argument 'walls'"),
        ({"kind": "other"}, "task.kind must be one of"),
        ({"run_dir": "here"}, "absolute path"),
        ({"wall_limit_s": 0}, "must be positive"),
        ({"wall_limit_s": float("nan")}, "task.wall_limit_s"),
        ({"limits": {"process": 3}}, "argument 'process'"),
        ({"budget": {"kind": "wall"}}, "amount"),
        ({"data": None}, "task.data"),
        ({"kind": "general"}, "task.scorer"),
        ({"isolation": "apptainer"}, "task.program_argv"),
    ],
)
def test_a_wrong_task_is_named_by_its_field(change, words):
    task = {"kind": "nanochat", "program": "/p", "command": ["python"], "run_dir": "/r"}
    task |= {"wall_limit_s": 1, "data": "/d"} | change
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Task.from_json(task)


def test_numbers_of_a_run_are_the_referees_and_the_kernels(folder):
    program = "session.log({'step': 7, 'loss': 2.5})\nhog = b'x' * 2**27\n" + HONEST
    result = run(folder, program, facts={"experiment": "e1", "run": "r1", "commit": "abc"})
    assert result["tokens"] == runs.SCALE.budget_amount
    assert result["tokens_served"] == result["tokens"] + runs.SCALE.warmup_tokens
    assert result["steps"] == 7
    assert result["reported"] == {"step": 7, "loss": 2.5}
    assert (result["experiment"], result["run"], result["commit"]) == ("e1", "r1", "abc")
    assert 128 < result["peak_memory_mb"] < 400
    assert result["rows_scored"] == runs.SCALE.eval_tokens // runs.T
    assert result["program_cpu_seconds"] > 0.01
    lines = (folder / "run" / "telemetry.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == 2.5


@pytest.mark.parametrize("step", [True, -1, 10**25, 2**53])
def test_a_count_that_no_reader_can_hold_is_not_told(folder, step):
    result = run(folder, f"session.log({{'step': {step}}})\n" + HONEST)
    assert (result["status"], result["steps"]) == ("ok", None)
    told = outcome.read(folder / "run", SimpleNamespace(id="e0001-s1-a1"))
    assert (told.status, told.metric) == ("ok", result["value"])


def test_the_controller_reads_only_what_the_schema_names():
    assert {*outcome.NUMBERS.values(), *outcome.TEXTS} <= schema("result.schema.json")[
        "properties"
    ].keys()


@pytest.mark.parametrize(("by_others", "status"), [(0, "invalid"), (20, "infrastructure")])
def test_a_full_disk_is_told_and_is_not_left_full(folder, by_others, status):
    disk = [sys.executable, str(Path(__file__).with_name("full_disk.py")), str(by_others)]
    done = subprocess.run(
        ["unshare", "-rm", *disk, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == status
    assert "the disk is full" in result["reason"]
    assert set(result["files"]) <= runs.KNOWN_FILES


def test_a_missing_data_folder_is_infrastructure_in_words(folder):
    result = run(folder, HONEST, data=str(folder / "nowhere"))
    assert result["status"] == "infrastructure"
    assert "holds no prepared data" in result["reason"]


def test_a_command_that_does_not_exist_says_so(folder):
    result = run(folder, "", command=["no-such-program"])
    assert result["status"] == "infrastructure"
    assert "no-such-program" in result["reason"]


# --- caches and weights ---------------------------------------------------------------------------

CACHED = """
    import os, pathlib
    cache = pathlib.Path(os.environ['TORCHINDUCTOR_CACHE_DIR'])
    cache.mkdir(parents=True, exist_ok=True)
    print('found', sorted(p.name for p in cache.iterdir()))
    (cache / 'new').write_text('made here')
    (cache / 'leak').symlink_to('/etc/passwd')
    (pathlib.Path(os.environ['AUTORESEARCH_SCRATCH']) / 'model.safetensors').write_text('weights')
    train(); evaluate()
"""


def test_each_run_gets_a_copy_of_the_cache_and_leaves_its_own(folder):
    (folder / "cache" / "inductor").mkdir(parents=True)
    (folder / "cache" / "inductor" / "old").write_text("from the baseline")
    result = run(folder, CACHED, cache=str(folder / "cache"))
    assert "found ['old']" in result["log"]
    assert os.listdir(folder / "cache" / "inductor") == ["old"]
    left = folder / "run" / "cache" / "inductor"
    assert sorted(os.listdir(left)) == ["new", "old"]  # no link: it could lead anywhere
    assert (folder / "run" / "model.safetensors").read_text() == "weights"
    assert not (folder / "run" / "scratch").exists()


def forged(folder: Path) -> None:
    """A score.json that nobody measured, and what keeps a referee from writing its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.json").write_text('{"state": "scored", "reason": "forged", "val_bpb": 0.1}')
    (folder / ".score.json" / "in the way").mkdir(parents=True)


def test_a_cache_brings_no_score_through_a_link_that_a_program_puts_in_its_way(folder):
    forged(folder / "cache" / "triton")
    (folder / "cache" / "inductor").mkdir()
    for n in range(3000):  # as long as these are copied, a link can still be made
        (folder / "cache" / "inductor" / str(n)).touch()
    program = """
        import os
        cache = os.environ['TRITON_CACHE_DIR']
        try:
            os.symlink('../..', cache)
        except OSError as error:
            print('refused:', error)
    """
    result = run(folder, program, prelude="", cache=str(folder / "cache"))
    assert result["status"] == "crash"
    assert result["value"] is None
    assert "refused:" in result["log"]


def test_a_score_that_lay_in_the_run_folder_before_is_nobodys(folder):
    forged(folder / "there")
    fill = ["sh", "-c", 'cp -r "$0"/. "$1" && shift && exec "$@"', folder / "there", folder / "run"]
    result = start(folder, "train()", through=[str(word) for word in fill]).result()
    assert result["status"] == "crash"
    assert "without asking to be scored" in result["reason"]


@pytest.mark.parametrize(("length", "kept"), [(100, True), (2**20, False)])
def test_a_sample_of_the_models_text_is_kept_unless_it_is_a_book(folder, length, kept):
    scratch = "pathlib.Path(os.environ['AUTORESEARCH_SCRATCH'])"
    program = f"import os, pathlib\n({scratch} / 'sample.txt').write_text('x' * {length})\n{HONEST}"
    assert run(folder, program)["status"] == "ok"
    assert (folder / "run" / "sample.txt").exists() == kept


def test_a_failed_run_leaves_neither_cache_nor_weights(folder):
    result = run(folder, CACHED.replace("train(); evaluate()", "1 / 0"))
    assert result["status"] == "crash"
    assert not (folder / "run" / "cache").exists()
    assert not (folder / "run" / "model.safetensors").exists()


def test_a_cache_over_its_size_is_not_kept(folder):
    program = CACHED.replace("write_text('made here')", "write_text('x' * 2**21)")
    assert run(folder, program, cache_mb=1)["status"] == "ok"
    assert not (folder / "run" / "cache").exists()


def test_weights_that_are_a_link_are_left_behind(folder):
    program = CACHED.replace(".write_text('weights')", ".symlink_to('/etc/passwd')")
    assert run(folder, program)["status"] == "ok"
    assert not (folder / "run" / "model.safetensors").exists()


def test_a_scratch_folder_that_hides_what_it_holds_is_invalid_and_removed(folder):
    program = """
        import os, time
        os.chdir(os.environ['AUTORESEARCH_SCRATCH'])
        os.mkdir('closed'); open('closed/file', 'w'); os.chmod('closed', 0)
        for _ in range(2100): os.mkdir('dd'); os.chdir('dd')
        time.sleep(60)
    """
    assert run(folder, program)["status"] == "invalid"
    assert not (folder / "run" / "scratch").exists()


# --- what a program can see and reach -------------------------------------------------------------

LOOK = """
    import json, os, socket, pathlib
    def reads(path):
        try: return bool(os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(1))
        except OSError: return False
    def writes(path):
        try: pathlib.Path(path, 'mark').write_text('x')
        except OSError: return False
        return True
    def reaches(port):
        try: socket.create_connection(('127.0.0.1', port), 1)
        except OSError: return False
        return True
    ports, read, write = json.loads(LOOK)
    print('SEEN', json.dumps({
        'ports': [p for p in ports if reaches(p)],
        'read': [p for p in read if reads(p)],
        'write': [p for p in write if writes(p)],
        'processes': sum(map(str.isdigit, os.listdir('/proc'))),
        'interfaces': [name for _, name in socket.if_nameindex()],
        'uid': os.getuid(),
        'environment': sorted(os.environ),
        'capabilities': [l.split()[1] for l in open('/proc/self/status') if l.startswith('CapEff')],
    }))
    train(); evaluate()
"""


def look(folder, user) -> dict:
    """What a walled program says it could read, write and reach."""
    secret = folder / "elsewhere"
    secret.mkdir(mode=0o777)
    secret.chmod(0o777)
    (secret / "secret").write_text("s")
    data = runs.data_folder()
    read = [str(secret), str(data), str(folder / "run"), "/root", "/home", "/etc/shadow", "/run"]
    read += ["/var", "/dev/vda", "/dev/mem", "/autoresearch/program/train.py", "/proc/1/environ"]
    places = ["/tmp", "/autoresearch/scratch", "/autoresearch/shared", "/autoresearch/program"]
    write = [
        *places,
        "/dev/shm",
        "/usr",
        "/",
        "/dev",
        str(REFEREE),
        str(secret),
        "/proc/sys/kernel",
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = json.dumps([[server.getsockname()[1]], read, write])
        program = f"LOOK = {asked!r}\n" + LOOK.replace("\n    ", "\n")
        os.environ["SECRET_API_KEY"] = "hunter2"
        try:
            result = run(folder, program, user, isolation="namespaces")
        finally:
            del os.environ["SECRET_API_KEY"]
    assert result["status"] == "ok", result
    (line,) = [line for line in result["log"].splitlines() if line.startswith("SEEN")]
    return json.loads(line.removeprefix("SEEN"))


@pytest.mark.parametrize("user", [None, runs.USER] if os.getuid() == 0 else [None])
def test_inside_walls_there_is_what_a_program_needs_and_nothing_else(folder, user):
    seen = look(folder, user)
    assert seen["ports"] == []
    assert seen["interfaces"] == ["lo"]
    assert set(seen["read"]) <= {"/autoresearch/program/train.py", "/root", "/var"}
    assert seen["write"] == ["/tmp", "/autoresearch/scratch", "/dev/shm"]
    assert seen["processes"] <= 3
    assert seen["uid"] != 0
    assert seen["capabilities"] == ["0000000000000000"]
    assert not {"SECRET_API_KEY", "SSH_AUTH_SOCK"} & set(seen["environment"])
    assert not (folder / "elsewhere" / "mark").exists()


def test_what_lies_in_memory_as_files_is_bounded_too(folder):
    program = """
        import os
        room = os.statvfs("/dev/shm")
        print("ROOM", room.f_blocks * room.f_frsize >> 20, "MiB")
        train(); evaluate()
    """
    limits = {"memory_mb": 2048, "processes": 64, "log_mb": 4, "scratch_mb": 8192}
    result = run(folder, program, isolation="namespaces", limits=limits)
    assert result["status"] == "ok", result
    assert "ROOM 1024 MiB" in result["log"]


def test_roots_home_holds_only_the_interpreter_inside_walls(folder):
    home = Path.home()
    program = f"""
        import os
        print('HOME', sorted(os.listdir({str(home)!r})) if os.path.exists({str(home)!r}) else [])
        train(); evaluate()
    """
    result = run(folder, program)
    (line,) = [line for line in result["log"].splitlines() if line.startswith("HOME")]
    hidden = {".ssh", ".bashrc", ".profile", ".cache", ".config", ".netrc", ".git-credentials"}
    assert not hidden & set(eval(line.removeprefix("HOME")))


def test_without_walls_the_result_says_so_and_keys_are_still_kept_away(folder, monkeypatch):
    monkeypatch.setenv("SECRET_API_KEY", "hunter2")
    result = run(folder, "import os\nprint(dict(os.environ))\n" + HONEST, isolation="none")
    assert (result["status"], result["isolation"]) == ("ok", "none")
    assert "hunter2" not in result["log"]


def test_where_the_kernel_refuses_walls_auto_runs_without_and_records_why(folder):
    limit = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'  # as some hosts are set
    walls = ["unshare", "--user", "--map-root-user", "sh", "-c", limit, "sh"]
    result = start(folder, HONEST, through=walls, isolation="auto").result()
    assert (result["status"], result["isolation"]) == ("ok", "none")
    assert "unshare" in result["isolation_reason"]


def test_walls_that_are_asked_for_and_refused_are_infrastructure(folder):
    limit = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    walls = ["unshare", "--user", "--map-root-user", "sh", "-c", limit, "sh"]
    result = start(folder, HONEST, through=walls, isolation="namespaces").result()
    assert result["status"] == "infrastructure"
    assert "isolation could not be set up" in result["reason"]


def test_sealed_prepare_comes_before_one_of_the_experiments(folder):
    files = {"prepare.py": "raise SystemExit('the experiment has its own')", "mine.py": ""}
    program = "import prepare, mine\nprint('FROM', prepare.__file__)\n" + HONEST
    result = run(folder, program, files=files)
    assert result["status"] == "ok"
    assert f"FROM {REPO / 'trainer' / 'prepare.py'}" in result["log"]


def test_a_container_gets_its_folders_and_environment_by_its_template():
    view = sandbox.View.of({"scratch": "/host/s", "program": "/host/p"}, True)
    prefix = ["run", "--bind", "{scratch}:/autoresearch/scratch", "--data={data}", "{env}", "image"]
    argv = sandbox.contained(prefix, view, {"A": "1", "B": "x y"})
    assert argv == ["run", "--bind", "/host/s:/autoresearch/scratch", "A=1", "B=x y", "image"]
    assert view.inside == {"scratch": "/autoresearch/scratch", "program": "/autoresearch/program"}


CONTAINER = """#!/bin/sh
# Stands in for a container's own command line: does what one does at its start, then runs the rest.
case "$1" in
    broken) echo "FATAL: no such image" >&2; exit 255;;
    refused)
        printf '\\033[91mERROR  : Failed to create network namespace: refused\\n\\033[0m\\n' >&2
        exit 1;;
esac
: > "$2/.started"; shift 2
exec env "$@"
"""


@pytest.fixture
def container(folder) -> str:
    script = folder / "container"
    script.write_text(CONTAINER)
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("image", ["fine", "broken", "refused"])
def test_a_container_that_fails_is_told_from_a_program_that_does(folder, container, image):
    """The template's part only: real containers are tested where there are some."""
    # Places inside are the host's here: nothing mounts them. A program may hide that it began.
    python = f"import os; os.unlink({str(folder / 'run/scratch/.started')!r}); exit(255)"
    result = run(
        folder,
        "",
        isolation="apptainer",
        command=["python", "-c", python],
        program_argv=[container, image, "{scratch}", "{env}"],
        referee_argv=["env", "--data={data}/x{files}", "{env}"],
    )
    assert result["status"] == ("crash" if image == "fine" else "infrastructure")
    assert ("no such image" in result["reason"]) == (image == "broken")
    assert ("executor.allow_network" in result["reason"]) == (image == "refused")


def test_a_general_tasks_container_that_fails_is_told_from_its_program(folder, container):
    for image, status in (("broken", "infrastructure"), ("fine", "crash")):
        place = folder / image
        place.mkdir()
        argv = [container, image, "{scratch}", "{env}"]
        result = general(place, "1 / 0", isolation="apptainer", program_argv=argv)
        assert result["status"] == status, result


@pytest.mark.parametrize(
    ("isolation", "argv", "network"),
    [
        ("namespaces", [], "none"),
        ("none", [], "host"),
        ("apptainer", ["exec", "--net", "--network", "none"], "none"),
        ("apptainer", ["exec"], "host"),
    ],
)
def test_a_result_says_what_the_program_could_reach_and_what_bounds_its_files(
    folder, isolation, argv, network
):
    result = run(folder, "1 / 0", isolation=isolation, program_argv=["false", *argv])
    assert (result["isolation"], result["network"]) == (isolation, network)
    assert result["scratch_bound"] == "polling, RLIMIT_FSIZE"


# --- scratch elsewhere, and the card --------------------------------------------------------------


@pytest.fixture
def disk():
    """A folder of another file system than the run's."""
    path = Path("/dev/shm/autoresearch test")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def test_scratch_on_the_nodes_own_disk_leaves_what_is_kept_and_nothing_there(
    folder, disk, monkeypatch
):
    monkeypatch.setenv("NODE_DISK", str(disk))
    node = os.uname().nodename
    dead, other = (disk / f"autoresearch-{n}-1.1-{'0' * 16}" for n in (node, "elsewhere"))
    for path in (dead, other):
        path.mkdir()
    result = run(folder, CACHED, scratch="$NODE_DISK")
    assert result["status"] == "ok", result
    assert (folder / "run" / "model.safetensors").read_text() == "weights"
    assert os.listdir(folder / "run" / "cache" / "inductor") == ["new"]
    assert os.listdir(disk) == [other.name]  # another node's may be in use


def test_a_nodes_disk_that_is_not_there_is_infrastructure_and_named(folder):
    result = run(folder, HONEST, scratch="$NO_SUCH_VARIABLE")
    assert result["status"] == "infrastructure"
    assert "$NO_SUCH_VARIABLE" in result["reason"]


def cards(*names: str) -> list[str]:
    return [f"NVIDIA {name}, GPU-{i}{i}, 550.54.14" for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("device", "gpu", "uuid"),
    [
        ("1", "NVIDIA B", "GPU-11"),
        ("0,1", "NVIDIA A", "GPU-00"),
        ("", "NVIDIA A", "GPU-00"),
        ("GPU-1", "NVIDIA B", "GPU-11"),
        ("MIG-7", None, None),  # of one of the two
    ],
)
def test_a_card_among_several_is_the_one_that_nvidia_smi_counts(
    tmp_path, monkeypatch, device, gpu, uuid
):
    proc_of(tmp_path, monkeypatch, "A", "B")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(cards("A", "B")) + "\nEND\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told = {"gpu": gpu, "gpu_uuid": uuid, "driver": "550.54.14"}
    assert wrapper.gpu(device) == told


def test_without_nvidia_smi_several_cards_tell_what_they_have_in_common(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    driver = {"driver": "550.54.14"}
    proc_of(tmp_path / "alone", monkeypatch, "A")
    assert wrapper.gpu("3") == {"gpu": "NVIDIA A", "gpu_uuid": "GPU-00", **driver}
    proc_of(tmp_path / "alike", monkeypatch, "A", "A")
    assert wrapper.gpu("0") == {"gpu": "NVIDIA A", "gpu_uuid": None, **driver}
    proc_of(tmp_path / "mixed", monkeypatch, "A", "B")
    assert wrapper.gpu("0") == {"gpu": None, "gpu_uuid": None, **driver}
    assert wrapper.gpu("GPU-11")["gpu"] == "NVIDIA B"
    monkeypatch.setattr(wrapper, "NVIDIA", tmp_path / "none")
    assert wrapper.gpu("0") == {}


def proc_of(place: Path, monkeypatch, *names: str) -> None:
    """What the kernel's driver shows of cards of these models."""
    for i, name in enumerate(names):
        card = place / "gpus" / f"0000:0{i}:00.0"
        card.mkdir(parents=True)
        told = f"Model: \t\t NVIDIA {name}\nGPU UUID: \t GPU-{i}{i}\nDevice Minor: \t {i}\n"
        (card / "information").write_text(told)
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\nGCC 12.3.0\n"
    (place / "version").write_text(version)
    monkeypatch.setattr(wrapper, "NVIDIA", place)


# --- shared folders -------------------------------------------------------------------------------


def test_folders_of_dead_owners_are_swept_and_those_of_living_ones_stay():
    mine = shared.make()
    dead = shared.place() / f"autoresearch-{os.getpid()}.1-0123456789abcdef"
    other = shared.place() / "autoresearch-notes"
    for path in (dead, other):
        path.mkdir()
    try:
        assert dead.name in shared.sweep()
        assert mine.is_dir()
        assert other.is_dir()
        assert not dead.exists()
        assert mine.stat().st_mode & 0o777 == 0o700
    finally:
        other.rmdir()
        (mine / "ring").unlink()
        mine.rmdir()


# --- speed ----------------------------------------------------------------------------------------


def test_wrapper_needs_nothing_beyond_the_standard_library():
    code = "import sys; from trainer.referee import wrapper; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert not {"numpy", "torch", "rows", "pydantic"} & set(out.stdout.split())


def test_the_program_starts_soon(folder):
    times = []
    for i in range(3):
        (folder / str(i)).mkdir()
        times.append(run(folder / str(i), "")["exec_seconds"])
    assert min(times) < 0.25  # 0.04 on an idle machine; others may be at work here


# --- general tasks --------------------------------------------------------------------------------

SCORER = """
import json, os, subprocess, sys
program, output = os.environ['AUTORESEARCH_PROGRAM'], os.environ['AUTORESEARCH_OUTPUT']
made = open(os.path.join(output, 'made')).read()
exec(open(os.path.join(program, 'train.py')).read().partition('#')[0])
print('noise on the way')
print(json.dumps({'speed': float(made), 'other': 1}))
"""


def general(folder, program="", scorer=SCORER, **task) -> dict:
    files = folder / "files"
    files.mkdir()
    (files / "scorer.py").write_text(scorer)
    made = "import os; open(os.environ['AUTORESEARCH_SCRATCH'] + '/made', 'w').write('2.5')"
    settings = {
        "kind": "general",
        "command": ["python", "-c", program or made],
        "data": None,
        "scorer": {
            "command": ["python", "scorer.py"],
            "files_dir": str(files),
            "metric": "speed",
        },
    }
    return run(folder, "", **settings | task)


@pytest.mark.parametrize("isolation", ["namespaces", "none"])
def test_a_general_task_is_scored_by_files_that_are_not_the_experiments(folder, isolation):
    scorer = SCORER.replace("exec(", "0 and exec(")
    result = general(folder, scorer=scorer, isolation=isolation)
    assert (result["status"], result["metric"], result["value"]) == ("ok", "speed", 2.5)
    jsonschema.validate(
        {k: v for k, v in result.items() if k != "log"}, schema("result.schema.json")
    )


@pytest.mark.parametrize(
    ("program", "scorer", "status", "words"),
    [
        ("1 / 0", "", "crash", "ZeroDivisionError"),
        ("", "1 / 0", "crash", "the scorer: exit status 1: ZeroDivisionError"),
        ("", "print('{\"speed\": NaN}')", "crash", "no finite number for speed"),
        ("", "print('{\"pace\": 1}')", "crash", "no finite number for speed"),
        ("", "print('[' * 9000)", "crash", "no finite number for speed"),
        ("", "", "crash", "no finite number for speed"),
        ("import time; time.sleep(60)", "", "timeout", "time limit"),
        ("while True: print('x' * 10**6)", "", "invalid", "log"),
    ],
)
def test_a_general_task_fails_in_words(folder, program, scorer, status, words):
    result = general(folder, program, scorer, wall_limit_s=2)
    assert (result["status"], result["value"]) == (status, None)
    assert words in result["reason"]


def test_a_scorer_without_end_is_a_timeout(folder):
    result = general(folder, scorer="import time; time.sleep(60)", scoring_limit_s=1)
    assert result["status"] == "timeout"
    assert result["total_seconds"] < 20


def test_a_program_cannot_change_what_scores_it(folder):
    program = (
        "import os, glob\n"
        "for path in glob.glob('/autoresearch/*') + [os.getcwd()]:\n"
        "    try: open(path + '/scorer.py', 'w').write('print(1)')\n"
        "    except OSError: pass\n"
        "open(os.environ['AUTORESEARCH_SCRATCH'] + '/made', 'w').write('3')"
    )
    result = general(folder, program, SCORER.replace("exec(", "0 and exec("))
    assert result["value"] == 3.0


def test_two_runs_at_once_do_not_disturb_each_other(folder):
    begun = time.monotonic()
    for name in ("a", "b"):
        (folder / name).mkdir()
    both = [start(folder / name, HONEST) for name in ("a", "b")]
    assert [one.result()["status"] for one in both] == ["ok", "ok"]
    assert time.monotonic() - begun < 30
