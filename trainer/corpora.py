"""Owns the corpora: where their documents come from, until they lie in Parquet shards.

    stdlib       Python's own standard library: on every machine, real text, no download
    climbmix     karpathy/climbmix-400b-shuffle, shard_00000 .. shard_06542 (the last validates)
    tinystories  karpathy/tinystories-gpt4-clean, for small machines
    dir:PATH     your own folder: UTF-8 text files, or Parquet files with a "text" column

A corpus becomes shards in two steps: `fetch` (the only one that needs internet) and `shards`.
Everything after reads the shards, by `batches`, in an order that depends on nothing but them.

The text files of stdlib and dir: are cut into pieces of about a row (see `pieces`), because the
packing crops a document that is longer than a row and never shows its rest. Their order and the
held-out part follow from sha256 of their content, so they are the same on every machine that has
the same files. The standard library leaves out its tests (many distributions do not ship them,
and some of those files are broken on purpose) and files that carry the machine's own paths.
"""

import hashlib
import http.client
import itertools
import json
import os
import re
import ssl
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rows import REFILL, DataError, Progress, atomic, sha256, write_json

HUB = "https://huggingface.co/datasets"
CLIMBMIX = "karpathy/climbmix-400b-shuffle/resolve/main"
CLIMBMIX_LAST = 6542
TINYSTORIES = "karpathy/tinystories-gpt4-clean/resolve/main/tinystories_gpt4_clean.parquet"
HELD_OUT = 1 / 16  # of the characters of stdlib and dir:
ROW_GROUP = 8 * REFILL
SHARD_DOCUMENTS = 2**17

_NOT_CORPUS = re.compile(
    r"(^|/)(test|tests|idle_test|site-packages|dist-packages|__pycache__|pydoc_data|config-[^/]*)/"
    r"|(^|/)_sysconfigdata"
)


@dataclass(frozen=True)
class Source:
    """A corpus as it was asked for: its name, how much of it, and where it comes from."""

    name: str
    shards: int = 10
    base_url: str = HUB

    def __post_init__(self):
        if self.name not in ("stdlib", "climbmix", "tinystories") and not self.folder:
            raise DataError(
                f"There is no corpus {self.name!r}: stdlib, climbmix, tinystories or dir:PATH."
            )
        if self.folder:  # recorded as what it is, wherever it was named from
            object.__setattr__(self, "name", f"dir:{os.path.abspath(self.folder)}")
        if not 1 <= self.shards <= CLIMBMIX_LAST:
            raise DataError(
                f"climbmix has 1 to {CLIMBMIX_LAST} training shards, not {self.shards}."
            )

    @property
    def folder(self) -> str:
        """The user's folder of dir:PATH, else an empty string."""
        return os.path.expanduser(self.name[4:]) if self.name.startswith("dir:") else ""

    def downloads(self) -> dict[str, str]:
        """File within the data folder -> URL, for everything that has to come over the network."""
        if self.name == "climbmix":
            names = [f"shard_{i:05d}.parquet" for i in (*range(self.shards), CLIMBMIX_LAST)]
            return {f"shards/{n}": f"{self.base_url}/{CLIMBMIX}/{n}" for n in names}
        if self.name == "tinystories":
            return {"download/tinystories.parquet": f"{self.base_url}/{TINYSTORIES}"}
        return {}


# --- from a corpus to shards ----------------------------------------------------------------------


