"""The image store: which file a tag means, by its sha256. Plain JSON files, each written whole.

STORE/<sha256[:16]>.sif and .json (one image, never changed), STORE/tags/<tag>.json (may move).
Every file is its own record, so that two builds on two hosts never overwrite each other's entry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from containers.apptainer import ImageError
from jobs import model

PROTOCOL = 1  # of referee and wrapper, as this version of the project speaks it

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


@dataclass(frozen=True)
class Image:
    """One SIF file of a store and what is known of it."""

    sha256: str
    path: str  # absolute once read from a store; there, the file's name
    size: int  # bytes
    mtime_ns: int
    definition: str  # its text, arguments filled in: `image build` makes another like it
    labels: Mapping[str, str]
    packages: tuple[str, ...]  # "name==version", "deb:name=version"
    origin: str  # "built from cpu.def", or the address it was pulled from
    made: Mapping[str, str] = field(default_factory=dict)  # time (UTC), host, apptainer
    registry: Mapping[str, str] = field(default_factory=dict)  # address -> manifest digest there

    @property
    def registry_digest(self) -> str | None:
        """The manifest's digest in the registry last pushed to or pulled from ('sha256:...')."""
        return next(reversed(list(self.registry.values())), None)

    @property
    def definition_sha256(self) -> str:
        """Of definition, arguments and scripts (build.Recipe); 'by-hand' without such a label."""
        return self.labels.get("autoresearch.definition.sha256", "by-hand")


def default_store(setting: str | None = None) -> Path:
    """executor.images, else $AUTORESEARCH_IMAGES, else a folder below the home."""
    if setting:
        return Path(setting).expanduser().absolute()
    home = Path.home() / ".local" / "share" / "autoresearch" / "images"
    return Path(os.environ.get("AUTORESEARCH_IMAGES") or home)


def tags(store: Path) -> dict[str, str]:
    """{tag: sha256}, sorted by tag."""
    return {path.stem: _read(path)["sha256"] for path in sorted(store.glob("tags/*.json"))}


def every(store: Path) -> list[Image]:
    """All images of the store, oldest first. Raises ImageError: this user may not look into it."""
    if store.exists() and not os.access(store, os.R_OK | os.X_OK):
        raise ImageError(
            f"The image store {store} is not readable for this user: its owner gives the group "
            "access (chgrp -R GROUP, chmod -R g+rX)"
        )
    found = [_load(path) for path in store.glob("*.json")]
    return sorted(found, key=lambda image: image.made.get("time", ""))


def find(store: Path, name: str) -> Image:
    """The image by tag, by sha256 (or >= 8 first digits of it), or by a registry's digest.

    Raises ImageError: none or several; the message says what the store holds.
    """
    tag = store / "tags" / f"{name}.json"
    wanted = _read(tag)["sha256"] if _TAG.fullmatch(name) and tag.exists() else name
    digits = wanted.removeprefix("sha256:")
    if len(digits) < 8:  # too short for a digest
        digits = "not a digest"
    hits = [
        image
        for image in every(store)
        if image.sha256.startswith(digits) or wanted in image.registry.values()
    ]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise ImageError(f"{name!r} means {len(hits)} images in {store}: give more digits")
    known = ", ".join(tags(store)) or "none"
    raise ImageError(
        f"No image {name!r} in {store} (tags there: {known}). Build it (autoresearch image build), "
        "pull it by its digest, or name another store (--store, executor.images)."
    )


def tag(store: Path, name: str, new: str) -> tuple[Image, str | None]:
    """Let tag `new` mean image `name`. Returns the image and the sha256 that the tag meant before.

    A tag may move: commits record the sha256 too, and that decides.

    Raises ImageError: no such image, or not a tag's name.
    """
    if not _TAG.fullmatch(new):
        raise ImageError(
            f"{new!r} cannot be a tag: letters, digits and _ . + -, a letter or digit first"
        )
    image = find(store, name)
    path = store / "tags" / f"{new}.json"
    old = _read(path)["sha256"] if path.exists() else image.sha256
    write_json(path, {"sha256": image.sha256, "time": now()})
    return image, old if old != image.sha256 else None


