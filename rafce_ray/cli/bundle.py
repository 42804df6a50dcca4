"""``rafce bundle``: manage model versions in a registry: list, add, promote, roll back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rafce_ray.base.console import print_json, say
from rafce_ray.cli.arguments import BUNDLE_HELP, ENGINES, command, parse_verb

if TYPE_CHECKING:
    from rich.console import Console

    from rafce_ray.base.storage import Location
    from rafce_ray.registry.live import Gate, LiveRecord
    from rafce_ray.registry.promotion import Outcome

_STYLES = {"passed": "green", "refused": "bold red"}


@command
def main(argv: list[str]) -> int:
    """``rafce bundle``; exit code 3 where a gate said no."""
    parser, verbs = _parser()
    parse_verb(parser, argv, verbs)
    arguments = parser.parse_args(argv)
    from rafce_ray.base.storage import locate

    registry = locate(arguments.registry)
    registry.check_reachable()
    run: Callable[[Location, argparse.Namespace], None] = arguments.run
    run(registry, arguments)
    return 0


def _list(registry: Location, arguments: argparse.Namespace) -> None:
    from rafce_ray.registry.live import read_live
    from rafce_ray.registry.versions import list_versions, summary_of

    live = read_live(registry)
    rows = [summary_of(version, live) for version in list_versions(registry)]
    if arguments.json:
        for row in rows:
            print_json(row)
    elif rows:
        columns = ("version", "live", "added", "backbone", "score", "on", "sha256")
        _print_table(columns, map(_cells, rows))
    for row in rows:
        if row["problem"] is not None:
            say(f"{row['version']}: {row['problem']}")
    say(f"{registry.shown} has {len(rows)} version{'' if len(rows) == 1 else 's'}. {_what_is_live(registry, live)}")


def _show(registry: Location, arguments: argparse.Namespace) -> None:
    from rafce_ray.registry.live import read_history, read_live
    from rafce_ray.registry.versions import read_version, summary_of

    live = read_live(registry)
    columns: tuple[str, ...] = ("what", "value")
    if arguments.version is not None:
        record = summary_of(read_version(registry, arguments.version), live)
        rows = [[key, _text(value)] for key, value in record.items()]
    else:
        history = read_history(registry)
        record = {
            "live": None if live is None else live.model_dump(mode="json"),
            "history": [one.model_dump(mode="json") for one in history],
        }
        columns = ("number", "when", "what", "version", "by", "overruled", "why")
        rows = []
        for one in history:
            what = (one.action, one.version, one.by, _text(one.overruled), one.why)
            rows.append([str(one.number), f"{one.since:%Y-%m-%d %H:%M:%S}", *what])
        if live is not None and not arguments.json:
            _print_gates(live.gates)
    if arguments.json:
        print_json(record)
    elif rows:
        _print_table(columns, rows)
    say(_what_is_live(registry, live))


def _add(registry: Location, arguments: argparse.Namespace) -> None:
    from rafce_ray.registry.live import read_live
    from rafce_ray.registry.versions import add_version

    version, is_new = add_version(registry, arguments.bundle, arguments.name)
    if arguments.json:
        print_json({"version": version, "added": is_new})
    say(
        f"{'Added' if is_new else 'Was there already:'} {version}. {_what_is_live(registry, read_live(registry))}\n"
        f"Make it live: rafce bundle promote {registry.command} {version}"
    )


def _promote(registry: Location, arguments: argparse.Namespace) -> None:
    from rafce_ray.registry.promotion import Reason, Refused, Rules, promote, take_candidate

    reason = Reason(arguments.why, arguments.force)
    rules = Rules(arguments.max_latency_ratio, arguments.engine)
    try:
        version, is_new = take_candidate(registry, arguments.candidate, arguments.name)
        if is_new:
            say(f"Added {version} to {registry.shown}.")
        say(f"Asking the gates of {version}: it is loaded, asked and timed.")
        outcome = promote(registry, version, reason, rules)
    except Refused as refused:
        _print_gates(refused.gates)
        if arguments.json:
            gates = [gate.model_dump(mode="json") for gate in refused.gates]
            print_json({"changed": False, "version": refused.version, "refused": True, "gates": gates})
        raise
    _tell(registry, outcome, arguments.json)


def _rollback(registry: Location, arguments: argparse.Namespace) -> None:
    from rafce_ray.registry.promotion import Reason, Rules, roll_back

    _tell(registry, roll_back(registry, Reason(arguments.why), Rules(engine=arguments.engine)), arguments.json)


def _tell(registry: Location, outcome: Outcome, is_json: bool) -> None:
    if outcome.changed:
        _print_gates(outcome.live.gates)
        if outcome.live.overruled:
            say(f"Overruled: {', '.join(outcome.live.overruled)}, because: {outcome.live.why}")
    else:
        say(f"{outcome.live.version} is live already: nothing was changed.")
    if is_json:
        print_json({"changed": outcome.changed, "live": outcome.live.model_dump(mode="json")})
    say(_what_is_live(registry, outcome.live))


def _what_is_live(registry: Location, live: LiveRecord | None) -> str:
    """What is live, why, and the next command."""
    if live is None:
        return f"Nothing is live. Next: rafce bundle promote {registry.command} BUNDLE"
    before = f", before it {live.before[0]}" if live.before else ""
    return (
        f"Live is {live.version} since {live.since:%Y-%m-%d %H:%M} UTC ({live.action} by {live.by}: "
        f"{live.why}){before}. Next: rafce serve --registry {registry.command}"
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["version"],
        "live" if row["is_live"] else "",
        _text(row["added"])[:16].replace("T", " "),
        _text(row["backbone"]),
        "-" if row["score"] is None else f"{row['score']:.3f}",
        "-" if row["split"] is None else f"{row['split']}, {_text(row['num_images'])} images",
        _text(row["sha256"])[:12],
    )


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _print_gates(gates: Sequence[Gate]) -> None:
    from rafce_ray.base.console import console

    _print_columns(console, ("gate", "verdict", "found"), ((gate.name, gate.verdict, gate.detail) for gate in gates))


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal, lines with tabs elsewhere."""
    if not sys.stdout.isatty():
        sys.stdout.writelines("\t".join(row) + "\n" for row in [columns, *rows])
        return
    from rich.console import Console

    _print_columns(Console(highlight=False), columns, rows)


