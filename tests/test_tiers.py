"""The test runner: every test is in one tier, what failed or was skipped is counted, and CI lets nothing be skipped
that it could run.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import tiers
from needs import NEEDS
from tiers import (
    EVERY_CHANGE,
    INTERRUPTED,
    NOTHING_SELECTED,
    TIERS,
    Outcome,
    faults_of,
    forbidden_skips,
    main,
    not_tested,
    read_report,
    table,
)

GPU, CHROMIUM = NEEDS["gpu"].reason, NEEDS["chromium"].reason

REPORT = f"""<testsuites><testsuite>
<testcase classname="tests.a" name="good" time="1.5"/>
<testcase classname="tests.a" name="bad" time="0.25"><failure message="no">text</failure></testcase>
<testcase classname="tests.a" name="bad" time="0.25"><error message="its teardown fails too">text</error></testcase>
<testcase classname="tests.a" name="worse" time="0.5"><error message="no">text</error></testcase>
<testcase classname="tests.a" name="known" time="0"><skipped type="pytest.xfail" message="">a.py:1</skipped></testcase>
<testcase classname="tests.b" name="gpu" time="0">
<skipped type="pytest.skip" message="{GPU}">b.py:1</skipped></testcase>
<testcase classname="tests.b" name="page" time="0">
<skipped type="pytest.skip" message="{CHROMIUM}">b.py:2</skipped></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    file = tmp_path / "report.xml"
    file.write_text(REPORT)
    found = Outcome(1, 12.0)
    read_report(file, found)
    return found


def test_every_test_is_in_exactly_one_tier():
    """The tiers of other instruction sets run some of them once more."""
    whole = [tier.chosen for name, tier in TIERS.items() if name not in ("avx2", "avx512-bf16")]
    for ray, slow, long in product((False, True), repeat=3):
        marks = {"ray": ray, "slow": slow, "long": long}
        assert sum(eval(chosen, {}, marks) for chosen in whole) == 1, marks
    assert set(TIERS) - set(EVERY_CHANGE) == {"long"}


def test_a_report_is_counted(outcome):
    assert outcome.tests == {
        "tests.a::good": 1.5,
        "tests.a::bad": 0.5,
        "tests.a::worse": 0.5,
        "tests.a::known": 0.0,
        "tests.b::gpu": 0.0,
        "tests.b::page": 0.0,
    }
    assert (outcome.failed, len(outcome.skipped)) == ({"tests.a::bad", "tests.a::worse"}, 2)
    lines = table({"fast": outcome, "slow": Outcome(0, 3.0, {"tests.c::x": 2.0})}).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["fast", "6", "2", "2", "12"],
        ["slow", "1", "0", "0", "3"],
        ["together", "7", "2", "2", "15"],
    ]
    assert lines[6].split() == ["2.0", "slow:", "tests.c::x"]


def test_ci_allows_a_missing_gpu_alone(outcome):
    assert forbidden_skips({"fast": outcome}) == ["tests.b::page"]
    assert not_tested({"fast": outcome}) == [f"1 test skipped: {CHROMIUM}", f"1 test skipped: {GPU}"]
    assert "apt-get install chromium" in CHROMIUM


@pytest.mark.parametrize(
    ("exit_code", "faults"),
    [(0, []), (4, ["fast: pytest ended with code 4"]), (INTERRUPTED, ["fast: interrupted"])],
)
def test_what_makes_a_run_red_is_named(exit_code, faults, outcome):
    outcomes = {"fast": Outcome(exit_code, 1.0, {"tests.a::good": 1.0})}
    assert faults_of(outcomes, selected=False, nothing_skipped=True) == faults
    red = faults_of({"slow": outcome}, selected=False, nothing_skipped=True)
    assert red == ["slow: tests.a::bad", "slow: tests.a::worse", "tests.b::page: must not be skipped here"]


def test_a_tier_without_a_selected_test_is_red_only_where_no_tier_has_one():
    empty, full = Outcome(NOTHING_SELECTED, 1.0), Outcome(0, 1.0, {"tests.a::good": 1.0})
    assert faults_of({"fast": empty, "slow": full}, selected=True, nothing_skipped=False) == []
    assert faults_of({"fast": empty}, selected=True, nothing_skipped=False) == ["fast: no test was selected"]
    assert faults_of({"fast": empty, "slow": full}, selected=False, nothing_skipped=False) == [
        "fast: no test was selected"
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list]]:
    """``asked(*words)``: the exit code, and the tiers that were run with what was handed to pytest."""
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(tiers, "run", lambda name, more: seen.append((name, more)) or Outcome(0, 1.0, {name: 1.0}))
    return lambda *words: (main(list(words)), seen)


@pytest.mark.parametrize(
    ("words", "run"),
    [
        ((), [(name, []) for name in EVERY_CHANGE]),
        (("all", "--nothing-skipped"), [(name, []) for name in TIERS]),
        (("fast", "fast", "--nothing-skipped"), [("fast", [])]),
        (("fast", "-k", "slow"), [("fast", ["-k", "slow"])]),
        (("tests/test_tiers.py",), [(name, ["tests/test_tiers.py"]) for name in EVERY_CHANGE]),
        (("ray", "tests/test_train.py::test_x", "-x"), [("ray", ["tests/test_train.py::test_x", "-x"])]),
    ],
)
def test_tiers_come_first_and_the_rest_is_for_pytest(words, run, asked):
    assert asked(*words) == (0, run)


def test_an_unknown_tier_is_refused(asked, capsys):
    assert asked("quick") == (2, [])
    assert "no such tier: quick; there are fast" in capsys.readouterr().err


def test_ctrl_c_lets_pytest_end_what_its_tests_have_started(tmp_path: Path):
    """A stand-in for pytest that takes a moment to tear down."""
    program = f"""
import signal, subprocess, sys
sys.path.insert(0, {str(Path(tiers.__file__).parent)!r})
import tiers
# A shell starts programs in the background with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
slow_end = (
    "import sys, time\\ntry:\\n    print('ready', flush=True)\\n    while True: time.sleep(0.05)\\n"
    "finally:\\n    time.sleep(1); print('torn down', flush=True)"
)
print(tiers.wait_for(subprocess.Popen([sys.executable, "-c", slow_end])))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert said == f"torn down\n{INTERRUPTED}\n"
