"""train.py for tests: imported over a stand-in for prepare, or run as a program of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

TRAIN = Path(__file__).resolve().parents[2] / "trainer" / "train.py"
STAND_IN = Path(__file__).with_name("stand_in")


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_train() -> tuple[ModuleType, ModuleType]:
    """(train, stand_in): fresh modules; the real prepare, if imported, stays what it is."""
    real = sys.modules.get("prepare")
    sys.modules["prepare"] = stand_in = load(STAND_IN / "prepare.py", "stand_in_prepare")
    try:
        return load(TRAIN, "train_under_test"), stand_in
    finally:
        del sys.modules["prepare"]
        if real is not None:
            sys.modules["prepare"] = real


def block(train: ModuleType, scale: str, **changes: object) -> SimpleNamespace:
    """The constants of a scale, some of them changed."""
    unknown = set(changes) - set(train.CONSTANTS[scale])
    assert not unknown, f"no such constants: {unknown}"
    return SimpleNamespace(**(train.CONSTANTS[scale] | changes))


def run(folder: Path, text: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a program text in a folder of its own, without a compiler unless CXX says otherwise."""
    (folder / "train.py").write_text(text)
    settings = {"CXX": "/no/compiler", "PYTHONPATH": str(STAND_IN), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
