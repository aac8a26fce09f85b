"""Who takes a run folder, and what is read of that afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jobs import payload

RUN = "e0001-s1-a1"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "e0001" / "s1-a1"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"facts": {"run": RUN}}))
    return folder


def test_a_folder_is_claimed_once(run_dir: Path) -> None:
    assert payload.claim(run_dir)
    assert not payload.claim(run_dir)
    assert payload.claimed(run_dir.parents[1], RUN)["run"] == RUN
    assert [path.name for path in run_dir.glob("*claim*")] == ["claim.json"]


def test_a_link_that_a_file_server_made_and_denied_is_ones_own(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def denied(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", denied)
    assert payload.claim(run_dir)


@pytest.mark.parametrize("text", [None, "", '{"run": "e00'])
def test_no_claim_and_a_torn_one_say_nothing(run_dir: Path, text: str | None) -> None:
    if text is not None:
        (run_dir / "claim.json").write_text(text)
    assert payload.claimed(run_dir.parents[1], RUN) == {}
