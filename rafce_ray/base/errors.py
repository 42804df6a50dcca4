"""Errors that a user can fix, and the record of everything else that is reported: ``Finding``.

Each names what was found, where, what was expected, and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args


class RafceError(Exception):
    """The work failed for a reason that the message explains; programs exit with 1.

    ``may_pass``: the same may succeed later without a fix, for example after an outage of the storage.
    """

    exit_code = 1
    may_pass = False


class DamagedFile(RafceError):
    """A file of a run or a study cannot be read; the message says where it is, why, and how to go on without it."""


class UsageError(RafceError, ValueError):
    """A command line, a configuration or an argument cannot be used; programs exit with 2."""

    exit_code = 2


class GateError(RafceError):
    """A check failed, for example the audit of the training data; programs exit with 3."""

    exit_code = 3


Level = Literal["refusal", "serious", "error", "warning", "info"]
"""How much a finding matters, the most serious first. A refusal stops the work.

Data have errors, runs have serious findings.
"""

LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Evidence:
    """One place that shows a finding; ``line`` counts from 1."""

    detail: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        if self.file is None:
            return self.detail
        return f"{self.file}:{self.line}: {self.detail}" if self.line is not None else f"{self.file}: {self.detail}"


@dataclass(frozen=True)
class Finding:
    """A problem in data, in an image file or in a run: its level, the observation and the remedy.

    ``code`` names the kind and never changes. ``count``: how often it was seen; ``evidence``: the first places.
    """

    level: Level
    code: str
    message: str
    remedy: str = ""
    count: int = 1
    evidence: tuple[Evidence, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in ``audit.json``."""
        return {**asdict(self), "evidence": [asdict(item) for item in self.evidence]}


def did_you_mean(wanted: str, known: Sequence[str]) -> str:
    """``"; did you mean 'optim.lr'?"`` for the known key nearest to ``wanted``, or nothing where none is near."""
    parent, _, last = wanted.rpartition(".")
    siblings = [key for key in known if parent and key.rpartition(".")[0] == parent]
    near = (
        [key for key in siblings if key.startswith(wanted)]
        or difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.85)
        or [key for key in known if key.rpartition(".")[2] == last]
        or difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    )
    return f"; did you mean {near[0]!r}?" if near else ""
