"""Upstream's loader written from its description alone, slow and plain: what ours is held against.

Rows: every row begins with BOS and holds T+1 tokens. A buffer of at least 1,000 tokenised
documents (each with BOS in front, refilled 128 documents at a time from the row groups in order);
into the rest of a row goes the longest document that fits whole (first in buffer order on ties),
else the shortest document, cropped to fill. No padding. x = row[:-1], y = row[1:].
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def document_batches(shards: Iterable[Path]) -> Iterator[tuple[list[str], int]]:
    """(up to 128 documents, epoch from 1), shard after shard, group after group, for ever."""
    epoch = 0
    while True:
        epoch += 1
        for shard in shards:
            file = pq.ParquetFile(shard)
            for group in range(file.num_row_groups):
                texts = file.read_row_group(group)["text"].to_pylist()
                while texts:
                    yield texts[:128], epoch
                    texts = texts[128:]


def rows(
    refills: Iterator[tuple[list, int]], tokenise: Callable, T: int, least: int = 1000
) -> Iterator[tuple[list[int], int]]:
    """(a row of T+1 tokens, the epoch of the latest refill), for ever."""
    buffer: list[list[int]] = []
    epoch = 0
    while True:
        row: list[int] = []
        while len(row) < T + 1:
            while len(buffer) < least:
                documents, epoch = next(refills)
                buffer.extend(tokenise(documents))
            rest = T + 1 - len(row)
            best, longest = -1, 0
            for i, document in enumerate(buffer):
                if longest < len(document) <= rest:
                    best, longest = i, len(document)
            if best < 0:
                best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            row += buffer.pop(best)[:rest]
        yield row, epoch


def batches(
    shards: list[Path], tokenizer, B: int, T: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(x (B, T), y (B, T), epoch), int64: tokenised on the way, as upstream does."""
    bos = tokenizer.get_bos_token_id()
    stream = rows(document_batches(shards), lambda texts: tokenizer.encode(texts, prepend=bos), T)
    while True:
        drawn = [next(stream) for _ in range(B)]
        batch = np.array([row for row, _ in drawn], dtype=np.int64)
        yield batch[:, :-1].copy(), batch[:, 1:].copy(), drawn[-1][1]
