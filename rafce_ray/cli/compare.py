"""``rafce compare``: compare runs on the same images, with paired confidence intervals."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rafce_ray.base.console import print_json, say, warn
from rafce_ray.base.errors import UsageError
from rafce_ray.cli.arguments import JSON_HELP, command

if TYPE_CHECKING:
    from rafce_ray.run.compare import Compared


@command
def main(argv: list[str]) -> int:
    """``rafce compare``."""
    arguments = _parser().parse_intermixed_args(argv)
    data = [text for text in arguments.runs if text.startswith("data.") and "=" in text]
    places = [text for text in arguments.runs if text not in data]
    if len(places) < 2:
        raise UsageError(f"{len(places)} run(s) given: name the run to compare with first, then at least one other.")
    from rafce_ray.base.console import console
    from rafce_ray.base.hardware import choose_device
    from rafce_ray.run.compare import compare, load_run, render, to_json_record

    choose_device(arguments.device)
    say(f"Comparing {len(places)} runs on the {arguments.split} split; the first, {places[0]}, is the reference.")
    names = _names(places)
    runs = [
        load_run(place, name, arguments.split, data=data, device=arguments.device)
        for place, name in zip(places, names, strict=True)
    ]
    compared = compare(runs)
    for remark in compared.remarks:
        warn(remark)
    for table in render(compared):
        console.print(table)
    _say_what_it_means(compared, arguments.split)
    if arguments.json:
        print_json(to_json_record(compared, arguments.split))
    return 0


def _names(places: Sequence[str]) -> list[str]:
    """The last part of every path, or all of it where two would have the same name."""
    names = [place.partition("?")[0].rstrip("/").rpartition("/")[2] or place for place in places]
    return names if len(set(names)) == len(names) else list(places)


def _say_what_it_means(compared: Compared, split: str) -> None:
    num_intervals = sum(len(one) for one in compared.against_first)
    say(
        f"real: the paired bootstrap 95 % interval over {len(compared.runs[0].outputs.names):,} images leaves 0 out; "
        f"of {num_intervals} intervals about {math.ceil(num_intervals / 20)} would by chance. Another seed moves "
        "figures too: train several before you believe a small difference."
    )
    if split == "validation":
        say("Validation chose each run's best epoch and thresholds. Next: the same with --split test.")
    else:
        say("Next: rafce replay RUN trains one of them again and tells whether its figures hold.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce compare",
        description="Compare runs on the same images: how their configurations differ, their figures with confidence "
        "intervals, and their differences from the first run with paired bootstrap intervals.",
        epilog="Example: rafce compare runs/BASELINE runs/NEW --split test",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders of finished runs, the reference first; data.KEY=VALUE among them gives the data's current place",
    )
    parser.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="split to compare on (default validation)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... for --split test (default auto)")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser
