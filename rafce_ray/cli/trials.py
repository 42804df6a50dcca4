"""``rafce trials``: list the trials of a study."""

from __future__ import annotations

import argparse
import sys

from rafce_ray.base.console import print_json, say
from rafce_ray.base.errors import UsageError, did_you_mean
from rafce_ray.base.figures import FIGURES
from rafce_ray.cli.arguments import command, positive


@command
def main(argv: list[str]) -> int:
    """``rafce trials``."""
    arguments = _parser().parse_args(argv)
    from rafce_ray.study.folder import StudyFolder
    from rafce_ray.study.listing import (
        STATUSES,
        ascends,
        default_columns,
        ordered,
        print_csv,
        print_tabbed,
        print_table,
        read_listing,
    )

    study = StudyFolder(arguments.study)
    statuses = [name.replace("-", "_").replace(" ", "_") for name in _names(arguments.status)]
    for name in statuses:
        if name not in STATUSES:
            near = did_you_mean(name, STATUSES) or "."
            raise UsageError(f"--status {name}: no trial has such a status{near} Known: {', '.join(STATUSES)}.")
    listing = read_listing(study)
    if not listing.rows:
        say(f"{study.location.shown} has no trials yet.")
        return 0
    key = arguments.sort or listing.metric
    wanted = _names(arguments.columns)
    known = listing.columns
    for name in (key, *wanted):
        if name not in known:
            near = did_you_mean(name, known) or "."
            raise UsageError(f"{name!r} is no column of these trials{near} Columns: {', '.join(known)}.")
    role = None if arguments.all else "finalist" if arguments.finalists else "sweep"
    candidates = [row for row in listing.rows if role in (None, row.get("role", "sweep"))]
    rows = [row for row in candidates if not statuses or row["status"] in statuses]
    ascending = ascends(key) if arguments.ascending is None else arguments.ascending
    rows = ordered(listing, rows, key, ascending=ascending)[: arguments.top]
    columns = wanted or list(dict.fromkeys([*default_columns(listing, role), key]))
    if arguments.json:
        for row in rows:
            print_json({name: row.get(name) for name in wanted} if wanted else dict(row))
    elif arguments.csv:
        print_csv(listing, rows, wanted or listing.columns)
    elif sys.stdout.isatty():
        print_table(listing, rows, columns, first=[key, listing.metric], is_chosen=bool(wanted))
    else:
        print_tabbed(listing, rows, columns)
    first = "best" if key in FIGURES and ascending == ascends(key) else "lowest" if ascending else "highest"
    hidden = len(listing.rows) - len(candidates)
    others = f"; --all lists {hidden} more" if hidden else ""
    say(f"{len(rows)} of {len(candidates)} trials, {first} {key} first{others}.")
    if any(row["status"] == "interrupted" for row in rows):
        say("interrupted: a trial without a result; it may also be training now.")
    whole = [row for row in rows if row["status"] in ("finished", "stopped_early")]
    commands = [f"rafce doctor {(study.trials / row['trial']).command}" for row in rows[:1]]
    commands += [f"rafce replay {(study.trials / row['trial']).command}" for row in whole[:1]]
    if commands:
        say(f"Next: {'; '.join(commands)}")
    return 0


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce trials",
        description="List and sort the trials of a study of rafce tune or rafce ablate: as a table on a terminal, as "
        "tab-separated lines otherwise.",
        epilog="Example: rafce trials runs/STUDY --status finished --sort optim.lr --top 10",
    )
    parser.add_argument("study", metavar="STUDY", help="folder of a study, a path or URI")
    parser.add_argument("--sort", metavar="KEY", help="column to sort by (default: the study's metric, best first)")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--ascending", action="store_true", default=None, help="lowest first")
    direction.add_argument("--descending", dest="ascending", action="store_false", help="highest first")
    parser.add_argument(
        "--status",
        metavar="S[,S]",
        help="keep trials with one of these statuses: finished, stopped_early, stopped_by_scheduler, diverged, failed, "
        "interrupted, waiting",
    )
    parser.add_argument("--columns", metavar="a,b", help="columns to list")
    parser.add_argument("--top", type=positive, metavar="N", help="list only the first N")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--finalists", action="store_true", help="list the finalists' runs instead of the sweep's trials"
    )
    which.add_argument("--all", action="store_true", help="list both")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print one JSON object per trial with all columns in full precision"
    )
    form.add_argument("--csv", action="store_true", help="print CSV with a header and all columns in full precision")
    return parser