def fetch(source: Source, folder: Path, offline: bool = False) -> None:
    """Bring the corpus's files into the data folder; those already there are left alone."""
    missing = {n: url for n, url in source.downloads().items() if not (folder / n).exists()}
    if missing and offline:
        raise DataError(
            f"{len(missing)} files of {source.name} are not in {folder} (first: {min(missing)}). "
            "Where there is internet, run the same command with --download-only first."
        )
    for number, (name, url) in enumerate(missing.items(), start=1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        download(
            url, folder / name, label=f"downloading {Path(name).name} ({number}/{len(missing)})"
        )


def shards(source: Source, folder: Path, piece: int) -> dict[str, list[str]]:
    """Make the shards unless they exist; return {split: files within the folder, in order}.

    `piece`: the characters a text file's documents may have (see `pieces`).
    """
    if source.name == "climbmix":
        *train, val = source.downloads()
        return {"train": train, "val": [val]}
    index = folder / "shards/index.json"
    if not index.exists():
        index.parent.mkdir(parents=True, exist_ok=True)
        texts = _texts(source, folder, piece)
        write_json(index, {split: write_shards(folder, split, texts[split]) for split in texts})
    return json.loads(index.read_text())


def _texts(source: Source, folder: Path, piece: int) -> dict[str, Iterable[str]]:
    if source.name == "tinystories":
        # Shuffled already. Its card: rows 0..9,999 are the test part, 10,000 more the validation.
        path = folder / "download/tinystories.parquet"
        return {"train": _row_range(path, 20_000, None), "val": _row_range(path, 10_000, 20_000)}
    if source.name == "stdlib":
        return hold_out(_stdlib_texts(piece))
    return hold_out(_user_texts(Path(source.folder), piece))


def write_shards(folder: Path, split: str, texts: Iterable[str]) -> list[str]:
    """Write texts to shards/{split}-00000.parquet and on; return their names in the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string())])
    names: list[str] = []
    source = iter(texts)
    while documents := list(itertools.islice(source, SHARD_DOCUMENTS)):
        names.append(f"shards/{split}-{len(names):05d}.parquet")
        with atomic(folder / names[-1]) as temporary:
            table = pa.table({"text": documents}, schema)
            pq.write_table(table, temporary, row_group_size=ROW_GROUP)
    return names


def batches(paths: Iterable[Path]) -> Iterator[list[str]]:
    """The documents of the shards in order: 128 at a time from each row group, then its rest."""
    import pyarrow.parquet as pq

    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["text"]).column("text")
                texts = [text or "" for text in column.to_pylist()]
                for start in range(0, len(texts), REFILL):
                    yield texts[start : start + REFILL]


def _row_range(path: Path, first: int, last: int | None) -> Iterator[str]:
    return itertools.islice(itertools.chain.from_iterable(batches([path])), first, last)


# --- documents of one's own -----------------------------------------------------------------------


def hold_out(units: list[list[str]]) -> dict[str, list[str]]:
    """Split units (the documents of one file) into {"train": documents, "val": documents}.

    Whole files are held out, the first in the order of their hashes, so that a validation
    document's neighbours are unseen too; with fewer than 20 files, documents are.
    Both parts are then shuffled by hash.
    """
    if len(units) < 20:
        units = [[document] for unit in units for document in unit]
    if len(units) < 2:
        raise DataError(f"A corpus needs two documents to hold one out; {len(units)} were found.")
    hashed = sorted((_hash("".join(unit)), unit) for unit in units)
    wanted = HELD_OUT * sum(len(document) for unit in units for document in unit)
    held = 0
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    for left, (digest, unit) in zip(range(len(hashed), 0, -1), hashed, strict=True):
        split = "val" if not parts["val"] or (held < wanted and left > 1) else "train"
        held += sum(map(len, unit))
        parts[split] += [(_hash(f"{digest}:{i}"), document) for i, document in enumerate(unit)]
    return {split: [document for _, document in sorted(part)] for split, part in parts.items()}


def pieces(text: str, limit: int) -> list[str]:
    """Cut a text into parts of at most `limit` characters that join to it again.

    Cut at the last section break (two blank lines), paragraph, line or word in the second half of
    a part, in this order of preference. White space alone is no document.
    """
    parts, start = [], 0
    while len(text) - start > limit:
        stop = start + limit
        for boundary in ("\n\n\n", "\n\n", "\n", " "):
            at = text.rfind(boundary, start + limit // 2, stop)
            if at >= 0:
                stop = at + len(boundary)
                break
        parts.append(text[start:stop])
        start = stop
    return [part for part in (*parts, text[start:]) if part.strip()]


def _stdlib_texts(piece: int) -> list[list[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (
        p for p in root.rglob("*.py") if not _NOT_CORPUS.search(p.relative_to(root).as_posix())
    )
    return [parts for path in paths if (parts := pieces(_utf8(path) or "", piece))]


def _user_texts(root: Path, piece: int) -> list[list[str]]:
    """The documents of every file below a folder; hidden files and what is not UTF-8 left out.

    Rows of Parquet files are documents already and stay whole.
    """
    if not root.is_dir():
        raise DataError(f"dir:{root} is not a folder.")
    units, skipped = [], 0
    for path in sorted(root.rglob("*")):
        if not path.is_file() or any(p.startswith(".") for p in path.relative_to(root).parts):
            continue
        if path.suffix == ".parquet":
            units += [[text] for text in _parquet_texts(path)]
        elif (text := _utf8(path)) is None:
            skipped += 1
        elif parts := pieces(text, piece):
            units.append(parts)
    print(f"dir:{root}: {len(units):,} texts, {skipped:,} files were not", file=sys.stderr)
    return units


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    if "text" not in names:
        raise DataError(f'{path} has no column "text"; it has {", ".join(names)}.')
    return itertools.chain.from_iterable(batches([path]))


def _utf8(path: Path) -> str | None:
    """A file's text; None where it is something else."""
    with path.open("rb") as file:
        head = file.read(2**16)
        if b"\0" in head:  # before a film is read to its end
            return None
        content = head + file.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# --- downloads ------------------------------------------------------------------------------------


class _Broken(Exception):
    """A transfer that did not bring the whole file, or not the right one: try again."""


# What another attempt may mend. A full disk is a plain OSError and is not among them.
_PASSING = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    _Broken,
)


