"""One run of one program, without a campaign."""

import json
import math
from pathlib import Path

import pytest
from ended import LEARNER, runs

from jobs import cli

CAMPAIGN = {"budget": {"tokens": 2**13}, "disk": {"keep_free_mb": 1}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program and settings, which is no git repository."""
    settings = {**CAMPAIGN, "data": {"folder": str(runs.data_folder())}}
    (tmp_path / "campaign.yaml").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text(LEARNER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_scored_and_only_its_result_is_on_standard_output(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.iterdir())
    assert cli.main(["run", "--once", "--train", "mine.py", "--seed", "7", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["status"], result["metric"], result["seed"]) == ("ok", "val_bpb", 7)
    assert result["value"] == pytest.approx(runs.uniform_bpb() * 6.0 / math.log(runs.VOCAB))
    assert result["tokens"] >= 2**13
    assert "running mine.py: scale cpu, 8192 tokens, seed 7" in said.err
    assert sorted(here.iterdir()) == before


def test_a_run_that_fails_shows_the_end_of_its_log(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").write_text("print('so far so good')\n1 / 0\n")
    assert cli.main(["run", "--once", "--train", "mine.py", "--keep", "kept"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("crash: no score. exit status 1: ZeroDivisionError")
    assert "so far so good" in said.err
    assert "line 2" in said.err
    assert json.loads((here / "kept/result.json").read_text())["status"] == "crash"
    assert cli.main(["run", "--once", "--train", "mine.py", "--keep", "kept"]) == 2
    assert "exists already" in capsys.readouterr().err
