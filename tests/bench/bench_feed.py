"""How fast batches come: ours, through the referee's socket, against upstream's loader.

Upstream's is written from its description (tests/trainer/described.py): it tokenises on the way.
Both fill the same tensors a program trains on, int64 (B, T) on this machine's device. Also how much
of it is the rows alone, read from their file.

python -m tests.bench.bench_feed [--repeats N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.results import record

ROOT = Path(__file__).resolve().parents[2]
CASES = (("h100", 128, 2048), ("cpu", 8, 256))
SECONDS = 4.0  # each measurement lasts, after a first batch that is not counted


def upstream(data: Path, B: int, T: int):
    """Batches of upstream's loader as described, as torch tensors."""
    import described
    import torch

    import rows
    from prepare import Tokenizer, device

    shards = [data / name for name in rows.read_manifest(data)["shards"]["train"]]
    for x, y, epoch in described.batches(shards, Tokenizer.from_directory(data), B, T):
        yield *(torch.from_numpy(part).to(device()) for part in (x, y)), epoch


def ours(data: Path, B: int, T: int):
    """Batches as train.py gets them: from a referee in a process of its own."""
    from prepare import make_dataloader

    return make_dataloader(None, B, T, "train")


def stream(data: Path, B: int, T: int):
    """The rows alone, in numpy: what the referee reads."""
    import rows

    source, position = rows.RowStream(data, "train", T, seed=1), 0
    while True:
        batch, epoch, position = source.take(B, position)
        yield batch, epoch


def measure(kind: str, data: Path, B: int, T: int) -> float:
    """Tokens per second over about SECONDS, at most 400 batches (the cpu scale's budget)."""
    loader = {"upstream": upstream, "ours": ours, "stream": stream}[kind](data, B, T)
    next(loader)
    started, batches = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS and batches < 400:
        last = next(loader)
        batches += 1
    if hasattr(last[0], "cpu"):
        last[0].cpu()  # on a GPU the copies are asynchronous
    return batches * B * T / (time.perf_counter() - started)


def measured(kind: str, data: Path, B: int, T: int) -> float:
    """The same in a process of its own: a session serves one program."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "trainer", ROOT / "tests/trainer")))
    environment = {**os.environ, "PYTHONPATH": path, "AUTORESEARCH_DATA": str(data)}
    environment.pop("AUTORESEARCH_REFEREE", None)
    command = [sys.executable, __file__, "--measure", kind, str(data), str(B), str(T)]
    return json.loads(subprocess.check_output(command, env=environment, text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        kind, data, B, T = asked.measure
        print(json.dumps(measure(kind, Path(data), int(B), int(T))))
        return
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for scale, B, T in CASES:
            data = Path(folder) / scale
            prepare = [
                sys.executable,
                ROOT / "trainer/prepare.py",
                "--scale",
                scale,
                "--data",
                data,
            ]
            subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
            rates = {
                kind: statistics.median(figures)
                for kind, figures in _interleaved(asked.repeats, data, B, T).items()
            }
            table.append(
                {
                    "batch": f"{B} x {T}",
                    "upstream's, M tokens/s": rates["upstream"] / 1e6,
                    "ours, M tokens/s": rates["ours"] / 1e6,
                    "ratio": f"{rates['ours'] / rates['upstream']:.0f}",
                    "rows alone, M tokens/s": rates["stream"] / 1e6,
                    "rows alone, ratio": f"{rates['stream'] / rates['upstream']:.0f}",
                }
            )
    note = (
        "The standard library, tokenised for each scale. *Ours* is what `next(train_loader)` gives "
        "train.py: read by the referee, over its socket and shared file, widened to int64 tensors. "
        f"Nothing is computed meanwhile. Medians of {asked.repeats}, the kinds taken in turn."
    )
    record("Feed", table, note)


def _interleaved(repeats: int, data: Path, B: int, T: int) -> dict[str, list[float]]:
    """Figures of every kind, in turn, so that a busy moment of the machine meets all alike."""
    figures: dict[str, list[float]] = {"upstream": [], "ours": [], "stream": []}
    for _ in range(repeats):
        for kind, found in figures.items():
            found.append(measured(kind, data, B, T))
    return figures


if __name__ == "__main__":
    main()
