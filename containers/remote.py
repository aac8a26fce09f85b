"""Images in a registry: pull, push, and the manifest digest that the registry knows them by."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from containers import apptainer, build, images
from containers.apptainer import ImageError
from containers.images import Image

_ORAS = re.compile(
    r"oras://(?P<host>[^/]+)/(?P<name>[^@]+?)(?:@(?P<digest>sha256:\w+)|:(?P<tag>[\w.-]+))?"
)
_MANIFESTS = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"


def pull(store: Path, uri: str, tag: str) -> Image:
    """Fetch an image of this project into the store: oras://host/name[:tag|@sha256:...], or a file.

    Raises ImageError: not there, not whole, or not an image of this project.
    """
    with build.fresh(store) as (draft, log):
        local = Path(uri)
        if local.is_file():
            shutil.copyfile(local, draft)
        else:
            apptainer.pull(uri, draft, log)
        image = build.describe(draft, f"pulled from {uri}")
        if found := None if local.is_file() else _digest(uri, image.sha256):
            image = dataclasses.replace(image, registry={_bare(uri): found})
        log.unlink()
        image = images.add(store, draft, image)
    images.tag(store, image.sha256, tag)
    return image


def push(store: Path, name: str, uri: str) -> Image:
    """Push an image to oras://host/name:tag and record the digest it has there.

    Raises ImageError: no such image, its bytes have changed, or the registry refused.
    """
    if not uri.startswith("oras://"):
        raise ImageError(f"An image is pushed to an oras:// address (any OCI registry), not {uri}")
    image = images.find(store, name)
    images.check(image)
    apptainer.run(["apptainer", "push", image.path, uri], f"Pushing {image.path} to {uri}")
    digest = _digest(uri, image.sha256)
    return images.note_registry(store, image, _bare(uri), digest) if digest else image


def registry_digest(uri: str) -> tuple[str, list[str]]:
    """(manifest digest, digests of its layers) of an oras:// address. A SIF's layer is its sha256.

    APPTAINER_NOHTTPS is followed, as apptainer does.

    Raises ImageError: the registry did not answer so.
    """
    match = _ORAS.fullmatch(uri)
    if not match:
        raise ImageError(f"{uri} is not of the form oras://HOST/NAME:TAG or @sha256:DIGEST")
    reference = match["digest"] or match["tag"] or "latest"
    scheme = "http" if os.environ.get("APPTAINER_NOHTTPS") else "https"
    url = f"{scheme}://{match['host']}/v2/{match['name']}/manifests/{reference}"
    body = _get(url, match["host"])
    layers = [layer["digest"] for layer in json.loads(body).get("layers", [])]
    return "sha256:" + hashlib.sha256(body).hexdigest(), layers


def _digest(uri: str, sha256: str) -> str | None:
    """The registry's digest for these very bytes; None where the registry is not an OCI one."""
    if not uri.startswith("oras://"):
        return None
    digest, layers = registry_digest(uri)
    if f"sha256:{sha256}" not in layers:
        raise ImageError(
            f"{uri} is manifest {digest}, which names {', '.join(layers)}; the file here is "
            f"sha256:{sha256}. It moved in between: pull it by digest."
        )
    return digest


def _bare(uri: str) -> str:
    """The address without tag or digest, to which '@sha256:...' can be put."""
    match = _ORAS.fullmatch(uri)
    return f"oras://{match['host']}/{match['name']}" if match else uri


def _get(url: str, host: str) -> bytes:
    """GET; again with a token where the registry asks for one (OCI distribution, token flow)."""
    headers = {"Accept": _MANIFESTS}
    try:
        try:
            return _open(url, headers)
        except urllib.error.HTTPError as refused:
            challenge = refused.headers.get("WWW-Authenticate", "")
            if refused.code != 401 or not challenge:
                raise
            return _open(url, {**headers, "Authorization": _authorization(challenge, host)})
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"Asking the registry for {url} failed: {error}") from None


def _authorization(challenge: str, host: str) -> str:
    login = _login(host)
    basic = {"Authorization": f"Basic {login}"} if login else {}
    if not challenge.lower().startswith("bearer"):
        return basic["Authorization"]
    asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    query = urllib.parse.urlencode({k: asked[k] for k in ("service", "scope") if k in asked})
    answer: dict[str, Any] = json.loads(_open(f"{asked['realm']}?{query}", basic))
    return f"Bearer {answer.get('token') or answer['access_token']}"


def _login(host: str) -> str | None:
    """What `apptainer registry login` stored for this host: base64 of user:password."""
    config = Path.home() / ".apptainer" / "docker-config.json"
    try:
        auth: str = json.loads(config.read_text())["auths"][host]["auth"]
        base64.b64decode(auth, validate=True)
        return auth
    except (OSError, ValueError, KeyError):
        return None


def _open(url: str, headers: dict[str, str]) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
        return bytes(reply.read(2**20))
