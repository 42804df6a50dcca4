"""A study's trials as rows: read, filtered by conditions, sorted by a column."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rafce_ray.config import MINIMISED_METRICS, config_hash, flatten
from rafce_ray.console import warn
from rafce_ray.errors import DamagedFile, UsageError
from rafce_ray.run_folder import TRIALS, RunFolder
from rafce_ray.study.trials import ENDED, FIGURES, TRIAL_FILE, best_record, read_trials
from rafce_ray.study_folder import StudyFolder

DEFAULT_METRIC = "score"
STATUSES = (*ENDED, "interrupted", "waiting")
"""Statuses that a trial in a listing may have."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Listing:
    """A study's trials as rows. ``sampled``: the columns that hold sampled values, in which None is a value and absence is not."""

    metric: str
    rows: tuple[Row, ...]
    sampled: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """Every column that any row has, in order."""
        found = dict.fromkeys(key for row in self.rows for key in row)
        return [key for key in found if key not in self.sampled] + list(self.sampled)

    def has(self, row: Row, column: str) -> bool:
        """Whether a row has a value in a column."""
        return column in row and (row[column] is not None or column in self.sampled)


def read_listing(study: StudyFolder) -> Listing:
    """All trials of a study, of the sweep and its finalists, by number; of an ablation, what its run folders say.

    Raises:
        UsageError: there is no study at that place.
        RafceError: a trial's configuration is not the one that was sampled.
    """
    if not study.exists():
        raise UsageError(f"{study.location} is no study: {_what_is_there(study)}")
    metric = str((study.settings() or {}).get("metric", DEFAULT_METRIC))
    trials = read_trials(study, metric)
    planned = {one.name for one in trials}
    others = _run_rows(study, metric, [name for name in study.trial_names() if name not in planned])
    sampled = tuple(dict.fromkeys(key for one in trials for key in one.plan.values))
    rows = [dict(one.row) for one in trials]
    for one, row in zip(trials, rows, strict=True):
        if not one.plan.values:
            # The base samples nothing, yet it is compared by what it trains with.
            own = flatten(study.trial(one.name).config())
            row |= {key: own[key] for key in sampled}
    return Listing(metric, (*rows, *others), sampled)


def _what_is_there(study: StudyFolder) -> str:
    location = study.location
    if not location.exists():
        return "nothing is there. Name a folder that rafce tune or rafce ablate made."
    if RunFolder(study.place).exists():
        if location.parent.name == TRIALS:
            return f"it is a trial. List its study: rafce trials {location.parent.parent.command}"
        return (
            f"it is a run. See rafce doctor {location.command}, or name a folder that rafce tune or rafce ablate made."
        )
    if not location.is_dir():
        return "it is a file. Name the study's folder."
    inside = [info.base_name for info in location.list() if (location / info.base_name / "study.json").exists()]
    if inside:
        return f"it has no study.json. It holds studies; name one of {len(inside)}, such as {(location / inside[0]).shown}."
    return "it has no study.json. Name a folder that rafce tune or rafce ablate made."


