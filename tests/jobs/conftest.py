"""Labs for the tests of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toylab


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., toylab.Lab]]:
    """Makes toy labs: make_lab(EDIT, ..., SETTING=...); the first one lies in tmp_path/lab."""
    made: list[toylab.Lab] = []

    def make(*edits: dict, **settings: object) -> toylab.Lab:
        lab = toylab.Lab(tmp_path / f"lab{len(made) or ''}", *edits, **settings)
        made.append(lab)
        return lab

    yield make
    for lab in made:
        toylab.remove(lab.root)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[toylab.Lab]:
    """A toy campaign that has ended; not to be written to. See ended.toy."""
    import ended

    lab = ended.toy(tmp_path_factory.mktemp("toy") / "lab")
    yield lab
    toylab.remove(lab.root)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[toylab.Lab]:
    """A campaign with a real referee that has ended; not to be written to. See ended.tiny."""
    import ended

    lab = ended.tiny(tmp_path_factory.mktemp("tiny") / "lab")
    yield lab
    toylab.remove(lab.root)
    ended.runs.remove_data()
