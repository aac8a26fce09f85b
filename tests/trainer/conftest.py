"""Puts trainer/ on sys.path, where its modules lie at run time."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "trainer"))
