"""Runs inside an image, as far as no container is needed: which image, and that it stays so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from containers import images
from jobs import config, container, materialise
from jobs.errors import Paused
from jobs.history import State
from jobs.model import Experiment, Run

EVALUATOR = "e" * 64


@pytest.fixture
def image(tmp_path: Path) -> images.Image:
    """A file in a store that passes for an image."""
    store = tmp_path / "images"
    store.mkdir()
    file = store / "draft"
    file.write_bytes(b"a" * 1000)
    labels = {"autoresearch.protocol": "1", "autoresearch.evaluator.sha256": EVALUATOR}
    bare = images.Image(images.sha256(file), "", 0, 0, "", labels, (), "a test")
    made = images.add(store, file, bare)
    images.tag(store, made.sha256, "cpu")
    return made


def contained(image: images.Image, **executor: Any) -> materialise.Site:
    store = str(Path(image.path).parent)
    settings = config.parse({"executor": {"image": "cpu", "images": store, **executor}}, environ={})
    bare = materialise.Site(settings, Path("/night"), None, {"evaluator_sha256": EVALUATOR})
    return container.contained(bare)


def test_a_sites_image_comes_from_its_store_with_its_binds(image: images.Image) -> None:
    site = contained(image, binds=["/apps/cuda"])
    assert site.facts["container_sha256"] == image.sha256
    assert any('"src=/apps/cuda"' in word for word in site.program_argv)
    assert not any("/apps/cuda" in word for word in site.referee_argv)
    assert "--net" in site.program_argv
    assert "--net" not in contained(image, allow_network=True).program_argv


def test_an_image_changed_by_a_byte_during_a_campaign_pauses_it(image: images.Image) -> None:
    site, path = contained(image), Path(image.path)
    container.check_before_run(site)
    path.chmod(0o755)
    path.write_bytes(b"a" * 999 + b"b")
    with pytest.raises(Paused) as paused:
        container.check_before_run(site)
    for digest in (image.sha256, images.sha256(path)):
        assert digest in str(paused.value)


def test_an_image_that_goes_missing_during_a_campaign_pauses_it(image: images.Image) -> None:
    site = contained(image)
    Path(image.path).unlink()
    with pytest.raises(Paused, match=f"{image.path} is missing .sha256 {image.sha256}"):
        container.check_before_run(site)


def test_a_run_is_told_of_the_sites_folders_and_of_the_nodes_disk() -> None:
    settings = config.parse({"executor": {"binds": ["/apps"], "scratch": "$TMPDIR"}}, environ={})
    site = materialise.Site(settings, Path("/night"), Path("/data"), {})
    run = Run("e0001", 1, 1, materialise.budget(settings), "cpu")
    idea = Experiment("e0001", "main", "", "", None, "an idea", "person", "")
    task = materialise.task(site, State(), idea, run, Path("/night/run"))
    assert (task.readable, task.scratch) == (("/apps",), "$TMPDIR")
