"""What torch makes of a machine's device. Runs where runs do, in the image; train.py is its input.

Prints JSON: device, gpu, cuda (torch's), compile (None, or why not), attention {backend: text}.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

B, T, H, D, WINDOW = 2, 256, 2, 128, 128
TOLERANCE = 0.05  # bf16 has 8 bits; outputs are of size 1
WORKS = "works"


def main() -> None:
    torch: Any = importlib.import_module("torch")
    train = _load(sys.stdin.read())
    device = train.pick_device()
    cuda = device.type == "cuda"
    told = {"device": device.type, "cuda": torch.version.cuda}
    told |= {"gpu": torch.cuda.get_device_name(device) if cuda else None}
    told |= {"compile": train.why_not_compile(device)}
    print(json.dumps(told | {"attention": _attention(torch, train, device)}))


def _load(source: str) -> Any:
    """train.py as a module: compilers look for a function's lines in a file."""
    folder = tempfile.mkdtemp()
    Path(folder, "train.py").write_text(source)
    sys.path.insert(0, folder)
    return importlib.import_module("train")


def _attention(torch: Any, train: Any, device: Any) -> dict[str, str]:
    """One forward and backward pass in bf16 by each backend of train.py, or why there is none."""
    heads = [torch.randn(B, T, H, D).to(device, torch.bfloat16).requires_grad_() for _ in range(3)]
    exact = train.sdpa_attention(*(h.detach().float() for h in heads), WINDOW)
    told = {}
    for name, backend in train.attention_backends(device, T, {WINDOW}).items():
        if not callable(backend):
            told[name] = f"not here: {backend}"
            continue
        try:
            y = backend(*heads, WINDOW).float()
            y.sum().backward()
            error = (y - exact).abs().max().item()
            told[name] = WORKS if error < TOLERANCE else f"fails: wrong by {error:.2g}"
        except Exception as error:  # whatever a kernel or its compiler has to say
            told[name] = f"fails: {type(error).__name__}: {error}"[:300]
    return told


if __name__ == "__main__":
    main()
