"""The guides name every finding of the doctor and of the audit, and quote messages that the programs really give."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TROUBLESHOOTING = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
TRAINING = (REPOSITORY / "docs" / "train.md").read_text()


def calls(folder: str) -> Iterator[tuple[str, list[ast.expr]]]:
    """Every call in a part of the package: the function's last name, and its arguments."""
    for path in (REPOSITORY / "rafce_ray" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield getattr(node.func, "attr", getattr(node.func, "id", "")), node.args


def constants(folder: str) -> str:
    """All texts of a part of the package, as they are put together, a line each."""
    found = []
    for path in (REPOSITORY / "rafce_ray" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def texts_at(place: int, folder: str, *names: str) -> set[str]:
    """The arguments at one place, from 0, of calls of these functions, where they are written out."""
    found = [args[place] for name, args in calls(folder) if name in names and len(args) > place]
    return {one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def cells(page: str, heading: str, column: int) -> str:
    """One column of the tables below a heading."""
    below = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in below.splitlines() if line.startswith("| ")]
    return "\n".join(row[column] for row in rows if len(row) > column)


def test_every_finding_of_the_doctor_is_explained_and_no_other():
    codes = texts_at(0, "doctor", "diagnose") | texts_at(1, "doctor", "_change_weight")
    assert len(codes) > 15
    below = TROUBLESHOOTING.partition("\n## What the doctor finds\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([a-z_0-9]+)`", below)) == codes


def test_every_finding_of_the_audit_is_listed_and_no_other():
    listed = set(re.findall(r"`([a-z_0-9]+)`", cells(TRAINING, "Finding codes", 1)))
    assert texts_at(1, "data", "Finding", "finding") <= listed
    texts = set(constants("data").splitlines())
    assert len(listed) > 35
    assert listed - texts == set()


def test_messages_are_quoted_as_they_are_given():
    given = constants("")
    quoted = re.findall(r"`([^`]+)`", cells(TROUBLESHOOTING, "Messages", 0))
    assert len(quoted) > 20
    assert [text for text in quoted if text not in given] == []
