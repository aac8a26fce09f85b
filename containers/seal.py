"""What is sealed into an image: the frozen files of trainer/, and the one hash that names them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

# The agent's file, and the mark of a package: neither has a say in a score.
_NOT_FROZEN = frozenset({"train.py", "__init__.py"})


def evaluator_files(trainer: Path) -> list[str]:
    """Paths below trainer/ that decide a score (prepare, rows, corpora, referee/*), sorted.

    Raises:
        FileNotFoundError: `trainer` holds no prepare.py or no referee.
    """
    own = [path.name for path in trainer.glob("*.py") if path.name not in _NOT_FROZEN]
    referee = [f"referee/{path.name}" for path in (trainer / "referee").glob("*.py")]
    if "prepare.py" not in own or not referee:
        raise FileNotFoundError(
            f"No evaluator in {trainer}: expected prepare.py and referee/*.py there. "
            "Give the project's trainer/ folder."
        )
    return sorted(own + referee)


def evaluator_sha256(trainer: Path) -> str:
    """sha256 (hex) over name, length and bytes of every evaluator file, in sorted order."""
    digest = hashlib.sha256()
    for name in evaluator_files(trainer):
        content = (trainer / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def copy_sealed(trainer: Path, target: Path) -> None:
    """Copy the evaluator and its JSON schemas to `target`; train.py and caches stay behind."""
    schemas = [*trainer.glob("*.json"), *trainer.glob("referee/*.json")]
    names = evaluator_files(trainer) + [str(path.relative_to(trainer)) for path in schemas]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trainer / name, target / name)
