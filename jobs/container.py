"""Runs inside an image: which one, and that it still is what the campaign began with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from containers import apptainer, command, images
from jobs.errors import Paused, UserError
from jobs.materialise import Site


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
    image = images.find(images.default_store(), name)
    images.check(image)
    images.check_evaluator(image, site.facts["evaluator_sha256"])
    gpu = image.labels.get("autoresearch.cuda", "none") != "none"
    facts = {
        **site.facts,
        "container_tag": executor.image,
        "container_sha256": image.sha256,
        "registry_digest": image.registry_digest,
    }
    network = executor.allow_network
    return dataclasses.replace(
        site,
        facts=facts,
        image=image,
        program_argv=command.program_template(image.path, gpu=gpu, network=network),
        referee_argv=command.referee_template(image.path, network=network),
        python=command.PYTHON,
        trainer=Path(command.SEALED),
    )


def check_before_run(site: Site) -> None:
    """Size and time of the site's image, as cheap as a stat; in doubt its bytes.

    Raises:
        Paused: it is missing or changed, with both digests.
    """
    try:
        images.check_quick(site.image)
    except apptainer.ImageError as error:
        raise Paused(str(error), "Then start again") from error
