"""Runs the tests tier by tier and prints one table: ``python tests/support/tiers.py [TIER ...] [PYTEST OPTION ...]``.

``make test`` calls it. Exit code 1 if a test failed. With ``--nothing-skipped``, which CI sets, also if a test was
skipped for another reason than a missing GPU or missing photographs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from xml.etree import ElementTree

from needs import MAY_BE_MISSING, NEEDS, missing_packages

REPOSITORY = Path(__file__).parents[2]
NUM_SLOWEST = 10
NOTHING_SELECTED, INTERRUPTED = 5, 130
"""pytest's exit code where it selected no test, and this program's after Ctrl-C."""

IN_TWO_PROCESSES = ("--numprocesses=2", "--dist=worksteal")
A_FILE_A_PROCESS = ("--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder")
"""Tests of a file share what they start. The order is that of ``RAY_FILES_BY_SECONDS`` in ``conftest.py``."""

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Tiny networks are slower on several threads, and two processes that both use all cores crawl."""

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "RAFCE_TEST_FAST_BF16": "0"}
AVX512_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "RAFCE_TEST_FAST_BF16": "1"}
"""Limits of oneDNN and PyTorch: they use no newer instructions. The last variable is read by ``conftest.py``."""

NOT_ON_AVX2 = ("--deselect=tests/inference/test_build.py::test_bf16_is_used_or_told",)
"""OpenVINO ignores these limits, and crashes if oneDNN then has no bf16 kernels.

The test passes on CPUs that really have AVX2 alone.
"""

NUMERIC = "numeric and not slow and not ray"


@dataclass(frozen=True)
class Tier:
    """One run of pytest: ``chosen`` is its ``-m``, ``variables`` are set over the environment."""

    title: str
    chosen: str
    options: tuple[str, ...] = IN_TWO_PROCESSES
    variables: dict[str, str] = field(default_factory=lambda: ONE_THREAD)


TIERS = {
    "fast": Tier("without Ray, about a second each or less", "not ray and not slow and not long"),
    "slow": Tier("without Ray, some seconds each", "slow and not ray and not long"),
    "avx2": Tier("numeric tests with AVX2 alone", NUMERIC, (*IN_TWO_PROCESSES, *NOT_ON_AVX2), ONE_THREAD | AVX2),
    "avx512-bf16": Tier("numeric tests with AVX512-BF16 and no AMX", NUMERIC, variables=ONE_THREAD | AVX512_BF16),
    "ray": Tier("on Ray", "ray and not long", A_FILE_A_PROCESS, {}),
    "long": Tier("minutes each", "long", (), {}),
}
EVERY_CHANGE = tuple(name for name in TIERS if name != "long")


@dataclass
class Outcome:
    """What a tier's run gave. ``seconds`` is its wall time, ``tests`` the seconds of each test with its fixtures."""

    exit_code: int
    seconds: float
    tests: dict[str, float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)


