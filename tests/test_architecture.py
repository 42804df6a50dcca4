"""What docs/design.md promises of the whole: the core runs without ray, and documents tell the truth.

import-linter holds the rest.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rafce_ray.cli import VERBS
from rafce_ray.config import recipe_names

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "rafce_ray"

MAY_IMPORT_RAY = {"serve", "train", "tune"}


def modules() -> list[str]:
    return [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]


@pytest.mark.slow
def test_the_core_and_its_benchmark_import_where_ray_is_not_installed():
    core = [name for name in modules() if name.split(".")[1] not in MAY_IMPORT_RAY]
    assert len(core) > 30
    program = "import sys, importlib\nsys.modules['ray'] = None\n" + "".join(
        f"importlib.import_module({name!r})\n" for name in core
    )
    program += f"import runpy\nrunpy.run_path({str(REPOSITORY / 'benchmarks' / 'train.py')!r}, run_name='imported')\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_importing_does_nothing_to_the_surroundings():
    # Environment variables of other libraries (scikit-learn sets some) are theirs.
    program = """
import logging, os, torch
def surroundings():
    ours = {key: value for key, value in os.environ.items() if key.startswith(("RAY", "RAFCE"))}
    return ours, torch.initial_seed(), torch.get_num_threads(), list(logging.getLogger().handlers), os.listdir()
before = surroundings()
import rafce_ray.train.launch, rafce_ray.bundle.model, rafce_ray.bundle.evaluate, rafce_ray.run.loop
assert surroundings() == before, (before, surroundings())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_verb_and_the_guide_every_recipe():
    readme, guide = (REPOSITORY / "README.md").read_text(), (REPOSITORY / "docs" / "train.md").read_text()
    assert [verb for verb in VERBS if f"rafce {verb}" not in readme] == []
    assert [recipe for recipe in recipe_names() if f"`{recipe}`" not in guide] == []


def room_of(name: str) -> str:
    return name.split(".")[1]


def picture() -> str:
    """Which room imports which, from the imports of all modules, also those inside functions; rooms in the order of
    import-linter.
    """
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in settings if one["id"] == "layers")
    rooms = [room for layer in reversed(layers) for room in reversed(layer.split(" | "))]
    arrows = set()
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        nodes = list(ast.walk(ast.parse(path.read_text())))
        checks = [node for node in nodes if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
        for_types = {inner for node in checks for inner in node.body}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node not in for_types:
                package, _, rest = f"{node.module}.".partition(".")
                targets = [rest.split(".")[0]] if rest else [one.name for one in node.names]
                arrows |= {(here, one) for one in targets if package == "rafce_ray" and path.name != "__main__.py"}
    lines = [" " * 12 + " ".join(rooms)]
    for room in rooms:
        cells = ["·" if room == other else "●" if (room, other) in arrows else " " for other in rooms]
        marks = " ".join(cell.center(len(other)) for cell, other in zip(cells, rooms, strict=True))
        lines.append(f"  {room:<10}{marks}".rstrip())
    return "\n".join(lines)


def test_the_design_shows_the_rooms_and_their_imports():
    design = (REPOSITORY / "docs" / "design.md").read_text()
    assert f"```\n{picture()}\n```" in design, picture()
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", design, re.MULTILINE)
    assert sorted(rows) == sorted({room_of(name) for name in modules()} - {"predict"})


def test_the_design_names_files_that_are_there():
    design = (REPOSITORY / "docs" / "design.md").read_text()
    ten = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|", design, re.MULTILINE)
    assert len(ten) == 10
    assert [name for name in ten if not (PACKAGE / name).exists()] == []
    flow = re.findall(
        r"\b((?:data|faces|model|metrics|run|bundle|service)\.(?!safetensors|json)[a-z_]+)\b",
        design.partition("How a face flows")[2].partition("## Decisions")[0],
    )
    assert [name for name in flow if f"rafce_ray.{name}" not in modules()] == []
