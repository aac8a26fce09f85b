"""The same loop on something that is no model: a function's speed, gated by its correctness."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toylab
from toylab import Lab, change, check_books

SLOW = """\
import json
import os
from pathlib import Path


def pairs(numbers, total):
    \"\"\"How many pairs of `numbers` have this sum.\"\"\"
    found = 0
    for i, one in enumerate(numbers):
        for other in numbers[i + 1 :]:
            found += one + other == total
    return found


if __name__ == "__main__":
    scratch = Path(os.environ["AUTORESEARCH_SCRATCH"])
    answers = [pairs(list(range(n)), n) for n in range(40)]
    (scratch / "answers.json").write_text(json.dumps(answers))
    (scratch / "model.safetensors").write_text(Path(__file__).read_text())
"""
QUICK = """\
    seen, found = {}, 0
    for one in numbers:
        found += seen.get(total - one, 0)
        seen[one] = seen.get(one, 0) + 1
    return found
"""
BODY = SLOW[SLOW.index("    found = 0") : SLOW.index("\n\nif __name__")]
SCORE = """\
import json, os, sys

expected = [sum(i < n - i for i in range(1, n)) for n in range(40)]
with open(os.environ["AUTORESEARCH_OUTPUT"] + "/answers.json") as file:
    if json.load(file) != expected:
        sys.exit("wrong answers")
sys.path.insert(0, os.environ["AUTORESEARCH_PROGRAM"])
import pairs

steps = 0

def count(frame, event, argument):
    global steps
    frame.f_trace_opcodes = True
    steps += event == "opcode"
    return count

sys.settrace(count)
pairs.pairs([7 * i % 101 for i in range(100)], 100)
sys.settrace(None)
print("counted", steps)
print(json.dumps({"speed": 1e6 / steps}))
"""


def edit(description: str, old: str, new: str, file: str = "pairs.py") -> dict[str, object]:
    return {"description": description, "file": file, "replace": [[old, new]]}


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A campaign of five ideas, at its end."""
    lab = Lab(
        tmp_path_factory.mktemp("general") / "lab",
        edit("wrong but quick", BODY, "    return 0\n"),
        edit("a kinder scorer", "1e6 / steps", "1e9", "score.py"),
        edit("one pass", BODY, QUICK),
        edit("slower", "    seen, found", "    numbers = sorted(numbers)[:]\n    seen, found"),
        edit("does not end well", "    answers =", "    raise SystemExit(3)\n    answers ="),
        limits={"experiments": 6},
        confirm={"runs": 2},
    )
    (lab.root / "solution.py").unlink()
    lab.write("pairs.py", SLOW)
    lab.write("score.py", SCORE)
    lab.git("add", "--all", ":!campaign.yaml", ":!edits.yaml")
    lab.git("commit", "--quiet", "--message", "another task")
    task = lab.settings["task"] | {
        "editable": ["pairs.py", "score.py"],
        "command": ["python", "pairs.py"],
        "metric": "speed",
        "direction": "maximise",
    }
    lab.configure(task=task)
    lab.run()
    yield lab
    toylab.remove(lab.root)


def test_the_quicker_function_is_kept(night: Lab) -> None:
    assert night.verdicts() == {
        "baseline": "keep",
        "wrong but quick": "discard",
        "a kinder scorer": "discard",
        "one pass": "keep",
        "slower": "discard",
        "does not end well": "discard",
    }
    branch = night.state.branch("main")
    assert branch.best_metric > 5 * branch.baseline_metric
    assert QUICK in night.git("show", f"autoresearch/{night.name}/main:pairs.py")
    check_books(night)


def test_a_wrong_result_scores_nothing(night: Lab) -> None:
    (result,) = night.state.results("e0002")
    assert (result.status, result.metric) == ("crash", None)
    assert "wrong answers" in result.reason
    (result,) = night.state.results("e0006")
    assert (result.status, result.metric) == ("crash", None)
    assert "exit status 3" in result.reason


def test_a_scorer_edited_by_an_experiment_changes_nothing(night: Lab) -> None:
    assert "1e9" in night.git("show", f"{night.state.record('e0003').commit}:score.py")
    (result,) = night.state.results("e0003")
    assert result.metric == night.state.branch("main").baseline_metric
    assert night.state.decision("e0003").reason.startswith("equal (+0")


def test_the_score_does_not_depend_on_the_seed(night: Lab) -> None:
    for name in ("e0001", "e0004"):
        metrics = {run.metric for run in night.state.record(name).runs}
        assert len(night.state.record(name).runs) == 3
        assert len(metrics) == 1


def test_tables_name_the_metric_and_its_direction(night: Lab) -> None:
    rows = (night.folder / "results.tsv").read_text().splitlines()
    assert rows[0].split("\t") == ["commit", "speed", "memory_gb", "status", "description"]
    assert [row.split("\t")[3] for row in rows[1:]].count("crash") == 2
    assert any(line.startswith("e0004") and " +" in line for line in night.lines)


def test_only_the_best_ones_weights_stay_on_disk(night: Lab) -> None:
    kept = [p.relative_to(night.folder) for p in night.folder.rglob("model.safetensors")]
    best = night.state.branch("main").best
    assert kept == [Path(f"heads/main/{best}/model.safetensors")]
    assert QUICK in (night.folder / kept[0]).read_text()
    leftovers = [p for p in night.folder.glob("runs/*/*/*") if p.is_dir()]
    assert leftovers == []


def test_a_search_over_constants_needs_no_model_either(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab", agent={"kind": "sweep"}, limits={"experiments": 8})
    lab.run()
    state = lab.state
    assert len(state.records) == 8
    assert {record.base for record in state.recent(7)} <= {r.commit for r in state.chain("main")}
    assert all(state.experiment(r.id).researcher == "sweep" for r in state.recent(7))
    check_books(lab)


def test_what_a_program_leaves_running_ends_with_its_run(
    make_lab: Callable[..., Lab],
) -> None:
    lab = make_lab(change(X=1), limits={"experiments": 2})
    mark = f"daemon-{os.getpid()}-{lab.name}"
    lab.write(
        "daemon.py",
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]],"
        " start_new_session=True)\n",
    )
    lab.git("add", "daemon.py")
    lab.git("commit", "--quiet", "--message", "a daemon")
    lab.configure(task=lab.settings["task"] | {"command": ["python", "daemon.py", mark]})
    lab.run()
    assert lab.verdicts() == {"baseline": "keep", "X 1": "keep"}
    commands = (Path(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit())
    assert not [p for p in commands if p.exists() and mark.encode() in p.read_bytes()]
    check_books(lab)


def test_a_file_that_no_run_can_be_given_pauses_with_its_name(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(limits={"experiments": 2})
    (lab.root / "data").symlink_to("/etc")
    lab.git("add", "data")
    lab.git("commit", "--quiet", "--message", "a link")
    status, said = lab.call()
    assert status == 3
    assert "'data' is a symbolic link to '/etc', outside the commit's own files" in said
    assert not lab.state.open_runs
    assert lab.call("status")[0] == 0
