"""Owns the token rows: documents packed into them as upstream's loader does, kept ready on disk.

The row stream is a fact of the data, not of the program that trains on it: every row begins with
BOS and holds T+1 tokens; from a buffer of at least 1,000 documents the longest one that still fits
is placed whole, else the shortest is cropped to fill. Nothing here depends on the batch size, so
the rows are packed ("baked") once per T and served afterwards by plain reads.

A data folder holds, all of it named and hashed in manifest.json (written last, so a folder that
has one is complete):

    shards/*.parquet            the documents, column "text"
    tokenizer.json              see prepare.Tokenizer
    token_bytes.json            {"true": [bytes of token 0, ...], "upstream": [...]}
    {split}.u16                 the arena: every document's tokens, BOS in front, end to end
    {split}.offsets             int64, documents + 1: where each document starts
    {split}.refills             int64: the document count after each refill (128, or a group's rest)
    rows-{split}-{T}.u16, .json the baked rows (N, T+1), and {rows, T, bytes, sha256, epochs}

Training rows are also baked for half and a quarter of the longest T. A complete folder from before
that gets them without a new manifest, and so keeps its identity; their .json holds their hash.

numpy only: the referee imports this, and never torch.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

FORMAT = 1
REFILL = 128  # documents taken from a row group at a time
BUFFER = 1000  # documents the packer wants to choose from
BLOCKS = 1024  # a seed permutes this many blocks of consecutive rows
# A corpus smaller than this is packed over several passes, so that even a tiny folder's stream
# is upstream's for the length of a short run.
LEAST_TRAIN_TOKENS = 2**22
_SERIAL_BITS = 36  # in the packer's keys: below, arrivals; above, document lengths
BLOCK_TOKENS = 2**22  # packed in memory at a time


class DataError(Exception):
    """The data folder is missing, incomplete, damaged, or cannot serve what was asked."""


# --- the arena ------------------------------------------------------------------------------------


def build_arena(
    folder: Path,
    split: str,
    batches: Iterable[list[str]],
    encode: Callable[[list[str]], list[list[int]]],
) -> None:
    """Write the split's arena from document batches (one batch is one refill of the packer).

    `encode` turns texts into token lists, BOS included. The .u16 file is renamed last.
    """
    lengths: list[int] = []
    refills: list[int] = []
    say = Progress(f"tokenising {split}", "tokens")
    tokens = 0
    with atomic(folder / f"{split}.u16") as path, path.open("wb") as file:
        for batch in batches:
            documents = encode(batch)
            lengths.extend(map(len, documents))
            refills.append(len(lengths))
            arena = np.fromiter(itertools.chain.from_iterable(documents), dtype="<u2")
            file.write(arena)
            tokens += arena.size
            say(tokens)
        if not lengths:
            raise DataError(f"The corpus has no documents for the split {split!r}.")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        write_bytes(folder / f"{split}.offsets", offsets.astype("<i8").tobytes())
        write_bytes(folder / f"{split}.refills", np.array(refills, dtype="<i8").tobytes())
    say.end(f"{tokens:,} tokens in {len(lengths):,} documents")


def arena(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The split's (tokens uint16, offsets int64 (documents + 1,), refills int64), memory-mapped."""
    parts = ((".u16", "<u2"), (".offsets", "<i8"), (".refills", "<i8"))
    # A plain ndarray over the map: slicing np.memmap itself costs ten times as much.
    tokens, offsets, refills = (
        np.asarray(np.memmap(folder / f"{split}{suffix}", dtype=dtype, mode="r"))
        for suffix, dtype in parts
    )
    return tokens, offsets, refills


# --- packing --------------------------------------------------------------------------------------


