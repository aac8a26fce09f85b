"""`autoresearch image ...`: the verbs that only look at the store."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from test_images import put

from containers import cli
from containers.apptainer import ImageError


def image(*argv: str | Path) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    return cli.main(parser.parse_args(["image", *map(str, argv)]))


def test_the_list_names_tags_digests_and_origins(tmp_path: Path, capsys):
    one = put(tmp_path, b"one", "cpu")
    put(tmp_path, b"two")
    assert image("list", "--store", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["cpu", one.sha256[:16]]
    assert lines[1].split()[0] == "-"
    assert image("list", "--store", tmp_path, "--json") == 0
    assert [row["tags"] for row in json.loads(capsys.readouterr().out)] == [["cpu"], []]


def test_moving_a_tag_tells_what_it_meant_before(tmp_path: Path, capsys):
    old, new = put(tmp_path, b"old", "cpu"), put(tmp_path, b"new")
    image("tag", "--store", tmp_path, new.sha256, "cpu")
    told = capsys.readouterr().out
    assert new.sha256 in told
    assert f"it meant {old.sha256} before" in told


def test_an_image_is_shown_with_its_packages_labels_and_digests(tmp_path: Path, capsys):
    one = put(tmp_path, b"one", "cpu")
    image("inspect", "--store", tmp_path, "cpu")
    shown = json.loads(capsys.readouterr().out)
    assert (shown["sha256"], shown["packages"]) == (one.sha256, ["a==1"])
    assert shown["registry_digest"] is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["verify", "absent"], "No image 'absent'"),
        (["build", "absent"], "No definition absent: cpu, trainer, or a file's path"),
        (["build", "cpu", "--set", "X"], "write NAME=VALUE"),
        (["build", "cpu", "--set", "CONTEXT=/"], "not 'CONTEXT'"),
        (["push", "cpu", "docker://h/n"], "oras://"),
    ],
)
def test_wrong_words_are_answered_with_the_right_ones(tmp_path: Path, argv: list[str], words: str):
    with pytest.raises(ImageError, match=words):
        image(argv[0], "--store", tmp_path, *argv[1:])
