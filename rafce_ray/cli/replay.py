"""``rafce replay``: train a run again and check that its figures are reproduced."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rafce_ray.base.console import print_json, say, to_json, warn
from rafce_ray.base.errors import GateError
from rafce_ray.cli.arguments import JSON_HELP, add_data_overrides, command
from rafce_ray.train.environment import check_ray

if TYPE_CHECKING:
    from rafce_ray.run.compare import Circumstance, Comparison
    from rafce_ray.run.folder import RunFolder


@command
def main(argv: list[str]) -> int:
    """``rafce replay``; exit code 3 where figures differ or the data have changed."""
    arguments = _parser().parse_intermixed_args(argv)
    check_ray()
    from rafce_ray.base.console import console
    from rafce_ray.config import config_hash
    from rafce_ray.run.compare import circumstances_of, compare_circumstances
    from rafce_ray.run.folder import open_finished
    from rafce_ray.run.replay import circumstances_table, compare_runs, data_changes, plan_replay
    from rafce_ray.train.launch import train_again

    original = open_finished(arguments.run)
    plan = plan_replay(original, arguments.overrides)
    run = plan.config.run
    say(
        f"Training {original.location} again: {plan.config.model.backbone}, {len(original.metrics())} epochs with seed "
        f"{run.seed}; the replay goes to {run.storage}/{run.name}, the original is not touched."
    )
    for key, (trained, now) in plan.edited.items():
        warn(f"config.yaml was edited after training: {key} is {now!r} in it, {trained!r} was trained with and is now.")
    console.print(circumstances_table(plan.before))
    edited = {key: list(values) for key, values in plan.edited.items()}
    record: dict[str, Any] = {"original": str(original.location), "edited": edited}
    if plan.data_changed and not arguments.anyway:
        if arguments.json:
            before = [one.to_json() for one in plan.before]
            print_json(record | {"replay": None, "equal": None, "circumstances": before})
        raise GateError(data_changes(original, plan))
    replay = train_again(plan)
    comparison, same_weights = compare_runs(original, replay, arguments.tolerance)
    known = circumstances_of(original), circumstances_of(replay) | {"configuration": config_hash(plan.trained)}
    circumstances = compare_circumstances(*known)
    record |= {
        "replay": str(replay.location),
        **comparison.to_json(),
        "same_weights": same_weights,
        "circumstances": [one.to_json() for one in circumstances],
    }
    (replay.location / "replay.json").write_bytes((to_json(record) + "\n").encode())
    if arguments.json:
        print_json(record)
    return _conclude(comparison, same_weights, circumstances, original, replay)


def _conclude(
    comparison: Comparison,
    same_weights: bool | None,
    circumstances: Sequence[Circumstance],
    original: RunFolder,
    replay: RunFolder,
) -> int:
    """Say how it came out. GateError where a figure differs."""
    known = {True: "the weights are the same, bit for bit", False: "the weights differ"}
    weights = "there are no weights to compare" if same_weights is None else known[same_weights]
    if comparison.only_in_replay:
        number, names = len(comparison.only_in_replay), ", ".join(comparison.only_in_replay[:3])
        say(f"{number} figures are only in the replay ({names}, ...): this version records more.")
    if comparison.equal:
        largest = comparison.largest
        where = f" at {largest}" if largest is not None and largest.size > 0 else ""
        others = [one.what for one in circumstances if one.verdict == "differs"]
        although = f", although these differ: {', '.join(others)}" if others else ""
        say(
            f"equal within {comparison.tolerance:g}: {comparison.num_figures:,} figures, largest difference "
            f"{0.0 if largest is None else largest.size:.3g}{where}; {weights}{although}. The replay is in "
            f"{replay.location}; next: rafce report {original.location.command} shows what holds."
        )
        return 0
    from rafce_ray.run.replay import SHOWN_DIFFERENCES

    first = comparison.beyond[0]
    for one in comparison.beyond[:SHOWN_DIFFERENCES]:
        say(f"  {one} (difference {one.size:.3g})")
    if len(comparison.beyond) > SHOWN_DIFFERENCES:
        say(f"  and {len(comparison.beyond) - SHOWN_DIFFERENCES:,} more, all in {replay.location / 'replay.json'}")
    raise GateError(
        f"{replay.location} is not {original.location}: {len(comparison.beyond):,} of {comparison.num_figures:,} "
        f"figures differ by more than {comparison.tolerance:g}. The first: {first}. The largest: {comparison.largest}. "
        f"Also, {weights}.\n{_causes(circumstances, same_weights)}"
    )


def _causes(circumstances: Sequence[Circumstance], same_weights: bool | None) -> str:
    altered = "the original's records were altered, or"
    if same_weights:
        return f"As the weights are the same, {altered} another version measures otherwise."
    lines = [
        f"\n  {one.what}: {one.original} in the original, {one.replay} in the replay ({one.verdict})"
        for one in circumstances
        if one.verdict != "same"
    ]
    if not lines:
        return f"No circumstance that is known differs: {altered} its hardware does not compute the same twice."
    return f"What differs, or is not known to be the same:{''.join(lines)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce replay",
        description="Reproduce a finished run: train it again with its configuration, seed and data, and compare all "
        "figures of every epoch. The original is not changed. Exit code 3: figures differ, or the data have changed.",
        epilog="Example: rafce replay runs/NAME   or: rafce replay runs/STUDY/trials/NAME",
    )
    parser.add_argument(
        "run", metavar="RUN_OR_TRIAL", help="folder of a finished run, or of a study's trial; a path or URI"
    )
    add_data_overrides(parser, "current place of the data: data.root, data.images, data.store_dir")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="difference up to which figures count as equal, relative where they are above 1 (default 1e-06; 0.01 on a "
        "GPU, whose kernels do not add in the same order each time)",
    )
    parser.add_argument("--anyway", action="store_true", help="train even if the data have changed")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser
