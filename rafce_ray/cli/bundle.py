"""``rafce bundle``: manage model versions in a registry: list, add, promote, roll back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rafce_ray.base.console import print_json, say
from rafce_ray.cli.arguments import BUNDLE_HELP, ENGINES, command, parse_verb

if TYPE_CHECKING:
    from rich.table import Table

    from rafce_ray.base.storage import Location
    from rafce_ray.registry.live import Gate, LiveRecord
    from rafce_ray.registry.promotion import Outcome

_COLUMNS = ("version", "live", "added", "backbone", "score", "on", "sha256")
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
        _print_rows(_COLUMNS, [_cells(row) for row in rows])
    for row in rows:
        if row["problem"] is not None:
            say(f"{row['version']}: {row['problem']}")
    say(f"{registry.shown} has {len(rows)} version{'' if len(rows) == 1 else 's'}. {_what_is_live(registry, live)}")


def _show(registry: Location, arguments: argparse.Namespace) -> None:
    from rafce_ray.base.console import console
    from rafce_ray.registry.live import read_history, read_live
    from rafce_ray.registry.versions import read_version, summary_of

    live = read_live(registry)
    if arguments.version is None:
        history = read_history(registry)
        if arguments.json:
            print_json(
                {
                    "live": None if live is None else live.model_dump(mode="json"),
                    "history": [record.model_dump(mode="json") for record in history],
                }
            )
        else:
            if live is not None:
                console.print(_gates_table(live.gates))
            if history:
                _print_rows(("number", "when", "what", "version", "by", "overruled", "why"), map(_event, history))
        say(_what_is_live(registry, live))
        return
    summary = summary_of(read_version(registry, arguments.version), live)
    if arguments.json:
        print_json(summary)
    else:
        _print_rows(("what", "value"), [(key, _text(value)) for key, value in summary.items()])
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
    from rafce_ray.base.console import console
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
        console.print(_gates_table(refused.gates))
        if arguments.json:
            gates = [gate.model_dump(mode="json") for gate in refused.gates]
            print_json({"changed": False, "version": refused.version, "refused": True, "gates": gates})
        raise
    _tell(registry, outcome, arguments.json)


def _rollback(registry: Location, arguments: argparse.Namespace) -> None:
    from rafce_ray.registry.promotion import Reason, Rules, roll_back

    _tell(registry, roll_back(registry, Reason(arguments.why), Rules(engine=arguments.engine)), arguments.json)


def _tell(registry: Location, outcome: Outcome, is_json: bool) -> None:
    from rafce_ray.base.console import console

    if outcome.changed:
        console.print(_gates_table(outcome.live.gates))
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


def _gates_table(gates: Sequence[Gate]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("gate", "verdict", "found"):
        table.add_column(name, overflow="fold", vertical="top", no_wrap=name == "gate")
    for gate in gates:
        table.add_row(gate.name, Text(gate.verdict, _STYLES.get(gate.verdict, "")), Text(gate.detail))
    return table


def _event(record: LiveRecord) -> tuple[str, ...]:
    when = f"{record.since:%Y-%m-%d %H:%M:%S}"
    overruled = ", ".join(record.overruled) or "-"
    return (str(record.number), when, record.action, record.version, record.by, overruled, record.why)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    live = "live" if row["is_live"] else ""
    measured = "-" if row["split"] is None else f"{row['split']}, {_text(row['num_images'])} images"
    score = row["score"]
    return (
        row["version"],
        live,
        _text(row["added"])[:16].replace("T", " "),
        _text(row["backbone"]),
        "-" if score is None else f"{score:.3f}",
        measured,
        _text(row["sha256"])[:12],
    )


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _print_rows(columns: Sequence[str], rows: Any) -> None:
    """A table on a terminal, lines with tabs elsewhere."""
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            sys.stdout.write("\t".join(row) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", vertical="top")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


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
    _name_option(add)
    promote_verb = _verb(verbs, "promote", _promote, "promote a version to live, if all checks (gates) pass")
    promote_verb.add_argument("candidate", metavar="BUNDLE_OR_VERSION", help="a version's name, or a bundle to add")
    _name_option(promote_verb)
    promote_verb.add_argument("--force", action="store_true", help="promote although gates refuse; needs --why")
    promote_verb.add_argument("--why", metavar="TEXT", help="reason, recorded in the history")
    promote_verb.add_argument(
        "--max-latency-ratio",
        type=float,
        default=1.5,
        metavar="X",
        help="allowed ms per face, as a multiple of the live version's (default %(default)s)",
    )
    _engine_option(promote_verb)
    rollback = _verb(
        verbs, "rollback", _rollback, "roll back to the version that was live before; repeat it to go back further"
    )
    rollback.add_argument("--why", metavar="TEXT", help="reason, recorded in the history")
    _engine_option(rollback)
    return parser, list(verbs.choices)


def _verb(verbs: Any, name: str, run: Callable[[Location, argparse.Namespace], None], purpose: str) -> Any:
    parser = verbs.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
    parser.add_argument("registry", metavar="REGISTRY", help="folder of the registry; a path or URI")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.set_defaults(run=run)
    return parser


def _name_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--as", dest="name", metavar="NAME", help="name of the new version (default: start of its weights' sha256)"
    )


def _engine_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="engine that runs the models while they are checked and timed (default auto, as in serving)",
    )


if __name__ == "__main__":
    raise SystemExit(main())
