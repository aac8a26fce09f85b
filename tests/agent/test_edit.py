"""Every rule that an edit must pass before a GPU is spent."""

from __future__ import annotations

from pathlib import Path

import pytest
from tale import PATH, PROGRAM

from agent import edit, program

TRAIN = (Path(__file__).parents[2] / "trainer" / "train.py").read_text()


def refusal(text: str, old: str = PROGRAM, **facts) -> str | None:
    return edit.refusal(edit.Edit({PATH: old}, {PATH: text}, "cpu", **facts))


def test_a_good_edit_passes():
    assert refusal(PROGRAM.replace("depth=2", "depth=3")) is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("def f(:", "does not parse"),
        ("return 3", "does not parse"),
        ("import socket", "imports socket"),
        ("import subprocess", "imports subprocess"),
        ("import ctypes", "imports ctypes"),
        ("import torch.utils.cpp_extension", "cpp_extension"),
        ("from torch.utils import cpp_extension", "cpp_extension"),
        ("import os as o", "os by another name"),
        ("from os import system", "os.system"),
        ("import os\nos.system('x')", "os.system"),
        ("import os\nos.fork()", "os.fork"),
        ("import os\ngetattr(os, 'sys' + 'tem')('x')", "getattr(os"),
        ("import sys\nsys.modules", "sys.modules"),
        ("exec('x')", "uses exec"),
        ("eval('x')", "uses eval"),
        ("__import__('socket')", "__import__"),
        ("().__class__.__bases__", "__bases__"),
        ("torch.hub.load('x')", "torch.hub"),
        ("torch.load('x')", "torch.load"),
        ("from torch import load", "torch.load"),
        ("import numpy as np\nnp.load('x')", "np.load"),
        ("torch.from_file('x', size=3)", "from_file"),
        ("import os\nos.environ['TRITON_CACHE_DIR']", "the compile cache"),
        ("print(undefined_name)", "undefined_name, which is defined nowhere"),
        ("def f():\n    return lost", "line 39 uses lost"),
        ("class A:\n    x = [lost for y in range(3)]", "lost"),
        ("SEED = 137", "gives SEED a value"),
        ("torch.manual_seed(137)", "something else than SEED"),
        ("torch.manual_seed(SEED + 95)", "something else than SEED"),
        ("import random\nrandom.seed(7)", "something else than SEED"),
        ("import numpy\nnumpy.random.default_rng()", "something else than SEED"),
        ("def f(SEED=137):\n    return SEED", "gives SEED a value"),
        ("from math import tau as SEED", "gives SEED a value"),
        ("try:\n    pass\nexcept ValueError as SEED:\n    pass", "gives SEED a value"),
        ("match 3:\n    case SEED:\n        pass", "gives SEED a value"),
        ("import prepare\nprepare.SEED = 3", "gives SEED a value"),
        ("from torch import manual_seed as ms\nms(137)", "another name"),
        ("seeder = torch.manual_seed", "another name"),
        ("torch.os.system", "torch.os"),
        ("torch.ctypes.CDLL", "torch.ctypes"),
        ("from torch import ctypes", "torch.ctypes"),
        ("import inspect\ninspect.os.popen", "inspect.os"),
        ("import random\nrandom._os.fork", "random._os"),
        ("import logging.handlers\nlogging.handlers.socket.socket()", ".socket"),
        ("torch.multiprocessing.spawn", "torch.multiprocessing"),
        ("import torch.multiprocessing", "torch.multiprocessing"),
        ("x = " + "+".join(["1"] * 2500), "nested too deeply"),
        ("# only a comment", "only comments or layout"),
    ],
)
def test_a_bad_line_is_refused_in_words(line, words):
    assert words in refusal(PROGRAM + line + "\n")


@pytest.mark.parametrize(
    "line",
    [
        "import os\nos.environ['A'] = os.path.join('a', 'b')",
        "from collections import deque\nd = deque(maxlen=3)",
        "import triton",
        "import os, sys\nfrom os import path",
        "def f(seed):\n    torch.manual_seed(SEED)",
        "def f(a, *b, c=1, **d):\n    x = [a + y for y in b]\n    return lambda z: (x, c, d, z)",
        "class A(torch.nn.Module):\n    def f(self):\n        return super().forward, __class__",
        "def f():\n    global counter\n    counter = 1\n\n\ndef g():\n    return counter",
        "try:\n    import flash_attn\nexcept ImportError as error:\n    print(error)",
        "match 3:\n    case int() as n:\n        print(n)",
        "torch.cuda.manual_seed_all(SEED)",
        "compiled = torch.compile(train)",
        "model = torch.nn.Linear(1, 1).eval()",
    ],
)
def test_ordinary_code_passes(line):
    assert refusal(PROGRAM + line + "\n") is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("SCALE, SEED,", "SCALE,", "SEED"),
        ("    torch.manual_seed(SEED)\n", "    print(SEED)\n", "does not seed"),
        ("evaluate_bpb(model, tokenizer, 8)", "print(1.23)", "does not call evaluate_bpb"),
        ("import torch\n", "", "torch, which is defined nowhere"),
    ],
)
def test_what_a_run_needs_may_not_be_removed(old, new, words):
    changed = PROGRAM.replace(old, new)
    if "evaluate" in old:
        changed = changed.replace("evaluate_bpb, ", "")
    assert words in refusal(changed)


def test_what_the_base_does_already_is_not_held_against_an_edit():
    old = PROGRAM + "import socket, os\nos.kill\n"
    assert refusal(old.replace("depth=2", "depth=3"), old) is None


def test_only_editable_files_may_change():
    files = {PATH: PROGRAM, "trainer/prepare.py": "x = 1\n"}
    words = edit.refusal(edit.Edit({PATH: PROGRAM}, files, "cpu"))
    assert words.startswith("trainer/prepare.py may not be changed: only trainer/train.py may")


def test_a_program_that_was_tried_is_refused_whatever_its_layout():
    new = PROGRAM.replace("depth=2", "depth=3")
    known = {edit.fingerprint({PATH: new}): "e0042"}
    disguised = new.replace("depth=3,", "depth = 3,  # new!").replace('"""Trains', '"""It trains')
    assert "exactly the program of e0042" in refusal(disguised, known=known)


MARGINS = """# first
'''Two lines

at the margin.'''
if depth:
    a = 1
# between
else:
    a = 2
try:
    b = [
1,
]
except ValueError:
    b = 0
@decorated
# and why
def f(x):
    return x
c = 1 + \\
2; d = 3
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# first", "# second", True),
        ("Two lines", "Three lines", True),
        ("# between", "\n\n# elsewhere", True),
        ("# and why", "", True),
        ("a = 2", "a = 3", False),
        ("\n1,", "\n2,", False),
        ("@decorated\n", "", False),
        ("d = 3", "d = 4", False),
        ("else:\n    a = 2\n", "", False),
    ],
)
def test_a_program_is_known_by_its_statements_wherever_they_begin(old, new, same):
    one, other = MARGINS, MARGINS.replace(old, new)
    assert other != one
    assert (edit.fingerprint({PATH: one}) == edit.fingerprint({PATH: other})) == same


def test_may_change_holds_names_and_regions():
    limits = program.Limits(may_change=("matrix_rate", "train"))
    assert refusal(PROGRAM.replace("0.04", "0.05"), limits=limits) is None
    assert refusal(PROGRAM.replace("epoch=epoch", "epoch=1"), limits=limits) is None
    assert "depth may not be changed" in refusal(PROGRAM.replace("=2,", "=3,"), limits=limits)
    other = PROGRAM.replace("Linear(4", "Linear(5")
    assert "main may not be changed" in refusal(other, limits=limits)
    assert "CONSTANTS" in refusal(PROGRAM.replace("depth=8", "depth=9"), limits=limits)
    assert "new may not" in refusal(PROGRAM + "\n\ndef new():\n    pass\n", limits=limits)


def test_max_lines_counts_added_lines():
    two = PROGRAM + "a = 1\nb = 2\n"
    assert refusal(two, limits=program.Limits(max_lines=2)) is None
    assert "adds 2 lines" in refusal(two, limits=program.Limits(max_lines=1))
    shorter = PROGRAM.replace('    """Trains until the feed ends."""\n', "").replace("=2,", "=3,")
    assert refusal(shorter, limits=program.Limits(max_lines=1)) is None


@pytest.mark.parametrize("text", ["x = '\0'", "x = 1\n" * 200_000, "(" * 5000, "\ud800 = 1"])
def test_hostile_text_is_refused_without_an_exception(text):
    assert refusal(PROGRAM + text) is not None


def test_the_shipped_program_may_be_edited():
    assert refusal(TRAIN + "\nAN_EDIT = 1\n", TRAIN) is None


def test_the_shipped_program_defines_every_name_that_it_uses():
    assert edit.undefined(TRAIN) == []


def test_lines_are_counted_as_git_counts_them():
    assert edit.line_counts("a\nb\nc\n", "a\nx\ny\nc\n") == (2, 1)
    assert edit.line_counts("a\nb\n", "a\nb\na\nb\n") == (2, 0)
    assert edit.line_counts("b\nc\n", "a\nb\n") == (1, 1)
    assert edit.line_counts("a\n", "a\n") == (0, 0)
