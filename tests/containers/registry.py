"""A container registry on loopback: what push and pull use of the OCI distribution protocol."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _upload(self) -> Path:
        return self.server.store / self.path.partition("?")[0].rpartition("/")[2]  # type: ignore

    def _refused(self) -> bool:
        """Registries ask for a token, and give one for a login at an address of their own."""
        login = self.server.login  # type: ignore[attr-defined]
        given = self.headers.get("Authorization")
        if not login or given == "Bearer let-in":
            return False
        realm = f"http://{self.headers['Host']}/token"
        if self.path.startswith("/token") and given == f"Basic {basic(login)}":
            self._reply(200, b'{"token": "let-in"}')
        else:
            asked = f'Bearer realm="{realm}",service="test",scope="pull"'
            self._reply(401, WWW_Authenticate=asked)
        return True

    def do_GET(self) -> None:
        store: Path = self.server.store  # type: ignore[attr-defined]
        if self._refused():
            return None
        match = re.fullmatch(r"/v2/(.+)/(blobs|manifests)/([^/]+)", self.path)
        if not match:
            return self._reply(200)
        name, kind, reference = match.groups()
        if kind == "manifests" and not reference.startswith("sha256:"):
            tag = store / f"{name.replace('/', '_')}@{reference}"
            reference = tag.read_text() if tag.exists() else "absent"
        path = store / reference
        if not path.exists():
            return self._reply(404)
        headers = {"Docker_Content_Digest": reference}
        headers["Content_Type"] = MANIFEST if kind == "manifests" else "application/octet-stream"
        return self._reply(200, path.read_bytes(), **headers)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._content()  # blobs are uploaded side by side: each has a name of its own
        self._reply(202, Location=f"{self.path.rstrip('/')}/upload-{secrets.token_hex(8)}")

    def do_PATCH(self) -> None:
        with self._upload().open("ab") as upload:
            upload.write(self._content())
        self._reply(202, Location=self.path)

    def do_PUT(self) -> None:
        store: Path = self.server.store  # type: ignore[attr-defined]
        content = self._content()
        if self._upload().exists():
            content = self._upload().read_bytes() + content
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        (store / digest).write_bytes(content)
        if match := re.fullmatch(r"/v2/(.+)/manifests/([^/]+)", self.path):
            (store / f"{match[1].replace('/', '_')}@{match[2]}").write_text(digest)
        self._reply(201, Docker_Content_Digest=digest, Location=self.path.partition("?")[0])


def basic(login: str) -> str:
    """'user:password' as HTTP's basic scheme spells it."""
    return base64.b64encode(login.encode()).decode()


@contextmanager
def serve(store: Path, login: str | None = None):
    """Yields 'localhost:PORT'; blobs and manifests lie in `store`. `login`: 'user:password'."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.store, server.login = store, login  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