def _run_rows(study: StudyFolder, metric: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of run folders without a plan. Those with a plan were reported as damaged before."""
    rows = []
    for name in names:
        folder = study.trial(name)
        if (folder.location / TRIAL_FILE).exists():
            continue
        try:
            rows.append(_run_row(folder, metric))
        except DamagedFile as error:
            warn(f"{name} is left out. {error}")
    return rows


def _run_row(folder: RunFolder, metric: str) -> dict[str, Any]:
    """A row of a run folder without a plan, with the columns of :attr:`rafce_ray.study.trials.Trial.row` that it can fill."""
    config, records, result = folder.config(), folder.metrics(), folder.result() or {}
    best = best_record(records, metric)
    validation = {} if best is None else best["validation"]
    return {
        "trial": folder.location.name,
        "status": str(result.get("status", "interrupted" if records else "waiting")),
        "reason": result.get("reason"),
        "best_epoch": None if best is None else int(best["epoch"]),
        "epochs": len(records),
        "max_epochs": config.optim.epochs,
        **{name: validation.get(name) for name in FIGURES},
        "seed": config.run.seed,
        "seconds": round(float(records[-1]["elapsed_s"]), 1) if records else 0.0,
        "config_hash": config_hash(config),
    }


_CONDITION = re.compile(r"\s*([\w.]+)\s*(<=|>=|!=|==|=|<|>|~)(?!\s*[<>=!~])\s*(.*?)\s*", re.DOTALL)
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda found, wanted: found < wanted,
    "<=": lambda found, wanted: found <= wanted,
    ">": lambda found, wanted: found > wanted,
    ">=": lambda found, wanted: found >= wanted,
    "=": lambda found, wanted: found == wanted,
    "!=": lambda found, wanted: found != wanted,
    "~": lambda found, wanted: wanted in found,
}

_ORDERING = ("<", "<=", ">", ">=")


@dataclass(frozen=True)
class Condition:
    """``optim.lr >= 0.001`` of ``--where``."""

    column: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read ``KEY OP VALUE``. UsageError where it is nothing of the kind."""
        found = _CONDITION.fullmatch(text)
        if found is None or not found[3]:
            raise UsageError(
                f"--where {text!r} is no condition: write KEY OP VALUE with one of < <= > >= = != ~, such as 'optim.lr >= 0.001'."
            )
        return cls(found[1], "=" if found[2] == "==" else found[2], found[3])

    def holds(self, found: Any) -> bool:
        """Whether a value that is there meets the condition; numbers are compared as numbers, everything else as text."""
        wanted = _number(self.value)
        if self.operator != "~" and is_number(found):
            return self.operator == "!=" if wanted is None else _COMPARISONS[self.operator](found, wanted)
        if self.operator in _ORDERING and (wanted is not None or not isinstance(found, str)):
            return False
        return _COMPARISONS[self.operator](as_text(found), self.value if isinstance(found, str) else self.value.lower())

    def check(self, values: Sequence[Any]) -> None:
        """UsageError where the condition could not hold for any of a column's values, whatever they were: words against numbers."""
        if not values or self.operator == "~":
            return
        is_numeric = _number(self.value) is not None
        if self.operator in _ORDERING:
            comparable = [is_number(one) if is_numeric else isinstance(one, str) for one in values]
        else:
            comparable = [is_numeric or not is_number(one) for one in values]
        if not any(comparable):
            kind = "numbers" if is_number(values[0]) else "text" if isinstance(values[0], str) else "other values"
            raise UsageError(
                f"--where '{self.column} {self.operator} {self.value}': {self.column} holds {kind}, such as {as_text(values[0])}, "
                f"which {self.value!r} cannot be compared with. Give a value of that kind, or use ~ to search in it as text."
            )


def keep(listing: Listing, rows: Sequence[Row], conditions: Sequence[Condition]) -> tuple[list[Row], list[str]]:
    """Rows that meet all conditions, and remarks on those left out because they have no value to compare."""
    remarks = []
    kept = list(rows)
    for condition in conditions:
        there = [row for row in kept if listing.has(row, condition.column)]
        condition.check([row[condition.column] for row in there])
        if missing := len(kept) - len(there):
            verbs = ("trial has", "is") if missing == 1 else ("trials have", "are")
            remarks.append(f"{missing} {verbs[0]} no {condition.column} and {verbs[1]} left out")
        kept = [row for row in there if condition.holds(row[condition.column])]
    return kept, remarks


def ordered(listing: Listing, rows: Sequence[Row], column: str, *, ascending: bool) -> list[Row]:
    """Rows by a column, those without a value last; numbers come before text. Equal rows stay in order."""
    there = [row for row in rows if listing.has(row, column)]
    return [
        *sorted(there, key=lambda row: _sort_key(row[column]), reverse=not ascending),
        *(row for row in rows if not listing.has(row, column)),
    ]


def _sort_key(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if is_number(value) else (1, 0.0, as_text(value))


def ascends(column: str) -> bool:
    """Whether a column is listed from low to high unless asked otherwise: all but figures of which more is better."""
    return column not in FIGURES or column in MINIMISED_METRICS


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_text(value: Any) -> str:
    """A value as ``--where`` compares it: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
