"""The trials of a study as rows, and how they are printed: a table on a terminal, lines with tabs, or CSV."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rafce_ray.base.console import say, warn
from rafce_ray.base.errors import DamagedFile, UsageError
from rafce_ray.base.figures import FIGURES
from rafce_ray.config import config_hash, flatten
from rafce_ray.run.folder import TRIALS, RunFolder
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import ENDED, TRIAL_FILE, TrialPlan, metric_of, read_trials, trial_as_it_stands
from rafce_ray.study.watch import plain

COLUMNS = ("trial", "status", "epochs", "score", "macro_f1_supported", "au_f1_mean", "seconds")
"""Columns that are listed unless others are asked for, before the sampled keys."""

STATUSES = (*ENDED, "interrupted", "waiting")
"""Statuses that a trial in a listing may have."""

_STYLES = {"failed": "red", "diverged": "red", "stopped_by_scheduler": "dim", "waiting": "dim"}
_GAP = 2

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Listing:
    """A study's trials as rows.

    ``sampled``: the columns that hold sampled values, in which None is a value and absence is not.
    """

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
    metric = metric_of(study)
    trials = read_trials(study, metric)
    planned = {one.name for one in trials}
    others = _run_rows(study, metric, [name for name in study.trial_names() if name not in planned])
    sampled = tuple(dict.fromkeys(key for one in trials for key in one.plan.values))
    rows = [dict(one.row) for one in trials]
    for one, row in zip(trials, rows, strict=True):
        if not one.plan.values:
            # The base samples nothing, yet it is compared by what it trains with.
            own = flatten(one.config)
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
        return (
            f"it has no study.json. It holds studies; name one of {len(inside)}, such as "
            f"{(location / inside[0]).shown}."
        )
    return "it has no study.json. Name a folder that rafce tune or rafce ablate made."


def _run_rows(study: StudyFolder, metric: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of run folders without a plan. Those with a plan were reported as damaged before."""
    rows = []
    for name in names:
        folder = study.trial(name)
        if (folder.location / TRIAL_FILE).exists():
            continue
        try:
            config = folder.config()
            plan = TrialPlan(name, 0, "sweep", {}, config_hash(config), cpus=0, gpus=0)
            row = trial_as_it_stands(folder, metric, plan, config).row
        except DamagedFile as error:
            warn(f"{name} is left out. {error}")
            continue
        rows.append({key: value for key, value in row.items() if key not in ("role", "of", "cpus", "gpus")})
    return rows


def ordered(listing: Listing, rows: Sequence[Row], column: str, *, ascending: bool) -> list[Row]:
    """Rows by a column, those without a value last; numbers come before text. Equal rows stay in order."""

    def key(row: Row) -> tuple[int, float, str]:
        value = row[column]
        return (0, float(value), "") if is_number(value) else (1, 0.0, as_text(value))

    there = [row for row in rows if listing.has(row, column)]
    return [*sorted(there, key=key, reverse=not ascending), *(row for row in rows if not listing.has(row, column))]


def ascends(column: str) -> bool:
    """Whether a column is listed from low to high unless asked otherwise: all but figures of which more is better."""
    return column not in FIGURES or FIGURES[column].direction < 0


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_text(value: Any) -> str:
    """A value as CSV holds it: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def default_columns(listing: Listing, role: str | None) -> list[str]:
    """The columns of a listing that nobody chose any for; what tells finalists apart where they are listed."""
    told = [] if role == "sweep" else ["of", "seed"]
    names = [*COLUMNS[:1], *told, *COLUMNS[1:3], listing.metric, *COLUMNS[3:], *listing.sampled]
    return [name for name in dict.fromkeys(names) if name in listing.columns]


def cell(listing: Listing, row: Row, column: str) -> str:
    """A value for people: ``-`` where there is none."""
    if not listing.has(row, column):
        return "-"
    value = row[column]
    if is_number(value) and column in FIGURES:
        return f"{value:.4f}"
    if column == "seconds":
        return f"{value:.1f}"
    return " ".join(plain(value).split())


def print_tabbed(listing: Listing, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print a header and a line a row, with tabs between cells."""
    for line in [columns, *([cell(listing, row, name) for name in columns] for row in rows)]:
        sys.stdout.write("\t".join(line) + "\n")


def print_csv(listing: Listing, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print CSV with a header; numbers in full precision."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([as_text(row[name]) if listing.has(row, name) else "" for name in columns])


def print_table(
    listing: Listing, rows: Sequence[Row], columns: Sequence[str], *, first: Sequence[str], is_chosen: bool
) -> None:
    """Print the columns that fit the terminal and name the others; chosen columns are all shown and may wrap."""
    console = Console(highlight=False)
    shown = list(columns) if is_chosen else fitting(listing, rows, columns, first, console.width)
    table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="bold")
    for name in shown:
        cells = [cell(listing, row, name) for row in rows]
        numeric = any(is_number(row.get(name)) for row in rows)
        table.add_column(
            Text(_broken(name, _width(name, cells))),
            justify="right" if numeric else "left",
            overflow="fold",
            vertical="top",
        )
    for row in rows:
        table.add_row(*(Text(cell(listing, row, name)) for name in shown), style=_STYLES.get(row["status"], ""))
    console.print(table)
    if left := [name for name in columns if name not in shown]:
        say(f"Too narrow for {', '.join(left)}: choose with --columns, or see all with --json or --csv.")


def fitting(
    listing: Listing, rows: Sequence[Row], columns: Sequence[str], first: Sequence[str], width: int
) -> list[str]:
    """The columns that fit a terminal's width, in their order.

    Room goes to the trial's name and status, then to ``first``, to the sampled values, to the rest.
    """
    room, kept = width, []
    for name in dict.fromkeys([*COLUMNS[:2], *first, *listing.sampled, *columns]):
        if name in columns or name in first:
            needed = _width(name, [cell(listing, row, name) for row in rows]) + _GAP
            if needed <= room:
                room -= needed
                kept.append(name)
    return [name for name in dict.fromkeys([*columns, *first]) if name in kept]


def _width(name: str, cells: Sequence[str]) -> int:
    return max(len(text) for text in [*re.split(r"(?<=[._])", name), *cells])


def _broken(name: str, width: int) -> str:
    """A column's name on as many lines as its width asks for, broken after dots and underscores."""
    lines = [""]
    for part in re.split(r"(?<=[._])", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
