"""Owns what an edit may be: every rule that is checked before a GPU is spent, in RULES.

These keep honest mistakes from costing a run. What holds against malice is the isolation of the
run and the referee (trainer/): no check of source text can.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import functools
import hashlib
import re
import symtable
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from agent import constants, program
from agent.researcher import Context

LARGEST = 400_000  # characters in one file: a program, not a data set


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What the images hold and an experiment may import.
IMPORTS = _words(
    "prepare torch numpy math time os sys gc dataclasses typing functools itertools collections"
    " contextlib enum abc random copy operator statistics warnings types string re json inspect"
    " __future__ heapq bisect fractions numbers array struct textwrap logging pprint"
    " flash_attn flash_attn_interface triton einops liger_kernel kernels"
)
# Of `os` and `sys` an experiment needs little, and the rest starts processes or looks outside.
NARROW = {
    "os": _words("environ getenv path cpu_count sched_getaffinity getpid name linesep"),
    "sys": _words("argv exit stdout stderr version version_info maxsize platform"),
}
CALLS = _words("exec eval compile __import__ globals locals vars breakpoint input")
NAMES = CALLS | _words("__builtins__ __loader__ __spec__")
ATTRIBUTES = _words(
    "__globals__ __builtins__ __subclasses__ __bases__ __mro__ __code__ __loader__ __import__"
    " cpp_extension ctypeslib hub rpc f_back f_globals"
    " os _os sys subprocess socket ctypes multiprocessing"
    " fromfile memmap from_file load_file load_library load_inline"
)
# A run begins from its seed. What an earlier one left in a compile cache is no head start.
LOADERS = _words("torch.load np.load numpy.load")
SEEDERS = _words("manual_seed manual_seed_all seed default_rng RandomState Random")


@dataclass(frozen=True)
class Edit:
    """An edit under examination: all editable files before it and after it."""

    old: Mapping[str, str]
    new: Mapping[str, str]  # only the files that it hands over
    scale: str = ""
    known: Mapping[str, str] = field(default_factory=dict)  # fingerprint -> experiment
    limits: program.Limits = field(default_factory=program.Limits)

    @property
    def changed(self) -> list[str]:
        """Python files that it changes."""
        return [
            path
            for path, text in self.new.items()
            if path.endswith(".py") and path in self.old and text != self.old[path]
        ]


Rule = Callable[[Edit], Iterator[str]]


def of(context: Context, files: Mapping[str, str]) -> Edit:
    """`files` as an edit of what `context` shows.

    Raises ProgramError: the front matter of program.md cannot be read.
    """
    limits = program.limits(context.program)
    return Edit(context.files, files, context.scale, context.known, limits)


def refusal(edit: Edit) -> str | None:
    """Why this edit is not run, in words for whoever made it; None: run it."""
    try:
        return next((reason for rule in RULES for reason in rule(edit)), None)
    except (RecursionError, MemoryError):
        return "the program is nested too deeply to be checked: write long expressions as loops."


def fingerprint(files: Mapping[str, str]) -> str:
    """A hash that comments, docstrings, layout and the order of files do not change."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path}\0{_normalised(path, files[path])}\0".encode(errors="replace"))
    return digest.hexdigest()[:32]


@functools.lru_cache(maxsize=8)
def _normalised(path: str, text: str) -> str:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    marks = _marks("\n".join(lines)) if path.endswith(".py") else None
    return "\n".join(line.rstrip() for line in lines) if marks is None else "\n".join(marks)


# Where a top-level statement may begin: at the margin, with nothing that continues another.
_BEGINS = re.compile(r"^(?![\s#)\]}]|(?:elif|else|except|finally)\b)", re.MULTILINE)


def _marks(text: str) -> Sequence[str] | None:
    """A hash of each top-level statement but the docstring; None: it is no program.

    Each is parsed by itself, since an edit leaves most of them as they were.
    """
    marks: list[str] = []
    held, parsed = "", 0
    for piece in _BEGINS.split(text):
        held += piece
        parsed += len(held)
        if parsed > 20 * len(text):  # lines of a long text, or a bracket that nobody closes
            return _mark(text)
        if (found := _mark(held)) is not None:
            marks.extend(found)
            held = ""
    if held:
        return None
    return marks[1:] if marks and (marks[0],) == _mark("pass") else marks  # the docstring's


@functools.lru_cache(maxsize=4096)
def _mark(source: str) -> tuple[str, ...] | None:
    """A hash for each statement of a part of a program, docstrings aside; None: it is no whole."""
    tree = _parse.__wrapped__(source)  # its own: the cached ones are shared
    if tree is None:
        return None
    for node in ast.walk(tree):
        if _has_docstring(node):
            node.body[0] = ast.Pass()  # type: ignore[attr-defined]
    mark = hashlib.sha256(ast.dump(tree).encode(errors="replace")).hexdigest()
    return (mark,) * len(tree.body)


def _has_docstring(node: ast.AST) -> bool:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None


@functools.lru_cache(maxsize=8)  # the rules share trees: nobody writes to them
def _parse(text: str) -> ast.Module | None:
    try:
        return constants.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# The rules. Each yields refusals: what was seen, why it is refused, what to do instead.


