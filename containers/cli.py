"""`autoresearch image ...`: words in, one call of build, images or remote, words or JSON out."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from containers import build, images, remote
from containers.apptainer import ImageError
from containers.images import Image

Act = Callable[[argparse.Namespace], tuple[Any, str]]  # of a verb: its value as JSON, in words
MEANING = {
    "image": "a tag, or a sha256 (its first 8 digits will do)",
    "source": "where it comes from",
    "address": "oras://host/name:tag",
    "new": "another tag",
}


def add_parser(subparsers: Any) -> None:
    """Add `image` and its verbs to the parser of `autoresearch`; run them with `main(args)`."""
    about = "build and keep the images that runs happen in"
    parser = subparsers.add_parser("image", help=about, description=about)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", type=Path, help="image folder (default: executor.images)")
    common.add_argument("--json", action="store_true", help="print JSON")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(act: Act, name: str, help: str, *arguments: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(
            name, help=help, description=help, parents=[common]
        )
        for argument in arguments:
            made.add_argument(argument, help=MEANING[argument])
        made.set_defaults(act=act)
        return made

    _add_build(verb(_build, "build", "build an image from containers/NAME.def, or from a file"))
    verb(_list, "list", "tags and images of the store")
    verb(_inspect, "inspect", "all that is known of an image", "image")
    verb(_verify, "verify", "its bytes, its labels against its contents, its imports", "image")
    one = verb(_pull, "pull", "fetch one: oras://host/name:tag or @sha256:..., or a file", "source")
    one.add_argument("--tag", required=True, help="what it is called here")
    verb(_push, "push", "send one to a registry, and record its digest there", "image", "address")
    verb(_tag, "tag", "let NEW mean this image", "image", "new")


def main(args: argparse.Namespace) -> int:
    """Run the verb that `add_parser` understood. Returns the exit status.

    Raises ImageError: in words, what failed.
    """
    try:
        value, text = args.act(args)
    except OSError as error:
        raise ImageError(f"image {args.verb} failed: {error}") from error
    print(json.dumps(value, indent=1) if args.json else text)
    return 0


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("definition", help="cpu, trainer, or a definition file")
    parser.add_argument("--tag", help="default: the definition's name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the definition (its %%arguments)",
    )
    parser.add_argument("--ca-bundle", type=Path, help="the site's certificates (PEM), for pip")
    parser.add_argument("--pip-conf", type=Path, help="the site's package index")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to prefer")


def _build(args: argparse.Namespace) -> tuple[Any, str]:
    named = build.HERE / f"{args.definition}.def"
    definition = named if named.is_file() else Path(args.definition)
    if not definition.is_file():
        raise ImageError(f"No definition {args.definition}: cpu, trainer, or a file's path")
    wrong = [item for item in args.set if "=" not in item]
    if wrong:
        raise ImageError(f"--set {wrong[0]}: write NAME=VALUE")
    recipe = build.Recipe(definition, arguments=dict(item.split("=", 1) for item in args.set))
    site = build.Site(args.ca_bundle, args.pip_conf, args.wheels)
    image = build.build(args.store, args.tag or definition.stem, recipe, site)
    return _plain(image), _line(args.tag or definition.stem, image)


def _list(args: argparse.Namespace) -> tuple[Any, str]:
    known, tags = images.every(args.store), images.tags(args.store)
    rows = [{**_plain(i), "tags": [t for t, s in tags.items() if s == i.sha256]} for i in known]
    for row in rows:
        del row["definition"], row["packages"]
    lines = [_line(",".join(row["tags"]) or "-", i) for row, i in zip(rows, known, strict=True)]
    return rows, "\n".join(lines) or f"no images in {args.store}"


def _inspect(args: argparse.Namespace) -> tuple[Any, str]:
    value = _plain(images.find(args.store, args.image))
    return value, json.dumps(value, indent=1)


def _verify(args: argparse.Namespace) -> tuple[Any, str]:
    image = images.find(args.store, args.image)
    build.verify(image)
    return _plain(image), f"{image.path} is sha256 {image.sha256}, as recorded; it starts."


def _pull(args: argparse.Namespace) -> tuple[Any, str]:
    image = remote.pull(args.store, args.source, args.tag)
    return _plain(image), _line(args.tag, image)


def _push(args: argparse.Namespace) -> tuple[Any, str]:
    image = remote.push(args.store, args.image, args.address)
    return _plain(image), f"{args.address} is {image.registry_digest}"


def _tag(args: argparse.Namespace) -> tuple[Any, str]:
    image, moved = images.tag(args.store, args.image, args.new)
    said = f"; it meant {moved} before, which stays" if moved else ""
    return {"tag": args.new, "sha256": image.sha256, "moved": moved}, (
        f"{args.new} means sha256 {image.sha256}{said}"
    )


def _plain(image: Image) -> dict[str, Any]:
    extra = {
        "registry_digest": image.registry_digest,
        "definition_sha256": image.definition_sha256,
    }
    return {**dataclasses.asdict(image), **extra}


def _line(tag: str, image: Image) -> str:
    size = f"{image.size / 1e6:.0f} MB"
    return f"{tag:20} {image.sha256[:16]}  {size:>9}  {image.made['time']}  {image.origin}"