def download(url: str, target: Path, label: str, pause: float = 1.0) -> None:
    """Bring a URL to a file, which appears complete and checked or not at all.

    What came is kept in target.part and continued from there (HTTP Range), by this call or a later
    one. Failures are tried again after `pause` x 1, 2, 4 ... 60 s; eight in a row without a new
    byte end in DataError, and so does at once what asking again cannot mend (404, 403).
    """
    part = target.with_name(f"{target.name}.part")
    failures = 0
    while True:
        before = _size(part)
        try:
            _transfer(url, part, label)
            os.replace(part, target)
            return
        except _PASSING as error:
            failures = 0 if _size(part) > before else failures + 1
            final = getattr(error, "code", 500) in (400, 401, 403, 404, 410)
            if final or failures == 8:
                raise DataError(
                    f"{url} could not be downloaded: {error}. {_size(part):,} bytes are kept in "
                    f"{part}; the same command goes on from there."
                ) from error
            wait = min(60.0, 2**failures) * pause
            print(f"{label}: {error}; going on in {wait:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait)


def _transfer(url: str, part: Path, label: str) -> None:
    """One attempt: append what is missing to `part`, then check its length and sha256."""
    start = _size(part)
    hub = _Hub()
    request = urllib.request.Request(url, headers={"User-Agent": "autoresearch-hpc"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.build_opener(hub).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is as long as the file, or longer
            part.unlink(missing_ok=True)
        raise
    with response:
        hub.note(response.headers)
        start = start if response.status == 206 else 0  # 200: this server does not resume
        length = response.headers.get("Content-Length")
        if length is None:
            raise DataError(f"{url} comes without a length: a cut could not be noticed.")
        total = start + int(length)
        say = Progress(label, "MiB", total >> 20, start >> 20)
        with part.open("ab" if start else "wb") as file:
            while chunk := response.read(2**20):
                file.write(chunk)
                say(file.tell() >> 20)
            os.fsync(file.fileno())
    if _size(part) < total:
        raise _Broken(f"the connection broke off at {_size(part):,} of {total:,} bytes")
    found = sha256(part)
    if hub.sha256 and found != hub.sha256:
        part.unlink()
        raise _Broken(f"what came has sha256 {found}, the hub says {hub.sha256}")
    say.end(f"{total:,} bytes")


class _Hub(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the sha256 that the hub states on the first of its answers."""

    sha256 = ""

    def note(self, headers) -> None:
        tag = (headers.get("X-Linked-ETag") or "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", tag):  # small files have a git hash here
            self.sha256 = self.sha256 or tag

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.note(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
