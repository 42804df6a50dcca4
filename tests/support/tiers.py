"""Runs the tests tier by tier and prints one table: ``python tests/support/tiers.py [TIER ...]``; ``make test`` calls it.

Exit code 1 if a test failed. With ``--nothing-skipped``, which CI sets, also if a test was skipped for another reason than a missing
GPU or missing photographs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from needs import MAY_BE_MISSING, NEEDS, missing_packages

REPOSITORY = Path(__file__).parents[2]
NUM_SLOWEST = 10

IN_TWO_PROCESSES = ("--numprocesses=2", "--dist=worksteal")
A_FILE_A_PROCESS = ("--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder")
"""Tests of a file share what they start. The order is that of ``RAY_FILES_BY_SECONDS`` in ``conftest.py``."""

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Tiny networks are slower on several threads, and two processes that both use all cores crawl."""

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "RAFCE_TEST_FAST_BF16": "0"}
AVX512_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "RAFCE_TEST_FAST_BF16": "1"}
"""oneDNN's and PyTorch's own limits make this processor compute as a lesser one. The last variable is this suite's own (conftest.py)."""

NOT_ON_AVX2 = ("--deselect=tests/inference/test_build.py::test_bf16_is_used_or_told",)
"""OpenVINO goes by the processor itself when it is asked for bf16, and crashes where oneDNN then has no such kernels. Processors that
really lack them pass."""

NUMERIC = "numeric and not slow and not ray"


@dataclass(frozen=True)
class Tier:
    """One run of pytest: ``chosen`` is its ``-m``, ``variables`` are set over the environment."""

    title: str
    chosen: str
    options: tuple[str, ...] = IN_TWO_PROCESSES
    variables: dict[str, str] = field(default_factory=lambda: ONE_THREAD)


TIERS = {
    "fast": Tier("no Ray, less than a second each", "not ray and not slow and not long"),
    "slow": Tier("no Ray, some seconds each", "slow and not ray and not long"),
    "avx2": Tier("numeric tests as with AVX2 alone", NUMERIC, (*IN_TWO_PROCESSES, *NOT_ON_AVX2), ONE_THREAD | AVX2),
    "avx512-bf16": Tier("numeric tests as with AVX512-BF16 and no AMX", NUMERIC, variables=ONE_THREAD | AVX512_BF16),
    "ray": Tier("on Ray", "ray and not long", A_FILE_A_PROCESS, {}),
    "long": Tier("minutes each", "long", (), {}),
}
EVERY_CHANGE = ("fast", "slow", "avx2", "avx512-bf16", "ray")


@dataclass
class Outcome:
    """What a tier's run gave. ``seconds`` is its wall time, ``tests`` the seconds of each test with its fixtures."""

    exit_code: int
    seconds: float
    tests: dict[str, float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    num_failed: int = 0

    @property
    def is_good(self) -> bool:
        """Whether every test passed or was skipped, and one was there at all."""
        return self.exit_code == 0


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
        code = subprocess.run(argv, cwd=REPOSITORY, env=variables, check=False).returncode
        outcome = Outcome(code, time.monotonic() - since)
        if report.exists():
            read_report(report, outcome)
    return outcome


def read_report(report: Path, outcome: Outcome) -> None:
    """Add what pytest's JUnit file says."""
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome.tests[name] = outcome.tests.get(name, 0.0) + float(case.get("time", 0))
        if (skipped := case.find("skipped")) is not None:
            outcome.skipped.append((name, skipped.get("message", "")))
        outcome.num_failed += any(case.find(kind) is not None for kind in ("failure", "error"))


def table(outcomes: dict[str, Outcome]) -> str:
    """Tiers with their tests and seconds, and the slowest tests of all."""
    lines = [f"{'tier':<13}{'tests':>7}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for name, one in outcomes.items():
        lines.append(f"{name:<13}{len(one.tests):>7}{one.num_failed:>8}{len(one.skipped):>9}{one.seconds:>9.0f}")
    lines.append(f"{'together':<13}{sum(len(one.tests) for one in outcomes.values()):>7}"
                 f"{sum(one.num_failed for one in outcomes.values()):>8}"
                 f"{sum(len(one.skipped) for one in outcomes.values()):>9}"
                 f"{sum(one.seconds for one in outcomes.values()):>9.0f}")  # fmt: skip
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


def main(argv: Sequence[str]) -> int:
    """Run the tiers named, or those of every change."""
    parser = argparse.ArgumentParser(description="Run the tests tier by tier and print one table.")
    parser.add_argument("tiers", nargs="*", metavar="TIER", help=f"of {', '.join(TIERS)}; default: all but long")
    parser.add_argument("--nothing-skipped", action="store_true", help="fail if a test was skipped that CI could run")
    arguments, more = parser.parse_known_args(argv)
    names = arguments.tiers or EVERY_CHANGE
    if unknown := [name for name in names if name not in TIERS]:
        parser.error(f"no such tier: {', '.join(unknown)}; there are {', '.join(TIERS)}")
    outcomes = {name: run(name, more) for name in names}

    print(f"\n{table(outcomes)}\n")
    if lines := not_tested(outcomes):
        print("\n".join(lines))
        if packages := missing_packages():
            print(f"To test these parts too: apt-get install {' '.join(packages)}")
        print()
    forbidden = forbidden_skips(outcomes) if arguments.nothing_skipped else []
    if forbidden:
        print("These tests must not be skipped here:", *forbidden, "", sep="\n")
    num_failed = sum(one.num_failed for one in outcomes.values())
    num_skipped = sum(len(one.skipped) for one in outcomes.values())
    num_passed = sum(len(one.tests) for one in outcomes.values()) - num_failed - num_skipped
    broken = [name for name, one in outcomes.items() if not one.is_good]
    if broken:
        print(f"failed: {', '.join(broken)}")
    print(f"{num_passed} passed, {num_failed} failed, {num_skipped} skipped")
    return 1 if broken or forbidden else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
