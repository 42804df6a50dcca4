"""The test runner: every test is in one tier, what failed or was skipped is counted, and CI lets nothing be skipped that it could run."""

from itertools import product
from pathlib import Path

import pytest
from needs import NEEDS
from tiers import EVERY_CHANGE, TIERS, Outcome, forbidden_skips, main, not_tested, read_report, table

GPU, CHROMIUM = NEEDS["gpu"].reason, NEEDS["chromium"].reason

REPORT = f"""<testsuites><testsuite>
<testcase classname="tests.a" name="good" time="1.5"/>
<testcase classname="tests.a" name="bad" time="0.25"><failure message="no">text</failure></testcase>
<testcase classname="tests.a" name="worse" time="0.5"><error message="no">text</error></testcase>
<testcase classname="tests.b" name="gpu" time="0"><skipped type="pytest.skip" message="{GPU}">b.py:1</skipped></testcase>
<testcase classname="tests.b" name="page" time="0"><skipped type="pytest.skip" message="{CHROMIUM}">b.py:2</skipped></testcase>
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
        "tests.a::bad": 0.25,
        "tests.a::worse": 0.5,
        "tests.b::gpu": 0.0,
        "tests.b::page": 0.0,
    }
    assert (outcome.num_failed, len(outcome.skipped), outcome.is_good) == (2, 2, False)
    lines = table({"fast": outcome}).splitlines()
    assert lines[1].split() == ["fast", "5", "2", "2", "12"]
    assert lines[5].split() == ["1.5", "fast:", "tests.a::good"]


def test_ci_allows_a_missing_gpu_alone(outcome):
    assert forbidden_skips({"fast": outcome}) == ["tests.b::page"]
    assert not_tested({"fast": outcome}) == [f"1 test skipped: {CHROMIUM}", f"1 test skipped: {GPU}"]
    assert "apt-get install chromium" in CHROMIUM


def test_an_unknown_tier_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["quick"])
    assert caught.value.code == 2
    assert "no such tier: quick; there are fast" in capsys.readouterr().err
