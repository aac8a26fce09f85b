"""trainer.def itself, run on a base without CUDA: stub wheels stand in for the heavy ones."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import Person, person

from containers.images import Image

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

TORCH = """
class _C:
    def _cuda_getArchFlags():
        return "sm_90"
class version:
    cuda = "13.0"
def compiled_with_cxx11_abi():
    return True
"""
BARE = """\
Bootstrap: localimage
From: {image}

%post
    rm -rf /opt/autoresearch /usr/lib/gcc /usr/include /usr/share/doc /usr/lib/x86_64-linux-gnu/*.a
"""
VENDOR = """\
Bootstrap: localimage
From: {folder}/bare.sif

%files
    {torch} /torch.whl

%post
    python3 -m zipfile -e /torch.whl /usr/lib/python3/dist-packages
"""


def wheel(folder: Path, name: str, version: str, code: str = "", needs: str = "") -> Path:
    """A wheel of one module, as pip takes it."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": f"__version__ = {version!r}\n{code}",
        f"{info}/METADATA": metadata + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return path


@pytest.fixture(scope="module")
def bases(cpu_image: Image):
    """Images to build on: bare.sif, Debian with its Python, and vendor.sif, which has a torch."""
    folder = Path("/var/tmp/autoresearch-test-bases")
    shutil.rmtree(folder, ignore_errors=True)
    builder = person("apptester", folder)
    torch = wheel(folder, "torch", "2.13.0+vendor", TORCH)
    (folder / "bare.def").write_text(BARE.format(image=cpu_image.path))
    (folder / "vendor.def").write_text(VENDOR.format(folder=folder, torch=torch))
    for name in ("bare", "vendor"):
        packed = ("--mksquashfs-args", "-comp zstd -Xcompression-level 1")
        argv = ["apptainer", "--quiet", "build", *packed, f"{folder}/{name}.sif"]
        builder.run(*argv, f"{folder}/{name}.def")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def wheels(someone: Person) -> Path:
    folder = someone.folder / "wheels"
    folder.mkdir()
    for name in ("numpy", "pyarrow", "tiktoken", "rustbpe", "safetensors", "einops"):
        wheel(folder, name, "99.0")
    for name in ("ninja", "packaging", "psutil", "wheel", "setuptools"):
        wheel(folder, name, "99.0")
    return folder


def build(someone: Person, base: Path, wheels: Path, check: bool = True):
    """trainer.def on that base, with no package index but the wheels."""
    (someone.folder / "pip.conf").write_text("[global]\nno-index = true\n")
    settings = ("--set", "BOOTSTRAP=localimage", "--set", f"FROM={base}")
    site = ("--wheels", wheels, "--pip-conf", someone.folder / "pip.conf")
    return someone.image("build", "trainer", "--json", *settings, *site, check=check)


def test_a_vendors_torch_stays_and_the_labels_name_it(someone: Person, bases: Path, wheels: Path):
    wheel(wheels, "flash_attn", "2.8.3")
    wheel(wheels, "torch", "2.13.0", TORCH)  # the index has another: it is not taken
    labels = json.loads(build(someone, bases / "vendor.sif", wheels).stdout)["labels"]
    told = {
        name: labels[f"autoresearch.{name}"] for name in ("torch", "flash_attn", "cuda", "arch")
    }
    assert told == {
        "torch": "2.13.0+vendor",
        "flash_attn": "2.8.3",
        "cuda": "13.0",
        "arch": "sm_90",
    }
    assert labels["autoresearch.protocol"] == "1"


def test_a_base_without_torch_gets_it_from_the_index(someone: Person, bases: Path, wheels: Path):
    wheel(wheels, "flash_attn", "2.8.3")
    wheel(wheels, "torch", "2.13.0", TORCH)
    labels = json.loads(build(someone, bases / "bare.sif", wheels).stdout)["labels"]
    assert labels["autoresearch.torch"] == "2.13.0"


def test_a_flash_attn_that_does_not_import_fails_the_build(
    someone: Person, bases: Path, wheels: Path
):
    wheel(wheels, "flash_attn", "2.8.3", "raise ImportError('undefined symbol: c10')\n")
    failed = build(someone, bases / "vendor.sif", wheels, check=False)
    assert failed.returncode == 1
    assert "undefined symbol: c10" in failed.stderr
    assert not list(someone.store.glob("*.sif"))


def test_a_package_that_replaces_torch_fails_the_build_with_both_versions(
    someone: Person, bases: Path, wheels: Path
):
    wheel(wheels, "flash_attn", "2.8.3")
    wheel(wheels, "torch", "2.14.0", TORCH)
    wheel(wheels, "einops", "99.1", needs="torch==2.14.0")
    failed = build(someone, bases / "vendor.sif", wheels, check=False)
    assert failed.returncode == 1
    assert "torch was changed by what was installed after it" in failed.stderr
    assert "before: 2.13.0+vendor" in failed.stderr
    assert "after:  2.14.0" in failed.stderr
