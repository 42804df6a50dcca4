"""How the package is cut: files and lines, who imports whom, circles, what touches Ray, and the CPU time of the command
line.

Source is read, not imported, so that any checkout can be measured. An import is *at the top* where loading the module
runs it; others are inside functions. Imports for type checkers alone, and modules named in strings (``rafce`` loads its
verbs so), are not counted. A room is a folder of the package or a top-level module; an arrow is a pair of rooms of
which one imports the other.

Run: python benchmarks/structure.py [CHECKOUT] [--json] [--no-times] [--out benchmarks/results/structure.json]
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "rafce_ray"
REPEATS = 3
ARRAY = re.compile(r"\b(NDArray|ndarray|ArrayLike|Tensor)\b")
AXIS = r"(?:\.\.\.|\d+|[A-Za-z]|[A-Z]\w*|num_\w+|\w+_px)(?: ?[*+-] ?\w+)?"
SHAPE = re.compile(rf"\({AXIS},(?: {AXIS},?)*\)|\b{AXIS} x {AXIS}\b|\bscalar\b")
"""``(B, 3, P, P)``, ``(N,)``, ``E x A`` or a scalar."""

NOT_RAYS = {"_replace", "_asdict", "_fields", "_make", "_exit"}
"""Public parts of Python whose names begin with an underscore."""


@dataclass
class Module:
    """What is read from one file; import sets hold modules of the package."""

    name: str
    file: str
    num_lines: int
    is_package: bool
    at_top: set[str] = field(default_factory=set)
    inside: set[str] = field(default_factory=set)
    imports_ray: bool = False
    private: set[str] = field(default_factory=set)
    without_shape: list[str] = field(default_factory=list)

    @property
    def room(self) -> str:
        """The folder or the top-level module; ``rafce_ray`` for the package's own file."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else parts[0]

    def imports(self, *, everywhere: bool) -> set[str]:
        """Modules imported at the top, or everywhere."""
        return self.at_top | self.inside if everywhere else self.at_top


def read_modules(checkout: Path) -> dict[str, Module]:
    """Every module of the package by its name."""
    trees: dict[str, ast.Module] = {}
    modules: dict[str, Module] = {}
    for path in sorted((checkout / PACKAGE).rglob("*.py")):
        parts = path.relative_to(checkout).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        text = path.read_text(encoding="utf-8")
        trees[name] = ast.parse(text)
        modules[name] = Module(name, str(path.relative_to(checkout)), len(text.splitlines()), is_package)
    for name, tree in trees.items():
        read_imports(modules[name], tree, modules)
        if modules[name].imports_ray:
            modules[name].private |= private_attributes(tree)
        modules[name].without_shape = list(without_shape(tree))
    return modules


def read_imports(module: Module, tree: ast.Module, modules: dict[str, Module]) -> None:
    """Note what the module imports, and where."""
    for node, is_inside in import_statements(tree):
        for found in full_names(node, module):
            if found == "ray" or found.startswith("ray."):
                module.imports_ray = True
                if any(part.startswith("_") for part in found.split(".")):
                    module.private.add(found)
                continue
            # ``from package import name``: a module of that name, else something in the package's own file.
            target = found if found in modules else found.rpartition(".")[0]
            if target in modules and target != module.name:
                (module.inside if is_inside else module.at_top).add(target)