def _only_editable_files(edit: Edit) -> Iterator[str]:
    for path in edit.new:
        if path not in edit.old:
            allowed = ", ".join(edit.old)
            yield f"{path} may not be changed: only {allowed} may. Make your change there."


def _is_text(edit: Edit) -> Iterator[str]:
    for path, text in edit.new.items():
        if len(text) > LARGEST:
            yield f"{path} has {len(text):,} characters; a program may have {LARGEST:,}."
        elif "\0" in text:
            yield f"{path} contains a NUL character: it must be plain text."


def _changes_something(edit: Edit) -> Iterator[str]:
    if all(text == edit.old[path] for path, text in edit.new.items()):
        yield "nothing was changed: edit the program before you submit it."


def _parses(edit: Edit) -> Iterator[str]:
    for path in edit.changed:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(edit.new[path], "<program>", "exec", dont_inherit=True)
        except SyntaxError as error:
            line = edit.new[path].split("\n")[(error.lineno or 1) - 1 :][:1]
            said = line[0].strip()[:100] if line else ""
            yield f"{path} line {error.lineno} does not parse: {error.msg}: {said}"
        except (ValueError, RecursionError, MemoryError) as error:
            yield f"{path} does not parse: {type(error).__name__}: {error}"


def _imports_what_is_there(edit: Edit) -> Iterator[str]:
    allowed = IMPORTS | {PurePosixPath(path).stem for path in edit.old}
    for path in edit.changed:
        before = {module for module, _ in _imported(edit.old[path])}
        for module, line in _imported(edit.new[path]):
            if module not in before and module.split(".")[0] not in allowed:
                yield (
                    f"{path} line {line} imports {module}, which the image does not offer to "
                    f"experiments. There are torch, numpy, triton, einops, flash_attn and the "
                    f"harmless part of the standard library; write what you need with those."
                )


def _imported(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(_parse(text) or ast.Module([], [])):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno


def _starts_nothing(edit: Edit) -> Iterator[str]:
    for path in edit.changed:
        before = {what for what, _ in _suspicious(edit.old[path])}
        for what, line in _suspicious(edit.new[path]):
            if what not in before:
                yield (
                    f"{path} line {line} uses {what}: an experiment starts no processes, opens no "
                    f"sockets, loads no files and runs no hidden code. Say what you need in plain "
                    f"Python."
                )


def _suspicious(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(_parse(text) or ast.Module([], [])):
        for what in _tricks(node):
            yield what, node.lineno  # type: ignore[attr-defined]


def _tricks(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            if alias.name not in NARROW.get(module, {alias.name}):
                yield f"{module}.{alias.name}"
            if alias.asname and alias.name in NARROW:
                yield f"{alias.name} by another name"
            dotted = f"{module}.{alias.name}".strip(".")
            inner = dotted.split(".")[1:]  # IMPORTS has the say on the first
            if ATTRIBUTES.intersection(inner) or dotted in LOADERS:
                yield dotted
    elif isinstance(node, ast.Attribute):
        base = node.value.id if isinstance(node.value, ast.Name) else ""
        name = f"{base}.{node.attr}"
        narrow = node.attr not in NARROW.get(base, {node.attr})
        if narrow or node.attr in ATTRIBUTES or name in LOADERS:
            yield name
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield node.id
    elif isinstance(node, ast.Constant) and "CACHE_DIR" in str(node.value):
        yield "the compile cache"
    elif isinstance(node, ast.Call) and _called(node) in ("getattr", "setattr", "delattr"):
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Name) and first.id in NARROW:
            yield f"{_called(node)}({first.id}, ...)"


def _called(node: ast.Call) -> str:
    target = node.func
    if isinstance(target, ast.Attribute):
        return target.attr
    return target.id if isinstance(target, ast.Name) else ""


def _names_exist(edit: Edit) -> Iterator[str]:
    for path in edit.changed:
        for name in undefined(edit.new[path]):
            line = _first_use(edit.new[path], name)
            yield f"{path} line {line} uses {name}, which is defined nowhere: define or import it."


def undefined(text: str) -> list[str]:
    """Names that some scope of the module reads and nothing defines, in order of the alphabet."""
    top = symtable.symtable(text, "program", "exec")
    tables = [top]
    for table in tables:
        tables.extend(table.get_children())
    defined = {*dir(builtins), "__file__", "__name__", "__doc__", "__builtins__", "__class__"}
    read = set()
    for table in tables:
        for symbol in table.get_symbols():
            at_top = table is top or symbol.is_declared_global()
            if at_top and (symbol.is_assigned() or symbol.is_imported()):
                defined.add(symbol.get_name())
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                read.add(symbol.get_name())
    return sorted(read - defined)


def _first_use(text: str, name: str) -> int:
    uses = [
        node.lineno
        for node in ast.walk(constants.parse(text))
        if isinstance(node, ast.Name) and node.id == name
    ]
    return min(uses, default=0)


def _keeps_the_protocol(edit: Edit) -> Iterator[str]:
    for path in edit.changed:
        for name in ("make_dataloader", "evaluate_bpb"):
            if _uses(edit.old[path], name) and not _uses(edit.new[path], name):
                yield (
                    f"{path} does not call {name} from prepare any more: a run trains on what "
                    f"make_dataloader yields and ends with evaluate_bpb, else it has no score."
                )


def _uses(text: str, name: str) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == name
        for node in ast.walk(_parse(text) or ast.Module([], []))
    )


def _keeps_the_seed(edit: Edit) -> Iterator[str]:
    advice = "The controller sets the seed of each run: seed with SEED from prepare, as it was."
    for path in edit.changed:
        if not _imports_seed(edit.old[path]):
            continue
        if not _imports_seed(edit.new[path]):
            yield f"{path} does not import SEED from prepare any more. {advice}"
        tree = constants.parse(edit.new[path])
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            where = f"{path} line {getattr(node, 'lineno', 0)}"
            if _binds_seed(node):
                yield f"{where} gives SEED a value of its own. {advice}"
            if isinstance(node, ast.Call) and _called(node) in SEEDERS and not _by_seed(node):
                yield f"{where} seeds with something else than SEED. {advice}"
            if _names_seeder(node) and id(node) not in called:
                yield f"{where} gives a function that seeds another name. {advice}"
        if _seeds(edit.old[path]) and not _seeds(edit.new[path]):
            yield f"{path} does not seed with SEED any more. {advice}"


def _imports_seed(text: str) -> bool:
    return any(map(_is_import_of_seed, ast.walk(_parse(text) or ast.Module([], []))))


def _is_import_of_seed(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.ImportFrom)
        and node.module == "prepare"
        and any(alias.name == "SEED" and alias.asname is None for alias in node.names)
    )


