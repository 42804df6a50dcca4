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

from rafce_ray.base.console import say
from rafce_ray.base.errors import UsageError
from rafce_ray.base.figures import FIGURES
from rafce_ray.config import flatten
from rafce_ray.run.folder import TRIALS, RunFolder
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import ENDED, metric_of, read_trials
from rafce_ray.study.watch import plain

COLUMNS = ("trial", "status", "epochs", "score", "macro_f1_supported", "au_f1_mean", "seconds")
"""Columns that are listed unless others are asked for, before the sampled keys."""

STATUSES = (*ENDED, "interrupted", "waiting")
"""Statuses that a trial in a listing may have."""

_STYLES = {"failed": "red", "diverged": "red", "stopped_by_scheduler": "dim", "waiting": "dim"}
MOST_WIDE = 10_000
"""Characters, more than any table has."""

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
    """All trials of a study, of the sweep and its finalists, or of an ablation, by number.

    Raises:
        UsageError: there is no study at that place.
        RafceError: a trial's configuration is not the one that was sampled.
    """
    if not study.exists():
        raise UsageError(f"{study.location} is no study: {_what_is_there(study)}")
    metric = metric_of(study)
    trials = read_trials(study, metric)
    sampled = tuple(dict.fromkeys(key for one in trials for key in one.plan.values))
    rows = []
    for one in trials:
        # The base samples nothing, yet it is compared by what it trains with.
        own = {} if one.plan.values else flatten(one.config)
        rows.append(one.row | {key: own[key] for key in sampled if own})
    return Listing(metric, tuple(rows), sampled)


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
    shown = list(columns)
    # Room goes to the trial's name and status, then to ``first``, to the sampled values, to the rest.
    order = list(dict.fromkeys([*COLUMNS[:2], *first, *listing.sampled, *columns]))
    while (table := _table(listing, rows, shown)) and not is_chosen and len(shown) > 1:
        if console.measure(table, options=console.options.update(width=MOST_WIDE)).maximum <= console.width:
            break
        shown.remove(next(name for name in reversed(order) if name in shown))
    console.print(table)
    if left := [name for name in columns if name not in shown]:
        say(f"Too narrow for {', '.join(left)}: choose with --columns, or see all with --json or --csv.")


def _table(listing: Listing, rows: Sequence[Row], columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        numeric = any(is_number(row.get(name)) for row in rows)
        # Names are long: they break after dots and underscores.
        title = Text(re.sub(r"(?<=[._])(?=.)", "\n", name))
        table.add_column(title, justify="right" if numeric else "left", overflow="fold", vertical="top")
    for row in rows:
        table.add_row(*(Text(cell(listing, row, name)) for name in columns), style=_STYLES.get(row["status"], ""))
    return table
