"""Building, pushing and pulling small images with a real Apptainer, as ordinary users."""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path

import pytest
import registry
import small
from accounts import for_group_only, python_as
from conftest import Person, person
from small import LABELS

from containers import apptainer, command, images
from containers.apptainer import ImageError
from containers.images import Image

pytestmark = pytest.mark.cluster


@pytest.fixture
def definition(someone: Person):
    """A function that writes a small definition: definition(post='', labels=...)."""
    return functools.partial(small.write, small.make_root(someone.folder, someone.run))


def word_in(person: Person, image: Image) -> str:
    return person.run(*command.plain(image.path, ["cat", "/word"])).stdout


def test_an_ordinary_user_builds_an_image_that_is_tested_and_then_tagged(someone, definition):
    built = someone.image("build", definition(), "--tag", "small", "--json", "--set", "WORD=hi")
    image = someone.find("small")
    assert json.loads(built.stdout)["sha256"] == image.sha256
    assert image.labels["autoresearch.definition.sha256"] == image.definition_sha256 != "by-hand"
    assert image.packages == ("torch==9", "deb:gcc=12")
    assert 'echo "hi" > /word' in image.definition
    assert word_in(someone, image) == "hi\n"
    log = Path(image.path).with_suffix(".log")
    assert sorted(p.name for p in someone.store.iterdir()) == sorted(
        ["tags", log.name, Path(image.path).name, Path(image.path).stem + ".json"]
    )
    assert "Build complete" in log.read_text()
    someone.image("verify", "small")


def test_the_definition_that_an_image_keeps_builds_another_like_it(someone, definition):
    someone.image("build", definition(), "--tag", "small", "--set", "WORD=hi")
    kept = someone.folder / "kept.def"
    kept.write_text(someone.find("small").definition)
    someone.image("build", kept, "--tag", "again")
    again = someone.find("again")
    assert again.sha256 != someone.find("small").sha256  # time stamps
    assert word_in(someone, again) == "hi\n"
    assert again.definition == kept.read_text().rstrip("\n")


def test_a_failed_build_says_its_last_words_and_the_tag_stays(someone, definition):
    someone.image("build", definition(), "--tag", "small")
    before = someone.find("small")
    failed = someone.image(
        *("build", definition("echo flash-attn does not import; exit 3"), "--tag", "small"),
        check=False,
    )
    assert failed.returncode == 1
    assert "Building small.def failed" in failed.stderr
    assert "flash-attn does not import" in failed.stderr
    assert someone.find("small") == before
    assert len(list(someone.store.glob("*.sif"))) == 1


def test_an_image_whose_labels_are_not_what_it_holds_is_refused(someone, definition):
    lying = {**LABELS, "autoresearch.evaluator.sha256": "0" * 64}
    failed = someone.image("build", definition(labels=lying), "--tag", "small", check=False)
    assert failed.returncode == 1
    assert "e" * 64 in failed.stderr
    assert "0" * 64 in failed.stderr
    assert not list(someone.store.glob("*.sif"))


def test_an_argument_that_the_definition_does_not_have_is_refused_before_anything(
    someone, definition
):
    failed = someone.image("build", definition(), "--set", "WRONG=1", check=False)
    assert failed.returncode == 1
    assert "small.def takes WORD, not 'WRONG'" in failed.stderr


def test_an_image_travels_by_a_registry_and_is_found_by_its_digest_there(
    someone, definition, reachable
):
    someone.image("build", definition(), "--tag", "small")
    image = someone.find("small")
    (reachable / "registry").mkdir()
    other = person("apptester2", reachable / "other")
    with registry.serve(reachable / "registry") as host:
        plain = {"APPTAINER_NOHTTPS": "true"}
        someone.image("push", "small", f"oras://{host}/lab/small:v1", **plain)
        digest = someone.find("small").registry_digest
        assert digest == (reachable / "registry" / "lab_small@v1").read_text()
        address = f"oras://{host}/lab/small"
        other.image("pull", f"{address}@{digest}", "--tag", "theirs", **plain)
        pulled = other.find(digest)
        assert (pulled.sha256, pulled.registry) == (image.sha256, {address: digest})
        assert not (Path("/home") / other.name / ".apptainer" / "cache" / "oras").exists()
        missing = other.image("pull", f"{address}:v2", "--tag", "x", check=False, **plain)
    assert missing.returncode == 1
    assert f"Pulling {address}:v2 failed" in missing.stderr
    assert images.tags(other.store) == {"theirs": image.sha256}


def test_a_file_that_is_not_an_image_of_this_project_is_not_taken_in(someone, tiny):
    failed = someone.image("pull", tiny, "--tag", "tiny", check=False)
    assert failed.returncode == 1
    assert "Testing the image" in failed.stderr
    assert not list(someone.store.glob("*.sif"))


def test_a_flipped_byte_is_found_with_both_digests(someone, definition):
    someone.image("build", definition(), "--tag", "small")
    image = someone.find("small")
    path = Path(image.path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o755)
    path.write_bytes(content)
    changed = someone.image("verify", "small", check=False)
    assert changed.returncode == 1
    for digest in (image.sha256, images.sha256(path)):
        assert digest in changed.stderr


def test_a_second_user_verifies_and_runs_from_a_store_that_the_group_may_read(
    someone, definition, reachable
):
    someone.image("build", definition(), "--tag", "small")
    for_group_only("apptester2", someone.store)
    other = person("apptester2", reachable / "other", someone.store)
    assert someone.find("small").path in other.image("verify", "small").stdout
    assert word_in(other, other.find("small")) == "hello\n"
    refused = other.image("tag", "small", "mine", check=False)  # readable is not writable
    assert "image tag failed: [Errno 13] Permission denied" in refused.stderr
    stranger = person("apptester3", reachable / "stranger", someone.store)
    assert "not readable for this user" in stranger.image("list", check=False).stderr


def test_the_machine_is_fit_for_apptainer_and_doctor_says_so_as_an_ordinary_user(someone):
    ask = "from containers import machine; print([(f.check, f.status) for f in machine.examine()])"
    told = ast.literal_eval(python_as(someone.name, "-c", ask).stdout)
    assert dict(told) == dict.fromkeys(
        ["apptainer", "/dev/fuse", "squashfuse", "user namespaces"], "ok"
    )


def test_inspecting_what_is_no_image_says_so():
    with pytest.raises(ImageError, match=r"Inspecting /nowhere.sif failed"):
        apptainer.inspect(Path("/nowhere.sif"))
