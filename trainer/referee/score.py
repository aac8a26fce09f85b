"""The score: which rows are shown in which order, and what the answers come to. Pure.

The rows are fixed by the data; their order is the referee's secret. Sums are kept per row, so that
the score does not depend on order or batch size at all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

TOLERANCE = 1e-3  # nats below zero that rounding may explain


class NotFinite(ValueError):
    """A loss is NaN or infinite: the model diverged."""


class Scoring:
    """One scoring, from the first batch to the sum.

    Args:
        rows: uint16 (n, T + 1), the rows to score; targets are rows[:, 1:].
        lengths: int64 (vocab,), true bytes of every token, 0 for special tokens.
        upstream: int64 (vocab,), the same by upstream's count.
        batch: rows per batch; the last one is padded with rows of the first.
        order: permutation of the n rows.
    """

    def __init__(
        self,
        rows: np.ndarray,
        lengths: np.ndarray,
        upstream: np.ndarray,
        batch: int,
        order: np.ndarray,
    ):
        self.batches = -(-len(rows) // batch)
        self._rows, self._lengths, self._upstream = rows, lengths, upstream
        self._batch = batch
        self._order = np.resize(order, self.batches * batch)
        self._nats = np.zeros(len(rows))

    def rows(self, index: int) -> np.ndarray:
        """Batch `index`: uint16 (batch, T + 1)."""
        return self._rows[self._indices(index)]

    def take(self, index: int, losses: np.ndarray) -> None:
        """Count the answer to batch `index`: float32 (batch, T), nats.

        Raises:
            NotFinite: a loss is NaN or infinite.
            ValueError: a loss is negative.
        """
        if not np.isfinite(losses).all():
            raise NotFinite("the model's loss is NaN or infinite on the validation rows")
        if losses.min() < -TOLERANCE:
            raise ValueError(f"a loss of {losses.min():.4g} nats: a loss cannot be negative")
        real = min(self._batch, len(self._rows) - index * self._batch)
        indices = self._indices(index)[:real]
        counted = self._lengths[self._rows[indices, 1:]] > 0
        losses = np.maximum(losses[:real], 0.0)
        self._nats[indices] = np.sum(losses, axis=1, dtype=np.float64, where=counted)

    def result(self) -> dict[str, Any]:
        """The score in bits per byte, and how many rows it was made from."""
        targets = np.bincount(self._rows[:, 1:].ravel(), minlength=len(self._lengths))
        nats = math.fsum(self._nats)
        return {
            "val_bpb": nats / (math.log(2) * int(targets @ self._lengths)),
            "val_bpb_upstream": nats / (math.log(2) * int(targets @ self._upstream)),
            "rows_scored": len(self._rows),
        }

    def _indices(self, index: int) -> np.ndarray:
        return self._order[index * self._batch : (index + 1) * self._batch]
