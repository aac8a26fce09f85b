"""Runs inside an image: which one, and that it still is what the campaign began with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from containers import apptainer, command, images, remote
from jobs.errors import Paused, UserError
from jobs.materialise import Site
from jobs.model import to_json


def contained(site: Site, by: str | None = None) -> Site:
    """The site with its runs in containers of executor.image (`by`: another tag or sha256).

    Raises:
        UserError: no such image in the store.
        ImageError: its bytes, its evaluator or its protocol are not what they are said to be.
    """
    executor = site.config.executor
    name = by or executor.image
    if name is None:
        raise UserError("executor.image: no image is named")
    image = images.find(images.default_store(executor.images), name)
    images.check(image)
    images.check_evaluator(image, site.facts["evaluator_sha256"])
    gpu = image.labels.get("autoresearch.cuda", "none") != "none"
    facts = {
        **site.facts,
        "container_tag": executor.image,
        "container_sha256": image.sha256,
        "registry_digest": pinned(image),
    }
    network = executor.allow_network
    return dataclasses.replace(
        site,
        facts=facts,
        image=image,
        program_argv=command.program_template(
            image.path, gpu=gpu, network=network, binds=executor.binds
        ),
        referee_argv=command.referee_template(image.path, network=network),
        python=command.PYTHON,
        trainer=Path(command.SEALED),
    )


def check_before_run(site: Site) -> None:
    """Size and time of the site's image, as cheap as a stat; in doubt its bytes.

    Raises Paused: it is missing or changed, with both digests.
    """
    try:
        images.check_quick(site.image)
    except apptainer.ImageError as error:
        raise Paused(str(error), "Then start again") from error


def pinned(image: images.Image) -> str | None:
    """The address that no registry can let mean another image: oras://host/name@sha256:..."""
    return next((f"{uri}@{digest}" for uri, digest in reversed([*image.registry.items()])), None)


def records(image: images.Image | None) -> dict[str, bytes]:
    """What a campaign's records in git keep of its image: enough to build one like it."""
    if image is None:
        return {}
    name, told = f"image-{image.sha256[:16]}", json.dumps(to_json(image), indent=1)
    return {f"{name}.def": image.definition.encode(), f"{name}.json": told.encode()}


def recorded(
    store: Path, sha256: str, tag: str, address: str | None, kept: str, note: Callable[[str], None]
) -> str:
    """The sha256 of the image that a commit names, once it is in the store: it decides.

    Args:
        tag: what people called it; that it means another image now is only noted.
        address: of the registry, as `pinned` gives it, from where it is pulled if it is missing.
        kept: the ref of the campaign's records.

    Raises:
        ImageError: it is not to be had, and how one like it is built; or the registry's is another.
    """
    try:
        there = Path(images.find(store, sha256).path).exists()
    except apptainer.ImageError:
        there = False
    if not there:
        if not (address or "").startswith("oras://"):
            raise apptainer.ImageError(
                f"the image {tag} (sha256 {sha256}) is not in {store}, and no registry is recorded."
                f" Restore its file (autoresearch image pull FILE --tag {tag}); or build its like "
                f"(git show {kept}:image-{sha256[:16]}.def >again.def && autoresearch image build "
                "again.def --tag again) and say --image again: another image, compared as such"
            )
        note(f"image pulled by its digest from {address}")
        found = remote.pull(store, address or "", tag=sha256[:16]).sha256
        if found != sha256:
            raise apptainer.ImageError(f"{address} is sha256 {found}; recorded is sha256 {sha256}")
    now = images.tags(store).get(tag)
    if now not in (None, sha256):
        note(f"the tag {tag} means sha256 {now} now; the recorded {sha256} is used")
    return sha256
