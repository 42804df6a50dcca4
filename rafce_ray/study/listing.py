"""``rafce trials``: the trials of a study, listed, filtered and sorted."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rafce_ray.config_errors import did_you_mean
from rafce_ray.console import print_json, run_main, say
from rafce_ray.errors import UsageError
from rafce_ray.run_folder import TRIALS
from rafce_ray.study.progress import plain
from rafce_ray.study.rows import (
    STATUSES,
    Condition,
    Listing,
    Row,
    as_text,
    ascends,
    is_number,
    keep,
    ordered,
    read_listing,
)
from rafce_ray.study.trials import FIGURES
from rafce_ray.study_folder import StudyFolder

COLUMNS = ("trial", "status", "epochs", "score", "macro_f1_supported", "au_f1_mean", "seconds")
"""Columns that are listed unless others are asked for, before the sampled keys."""

_STYLES = {"failed": "red", "diverged": "red", "stopped_by_scheduler": "dim", "waiting": "dim"}
_GAP = 2


def main(argv: list[str] | None = None) -> int:
    """``rafce trials``."""
    return run_main(_main, argv)


def _main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    study = StudyFolder(arguments.study)
    conditions = [Condition.parse(text) for text in arguments.where]
    statuses = _statuses(arguments.status)
    listing = read_listing(study)
    if not listing.rows:
        say(f"{study.location.shown} has no trials yet.")
        return 0
    key = arguments.sort or listing.metric
    used = [key, *(one.column for one in conditions)]
    wanted = _names(arguments.columns)
    _check_columns([*used, *wanted], listing)
    role = None if arguments.all else "finalist" if arguments.finalists else "sweep"
    candidates = [row for row in listing.rows if role in (None, row.get("role", "sweep"))]
    rows, remarks = keep(listing, [row for row in candidates if not statuses or row["status"] in statuses], conditions)
    ascending = ascends(key) if arguments.ascending is None else arguments.ascending
    rows = ordered(listing, rows, key, ascending=ascending)[: arguments.top]
    columns = wanted or list(dict.fromkeys([*default_columns(listing, role), *used]))
    if arguments.json:
        for row in rows:
            print_json({name: row.get(name) for name in wanted} if wanted else dict(row))
    elif arguments.csv:
        _print_csv(listing, rows, wanted or listing.columns)
    elif sys.stdout.isatty():
        _print_table(listing, rows, columns, first=[*used, listing.metric], is_chosen=bool(wanted))
    else:
        _print_tabbed(listing, rows, columns)
    for remark in remarks:
        say(f"{remark}.")
    first = "best" if key in FIGURES and ascending == ascends(key) else "lowest" if ascending else "highest"
    hidden = len(listing.rows) - len(candidates)
    _say_what_is_shown(study, rows, len(candidates), hidden, f"{first} {key} first")
    return 0


def _statuses(text: str | None) -> list[str]:
    statuses = [name.replace("-", "_").replace(" ", "_") for name in _names(text)]
    for name in statuses:
        if name not in STATUSES:
            raise UsageError(
                f"--status {name}: no trial has such a status{did_you_mean(name, STATUSES) or '.'} Known: {', '.join(STATUSES)}."
            )
    return statuses


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _check_columns(names: Sequence[str], listing: Listing) -> None:
    known = listing.columns
    for name in names:
        if name not in known:
            raise UsageError(
                f"{name!r} is no column of these trials{did_you_mean(name, known) or '.'} Columns: {', '.join(known)}."
            )


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


def _print_tabbed(listing: Listing, rows: Sequence[Row], columns: Sequence[str]) -> None:
    for line in [columns, *([cell(listing, row, name) for name in columns] for row in rows)]:
        sys.stdout.write("\t".join(line) + "\n")


def _print_csv(listing: Listing, rows: Sequence[Row], columns: Sequence[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([as_text(row[name]) if listing.has(row, name) else "" for name in columns])


def _print_table(
    listing: Listing, rows: Sequence[Row], columns: Sequence[str], *, first: Sequence[str], is_chosen: bool
) -> None:
    """Print what fits the terminal and say what does not; columns that were asked for are all shown, on several lines if need be."""
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


def _say_what_is_shown(
    study: StudyFolder, rows: Sequence[Row], num_candidates: int, num_others: int, order: str
) -> None:
    others = f"; --all lists {num_others} more" if num_others else ""
    say(f"{len(rows)} of {num_candidates} trials, {order}{others}.")
    if any(row["status"] == "interrupted" for row in rows):
        say("interrupted: a trial without a result; it may also be training now.")
    if not rows:
        return
    folder = study.location / TRIALS
    commands = [f"rafce doctor {(folder / rows[0]['trial']).command}"]
    whole = [row for row in rows if row["status"] in ("finished", "stopped_early")]
    commands += [f"rafce replay {(folder / row['trial']).command}" for row in whole[:1]]
    say(f"Next: {'; '.join(commands)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce trials",
        description="The trials of a study (of rafce tune or rafce ablate): listed, filtered and sorted. On a terminal a table of what "
        "fits, else lines with tabs.",
        epilog="Example: rafce trials runs/STUDY --where 'model.dropout >= 0.4' --where 'score > 0.3' --sort optim.lr --top 10",
    )
    parser.add_argument("study", metavar="STUDY", help="folder of a study, a path or URI")
    parser.add_argument("--sort", metavar="KEY", help="column to sort by (default: the study's metric, best first)")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--ascending", action="store_true", default=None, help="lowest first")
    direction.add_argument("--descending", dest="ascending", action="store_false", help="highest first")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="'KEY OP VALUE'",
        help="keep trials that meet a condition; OP is < <= > >= = != or ~ (contains); may be given several times",
    )
    parser.add_argument("--status", metavar="S[,S]", help=f"keep trials that ended so: {', '.join(STATUSES)}")
    parser.add_argument("--columns", metavar="a,b", help="columns to list")
    parser.add_argument("--top", type=_positive, metavar="N", help="list only the first N")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--finalists", action="store_true", help="list the finalists' runs instead of the sweep's trials"
    )
    which.add_argument("--all", action="store_true", help="list both")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a trial, all columns in full precision")
    form.add_argument("--csv", action="store_true", help="comma-separated with a header, all columns in full precision")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
