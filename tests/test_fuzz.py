"""No input of a user ends in a traceback: some cases of each command by the fuzz of tests/support/fuzz.py, the same
ones each time.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from studies import SyntheticStudy

from rafce_ray.cli.bundle import main as bundle_command

pytestmark = pytest.mark.slow

NUM_CASES = 4 * len(fuzz.COMMANDS)


@pytest.fixture(scope="module")
def world(tmp_path_factory, drawn_faces, trained_run, write_bundle) -> Path:
    """What the commands name, as far as no Ray is needed to make it."""
    world = tmp_path_factory.mktemp("fuzz") / "world"
    shutil.copytree(drawn_faces, world / "faces")
    fuzz.write_files(
        world, ["model.backbone=mobilenet_v3_small", "model.weights=none", "model.image_px=32", "optim.epochs=2"]
    )
    run = world / "runs" / "tiny"
    shutil.copytree(trained_run[0], run)
    # The copy alone is the run that the commands work on.
    for file in (run / name for name in ("config.yaml", "provenance.json", "result.json")):
        file.write_text(file.read_text().replace(str(trained_run[0].parent), "runs"))
    study = SyntheticStudy(world / "runs" / "study")
    for number, lr in enumerate((1e-3, 1e-4)):
        study.add(number, {"optim.lr": lr}, [(0.2, 0.3), (0.3, 0.4)])
    shutil.copytree(world / "runs" / "tiny" / "bundle", world / "bundle")
    for seed, version in enumerate(("first", "second")):
        bundle = write_bundle(world.parent / version, seed=seed)
        assert bundle_command(["add", str(world / "registry"), str(bundle), "--as", version]) == 0
    (world / "keys.json").write_text('{"keys": []}')
    return world


def test_no_case_ends_in_a_traceback_or_hangs(world, trained_run):
    argv = [sys.executable, fuzz.__file__, "--world", str(world), "--cases", str(NUM_CASES), "--seed", "7"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NUM_CASES} cases of seed 7" in done.stdout
    assert (trained_run[0] / "result.json").exists()


def test_a_command_as_it_stands_is_no_fault_and_a_traceback_is_one(world, tmp_path, monkeypatch):
    argv = [sys.executable, fuzz.__file__, "--world", str(world), "--cases", "1", "--verbs", "doctor"]
    program = tmp_path / "broken.py"
    program.write_text(
        "import runpy, sys\nimport rafce_ray.cli.doctor as command\n"
        "def main(argv):\n    raise KeyError('a fault')\n"
        f"command.main = main\nsys.argv = {argv[1:]!r}\nrunpy.run_path({fuzz.__file__!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "KeyError: 'a fault'" in done.stdout
    assert "faults: 1" in done.stdout
