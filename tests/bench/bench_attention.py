"""Each attention backend of train.py: its error against float64, and its time; or why not run.

python -m tests.bench.bench_attention
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from tests.bench.results import REPOSITORY, record

sys.path.insert(0, str(REPOSITORY / "trainer"))
sys.path.insert(0, str(REPOSITORY / "tests/trainer"))

from prepare import SCALES
from programs import block, load_train

train, _ = load_train()


def shape(scale: str, rows: int) -> tuple[tuple[int, int, int, int], int]:
    """(B, T, H, D) and the first layer's window, as train.py's scale uses them."""
    c, T = block(train, scale), SCALES[scale].max_seq_len
    heads = -(-c.depth * c.width_per_layer // c.head_width)
    return (rows, T, heads, c.head_width), train.layer_windows(c, T)[0]


SHAPES = {"cpu": shape("cpu", 8), "h100": shape("h100", 16)}


def reference(q, k, v, window):
    """(B, T, H, D) of float64, by the definition, one row after another to bound the memory."""
    visible = train.attention_mask(q.size(1), window, q.device)
    rows = []
    for row in zip(q.double(), k.double(), v.double(), strict=True):
        q1, k1, v1 = (x.transpose(0, 1) for x in row)  # (H, T, D)
        scores = (q1 @ k1.mT / q1.size(-1) ** 0.5).masked_fill(~visible, float("-inf"))
        rows.append((scores.softmax(-1) @ v1).transpose(0, 1))
    return torch.stack(rows)


def milliseconds(attend, heads, window, device) -> float:
    """Of a forward and a backward pass, the median of ten."""
    times = []
    for _ in range(13):
        start = time.perf_counter()
        attend(*heads, window).float().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def rows_of(shape, short, device, precision) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    heads = [torch.randn(shape).to(device, precision).requires_grad_() for _ in range(3)]
    rows = []
    for window in (short, shape[1]):
        with torch.no_grad():
            exact = reference(*heads, window)
        for name, backend in train.attention_backends(device, shape[1], {window}).items():
            row = {"backend": name, "B, T, H, D": str(shape), "window": window}
            if not callable(backend):
                rows.append(row | {"largest error": None, "ms": None, "why": backend})
                continue
            with torch.no_grad():
                error = (backend(*heads, window).double() - exact).abs().max().item()
            ms = milliseconds(backend, heads, window, device)
            rows.append(row | {"largest error": error, "ms": ms, "why": ""})
    return rows


def main() -> None:
    device = train.pick_device()
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, short = SHAPES["h100" if device.type == "cuda" else "cpu"]
    note = (
        f"Forward and backward on {device} in {precision} with {torch.get_num_threads()} threads;"
        " the error is the largest of any output, against float64."
    )
    record("Attention backends", rows_of(shape, short, device, precision), note)


if __name__ == "__main__":
    main()
