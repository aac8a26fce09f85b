"""The referee's side of the shared file: slots written and read by calls, never mapped.

A file that is cut short under a mapping kills its reader with SIGBUS; a call only returns less.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .protocol import Garbage

# What the two last views may still show, one written ahead, and one in its place when another
# shape is asked for than was foreseen.
SLOTS = 4


class Ring:
    """Batches of rows in turn through four slots, and reserved places beside them."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.size = 0
        self._places = [(0, 0)] * SLOTS  # offset, capacity
        self._turn = 0

    def put(self, rows: np.ndarray) -> int:
        """Write rows into the next slot; its offset. What lies in the other slots stays.

        Raises Garbage where the program cut the file: writing would make it whole again.
        """
        self.check()
        turn = self._turn = (self._turn + 1) % SLOTS
        offset, capacity = self._places[turn]
        if rows.nbytes > capacity:
            # Powers of two: places left behind never add up to more than the ones in use.
            capacity = 1 << (rows.nbytes - 1).bit_length()
            offset = self.reserve(capacity)
            self._places[turn] = offset, capacity
        left = memoryview(np.ascontiguousarray(rows)).cast("B")
        at = offset
        while left:
            written = os.pwrite(self._file, left, at)
            left, at = left[written:], at + written
        return offset

    def reserve(self, size: int) -> int:
        """A new place of `size` bytes at the end of the file, on a page of its own; its offset."""
        offset = -(-self.size // 4096) * 4096
        self.size = offset + size
        os.ftruncate(self._file, self.size)
        return offset

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes that the program wrote. Raises Garbage for a short read."""
        data = os.pread(self._file, size, offset)
        if len(data) < size:
            raise Garbage(f"the shared file was cut short: {len(data)} of {size} bytes to be read")
        return data

    def check(self) -> None:
        """Raises Garbage if the program changed the file's size."""
        size = os.fstat(self._file).st_size
        if size != self.size:
            raise Garbage(
                f"the shared file was {'cut short' if size < self.size else 'grown'} by the"
                f" program: {size} bytes, {self.size} are the referee's"
            )