def pack(
    lengths: np.ndarray, refills: np.ndarray, T: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """Yield for every row its (documents, tokens taken from the start of each, epoch), for ever.

    The buffer is one sorted list of keys: length first, then arrival counted backwards, so that
    "the longest that fits, the earliest of equals" is the key just left of a bisection, and "the
    shortest, the earliest of equals" the one just left of the next length. Documents wrap around
    from pass to pass; the epoch (from 1) is that of the latest refill, as upstream reports it.
    """
    buffer: list[int] = []
    feed = _refill_keys(lengths, refills)
    arrivals = (1 << _SERIAL_BITS) - 1
    epoch = 0
    while True:
        documents, taken, room = [], [], T + 1
        while room:
            while len(buffer) < BUFFER:
                keys, epoch = next(feed)
                buffer += keys
                buffer.sort()  # two sorted runs: timsort merges them in one go
            at = bisect_left(buffer, (room + 1) << _SERIAL_BITS) - 1
            if at < 0:  # nothing fits whole
                shortest = buffer[0] >> _SERIAL_BITS
                at = bisect_left(buffer, (shortest + 1) << _SERIAL_BITS) - 1
            key = buffer.pop(at)
            length = min(key >> _SERIAL_BITS, room)
            documents.append((arrivals - (key & arrivals)) % len(lengths))
            taken.append(length)
            room -= length
        yield documents, taken, epoch


def _refill_keys(lengths: np.ndarray, refills: np.ndarray) -> Iterator[tuple[list[int], int]]:
    """Yield the sorted keys of each refill and its epoch, wrapping around after the last one."""
    if int(lengths.max()) >> (63 - _SERIAL_BITS):
        raise DataError(f"A document of {int(lengths.max()):,} tokens cannot be packed: cut it.")
    arrivals = (1 << _SERIAL_BITS) - 1
    bounds = [0, *refills.tolist()]
    for epoch in itertools.count(1):
        first = (epoch - 1) * len(lengths)
        for start, stop in itertools.pairwise(bounds):
            serials = np.arange(first + start, first + stop, dtype=np.int64)
            keys = (lengths[start:stop] << _SERIAL_BITS) | (arrivals - serials)
            yield np.sort(keys).tolist(), epoch


def packed_rows(
    folder: Path, split: str, T: int, count: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yield the first `count` rows in blocks: (rows uint16 (n, T+1), the epoch of each row)."""
    tokens, offsets, refills = arena(folder, split)
    rows = itertools.islice(pack(np.diff(offsets), refills, T), count)
    while block := list(itertools.islice(rows, max(1, BLOCK_TOKENS // (T + 1)))):
        documents, taken, epochs = zip(*block, strict=True)
        starts = offsets[list(itertools.chain.from_iterable(documents))].tolist()
        # Rows have no padding: end to end, the pieces are the rows.
        pieces = zip(starts, itertools.chain.from_iterable(taken), strict=True)
        yield np.concatenate([tokens[s : s + t] for s, t in pieces]).reshape(-1, T + 1), epochs


def bake(folder: Path, split: str, T: int, file) -> dict:
    """Pack one pass's worth of tokens into an open binary file; return its facts.

    The rows end when they hold as many tokens as the arena (crops make that more than one pass
    over long documents). `epochs` lists [first row, epoch] wherever the epoch changes.
    """
    least = LEAST_TRAIN_TOKENS if split == "train" else 1
    count = -(-max(arena(folder, split)[0].size, least) // (T + 1))
    say = Progress(f"packing {split} rows of {T}", "rows", count)
    epochs: list[list[int]] = []
    digest = hashlib.sha256()
    done = 0
    for rows, row_epochs in packed_rows(folder, split, T, count):
        for row, epoch in enumerate(row_epochs, start=done):
            if not epochs or epochs[-1][1] != epoch:
                epochs.append([row, epoch])
        file.write(rows)
        digest.update(rows)
        done += len(rows)
        say(done)
    say.end(f"{count:,} rows")
    size = count * (T + 1) * 2
    return {"rows": count, "T": T, "bytes": size, "sha256": digest.hexdigest(), "epochs": epochs}


def bake_into(folder: Path, split: str, T: int) -> dict:
    """Bake rows-{split}-{T}.u16 into the folder, its .json last; return the .json's content."""
    with atomic(rows_path(folder, split, T)) as path, path.open("wb") as file:
        facts = bake(folder, split, T, file)
    write_json(rows_path(folder, split, T).with_suffix(".json"), facts)
    return facts


def rows_path(folder: Path, split: str, T: int) -> Path:
    return folder / f"rows-{split}-{T}.u16"


# --- serving --------------------------------------------------------------------------------------


class RowStream:
    """The rows of one split at one T in the order of one seed, endlessly.

    A position counts rows from the start of the stream. Seed 0 is the packed order; any other
    seed permutes 1,024 blocks of consecutive rows, anew in each pass. A T that was not prepared
    is baked into memory: what a program asks for never writes to the data folder.

    Raises DataError when the folder is incomplete or damaged, or T is not 1..max_seq_len.
    """

    def __init__(self, folder: str | Path, split: str, T: int, seed: int = 0):
        folder = Path(folder)
        manifest = check(folder)
        limit = manifest["scale"]["max_seq_len"]
        if not 1 <= T <= limit:
            raise DataError(f"Rows of T={T} were asked for; this data serves T from 1 to {limit}.")
        self.split, self.T, self.seed = split, T, seed
        self._file, facts = _open_rows(folder, split, T)
        self.rows: int = facts["rows"]
        self._epoch_rows, self._epochs = zip(*facts["epochs"], strict=True)
        blocks = min(BLOCKS, self.rows) if seed else 1
        self._bounds = [block * self.rows // blocks for block in range(blocks + 1)]
        self._pass, self._starts, self._order = -1, [0], [0]

    def take(self, n: int, position: int) -> tuple[np.ndarray, int, int]:
        """Return (rows uint16 (n, T+1), the last row's epoch, the position after them)."""
        rows = np.empty((n, self.T + 1), dtype="<u2")
        done = 0
        while done < n:
            first, run = self._locate(position + done)
            run = min(run, n - done)
            self._read(first, rows[done : done + run])
            done += run
        return rows, self.epoch(position + n - 1), position + n

    def epoch(self, position: int) -> int:
        """The epoch (from 1) at a position: it never falls, and goes on when the rows repeat."""
        passes, row = divmod(max(position, 0), self.rows)
        epoch = self._epochs[bisect_right(self._epoch_rows, row) - 1]
        return epoch + passes * max(1, self._epochs[-1] - self._epochs[0])

    def follow(self, other: "RowStream", position: int) -> int:
        """This stream's position at the same fraction of the data as another T's position."""
        return -(-position * self.rows // other.rows)

    def close(self) -> None:
        self._file.close()

    def _locate(self, position: int) -> tuple[int, int]:
        """The stored row at a position, and how many rows follow in order from there."""
        passes, at = divmod(position, self.rows)
        if passes != self._pass:
            self._pass, self._order = passes, block_order(self.seed, passes, len(self._bounds) - 1)
            sizes = (self._bounds[b + 1] - self._bounds[b] for b in self._order)
            self._starts = [0, *itertools.accumulate(sizes)]
        turn = bisect_right(self._starts, at) - 1
        return self._bounds[self._order[turn]] + at - self._starts[turn], self._starts[
            turn + 1
        ] - at

    def _read(self, first: int, out: np.ndarray) -> None:
        # A read, not a map: a file cut short under a map kills its reader with SIGBUS.
        wanted = memoryview(out).cast("B")
        self._file.seek(first * (self.T + 1) * 2)
        while wanted:
            got = self._file.readinto(wanted)
            if not got:
                raise DataError(f"{self._file.name} ended early: it was cut short while in use.")
            wanted = wanted[got:]


def block_order(seed: int, passes: int, blocks: int) -> list[int]:
    """The order of the blocks in one pass (from 0). By sha256, so that it is stable for ever."""
    if seed == 0:
        return list(range(blocks))
    return sorted(
        range(blocks), key=lambda b: hashlib.sha256(f"{seed}:{passes}:{b}".encode()).digest()
    )


def _open_rows(folder: Path, split: str, T: int):
    """The open rows file and its facts; baked into memory now where it does not exist."""
    path = rows_path(folder, split, T)
    with contextlib.suppress(FileNotFoundError):
        facts = json.loads(path.with_suffix(".json").read_text())
        _check_size(path, facts["bytes"])
        return path.open("rb", buffering=0), facts
    if not (folder / f"{split}.u16").exists():
        raise DataError(f"{folder} has no split {split!r}.")
    file = _memory_file(path.name)
    return file, bake(folder, split, T, file)


def _memory_file(name: str):
    if hasattr(os, "memfd_create"):  # a container's /tmp may hold less than the rows
        return os.fdopen(os.memfd_create(name), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


# --- the manifest ---------------------------------------------------------------------------------


def write_manifest(folder: Path, facts: dict) -> dict:
    """Hash every file of the folder and write manifest.json, last. Return the manifest."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith((".", "download/")) and name != "manifest.json":
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"format": FORMAT, **facts, "files": files}
    write_json(folder / "manifest.json", manifest)
    return manifest


def read_manifest(folder: str | Path) -> dict:
    """manifest.json of a data folder; DataError where there is none or it is of another format."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no prepared data (no manifest.json). "
            "Make it with: python trainer/prepare.py --data FOLDER"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}): prepare the data again.") from error
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} is of format {manifest.get('format')!r}, this program reads {FORMAT}: "
            "prepare the data again."
        )
    return manifest


def manifest_sha256(folder: str | Path) -> str:
    """The identity of the data: sha256 of manifest.json, which holds that of everything else."""
    read_manifest(folder)
    return sha256(Path(folder) / "manifest.json")


def check(folder: str | Path) -> dict:
    """The manifest, after comparing every file's size with it (cheap: no file is read)."""
    manifest = read_manifest(folder)
    for name, file in manifest["files"].items():
        _check_size(Path(folder) / name, file["bytes"])
    return manifest


def verify(folder: str | Path) -> dict:
    """The manifest, after hashing every file; DataError names the file and both hashes."""
    manifest = check(folder)
    later = {
        path.with_suffix(".u16").name: json.loads(path.read_text())
        for path in Path(folder).glob("rows-*.json")
    }
    for name, file in (later | manifest["files"]).items():
        found = sha256(Path(folder) / name)
        if found != file["sha256"]:
            raise DataError(
                f"{Path(folder) / name} has sha256 {found}, its manifest says {file['sha256']}: "
                "the file was changed. Delete the folder and prepare the data again."
            )
    return manifest


def token_bytes(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(true, upstream's) byte length of every token, int64 (vocab,); special tokens count 0."""
    lengths = json.loads((Path(folder) / "token_bytes.json").read_text())
    return np.array(lengths["true"], dtype=np.int64), np.array(lengths["upstream"], dtype=np.int64)


def _check_size(path: Path, wanted: int) -> None:
    size = path.stat().st_size if path.exists() else None
    if size != wanted:
        seen = "is missing" if size is None else f"has {size:,} bytes"
        raise DataError(
            f"{path} {seen}, {wanted:,} bytes were written: "
            "copy the folder again, or delete it and prepare the data again."
        )


# --- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` by rename when the block ends well, else goes away."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Progress:
    """One line on stderr about long work: rewritten in place on a terminal, sparse in a log."""

    def __init__(self, what: str, unit: str, total: int | None = None, first: int = 0):
        self.what, self.unit, self.total, self.first = what, unit, total, first
        self.started = self.spoke = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.spoke < (0.2 if self.terminal else 15):
            return
        self.spoke = now
        share = f" of {self.total:,} ({done / self.total:.0%})" if self.total else ""
        rate = f"{(done - self.first) / (now - self.started):,.0f} {self.unit}/s"
        self._print(
            f"{self.what}: {done:,}{share} {self.unit}, {rate}", "" if self.terminal else "\n"
        )

    def end(self, result: str) -> None:
        self._print(f"{self.what}: {result}, {time.monotonic() - self.started:.1f} s", "\n")

    def _print(self, line: str, end: str) -> None:
        print(f"\r\033[K{line}" if self.terminal else line, end=end, file=sys.stderr, flush=True)
