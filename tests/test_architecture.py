"""What docs/design.md promises of the whole: who imports ray, that the core runs without it, that documents tell the truth."""

import re
import subprocess
import sys
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


def test_the_design_names_every_module():
    design = (REPOSITORY / "docs" / "design.md").read_text()
    missing = [
        name for name in modules() if name.count(".") == 1 and not re.search(rf"\b{name.split('.')[1]}\b", design)
    ]
    assert missing == []
