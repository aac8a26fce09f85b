"""The image store: what a tag means, and that a changed file is found out. No Apptainer needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from containers import images
from containers.apptainer import ImageError
from containers.images import Image

EVALUATOR = "e" * 64


def put(store: Path, content: bytes, tag: str | None = None, **facts) -> Image:
    """A store's image with this content."""
    store.mkdir(exist_ok=True)
    draft = store / ".draft"
    draft.unlink(missing_ok=True)
    draft.write_bytes(content)
    labels = {"autoresearch.protocol": "1", "autoresearch.evaluator.sha256": EVALUATOR}
    known = {"definition": "", "labels": labels, "packages": ("a==1",), "origin": "built from x"}
    made = {"time": images.now()}
    image = Image(images.sha256(draft), draft.name, 0, 0, **{**known, "made": made, **facts})
    image = images.add(store, draft, image)
    if tag:
        images.tag(store, image.sha256, tag)
    return image


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "images"


def test_an_image_is_found_by_tag_by_digest_and_by_the_registrys_digest(store: Path):
    digest = "sha256:" + "5" * 64
    image = put(store, b"one", "cpu", registry={"oras://h/n": digest})
    put(store, b"two", "other")
    for name in ("cpu", image.sha256, f"sha256:{image.sha256}", image.sha256[:8], digest):
        assert images.find(store, name) == image
    assert Path(image.path).read_bytes() == b"one"
    assert image.registry_digest == digest


@pytest.mark.parametrize("name", ["absent", "../tags/cpu", "abc", "", "0" * 64])
def test_an_image_that_is_not_there_is_answered_with_what_is(store: Path, name: str):
    put(store, b"one", "cpu")
    with pytest.raises(ImageError, match=r"\(tags there: cpu\).*image build"):
        images.find(store, name)


def test_a_store_that_does_not_exist_holds_nothing(store: Path):
    assert images.every(store) == []
    with pytest.raises(ImageError, match="tags there: none"):
        images.find(store, "cpu")


def test_a_moved_tag_is_told_and_the_old_digest_still_finds_the_old_image(store: Path):
    old, new = put(store, b"old", "cpu"), put(store, b"new")
    assert images.tag(store, new.sha256, "cpu") == (new, old.sha256)
    assert images.find(store, "cpu") == new
    assert images.find(store, old.sha256) == old
    assert images.tag(store, "cpu", "cpu") == (new, None)
    assert images.tags(store) == {"cpu": new.sha256}


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "-x", "a b", "x" * 200])
def test_a_tag_that_could_not_be_a_files_name_is_refused(store: Path, name: str):
    image = put(store, b"one")
    with pytest.raises(ImageError, match="cannot be a tag"):
        images.tag(store, image.sha256, name)


def test_the_same_bytes_twice_are_one_image_that_keeps_its_first_origin(store: Path):
    put(store, b"one", origin="built from cpu.def")
    again = put(store, b"one", origin="pulled from oras://h/n", registry={"oras://h/n": "sha256:7"})
    assert images.every(store) == [again]
    assert again.origin == "built from cpu.def"
    assert again.registry_digest == "sha256:7"


def test_one_changed_byte_is_found_and_both_digests_are_named(store: Path):
    image = put(store, b"a" * 1000)
    images.check(image)
    images.check_quick(image)
    path = Path(image.path)
    path.chmod(0o755)
    path.write_bytes(b"a" * 999 + b"b")
    for check in (images.check, images.check_quick):
        with pytest.raises(ImageError) as error:
            check(image)
        assert image.sha256 in str(error.value)
        assert images.sha256(path) in str(error.value)


def test_a_byte_changed_behind_an_unchanged_mtime_is_found_by_the_full_check(store: Path):
    image = put(store, b"a" * 1000)
    path = Path(image.path)
    path.chmod(0o755)
    path.write_bytes(b"a" * 999 + b"b")
    os.utime(path, ns=(0, image.mtime_ns))
    images.check_quick(image)  # what size and mtime cannot tell, the campaign's start does
    with pytest.raises(ImageError, match="has changed"):
        images.check(image)


def test_a_file_that_was_only_touched_passes_by_its_bytes(store: Path):
    image = put(store, b"one")
    os.utime(image.path, ns=(0, 0))
    images.check_quick(image)


def test_a_missing_image_says_from_where_it_can_be_pulled(store: Path):
    here, remote = put(store, b"one"), put(store, b"two", registry={"oras://h/n": "sha256:77"})
    for image in (here, remote):
        Path(image.path).unlink()
    with pytest.raises(ImageError, match=r"missing.*rebuild it from its definition"):
        images.check_quick(here)
    with pytest.raises(ImageError, match="image pull oras://h/n@sha256:77"):
        images.check(remote)


def test_an_image_of_another_evaluator_or_protocol_is_refused_in_words(store: Path):
    image = put(store, b"one")
    images.check_evaluator(image, EVALUATOR)
    with pytest.raises(ImageError, match=f"seals evaluator sha256 {EVALUATOR}.*{'f' * 64}"):
        images.check_evaluator(image, "f" * 64)
    with pytest.raises(ImageError, match=r"protocol 1; this controller speaks 2"):
        images.check_evaluator(image, EVALUATOR, protocol=2)
    with pytest.raises(ImageError, match="protocol none"):
        images.check_evaluator(put(store, b"foreign", labels={}), EVALUATOR)


def test_a_torn_record_is_named_and_not_guessed(store: Path):
    image = put(store, b"one", "cpu")
    record = Path(image.path).with_suffix(".json")
    record.write_text(record.read_text()[:50])
    with pytest.raises(ImageError, match=f"{record.name}.* cannot be read"):
        images.find(store, "cpu")


def test_records_are_readable_for_others_and_images_writable_for_nobody(store: Path):
    image = put(store, b"one", "cpu")
    for path in (Path(image.path).with_suffix(".json"), store / "tags" / "cpu.json"):
        assert path.stat().st_mode & 0o777 == 0o644
    assert Path(image.path).stat().st_mode & 0o777 == 0o555


def test_the_store_is_the_settings_else_the_environments_else_the_homes(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("AUTORESEARCH_IMAGES", "/group/images")
    assert images.default_store("~/own") == Path("/home/someone/own")
    assert images.default_store() == Path("/group/images")
    monkeypatch.delenv("AUTORESEARCH_IMAGES")
    assert images.default_store() == Path("/home/someone/.local/share/autoresearch/images")


def test_a_store_may_be_seen_under_another_path(store: Path, tmp_path: Path):
    put(store, b"one", "cpu")
    store.rename(tmp_path / "moved")
    images.check_quick(images.find(tmp_path / "moved", "cpu"))
