"""A bundle runs by its plain command alone, and holds all that is known of its experiment."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ended
import toylab
from ended import autoresearch
from toylab import Lab

from jobs import cli, config
from jobs import lab as labs


def bundle(lab: Lab, name: str, target: Path) -> Path:
    status, said = autoresearch(lab.root, "bundle", name, "--to", str(target))
    assert status == 0, said
    return target


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """run.sh, somewhere else, in an environment that knows nothing of this project."""
    shutil.move(folder, folder.with_name("elsewhere, moved"))
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment}
    script = folder.with_name("elsewhere, moved") / "run.sh"
    return subprocess.run([str(script)], cwd="/", env=environment, capture_output=True, text=True)


def result(folder: Path) -> dict:
    (path,) = folder.with_name("elsewhere, moved").glob("out-*/result.json")
    return json.loads(path.read_text())


def test_the_plain_command_runs_a_general_task(toy: Lab, tmp_path: Path) -> None:
    made = bundle(toy, "e0002", tmp_path / "bundle")
    done = run(made)
    assert done.returncode == 0, done.stderr
    assert '"value": 2.0' in done.stdout
    found = result(made)
    assert (found["status"], found["value"], found["seed"]) == ("ok", 2.0, 1)


def test_the_plain_command_runs_a_real_run_on_its_own_data(tiny: Lab, tmp_path: Path) -> None:
    made = bundle(tiny, "e0002", tmp_path / "bundle")
    assert json.loads((made / "data-manifest.json").read_text())["files"]
    done = run(made)
    assert done.returncode == 0, done.stderr
    recorded = tiny.state.record("e0002").metric
    assert (result(made)["value"], result(made)["scale"]) == (recorded, "cpu")


def test_paths_may_be_relative(tiny: Lab, tmp_path: Path) -> None:
    """The folder's, the data's, the interpreter's, and that of the script itself."""
    with contextlib.chdir(tmp_path):
        words = ("bundle", "e0002", "--to", "bundle", "--config", f"{tiny.root}/campaign.yaml")
        assert cli.main(list(words)) == 0
    (tmp_path / "data").symlink_to(ended.runs.data_folder())
    for where, *script in ((tmp_path, "sh", "bundle/run.sh"), (tmp_path / "bundle", "./run.sh")):
        own = {"PYTHON": sys.executable, "DATA": str(tmp_path / "data")}
        environment = {name: os.path.relpath(path, where) for name, path in own.items()}
        environment["PATH"] = os.environ["PATH"]
        done = subprocess.run(script, cwd=where, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f'"value": {tiny.state.record("e0002").metric}' in done.stdout


def test_other_data_is_refused(tiny: Lab, tmp_path: Path) -> None:
    made = bundle(tiny, "e0002", tmp_path / "bundle")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    done = run(made, DATA=str(tmp_path / "data"))
    assert done.returncode == 2
    assert "must name the prepared data of data-manifest.json" in done.stderr


def test_a_bundle_holds_program_frozen_files_and_records(tiny: Lab, tmp_path: Path) -> None:
    weights = tiny.folder / "heads" / "main" / tiny.state.branch("main").best / "model.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_text("weights")
    made = bundle(tiny, "main", tmp_path / "bundle")
    weights.unlink()
    assert (made / "model.safetensors").read_text() == "weights"
    assert not (bundle(tiny, "e0001", tmp_path / "first") / "model.safetensors").exists()
    program = (made / "program" / "trainer" / "train.py").read_text()
    assert program.startswith("LOSS = 5.5\n")
    for name in ("prepare.py", "rows.py", "referee/server.py", "referee/result.schema.json"):
        assert (made / "trainer" / name).read_bytes() == (labs.TRAINER / name).read_bytes()
    assert not (made / "trainer" / "train.py").exists()
    told = json.loads((made / "record.json").read_text())
    assert told["experiment"]["id"] == "e0002"
    assert told["trailers"]["Campaign"] == tiny.name
    assert told["decision"]["verdict"] == "keep"
    assert config.load(made / "campaign.yaml") == config.load(tiny.root / "campaign.yaml")
    assert told["results"][0]["metric"] == tiny.state.record("e0002").metric
    assert "e0002" in (made / "record.txt").read_text()
    (made / "program" / "trainer" / "train.py").write_text("mine now\n")


def test_a_bundle_of_a_running_campaign_holds_the_data_manifest_too(tmp_path: Path) -> None:
    root, target = tmp_path / "lab", tmp_path / "bundle"
    words = ("bundle", "e0001", "--to", str(target))
    lab = ended.tiny(root, toylab.when("e0001", lambda: autoresearch(root, *words)))
    manifest = (ended.runs.data_folder() / "manifest.json").read_bytes()
    assert (target / "data-manifest.json").read_bytes() == manifest
    toylab.remove(lab.root)


def test_nothing_is_overwritten_and_other_frozen_files_are_refused(
    toy: Lab, tmp_path: Path, monkeypatch
) -> None:
    bundle(toy, "e0002", tmp_path / "bundle")
    status, said = autoresearch(toy.root, "bundle", "e0002", "--to", str(tmp_path / "bundle"))
    assert (status, "exists already" in said) == (2, True)
    changed = tmp_path / "trainer"
    shutil.copytree(labs.TRAINER, changed)
    (changed / "rows.py").write_text("")
    monkeypatch.setattr(labs, "TRAINER", changed)
    status, said = autoresearch(toy.root, "bundle", "e0002", "--to", str(tmp_path / "other"))
    assert (status, said.count("sha256 ")) == (2, 2)
    assert not (tmp_path / "other").exists()