def run(name: str, more: Sequence[str]) -> Outcome:
    """Run one tier's tests; their output goes where this program's goes."""
    tier = TIERS[name]
    print(f"\n== {name}: {tier.title}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        argv = [sys.executable, "-m", "pytest", "-m", tier.chosen, f"--junitxml={report}", *tier.options, *more]
        since = time.monotonic()
        # Compiled tests are kept whatever the environment says: compiling them again takes as long as importing torch.
        variables = os.environ | {"PYTHONDONTWRITEBYTECODE": ""} | tier.variables
        code = wait_for(subprocess.Popen(argv, cwd=REPOSITORY, env=variables))
        outcome = Outcome(code, time.monotonic() - since)
        if report.exists():
            read_report(report, outcome)
    return outcome


def wait_for(pytest: subprocess.Popen[bytes]) -> int:
    """The exit code.

    Ctrl-C reaches pytest too, which then ends what its tests have started; a second Ctrl-C kills it.
    """
    try:
        return pytest.wait()
    except KeyboardInterrupt:
        try:
            pytest.wait()
        except KeyboardInterrupt:
            pytest.kill()
            pytest.wait()
        return INTERRUPTED


def read_report(report: Path, outcome: Outcome) -> None:
    """Add what pytest's JUnit file says."""
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome.tests[name] = outcome.tests.get(name, 0.0) + float(case.get("time", 0))
        skipped = case.find("skipped")
        if skipped is not None and skipped.get("type") != "pytest.xfail":
            outcome.skipped.append((name, skipped.get("message", "")))
        if any(case.find(kind) is not None for kind in ("failure", "error")):
            outcome.failed.add(name)


def table(outcomes: dict[str, Outcome]) -> str:
    """Tiers with their tests and seconds, and the slowest tests of all."""
    rows = [(name, len(one.tests), len(one.failed), len(one.skipped), one.seconds) for name, one in outcomes.items()]
    rows.append(("together", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))))
    lines = [f"{'tier':<13}{'tests':>7}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    lines += [f"{name:<13}{tests:>7}{failed:>8}{skipped:>9}{s:>9.0f}" for name, tests, failed, skipped, s in rows]
    lines += ["", f"the {NUM_SLOWEST} slowest, in seconds with what they set up"]
    every = [(seconds, tier, test) for tier, one in outcomes.items() for test, seconds in one.tests.items()]
    lines += [f"{seconds:>7.1f}  {tier}: {test}" for seconds, tier, test in sorted(every, reverse=True)[:NUM_SLOWEST]]
    return "\n".join(lines)


def not_tested(outcomes: dict[str, Outcome]) -> list[str]:
    """A line for each reason for which tests were skipped."""
    reasons = Counter(reason for one in outcomes.values() for _, reason in one.skipped)
    return [f"{number} test{'s' if number > 1 else ''} skipped: {reason}" for reason, number in sorted(reasons.items())]


def forbidden_skips(outcomes: dict[str, Outcome]) -> list[str]:
    """Tests that were skipped though CI could have run them."""
    allowed = {NEEDS[name].reason for name in MAY_BE_MISSING}
    return [test for one in outcomes.values() for test, reason in one.skipped if reason not in allowed]


def faults_of(outcomes: dict[str, Outcome], *, selected: bool, nothing_skipped: bool) -> list[str]:
    """Why the run is red, a line each; empty: it is green. ``selected``: only a part of the tests was asked for."""
    found = []
    for name, one in outcomes.items():
        found += [f"{name}: {test}" for test in sorted(one.failed)]
        if one.exit_code == INTERRUPTED:
            found.append(f"{name}: interrupted")
        elif one.exit_code == NOTHING_SELECTED:
            found += (
                []
                if selected and any(other.tests for other in outcomes.values())
                else [f"{name}: no test was selected"]
            )
        elif one.exit_code and not one.failed:
            found.append(f"{name}: pytest ended with code {one.exit_code}")
    if nothing_skipped:
        found += [f"{test}: must not be skipped here" for test in forbidden_skips(outcomes)]
    return found


def main(argv: Sequence[str]) -> int:
    """Run the tiers named, or those of every change."""
    if not argv[1:] and argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nTiers: {', '.join(TIERS)}, or all; without one, all but long.")
        return 0
    if find_spec("pytest") is None:
        print("pytest is not installed for this Python. Run: make install && . .venv/bin/activate", file=sys.stderr)
        return 2
    nothing_skipped = "--nothing-skipped" in argv
    words = [word for word in argv if word != "--nothing-skipped"]
    # A file or a test is pytest's, as every option and what follows it.
    names = list(takewhile(lambda word: not word.startswith("-") and not {"/", ".", ":"} & set(word), words))
    more = words[len(names) :]
    if names == ["all"]:
        names = list(TIERS)
    if unknown := [name for name in names if name not in TIERS]:
        print(f"no such tier: {', '.join(unknown)}; there are {', '.join(TIERS)}", file=sys.stderr)
        return 2
    outcomes: dict[str, Outcome] = {}
    for name in dict.fromkeys(names or EVERY_CHANGE):
        outcomes[name] = run(name, more)
        if outcomes[name].exit_code == INTERRUPTED:
            break

    print(f"\n{table(outcomes)}\n")
    if lines := not_tested(outcomes):
        print("\n".join(lines))
        if packages := missing_packages():
            print(f"To test these parts too: apt-get install {' '.join(packages)}")
        print()
    faults = faults_of(outcomes, selected=bool(more), nothing_skipped=nothing_skipped)
    if faults:
        print("failed:", *faults, "", sep="\n")
    num_failed, num_skipped = (sum(len(one) for one in lists) for lists in zip(
        *((one.failed, one.skipped) for one in outcomes.values()), strict=True
    ))  # fmt: skip
    num_passed = sum(len(one.tests) for one in outcomes.values()) - num_failed - num_skipped
    print(f"{num_passed} passed, {num_failed} failed, {num_skipped} skipped")
    if any(one.exit_code == INTERRUPTED for one in outcomes.values()):
        return INTERRUPTED
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
