"""The definition files, as far as they can be judged without building them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from containers import build

ROOT = Path(__file__).parents[2]
NAMES = ("cpu", "trainer")
SECTION = re.compile(r"^%(\w+)$", re.MULTILINE)


def sections(name: str) -> dict[str, str]:
    """{'header': ..., 'post': ..., ...} of containers/NAME.def."""
    parts = SECTION.split((ROOT / "containers" / f"{name}.def").read_text())
    return {"header": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def rendered(text: str, arguments: dict[str, str]) -> str:
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: arguments[match[1]], text)


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_has_a_default_and_is_used(name: str):
    text = (ROOT / "containers" / f"{name}.def").read_text()
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == set(build.definition_arguments(text))
    assert text.count("{{") == len(re.findall(r"\{\{ \w+ \}\}", text))


@pytest.mark.parametrize("name", NAMES)
def test_the_post_section_is_shell_that_stops_at_the_first_failure(name: str):
    text = sections(name)
    arguments = build.definition_arguments((ROOT / "containers" / f"{name}.def").read_text())
    post = rendered(text["post"], arguments)
    checked = subprocess.run(["sh", "-n"], input=post, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert post.strip().startswith("set -eu")


@pytest.mark.parametrize("name", NAMES)
def test_the_evaluator_is_sealed_and_the_labels_are_written_from_what_is_inside(name: str):
    text = sections(name)
    for line in text["files"].strip().splitlines():
        source, target = re.fullmatch(r"\s*\{\{ CONTEXT \}\}/(\S+) (\S+)", line).groups()
        assert (ROOT / source).exists()
        assert target.startswith("/opt/autoresearch/")
    assert re.search(r'labels >> "\$APPTAINER_LABELS"', text["post"])
    assert "autoresearch.definition.sha256 {{ RECIPE }}" in text["post"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_site_is_copied_in(name: str):
    assert "/mnt" not in sections(name)["files"]
    assert "/mnt" not in sections(name).get("environment", "")


def test_the_cuda_image_takes_its_base_as_a_parameter_and_guards_torch():
    header, post = sections("trainer")["header"], sections("trainer")["post"]
    assert "Bootstrap: {{ BOOTSTRAP }}\nFrom: {{ FROM }}" in header
    before = post.index("torch=$($python $inside torch)")
    assert before < post.index("flash_attn") < post.index('[ "$torch" != ')
    assert '\n    $python -c "import flash_attn"' in post  # and fails if it does not
    assert "--no-build-isolation --no-deps" in post


def test_the_cpu_image_needs_no_container_registry():
    header = sections("cpu")["header"]
    assert "Bootstrap: debootstrap" in header
    assert not re.search(r"^From:", header, re.MULTILINE)


def test_arguments_may_hold_equals_signs_and_nothing():
    text = "Bootstrap: x\n\n%arguments\n    A=b==1 c>=2\n    EMPTY=\n\n%post\n    X=1\n"
    assert build.definition_arguments(text) == {"A": "b==1 c>=2", "EMPTY": ""}


def test_debootstrap_uses_the_mirror_that_the_machine_itself_uses(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    assert build.apt_mirror(tmp_path) == ""
    other = "Types: deb\nURIs: https://example.org/node/\nSuites: any\n"
    (tmp_path / "sources.list.d" / "a.sources").write_text(other)
    debian = "Types: deb\nURIs: http://mirror.example.org/debian/\nSuites: bookworm\n"
    (tmp_path / "sources.list.d" / "b.sources").write_text(debian)
    assert build.apt_mirror(tmp_path) == "http://mirror.example.org/debian"
    (tmp_path / "sources.list").write_text(
        "deb [arch=amd64] http://old.example.org/debian sid main\n"
    )
    assert build.apt_mirror(tmp_path) == "http://old.example.org/debian"