def import_statements(tree: ast.AST, is_inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, and whether they are inside a function; those for type checkers are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, is_inside
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from import_statements(other, is_inside)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from import_statements(node, is_inside or is_function)


def full_names(node: ast.Import | ast.ImportFrom, module: Module) -> list[str]:
    """Dotted names that a statement imports, relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    source = node.module or ""
    if node.level:
        parts = module.name.split(".")
        base = parts[: len(parts) - node.level + module.is_package]
        source = ".".join([*base, source] if source else base)
    return [f"{source}.{alias.name}" for alias in node.names]


def names_defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, variables and attributes that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node: ast.expr) -> bool:
    """Whether an expression is ``self`` or ``cls``."""
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_attributes(tree: ast.AST) -> set[str]:
    """Underscored attributes that a file uses, by name or with ``getattr``, and does not define: Ray's, by pattern."""
    own, found = set(names_defined(tree)), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("getattr", "setattr")):
            found |= {one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return {
        f".{name}" for name in found if re.fullmatch(r"_[A-Za-z]\w*", name) and name not in own and name not in NOT_RAYS
    }


def without_shape(tree: ast.Module) -> Iterator[str]:
    """Public functions and methods that take or return arrays and whose docstring has no shape."""
    for holder, prefix in [(tree, ""), *((one, f"{one.name}.") for one in tree.body if is_public_class(one))]:
        for node in holder.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            hints = [one.annotation for one in arguments if one.annotation] + ([node.returns] if node.returns else [])
            of_arrays = any(ARRAY.search(ast.unparse(hint)) for hint in hints)
            if of_arrays and not SHAPE.search(ast.get_docstring(node) or ""):
                yield f"{prefix}{node.name}"


def is_public_class(node: ast.stmt) -> bool:
    """Whether a statement defines a class whose name has no underscore in front."""
    return isinstance(node, ast.ClassDef) and not node.name.startswith("_")


def circles(modules: dict[str, Module], *, everywhere: bool) -> list[list[str]]:
    """Sets of modules that import each other, directly or through others: strongly connected components (Tarjan),
    largest first.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(modules[name].imports(everywhere=everywhere)):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            start = stack.index(name)
            found.append(sorted(stack[start:]))
            del stack[start:]

    sys.setrecursionlimit(10_000)
    for name in modules:
        if name not in index:
            visit(name)
    return sorted((one for one in found if len(one) > 1), key=lambda one: (-len(one), one))


def measure(checkout: Path) -> dict[str, Any]:
    """Everything that the source tells."""
    modules = read_modules(checkout)
    importers: dict[str, set[str]] = defaultdict(set)
    for module in modules.values():
        for other in module.imports(everywhere=True):
            importers[other].add(module.name)
    files = [one for one in modules.values() if not one.is_package and not one.name.endswith("__main__")]
    arrows = {
        everywhere: {
            f"{module.room} -> {modules[other].room}"
            for module in modules.values()
            for other in module.imports(everywhere=everywhere)
            if module.room != modules[other].room and PACKAGE not in (module.room, modules[other].room)
        }
        for everywhere in (False, True)
    }
    num_lines = sum(one.num_lines for one in modules.values())
    return {
        "files": len(modules),
        "lines": num_lines,
        "mean_lines": round(num_lines / len(modules)),
        "top_modules": sorted(one.name for one in files if one.name.count(".") == 1),
        "at_most_one_importer": sorted(one.name for one in files if len(importers[one.name]) <= 1),
        "circles_top_level": circles(modules, everywhere=False),
        "circles_with_functions": circles(modules, everywhere=True),
        "rooms": sorted({one.room for one in modules.values()} - {PACKAGE}),
        "arrows_top_level": sorted(arrows[False]),
        "arrows_with_functions": sorted(arrows[True]),
        "import_ray": sorted(one.name for one in modules.values() if one.imports_ray),
        "ray_private": {one.name: sorted(one.private) for one in modules.values() if one.private},
        "arrays_without_shape": sorted(f"{one.name}.{name}" for one in modules.values() for name in one.without_shape),
    }


def measure_times(checkout: Path) -> dict[str, dict[str, float]]:
    """CPU seconds, user and system, and exit code of commands that should load little: the fastest of three."""
    entry = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["scripts"]["rafce"]
    module, function = entry.split(":")
    program = [sys.executable, "-c", f"import sys; from {module} import {function} as main; sys.exit(main())"]
    dropped = ("PYTHONDONTWRITEBYTECODE", "RAY_ADDRESS")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {"PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as elsewhere:
        where: dict[str, Any] = {"env": environment, "cwd": elsewhere}
        usage = subprocess.run([*program, "--help"], **where, capture_output=True, text=True, check=True).stdout
        verbs = re.findall(r"^  ([a-z]+)  ", usage, re.MULTILINE)
        commands = [["--version"], ["no-such-verb"]]
        commands += [[verb, "--help"] for verb in verbs] + [[verb, "--no-such-option"] for verb in verbs]
        results = {}
        for command in commands:
            runs = [cpu_seconds([*program, *command], where) for _ in range(REPEATS)]
            results[" ".join(command)] = {"cpu_s": round(min(runs)[0], 2), "exit_code": runs[0][1]}
    return results


def cpu_seconds(command: Sequence[str], where: dict[str, Any]) -> tuple[float, int]:
    """User and system seconds of a process and its children, and its exit code."""
    process = subprocess.Popen(command, **where, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, process.returncode


def show(figures: dict[str, Any]) -> None:
    """All of it as text."""
    print(f"{figures['files']} Python files, {figures['lines']:,} lines, {figures['mean_lines']} a file on average")
    print(f"{len(figures['top_modules'])} top-level modules: {short(figures['top_modules'])}")
    few = figures["at_most_one_importer"]
    print(f"{len(few)} modules with at most one importer: {short(few)}")
    for key, what in (
        ("circles_top_level", "at the top of modules"),
        ("circles_with_functions", "with those in functions"),
    ):
        print(f"{len(figures[key])} circles of imports {what}")
        for circle in figures[key]:
            print(f"  {len(circle)}: {short(circle)}")
    print(
        f"{len(figures['rooms'])} rooms, {len(figures['arrows_top_level'])} arrows between them by imports at the top, "
        f"{len(figures['arrows_with_functions'])} with those in functions"
    )
    print(f"{len(figures['import_ray'])} modules import ray: {short(figures['import_ray'])}")
    print(f"{len(figures['ray_private'])} of them use private parts of Ray")
    for name, parts in figures["ray_private"].items():
        print(f"  {short([name])}: {', '.join(parts)}")
    lacking = figures["arrays_without_shape"]
    print(f"{len(lacking)} public functions of arrays whose docstring has no shape: {short(lacking)}")
    if times := figures.get("times"):
        print(f"CPU seconds, the fastest of {REPEATS}, and exit code")
        for command, one in times.items():
            print(f"  {one['cpu_s']:5.2f}  {one['exit_code']}  rafce {command}")


def short(names: Sequence[str]) -> str:
    """Names without the package's."""
    return ", ".join(name.removeprefix(f"{PACKAGE}.") for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1], help="default: this one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-times", action="store_true", help="run no command: read the source only")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    if not (checkout / PACKAGE).is_dir():
        parser.error(f"{checkout} has no folder {PACKAGE}: name a checkout of this repository.")
    figures = measure(checkout)
    if not arguments.no_times:
        figures["times"] = measure_times(checkout)
    text = json.dumps(figures, indent=1)
    print(text) if arguments.json else show(figures)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
