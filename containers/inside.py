"""What an image says of itself. Runs inside the image, at build time and at each verification."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from seal import evaluator_sha256  # beside this file in the image

SEALED = Path(__file__).resolve().parent / "trainer"
NEEDED = ("numpy", "pyarrow", "tiktoken", "rustbpe", "safetensors")


def torch_identity() -> str:
    """torch's version and the sha256 of its list of installed files (each with its own hash)."""
    distribution = importlib.metadata.distribution("torch")
    record = distribution.read_text("RECORD") or ""
    return f"{distribution.version} {hashlib.sha256(record.encode()).hexdigest()}"


def labels() -> dict[str, str]:
    """Labels of this image. Importing everything that a run needs is the test of the build.

    Raises:
        ImportError: something baked in does not import.
    """
    torch = importlib.import_module("torch")
    for name in NEEDED:
        importlib.import_module(name)
    flash = "none"
    if importlib.util.find_spec("flash_attn"):
        flash = importlib.import_module("flash_attn").__version__
    sys.path.insert(0, str(SEALED))
    protocol = importlib.import_module("referee.protocol")
    facts = {
        "protocol": str(protocol.VERSION),
        "evaluator.sha256": evaluator_sha256(SEALED),
        "torch": torch.__version__,
        "torch.identity": torch_identity(),
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "cxx11abi": str(torch.compiled_with_cxx11_abi()),
        "arch": _arch_list(torch) or platform.machine(),
        "flash_attn": flash,
    }
    return {f"autoresearch.{key}": value for key, value in facts.items()}


def _arch_list(torch: ModuleType) -> str:
    # torch.cuda.get_arch_list() answers nothing on a build node, which has no GPU.
    flags = getattr(torch._C, "_cuda_getArchFlags", None)
    return (flags() or "") if flags else ""


def packages() -> list[str]:
    """'name==version' of every Python package and 'deb:name=version' of every Debian one."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    query = ["dpkg-query", "-W", "-f", "deb:${Package}=${Version}\n"]
    debian = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return sorted(found) + sorted(debian)


def main(argv: list[str]) -> None:
    """`torch`: its identity. `labels`: lines for $APPTAINER_LABELS. `report`: JSON."""
    if argv[0] == "torch":
        print(torch_identity())
    elif argv[0] == "labels":
        print("\n".join(f"{key} {value}" for key, value in labels().items()))
    else:
        print(json.dumps({"labels": labels(), "packages": packages()}))


if __name__ == "__main__":
    main(sys.argv[1:])