def add(store: Path, file: Path, image: Image) -> Image:
    """Take a verified file (already on the store's file system) into the store.

    The same bytes twice are one image: what was known stays, registries are added.
    """
    key = image.sha256[:16]
    record, target = store / f"{key}.json", store / f"{key}.sif"
    if record.exists():
        known = _read(record)
        image = dataclasses.replace(
            image,
            **{name: known[name] for name in ("origin", "made")},
            registry={**known["registry"], **image.registry},
        )
    file.chmod(0o555)  # nothing writes to it again: one byte less or more is another image
    file.replace(target)
    status = target.stat()
    image = dataclasses.replace(
        image, path=target.name, size=status.st_size, mtime_ns=status.st_mtime_ns
    )
    write_json(record, model.to_json(image))
    return _load(record)


def note_registry(store: Path, image: Image, uri: str, digest: str) -> Image:
    """Record that `uri` holds the image under a manifest of this digest."""
    registry = {key: value for key, value in image.registry.items() if key != uri}
    record = store / f"{image.sha256[:16]}.json"
    write_json(record, {**_read(record), "registry": {**registry, uri: digest}})
    return _load(record)


def check(image: Image) -> None:
    """Before a campaign: the file's bytes are the recorded ones. Reads all of it (~1 s a GB).

    Raises ImageError: missing, or changed; both digests are named.
    """
    found = sha256(_present(image))
    if found != image.sha256:
        raise ImageError(
            f"The image {image.path} has changed: recorded is sha256 {image.sha256}, found is "
            f"sha256 {found}. Runs before and after would not be comparable. Restore the file, "
            "or build or pull the image again."
        )


def check_quick(image: Image) -> None:
    """Before each run: size and mtime, as NFS answers them for nothing. In doubt, the bytes.

    Raises ImageError: missing, or changed; both digests are named.
    """
    status = _present(image).stat()
    if (status.st_size, status.st_mtime_ns) != (image.size, image.mtime_ns):
        check(image)


def check_evaluator(image: Image, evaluator_sha256: str, protocol: int = PROTOCOL) -> None:
    """The evaluator sealed into the image is the campaign's, and speaks this controller's protocol.

    Raises ImageError: it is not; never guessed, for a score would change its meaning unseen.
    """
    spoken = image.labels.get("autoresearch.protocol", "none")
    if spoken != str(protocol):
        raise ImageError(
            f"The image {image.path} seals a referee of protocol {spoken}; this controller speaks "
            f"{protocol}. Use the version of the project that built it, or rebuild the image."
        )
    sealed = image.labels.get("autoresearch.evaluator.sha256", "none")
    if sealed != evaluator_sha256:
        raise ImageError(
            f"The image {image.path} seals evaluator sha256 {sealed}; the campaign's is "
            f"{evaluator_sha256}. Their scores are not comparable. Rebuild the image from this "
            "version of trainer/, or start a campaign with the version that built it."
        )


def sha256(path: Path) -> str:
    """Of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and readable for the group as the umask says (mkstemp's 0600 is not)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        json.dump(value, file, indent=1)
        os.fchmod(file.fileno(), 0o644)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _present(image: Image) -> Path:
    path = Path(image.path)
    if not path.exists():
        remote = next(reversed(list(image.registry)), None)
        remedy = f"Pull it again: autoresearch image pull {remote}@{image.registry_digest}"
        raise ImageError(
            f"The image {path} is missing (sha256 {image.sha256}). "
            + (remedy if remote else "Restore the file, or rebuild it from its definition.")
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text())
        return read
    except (OSError, ValueError) as error:
        raise ImageError(f"The image store's record {path} cannot be read: {error}") from None


def _load(record: Path) -> Image:
    try:
        image = model.from_json(Image, _read(record))
    except TypeError as error:
        raise ImageError(f"The image store's record {record} is not one: {error}") from None
    return dataclasses.replace(image, path=str(record.parent.resolve() / image.path))
