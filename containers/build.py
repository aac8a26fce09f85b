"""From a definition to an image in the store: staged, built to a fresh name, tested, renamed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from containers import apptainer, command, images, seal
from containers.apptainer import ImageError
from containers.images import Image

HERE = Path(__file__).resolve().parent
SCRIPTS = ("seal.py", "inside.py")


@dataclass(frozen=True)
class Site:
    """What a build needs of its site. It is bound to /mnt meanwhile: none of it stays inside."""

    ca_bundle: Path | None = None  # PEM, for pip
    pip_conf: Path | None = None  # package index
    wheels: Path | None = None  # folder of wheels to prefer


@dataclass(frozen=True)
class Recipe:
    """A definition with its arguments; the trainer folder is what it seals."""

    definition: Path = HERE / "cpu.def"
    trainer: Path = HERE.parent / "trainer"
    arguments: Mapping[str, str] = field(default_factory=dict)

    @property
    def scripts(self) -> tuple[Path, ...]:
        """What %post runs besides: those of the definition's own version, where it has them."""
        own = self.definition.parent
        folder = own if (own / SCRIPTS[0]).exists() else HERE
        return tuple(folder / name for name in SCRIPTS)

    @property
    def sha256(self) -> str:
        """Of definition, arguments, sealed files and scripts: equal, and the images are alike as
        far as the mirrors serve the same packages."""
        parts = {
            "definition": self.definition.read_text(),
            "arguments": dict(self.arguments),
            "evaluator": seal.evaluator_sha256(self.trainer),
            "scripts": [path.read_text() for path in self.scripts],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def definition_arguments(text: str) -> dict[str, str]:
    """The defaults in a definition's %arguments."""
    section = re.search(r"^%arguments\n((?:[ \t]+.*\n|\n)*)", text, re.MULTILINE)
    lines = section[1].split("\n") if section else []
    return dict(line.strip().split("=", 1) for line in lines if "=" in line)  # type: ignore[misc]


def build(
    store: Path, tag: str, recipe: Recipe, site: Site | None = None, key: Path | None = None
) -> Image:
    """Build, test and tag an image. The log stays in the store beside it.

    Args:
        key: PEM private key to sign with.

    Raises:
        ImageError: an argument that the definition does not have, a failed build, an image that
            does not hold what its labels say. The store is then as it was, but for the log.
    """
    known = definition_arguments(recipe.definition.read_text())
    settable = [name for name in known if name not in ("CONTEXT", "RECIPE")]
    for name in recipe.arguments:
        if name not in settable:
            raise ImageError(f"{recipe.definition.name} takes {', '.join(settable)}, not {name!r}")
    with fresh(store) as (draft, log), _staged(recipe, site or Site()) as context:
        arguments = {**recipe.arguments, "CONTEXT": str(context), "RECIPE": recipe.sha256}
        options = command.build_options(arguments, str(context / "site"))
        apptainer.build(recipe.definition, draft, options, log)
        if key:  # changes the file: before its hash is taken
            apptainer.run(command.sign(str(draft), str(key)), f"Signing {draft}")
        found = describe(draft, f"built from {recipe.definition.name}")
        found = dataclasses.replace(found, arguments=dict(recipe.arguments))
        image = images.add(store, draft, found)
        log.replace(Path(image.path).with_suffix(".log"))
    images.tag(store, image.sha256, tag)
    return image


def describe(file: Path, origin: str) -> Image:
    """Test an image (its imports, its labels against its contents) and say what it is.

    Raises:
        ImageError: it does not start, does not import what a run needs, or is not what it says.
    """
    told = apptainer.inspect(file)
    flash = told["labels"].get("autoresearch.flash_attn", "none") != "none"
    script = (command.PYTHON, "/opt/autoresearch/inside.py", "report", "flash" if flash else "")
    out = apptainer.run(command.plain(str(file), script), f"Testing the image {file}")
    report = json.loads(out.splitlines()[-1])
    for label, text in report["labels"].items():
        if told["labels"].get(label) != text:
            raise ImageError(
                f"The image {file} says {label} = {told['labels'].get(label)}, but holds {text}. "
                "It was changed after its labels were written: build it again."
            )
    version = apptainer.run(["apptainer", "version"], "Asking apptainer's version").strip()
    made = {"time": images.now(), "host": socket.gethostname(), "apptainer": version}
    digest = images.sha256(file)
    return Image(
        *(digest, file.name, file.stat().st_size, 0, told["definition"], told["labels"]),
        packages=tuple(report["packages"]),
        origin=origin,
        made=made,
    )


def verify(image: Image, key: Path | None = None) -> None:
    """Bytes, labels against contents, imports and, with a PEM public key, the signature.

    Raises:
        ImageError: the first of these that does not hold.
    """
    images.check(image)
    if key:
        apptainer.run(command.verify(image.path, str(key)), f"Verifying {image.path}'s signature")
    describe(Path(image.path), image.origin)


@contextmanager
def fresh(store: Path) -> Iterator[tuple[Path, Path]]:
    """A fresh path on the store's file system (a rename is then atomic), and one for the log."""
    store.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=store, prefix=".new-"))
    log = store / f"failed-{folder.name[5:]}.log"
    log.touch()
    try:
        yield folder / "image.sif", log
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _staged(recipe: Recipe, site: Site) -> Iterator[Path]:
    """The folder that %files copies from; its site/ is what %post finds at /mnt."""
    with tempfile.TemporaryDirectory(prefix="autoresearch-image-") as name:
        context = Path(name)
        seal.copy_sealed(recipe.trainer, context / "trainer")
        (context / "containers").mkdir()
        for script in recipe.scripts:
            shutil.copyfile(script, context / "containers" / script.name)
        (context / "site" / "wheels").mkdir(parents=True)
        for source, target in ((site.ca_bundle, "ca.crt"), (site.pip_conf, "pip.conf")):
            if source:
                shutil.copyfile(source, context / "site" / target)
        for wheel in site.wheels.glob("*.whl") if site.wheels else ():
            _link(wheel, context / "site" / "wheels" / wheel.name)
        yield context


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or another user's file
        shutil.copyfile(source, target)
