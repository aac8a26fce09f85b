"""The demonstration's closing words, whatever became of it; its detuned program; install.sh."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from story import Story

from agent import constants
from jobs import campaign, cli, demo, lab
from jobs.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def told(*best: float, first: tuple[float, ...] = (2.0, 2.01, 1.99)) -> list[str]:
    """The summary of a campaign whose baseline and one better program were rerun so."""
    night = Story()
    night.experiment(2.0)
    night.experiment(1.9)
    for experiment, values in (("e0001", first), ("e0002", best)):
        for seed, value in enumerate(values, start=2):
            night.run(experiment, value, seed=seed, purpose="confirm")
    return demo.summary(night.state)


def test_a_gain_on_fresh_seeds_is_the_headline() -> None:
    first, *_, last = told(1.90, 1.91, 1.92)
    assert first == "on fresh seeds (3 each):"
    assert last == "  gain 0.0900 val_bpb (the campaign's own seed said 0.1000)"


def test_a_difference_within_noise_is_called_none() -> None:
    assert told(1.90, 2.05, 2.06)[-1].startswith("  no gain beyond noise: -0.0033 +- ")


def test_without_reruns_there_is_no_figure() -> None:
    said = "first e0001 and best e0002 were not run again: it was stopped before"
    assert told() == told(1.9, first=()) == [said]


def test_a_campaign_without_a_score_says_so() -> None:
    assert demo.summary(Story().state) == ["nothing was scored: `autoresearch log` says why"]


def test_a_reference_that_has_no_reruns_or_is_no_better_recovers_nothing() -> None:
    night = Story("main", "reference")
    for branch in ("main", "reference"):
        night.experiment(2.0, branch=branch)
    night.experiment(1.9)
    for experiment in ("e0001", "e0003"):
        night.run(experiment, 1.95, seed=2, purpose="confirm")
    assert not any("detuning" in line for line in demo.summary(night.state))
    night.run("e0002", 1.95, seed=2, purpose="confirm")
    assert demo.summary(night.state)[-1] == "  detuning cost 0.0000"


def test_the_detuned_program_differs_in_its_named_constants_alone() -> None:
    shipped = (lab.TRAINER / "train.py").read_text()
    worse = demo.worsened(shipped)
    old, new = (constants.values(text, "cpu") for text in (shipped, worse))
    assert {name for name in old if old[name] != new[name]} == set(demo.DETUNED)
    for name, factor in demo.DETUNED.items():
        assert new[name] == pytest.approx(old[name] * factor)
    for scale in ("h100", "small"):
        assert constants.values(shipped, scale) == constants.values(worse, scale)


def test_the_demonstration_of_a_detuned_program_runs_to_its_closing_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, with the least of training; what it finds in so few steps means nothing."""
    monkeypatch.setattr(demo, "TOKENS", 12 * 2048)
    monkeypatch.setattr(demo, "RERUNS", 0)
    monkeypatch.setenv("CXX", "none")  # so few steps compile for longer than they train
    lines: list[str] = []
    folder = tmp_path / "demo"
    (tmp_path / ".demo.draft").mkdir()  # as a kill left it
    assert demo.run(folder, True, 1, lines.append, lambda text: None) == 0
    said = "\n".join(lines)
    assert (folder / lab.PROGRAM).read_text() == demo.worsened(
        (lab.TRAINER / "train.py").read_text()
    )
    state = campaign.read(folder / "campaigns" / "demo")
    assert [r.branch for r in state.experiments()].count("reference") == 1
    assert len(state.records) == 3
    assert all(r.runs[0].ok for r in state.experiments())
    assert f"table:  {folder}/campaigns/demo/results.tsv" in said
    assert f"report: {folder}/campaigns/demo/report/index.html" in said
    assert Path(folder, "campaigns/demo/report/index.html").exists()
    assert demo.run(folder, True, 1, lines.append, lambda text: None) == 0  # nothing is run again
    assert len(campaign.read(folder / "campaigns" / "demo").records) == 3


def test_a_number_of_experiments_that_is_none_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--experiments", "-5"])
    assert ended.value.code == 2


def test_another_lab_is_not_taken_for_a_demonstration(tmp_path: Path) -> None:
    (tmp_path / "campaign.yaml").write_text("campaign: mine\n")
    with pytest.raises(UserError, match="is a lab of its own"):
        demo.run(tmp_path, False, None, print, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["campaign.yaml"]


OLD = '#!/bin/sh\n[ "$1" = -c ] && exit 1\necho Python 3.9.2\n'
NO_VENV = '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n'


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({}, "git is missing: install it"),
        ({"git": "#!/bin/sh\n"}, "python3 is missing: Python 3.11 or newer is needed"),
        ({"git": "#!/bin/sh\n", "python3": OLD}, "Python 3.9.2 is too old"),
        ({"git": "#!/bin/sh\n", "python3": NO_VENV}, "cannot make virtual environments"),
    ],
)
def test_what_a_machine_lacks_is_said_in_a_line(
    tmp_path: Path, there: dict[str, str], said: str
) -> None:
    for name in ("dirname", "sed", "sh"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    for name, script in there.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": str(tmp_path), "VENV": str(tmp_path / "venv"), "HOME": os.devnull}
    argv = ["/bin/bash", str(ROOT / "install.sh")]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stdout + done.stderr
    assert not (tmp_path / "venv").exists()
