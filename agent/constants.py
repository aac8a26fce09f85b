"""Owns where a program's numeric constants are: found by syntax, replaced byte for byte."""

from __future__ import annotations

import ast
import math
import operator
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Number = int | float
LARGEST = 2**53  # beyond it a float no longer tells one integer from the next

_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.LShift: operator.lshift,
}


_parsing = threading.Lock()


def parse(source: str) -> ast.Module:
    """ast.parse, for one thread at a time: CPython 3.11 counts the depth of all of them together.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it is no program that can be read.
    """
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape is the program's business
        return ast.parse(source)


@dataclass(frozen=True)
class Constant:
    """A named number in a source text. `start` and `end` are offsets into its UTF-8 bytes."""

    name: str
    value: Number
    start: int
    end: int


def find(source: str, scale: str | None = None) -> dict[str, Constant]:
    """The constants of `source` by name, in the order in which they are written.

    Where the module has one literal block per scale (`{"cpu": dict(depth=2, ...), ...}`) these are
    the active scale's block alone, else all numbers that are assigned at the top level. `2**19`
    counts as a number; elements of tuples are `NAME[0]`. Raises SyntaxError: `source` is not
    Python.
    """
    tree = parse(source)
    # Byte offset of each line as the parser counts them: it breaks lines at newlines alone.
    offsets = [0, *(end.end() for end in re.finditer(rb"\r\n|\r|\n", source.encode()))]
    nodes = [pair for block in _blocks(tree, scale) for pair in block]
    if not nodes:
        nodes = list(_assigned(tree.body))
    found: dict[str, Constant] = {}
    for name, node in nodes:
        for label, part, value in _numbers(name, node):
            start = offsets[part.lineno - 1] + part.col_offset
            end = offsets[(part.end_lineno or 0) - 1] + (part.end_col_offset or 0)
            found[label] = Constant(label, value, start, end)
    return found


def values(source: str, scale: str | None = None) -> dict[str, Number]:
    """Name -> value of `find`; empty where `source` is not Python."""
    try:
        return {name: constant.value for name, constant in find(source, scale).items()}
    except (SyntaxError, ValueError):
        return {}


def replace(source: str, changes: Mapping[str, Number], scale: str | None = None) -> str:
    """`source` with new numbers in place of the named constants; all other bytes as they were.

    Raises KeyError: no such constant (the message lists those there are).
    """
    found = find(source, scale)
    absent = [name for name in changes if name not in found]
    if absent:
        raise KeyError(f"no constant {', '.join(absent)}; there are {', '.join(found) or 'none'}")
    data = source.encode()
    for name in sorted(changes, key=lambda name: found[name].start, reverse=True):
        old = found[name]
        data = data[: old.start] + spell(changes[name]).encode() + data[old.end :]
    return data.decode()


def spell(value: Number) -> str:
    """A number as a person would write it: 0.031, 2**19, 3e-05."""
    if isinstance(value, int):
        power = value.bit_length() - 1
        return f"2**{power}" if power >= 10 and value == 1 << power else str(value)
    return repr(value)


def pieces(source: str, scale: str | None = None) -> dict[str, str]:
    """The program cut into named pieces: name -> normalised source, for "what was changed?".

    Functions, classes and top-level assignments go by their names, entries of the active scale's
    block by theirs, all imports are "imports", everything else at the top level is "script". Raises
    SyntaxError: `source` is not Python.
    """
    tree = parse(source)
    found: dict[str, list[str]] = {}
    for block in _blocks(tree, scale):
        for name, node in block:
            found[name] = [ast.dump(node)]
            for field in node._fields:  # forgotten, since it is counted by its own name
                setattr(node, field, None)
    for number, statement in enumerate(tree.body):
        name = _name(statement)
        if name == "script" and number == 0 and isinstance(statement, ast.Expr):
            continue  # the docstring
        found.setdefault(name, []).append(ast.dump(statement))
    return {name: "\n".join(dumps) for name, dumps in found.items()}


def _name(statement: ast.stmt) -> str:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return statement.name
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return "imports"
    names = [name for name, _ in _assigned([statement])]
    return names[0] if names else "script"


Block = list[tuple[str, ast.expr]]


def _blocks(tree: ast.Module, scale: str | None) -> Iterator[Block]:
    """The active scale's items of each `{"cpu": {...}, "h100": Settings(...)}`, `dict(cpu=...)`."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            for key, item in _items(statement.value):
                if key == scale and isinstance(item, ast.Dict | ast.Call):
                    yield list(_items(item))


def _items(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Dict):
        for key, item in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, item
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg:
                yield keyword.arg, keyword.value


def _assigned(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for statement in body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        if isinstance(target, ast.Name):
            yield target.id, statement.value


def _numbers(name: str, node: ast.expr) -> Iterator[tuple[str, ast.expr, Number]]:
    if isinstance(node, ast.Tuple | ast.List):
        for index, element in enumerate(node.elts):
            yield from _numbers(f"{name}[{index}]", element)
        return
    value = _evaluate(node)
    if value is not None:
        yield name, node, value


def _evaluate(node: ast.expr) -> Number | None:
    """The value of a literal number or of plain arithmetic on such.

    None for all else, and beyond LARGEST: `1 << (1 << 40)` would take all memory.
    """
    value = _computed(node)
    return value if value is not None and abs(value) <= LARGEST else None


def _computed(node: ast.expr) -> Number | None:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _evaluate(node.operand)
        return None if inner is None else -inner
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _evaluate(node.left), _evaluate(node.right)
    if left is None or right is None:
        return None
    try:
        if isinstance(node.op, ast.Pow):
            value: Number = left**right if abs(right) <= 64 and abs(left) <= 1e6 else math.inf
        elif isinstance(node.op, ast.LShift) and right > 64:
            return None
        else:
            value = _OPERATORS[type(node.op)](left, right)
        return value if isinstance(value, int | float) else None  # (-8) ** 0.5 is complex
    except (KeyError, ArithmeticError, TypeError, ValueError):
        return None
