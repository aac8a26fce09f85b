"""Who may import whom: one way only, read from the source without running it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("jobs", "agent", "slurm", "containers", "trainer")

# Nouns and pure rules: they know each other and nothing that touches the world.
PURE = tuple(
    f"jobs.{name}"
    for name in ["errors", "model", "names", "policy", "records", "history", "text", "settings"]
)
# The upper end of jobs: each is imported only by those behind it.
UPPER = ("jobs.controller", "jobs.night", "jobs.demo", "jobs.cli", "jobs.__main__")
# What the other packages may know. jobs.submission holds the executors' protocol.
PACKAGES = {
    "agent": ("agent", *PURE),
    "slurm": (
        "slurm",
        "containers",
        *PURE,
        "jobs.submission",
        "jobs.process",
        "jobs.payload",
    ),
    "containers": ("containers", *PURE),
    "trainer": ("trainer",),
}


def modules() -> Iterator[tuple[str, Path]]:
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(p for p in parts if p != "__init__"), path


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Each imported module of ours, and whether that happens when the file itself is imported."""
    tree = ast.parse(path.read_text())
    lazy = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types_only(node):
            lazy |= set(ast.walk(node))
    return [
        (name, node not in lazy)
        for node in ast.walk(tree)
        for name in _names(node)
        if name.split(".")[0] in OURS
    ]


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        files = [name for name in inside if _is_module(name)]
        return files or [node.module]
    return []


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_nouns_and_rules_import_nothing_that_touches_the_world() -> None:
    for module, path in modules():
        if module in PURE:
            assert {name for name, _ in imports(path)} <= set(PURE), module


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_knows_only_what_is_below_it(package: str) -> None:
    for module, path in modules():
        if module.split(".")[0] == package:
            for name, _ in imports(path):
                allowed = PACKAGES[package]
                fits = any(name == a or name.startswith(f"{a}.") for a in allowed)
                assert fits, f"{module} imports {name}"


def test_the_controller_and_the_command_line_are_imported_from_above_only() -> None:
    for module, path in modules():
        for name, _ in imports(path):
            if name in UPPER:
                assert module in UPPER[UPPER.index(name) + 1 :], f"{module} imports {name}"


def test_jobs_reaches_for_executors_and_researchers_only_when_it_needs_them() -> None:
    for module, path in modules():
        if module.split(".")[0] == "jobs":
            for name, at_once in imports(path):
                heavy = name.split(".")[0] in ("slurm", "containers") or name == "jobs.container"
                lazy = not at_once or module == "jobs.container"
                assert lazy or not heavy, f"{module} imports {name} at once"


def test_the_imports_have_no_circle() -> None:
    graph = {
        module: {name for name, at_once in imports(path) if at_once} for module, path in modules()
    }

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for name in graph.get(module, ()):
            visit(name, (*path, module))
        done.add(module)

    done: set[str] = set()
    for module in graph:
        visit(module, ())


def test_the_command_line_starts_without_heavy_libraries() -> None:
    path = ROOT / "jobs" / "cli.py"
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    heavy = {"optuna", "anthropic", "git", "pydantic", "yaml", "pyarrow", "matplotlib", "submitit"}
    heavy |= {"numpy", "torch", "spython"}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {module} if module else {a.name for a in node.names}
            assert not {name.split(".")[0] for name in names} & heavy, ast.unparse(node)
