import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rafce_ray import __version__
from rafce_ray.base.console import command, finite, progress_bar, to_json
from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.cli import VERBS, main


def test_the_version_and_the_verbs_are_shown(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"rafce_ray {__version__}"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("data", "train", "evaluate", "predict"))


def test_an_unknown_verb_is_a_usage_error_with_the_nearest_one(capsys):
    assert main(["trian"]) == 2
    assert "rafce: unknown verb 'trian'; did you mean 'train'?\n" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "rafce: unknown verb 'xyzzy'\n" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "wrong", "meant"), [("data", "adit", "audit"), ("bundle", "promte", "promote")])
def test_an_unknown_verb_of_a_verb_is_a_usage_error_with_the_nearest_one(verb, wrong, meant, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, wrong, "here"])
    assert exit_.value.code == 2
    assert f"rafce {verb}: error: unknown verb {wrong!r}; did you mean {meant!r}?" in capsys.readouterr().err


HEAVY = (
    "torch",
    "ray",
    "numpy",
    "scipy",
    "pyarrow",
    "cv2",
    "sklearn",
    "PIL",
    "matplotlib",
    "optuna",
    "starlette",
    "rich",
    "pydantic",
)

USAGES = """
import contextlib, io, json, sys
from rafce_ray.cli import VERBS, main

def run(*argv):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(list(argv))
        except SystemExit as error:
            code = error.code
    return [argv, code, [name for name in HEAVY if name in sys.modules]]

more = [["train", "--recipe"], ["evaluate", "--split", "x"], ["report"], ["data", "adit"], ["bundle", "promte"]]
more += [["bundle", "list"]]
done = [run("--version"), run("trian")]
done += [run(verb, "--help") for verb in VERBS] + [run(verb, "--xyzzy") for verb in VERBS]
done += [run(*argv) for argv in more]
print(json.dumps(done))
"""


def test_usages_and_usage_errors_import_nothing_heavy():
    program = f"HEAVY = {HEAVY}\n{USAGES}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert len(told) == 2 + 2 * len(VERBS) + 6
    for argv, code, imported in told:
        assert imported == [], argv
        assert code == (0 if argv[-1] in ("--help", "--version") else 2), argv


@pytest.mark.slow
def test_a_mistake_in_a_configuration_is_found_before_torch_is_imported(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: [")
    program = """
import sys
from rafce_ray.cli import main
assert main(sys.argv[1:]) == 2
assert not {"torch", "ray", "cv2", "sklearn"} & sys.modules.keys()
"""
    for argv in (["train", "optim.lr=x"], ["train", "--config", str(file)], ["tune", "--config", str(file)]):
        done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("error: ")


def test_what_help_says_is_what_the_library_has(capsys):
    """Choices and defaults are written down in ``cli`` again, so that help does not import the library."""
    from rafce_ray.bundle.evaluate import EVALUATION_BATCH
    from rafce_ray.bundle.export import FORMATS
    from rafce_ray.cli import arguments, export
    from rafce_ray.config import recipe_names
    from rafce_ray.data.records import SPLITS
    from rafce_ray.data.split import FRACTIONS
    from rafce_ray.registry.promotion import Rules
    from rafce_ray.report.data import SPLITS_OF
    from rafce_ray.report.page import REPORT_FILE
    from rafce_ray.run.replay import MAY_MOVE, TOLERANCES
    from rafce_ray.study.listing import STATUSES

    def shown(*argv: str) -> str:
        with pytest.raises(SystemExit):
            main([*argv, "--help"])
        return " ".join(capsys.readouterr().out.split())

    assert (SPLITS, tuple(FORMATS), recipe_names()) == (arguments.SPLITS, export.FORMATS, arguments.recipe_names())
    assert f"(default {EVALUATION_BATCH})" in shown("evaluate")
    assert f"(default {','.join(f'{one:g}' for one in FRACTIONS)})" in shown("data", "split")
    assert f"(default {Rules.max_latency_ratio})" in shown("bundle", "promote")
    assert f"(default {TOLERANCES['cpu']:g}; {TOLERANCES['cuda']:g} on a GPU" in shown("replay")
    assert ", ".join(MAY_MOVE) in shown("replay")
    assert "{" + ",".join(SPLITS_OF) + "}" in shown("report")
    assert f"(default: {REPORT_FILE} in" in shown("report")
    assert ", ".join(STATUSES) in shown("trials")


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    assert f"rafce {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(GateError("no"), 3), (UsageError("what"), 2), (KeyboardInterrupt(), 130)])
def test_errors_become_exit_codes_without_a_traceback(error, code, capsys):
    def body(_: list[str]) -> int:
        raise error

    assert command(body)([]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_place_that_cannot_be_used_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    def body(places: list[str]) -> int:
        return len(Path(places[0]).read_text())

    for place, reason in (("x" * 300, "name too long"), ("", "Is a directory"), ("file/x", "Not a directory")):
        assert command(body)([str(tmp_path / place)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / place}: ")
        assert reason in line
    assert command(body)([str(tmp_path / "missing")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'missing'}: No such file or directory. ")


def test_a_place_whose_name_is_not_utf8_is_told_in_a_line(capsys):
    def body(_: list[str]) -> int:
        return len("/home/caf\udce9/stores".encode())

    assert command(body)([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(r"error: /home/caf\udce9/stores: its name is not UTF-8. ")


def test_a_terminal_of_any_width_and_alphabet_is_written_to(tmp_path):
    program = "from rafce_ray.cli import main; raise SystemExit(main(['data', 'audit', 'caf\u00e9']))"
    environment = os.environ | {"COLUMNS": "9" * 20, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert r"caf\xe9" in done.stderr


def test_a_full_disk_is_told_in_a_line(capsys):
    def body(_: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/new/metrics.jsonl")

    assert command(body)([]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: /runs/new/metrics.jsonl: No space left on device. Free some space, then give the same command again."
    ]


def test_a_reader_of_standard_output_that_goes_away_ends_a_command_quietly():
    body = (
        "import itertools, rafce_ray.base.console as c; c.command(lambda _: any(map(c.print_json, "
        "itertools.repeat({}))))([])"
    )
    with subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],
        ["trials"],
        ["report"],
        ["data", "audit"],
        ["data", "synthesize", "--num-images", "20", "--out"],
        ["evaluate", "--bundle"],
        ["tune", "--config"],
    ],
)
def test_a_name_that_no_file_can_have_is_told_in_a_line(arguments, capsys):
    assert main([*arguments, "x" * 300]) in (1, 2)
    assert "name too long" in capsys.readouterr().err.splitlines()[-1].lower()


def test_json_knows_no_nan():
    assert finite({"a": [float("nan"), 1.0], "b": (float("inf"),)}) == {"a": [None, 1.0], "b": [None]}
    assert to_json({"f1": float("nan")}) == '{"f1": null}'


def test_progress_without_a_terminal_is_a_line_a_tenth_with_rate_and_time_left(monkeypatch, capsys):
    """Four items each quarter of a second; a rate is told after a second."""
    clock = itertools.count(100, 0.25)
    monkeypatch.setattr("rafce_ray.base.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress_bar("reading", 40) as advance:
        for _ in range(10):
            advance(4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:5] == [
        "reading: 4/40",
        "reading: 8/40",
        "reading: 12/40",
        "reading: 16/40, 16.0/s, 0:00:02 left",
        "reading: 20/40, 16.0/s, 0:00:01 left",
    ]
    assert (len(lines), lines[-1]) == (10, "reading: 40/40, 16.0/s, 0:00:00 left")