def _binds_seed(node: ast.AST) -> bool:
    """Whether it is another SEED: a variable, an argument, a function, an import, a handler's."""
    if isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        return name == "SEED" and not isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.asname or alias.name for alias in node.names]
        return "SEED" in names and not _is_import_of_seed(node)
    if isinstance(node, ast.keyword | ast.alias):
        return False
    return "SEED" in [getattr(node, name, None) for name in ("arg", "name", "rest")]


def _names_seeder(node: ast.AST) -> bool:
    if isinstance(node, ast.alias):
        return node.asname is not None and node.name in SEEDERS
    if isinstance(node, ast.Attribute):
        return node.attr in SEEDERS
    return isinstance(node, ast.Name) and node.id in SEEDERS


def _by_seed(call: ast.Call) -> bool:
    """Whether SEED alone is handed over: SEED + 95 is another seed."""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [ast.unparse(value) for value in given] == ["SEED"]


def _seeds(text: str) -> bool:
    return any(
        isinstance(node, ast.Call) and _called(node) in SEEDERS and _by_seed(node)
        for node in ast.walk(_parse(text) or ast.Module([], []))
    )


def _changes_what_it_may(edit: Edit) -> Iterator[str]:
    allowed = set(edit.limits.may_change)
    if not allowed:
        return
    for path in edit.changed:
        before = constants.pieces(edit.old[path], edit.scale)
        after = constants.pieces(edit.new[path], edit.scale)
        names = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        for name in sorted(names - allowed):
            yield (
                f"{path}: {name} may not be changed. program.md's may_change allows "
                f"{', '.join(sorted(allowed))}; keep the change within these."
            )


def _adds_few_lines(edit: Edit) -> Iterator[str]:
    most = edit.limits.max_lines
    added = sum(line_counts(edit.old[path], text)[0] for path, text in edit.new.items())
    if most is not None and added > most:
        yield (
            f"the edit adds {added} lines; program.md's max_lines allows {most}. "
            f"Find the smaller form of the idea."
        )


def line_counts(old: str, new: str) -> tuple[int, int]:
    """(lines added, lines removed) between two texts, as `git diff --numstat` counts them."""
    added = removed = 0
    before, after = old.splitlines(), new.splitlines()
    for _ in ("head", "tail"):  # what is common there need not be matched: as git does, too
        pairs = enumerate(zip(before, after, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
        before, after = before[same:][::-1], after[same:][::-1]
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, end, new_start, new_end in matcher.get_opcodes():
        if kind != "equal":
            removed += end - start
            added += new_end - new_start
    return added, removed


def _was_not_tried(edit: Edit) -> Iterator[str]:
    mark = fingerprint({**edit.old, **edit.new})
    if mark == fingerprint(edit.old):
        yield "only comments or layout changed: the program is the same. Change what it does."
    if mark in edit.known:
        yield (
            f"this is exactly the program of {edit.known[mark]} (comments and layout aside). "
            f"Read what came of it (read_experiment) and propose something else."
        )


RULES: tuple[Rule, ...] = (
    _only_editable_files,
    _is_text,
    _changes_something,
    _parses,
    _imports_what_is_there,
    _starts_nothing,
    _names_exist,
    _keeps_the_protocol,
    _keeps_the_seed,
    _changes_what_it_may,
    _adds_few_lines,
    _was_not_tried,
)
