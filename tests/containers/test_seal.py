"""The evaluator's hash: what changes it and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from containers import seal

TRAINER = Path(__file__).parents[2] / "trainer"


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    folder = tmp_path / "trainer"
    (folder / "referee").mkdir(parents=True)
    for name in ("__init__.py", "prepare.py", "rows.py", "train.py", "referee/server.py"):
        (folder / name).write_text(f"# {name}\n")
    (folder / "referee" / "result.schema.json").write_text("{}")
    return folder


def test_the_projects_own_evaluator_is_prepare_rows_corpora_and_the_referee():
    files = seal.evaluator_files(TRAINER)
    assert {"prepare.py", "rows.py", "corpora.py"} <= set(files)
    assert {name.split("/")[0] for name in files if "/" in name} == {"referee"}
    assert "train.py" not in files


def test_one_byte_in_the_referee_changes_the_hash_and_train_py_does_not(trainer: Path):
    before = seal.evaluator_sha256(trainer)
    (trainer / "train.py").write_text("# the agent's\n")
    assert seal.evaluator_sha256(trainer) == before
    (trainer / "referee" / "server.py").write_text("# referee/server.pX\n")
    assert seal.evaluator_sha256(trainer) != before


def test_moving_text_from_one_file_to_the_next_changes_the_hash(trainer: Path):
    (trainer / "prepare.py").write_text("ab")
    (trainer / "rows.py").write_text("c")
    before = seal.evaluator_sha256(trainer)
    (trainer / "prepare.py").write_text("a")
    (trainer / "rows.py").write_text("bc")
    assert seal.evaluator_sha256(trainer) != before


def test_the_sealed_copy_has_the_same_hash_and_no_train_py(trainer: Path, tmp_path: Path):
    seal.copy_sealed(trainer, tmp_path / "sealed")
    assert seal.evaluator_sha256(tmp_path / "sealed") == seal.evaluator_sha256(trainer)
    assert not (tmp_path / "sealed" / "train.py").exists()
    assert (tmp_path / "sealed" / "referee" / "result.schema.json").exists()


def test_a_folder_without_an_evaluator_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="No evaluator in"):
        seal.evaluator_sha256(tmp_path)
