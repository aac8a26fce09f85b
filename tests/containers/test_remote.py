"""A registry's digests, asked for over real HTTP on loopback."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import registry

from containers import remote
from containers.apptainer import ImageError

LAYER = "sha256:" + "a" * 64
BODY = json.dumps({"schemaVersion": 2, "layers": [{"digest": LAYER}]}).encode()
DIGEST = "sha256:" + hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("APPTAINER_NOHTTPS", "1")
    (tmp_path / DIGEST).write_bytes(BODY)
    (tmp_path / "lab_cpu@v1").write_text(DIGEST)
    with registry.serve(tmp_path, login="user:secret") as address:
        yield address


def login(home: Path, host: str, auth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".apptainer").mkdir()
    config = {"auths": {host: {"auth": auth}}}
    (home / ".apptainer" / "docker-config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HOME", str(home))


def test_a_digest_is_asked_for_with_the_login_that_apptainer_stored(host, tmp_path, monkeypatch):
    login(tmp_path, host, registry.basic("user:secret"), monkeypatch)
    for address in (f"oras://{host}/lab/cpu:v1", f"oras://{host}/lab/cpu@{DIGEST}"):
        assert remote.registry_digest(address) == (DIGEST, [LAYER])


def test_without_a_login_the_registrys_refusal_is_told(host, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ImageError, match=r"/v2/lab/cpu/manifests/v1 failed.*401"):
        remote.registry_digest(f"oras://{host}/lab/cpu:v1")


def test_a_tag_that_moved_to_other_bytes_is_refused_with_both_digests(host, tmp_path, monkeypatch):
    login(tmp_path, host, registry.basic("user:secret"), monkeypatch)
    assert remote._digest(f"oras://{host}/lab/cpu:v1", "a" * 64) == DIGEST
    with pytest.raises(ImageError, match=f"{DIGEST}.*{'b' * 64}.*pull it by digest"):
        remote._digest(f"oras://{host}/lab/cpu:v1", "b" * 64)


@pytest.mark.parametrize("address", ["docker://h/n:t", "oras://h", "cpu"])
def test_an_address_that_is_not_one_is_told_the_form(address: str):
    with pytest.raises(ImageError, match="oras://HOST/NAME:TAG"):
        remote.registry_digest(address)


def test_a_registry_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("APPTAINER_NOHTTPS", "1")
    with pytest.raises(ImageError, match="Asking the registry for http://localhost:9/v2/n/"):
        remote.registry_digest("oras://localhost:9/n:t")
