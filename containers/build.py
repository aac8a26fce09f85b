"""From a definition to an image in the store: staged, built to a fresh name, tested, renamed."""

from __future__ import annotations

import hashlib
import json
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
TRAINER = HERE.parent / "trainer"
CONTEXT_PREFIX = "autoresearch-image-"
SCRIPTS = ("seal.py", "inside.py")
PASSED = ("CONTEXT", "RECIPE")  # arguments that are not the user's to set


@dataclass(frozen=True)
class Site:
    """What a build needs of its site. It is bound to /mnt meanwhile: none of it stays inside."""

    ca_bundle: Path | None = None  # PEM, for pip
    pip_conf: Path | None = None  # package index
    wheels: Path | None = None  # folder of wheels to prefer


@dataclass(frozen=True)
class Recipe:
    """A definition with its arguments; the trainer folder is what it seals.

    An image is known by two hashes, both among its labels: this one's and its evaluator's.
    """

    definition: Path = HERE / "cpu.def"
    trainer: Path = TRAINER
    arguments: Mapping[str, str] = field(default_factory=dict)

    @property
    def scripts(self) -> tuple[Path, ...]:
        """What %post runs besides: those of the definition's own version, where it has them."""
        own = self.definition.parent
        folder = own if (own / SCRIPTS[0]).exists() else HERE
        return tuple(folder / name for name in SCRIPTS)

    @property
    def sha256(self) -> str:
        """Of definition, arguments and scripts. Images of equal hash are alike but for their
        evaluator, as far as the mirrors serve the same packages."""
        parts = {
            "definition": self.definition.read_text(),
            "arguments": dict(self.arguments),
            "scripts": [path.read_text() for path in self.scripts],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def definition_arguments(text: str) -> dict[str, str]:
    """The defaults in a definition's %arguments."""
    section = re.search(r"^%arguments\n((?:[ \t]+.*\n|\n)*)", text, re.MULTILINE)
    lines = section[1].split("\n") if section else []
    pairs = (line.strip().partition("=") for line in lines if "=" in line)
    return {name: value for name, _, value in pairs}


def apt_mirror(sources: Path = Path("/etc/apt")) -> str:
    """The Debian mirror that this machine uses itself; "" where it has none (--set MIRROR=URL)."""
    files = [sources / "sources.list", *sorted(sources.glob("sources.list.d/*"))]
    text = "\n".join(path.read_text() for path in files if path.is_file())
    found = re.search(
        r"^(?:URIs:|deb (?:\[[^]]*\] )?)\s*(https?://\S*/debian)/?\s", text, re.MULTILINE
    )
    return found[1] if found else ""


def build(store: Path, tag: str, recipe: Recipe, site: Site | None = None) -> Image:
    """Build, test and tag an image. The log stays in the store beside it.

    Raises:
        ImageError: an argument that the definition does not have, a failed build, an image that
            does not hold what its labels say. The store is then as it was, but for the log.
    """
    known = definition_arguments(recipe.definition.read_text())
    settable = [name for name in known if name not in PASSED]
    for name in recipe.arguments:
        if name not in settable:
            raise ImageError(f"{recipe.definition.name} takes {', '.join(settable)}, not {name!r}")
    with fresh(store) as (draft, log), _staged(recipe, site or Site()) as context:
        passed = dict(zip(PASSED, (str(context), recipe.sha256), strict=True))
        arguments = {name: text for name, text in passed.items() if name in known}
        if "MIRROR" in known:
            arguments["MIRROR"] = apt_mirror()
        arguments |= recipe.arguments
        options = command.build_options(arguments, str(context / "site"))
        apptainer.build(recipe.definition, draft, options, log)
        found = describe(draft, f"built from {recipe.definition.name}")
        image = images.add(store, draft, found)
        log.replace(Path(image.path).with_suffix(".log"))
    images.tag(store, image.sha256, tag)
    return image


def describe(file: Path, origin: str) -> Image:
    """Test an image (its imports, its labels against its contents) and say what it is.

    Raises ImageError: it does not start, does not import what a run needs, or is not what it says.
    """
    told = apptainer.inspect(file)
    script = command.plain(str(file), (command.PYTHON, "/opt/autoresearch/inside.py", "report"))
    out = apptainer.run(script, f"Testing the image {file}")
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
    definition = buildable(told["definition"], told["labels"])
    return Image(
        *(digest, file.name, file.stat().st_size, 0, definition, told["labels"]),
        packages=tuple(report["packages"]),
        origin=origin,
        made=made,
    )


def buildable(definition: str, labels: Mapping[str, str]) -> str:
    """An image's own definition, such that `image build` takes it: of its arguments, which are all
    filled in, those that belong to one build are open again."""
    recipe = labels.get("autoresearch.definition.sha256")
    if recipe and recipe != "by-hand":
        definition = definition.replace(recipe, "{{ RECIPE }}")
    return re.sub(rf"\S*/{CONTEXT_PREFIX}[^/\s]+", "{{ CONTEXT }}", definition)


def verify(image: Image) -> None:
    """Bytes, labels against contents, and imports.

    Raises ImageError: the first of these that does not hold.
    """
    images.check(image)
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
    with tempfile.TemporaryDirectory(prefix=CONTEXT_PREFIX) as name:
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
            shutil.copyfile(wheel, context / "site" / "wheels" / wheel.name)
        yield context