def _print_columns(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", vertical="top", no_wrap=name == "gate")
    for row in rows:
        table.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in row))
    console.print(table)


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    parser = argparse.ArgumentParser(
        prog="rafce bundle",
        description="Manage model versions in a registry, a folder on a disk or an object store: list, add, promote "
        "and roll back.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _verb(verbs, "list", _list, "list all versions and the live one")
    show = _verb(verbs, "show", _show, "show the live version and the history of promotions, or one version")
    show.add_argument("version", nargs="?", metavar="VERSION", help="a version's name")
    add = _verb(verbs, "add", _add, "add a bundle to the registry, verified, without promoting it")
    add.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    promote = _verb(verbs, "promote", _promote, "promote a version to live, if all checks (gates) pass")
    promote.add_argument("candidate", metavar="BUNDLE_OR_VERSION", help="a version's name, or a bundle to add")
    promote.add_argument("--force", action="store_true", help="promote although gates refuse; needs --why")
    promote.add_argument(
        "--max-latency-ratio",
        type=float,
        default=1.5,
        metavar="X",
        help="allowed ms per face, as a multiple of the live version's (default %(default)s)",
    )
    back = "roll back to the version that was live before; repeat it to go back further"
    rollback = _verb(verbs, "rollback", _rollback, back)
    for verb in (add, promote):
        name = "name of the new version (default: start of its weights' sha256)"
        verb.add_argument("--as", dest="name", metavar="NAME", help=name)
    for verb in (promote, rollback):
        verb.add_argument("--why", metavar="TEXT", help="reason, recorded in the history")
        engine = "engine that runs the models while they are checked and timed (default auto, as in serving)"
        verb.add_argument("--engine", choices=ENGINES, default="auto", help=engine)
    return parser, list(verbs.choices)


def _verb(verbs: Any, name: str, run: Callable[[Location, argparse.Namespace], None], purpose: str) -> Any:
    parser = verbs.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
    parser.add_argument("registry", metavar="REGISTRY", help="folder of the registry; a path or URI")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.set_defaults(run=run)
    return parser
