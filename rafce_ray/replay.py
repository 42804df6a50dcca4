"""``rafce replay``: train a run again from its folder alone, and say whether the same figures come out, or what differs."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from rich.table import Table

from rafce_ray.config import LONGEST_NAME, Config, apply_overrides, build_config, config_hash, differences
from rafce_ray.console import console, print_json, progress_bar, run_main, say, to_json, warn
from rafce_ray.data.dataset import Prepared, prepare
from rafce_ray.errors import GateError, UsageError
from rafce_ray.hardware import choose_device, describe_hardware, describe_software
from rafce_ray.ray_environment import check_ray
from rafce_ray.reproduction import (
    Circumstance,
    Comparison,
    Records,
    circumstances_of,
    compare_circumstances,
    compare_figures,
    shown,
    software_circumstances,
)
from rafce_ray.run_folder import TRIALS, RunFolder, open_finished
from rafce_ray.storage import Location, locate
from rafce_ray.train import launch, ray_cluster

TOLERANCES = {"cpu": 1e-6, "cuda": 1e-2}
"""Difference up to which figures count as equal, by device: a GPU's kernels add up in another order each time, and training
lets such differences grow."""

MAY_MOVE = ("data.root", "data.images", "data.store_dir")
"""Keys that a replay may set: the same data may lie elsewhere, which their fingerprint tells."""

SHOWN_DIFFERENCES = 10


@dataclass(frozen=True)
class Plan:
    """What is to be trained again: the configuration that trained the original, the replay's, and what is known before it runs."""

    trained: Config
    config: Config
    edited: dict[str, tuple[Any, Any]]
    before: tuple[Circumstance, ...]
    prepared: Prepared

    @property
    def data_changed(self) -> bool:
        """Whether the data are not those that the original was trained on."""
        return any(one.what == "data fingerprint" and one.verdict == "differs" for one in self.before)


def plan_replay(original: RunFolder, overrides: Sequence[str] = ()) -> Plan:
    """Read what trained a finished run, prepare its data, and compare what can be compared before training.

    Raises:
        UsageError: an override is not one of MAY_MOVE, the run took over another's weights, or the data are not where the run had them.
        GateError: the data may not be trained on any more.
    """
    if wrong := [text for text in overrides if text.partition("=")[0].strip() not in MAY_MOVE]:
        raise UsageError(f"{wrong[0]!r}: a replay trains what was trained; only {', '.join(MAY_MOVE)} may be set.")
    _refuse_unrepeatable(original)
    provenance, known = original.provenance(), circumstances_of(original)
    trained = build_config(provenance["config"])
    values = apply_overrides(trained.model_dump(mode="json"), overrides)
    if known["threads"] and known["threads"].isdigit():
        values["run"]["cpus_per_worker"] = int(known["threads"])
    # A range of workers is trained again by as many as there were at most: their coming and going is not repeated.
    num_workers = max(int(number) for number in re.findall(r"\d+", str(known["workers"])))
    values["run"]["num_workers"] = num_workers
    if known["device"] in ("cpu", "cuda"):
        values["run"]["use_gpu"] = known["device"] == "cuda"
    if known["precision"] in ("fp32", "bf16"):
        values["run"]["precision"] = known["precision"]
    values["run"] |= dict(zip(("storage", "name"), _place_beside(original.location), strict=True))
    config = build_config(values)
    root = locate(str(config.data.root))
    if not root.exists():
        raise UsageError(
            f"the data of {original.location} are not at {root} any more (data.root={config.data.root}). "
            "Go to the folder in which it was trained if that is relative, or add data.root=PATH."
        )
    prepared = prepare(config.data, progress=progress_bar)
    here = describe_hardware(choose_device("auto" if known["device"] == "cuda" else "cpu"))
    now = known | {
        "configuration": config_hash(trained),
        "data fingerprint": prepared.fingerprint,
        **software_circumstances(describe_software()),
        "device": here["device"],
        "processor": here["name"],
        "workers": str(num_workers),
        "trained": "in one go",
    }
    return Plan(trained, config, differences(trained, original.config()), compare_circumstances(known, now), prepared)


def _refuse_unrepeatable(original: RunFolder) -> None:
    """UsageError for a trial that was stopped early or whose weights come from another trial: its configuration does not repeat it."""
    result = original.result() or {}
    if result.get("status") in ("stopped_by_scheduler", "failed"):
        raise UsageError(
            f"{original.location} did not come to its own end ({result['status'].replace('_', ' ')} after {result['epochs']} epochs), so there "
            "are no final figures to repeat. To train its configuration to the end: "
            f"rafce train --config {(original.location / 'config.yaml').command} run.name=NAME run.storage=FOLDER"
        )
    # Population-based training is gone, but its trials are still on disk.
    if any(event["event"] == "adopted" for event in original.events()):
        raise UsageError(
            f"{original.location} is a trial of population-based training and took over the weights of another trial. Its configuration does "
            f"not give the same figures. To train its last values from scratch: rafce train --config {(original.location / 'config.yaml').command} "
            "run.name=NAME run.storage=FOLDER"
        )


def _place_beside(location: Location) -> tuple[str, str]:
    """Storage and name of a replay: beside its run; that of a trial in ``replays`` beside ``trials``, whose readers must not count it.

    The first name that is free, or whose replay was interrupted and goes on.
    """
    storage = location.parent
    if storage.name == TRIALS:
        storage = storage.parent / "replays"
    # With room for a number.
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", location.name).lstrip("._-")[: LONGEST_NAME - 16] + "-replay"
    names = (base if number == 1 else f"{base}-{number}" for number in count(1))
    return str(storage), next(name for name in names if RunFolder(str(storage / name)).result() is None)


def train_again(plan: Plan) -> RunFolder:
    """Train the replay on as many threads as the original had, or as there are; returns its folder."""
    with ray_cluster(plan.config, f"rafce replay {plan.config.run.name}") as (num_cpus, num_gpus):
        values = plan.config.model_dump()
        run = values["run"]
        most = max(1, math.floor(num_cpus / run["num_workers"]))
        if (run["cpus_per_worker"] or 1) > most:
            warn(
                f"the original had {run['cpus_per_worker']} threads a worker, here are {most}: the last digits of figures depend on it."
            )
            run["cpus_per_worker"] = most
        if run["use_gpu"] and num_gpus < run["num_workers"]:
            warn(
                f"the original had a GPU for each of {run['num_workers']} worker(s), here are {num_gpus:g}: training on the CPU."
            )
            run["use_gpu"] = False
        config = build_config(values)
        launch(config)
    return RunFolder(str(locate(config.run.storage) / str(config.run.name)))


def compare_runs(original: RunFolder, replay: RunFolder, tolerance: float | None) -> tuple[Comparison, bool | None]:
    """All figures of two finished runs, and whether their weights are the same, bit for bit (None: one has none)."""
    if tolerance is None:
        on_gpu = any("cuda" in str(circumstances_of(folder)["device"]) for folder in (original, replay))
        tolerance = TOLERANCES["cuda" if on_gpu else "cpu"]
    comparison = compare_figures(_records(original), _records(replay), tolerance)
    weights = [(folder.result() or {}).get("weights_sha256") for folder in (original, replay)]
    return comparison, None if None in weights else weights[0] == weights[1]


def _records(folder: RunFolder) -> Records:
    records: dict[int | None, dict[str, Any]] = {record["epoch"]: record for record in folder.metrics()}
    return records | {None: folder.result() or {}}


def main(argv: list[str] | None = None) -> int:
    """``rafce replay``; exit code 3 where figures differ or the data have changed."""
    return run_main(_main, argv)


def _main(argv: list[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    check_ray()
    original = open_finished(arguments.run)
    plan = plan_replay(original, arguments.overrides)
    run = plan.config.run
    say(
        f"Training {original.location} again: {plan.config.model.backbone}, {len(original.metrics())} epochs with seed {run.seed}; "
        f"the replay goes to {run.storage}/{run.name}, the original is not touched."
    )
    for key, (trained, now) in plan.edited.items():
        warn(f"config.yaml was edited after training: {key} is {now!r} in it, {trained!r} was trained with and is now.")
    console.print(_table(plan.before))
    record: dict[str, Any] = {
        "original": str(original.location),
        "edited": {key: list(values) for key, values in plan.edited.items()},
    }
    if plan.data_changed and not arguments.anyway:
        if arguments.json:
            print_json(
                record | {"replay": None, "equal": None, "circumstances": [one.to_json() for one in plan.before]}
            )
        raise GateError(_data_changed(original, plan))
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
    weights = {
        True: "the weights are the same, bit for bit",
        False: "the weights differ",
        None: "there are no weights to compare",
    }[same_weights]
    if comparison.only_in_replay:
        names = ", ".join(comparison.only_in_replay[:3])
        say(
            f"{len(comparison.only_in_replay)} figures are only in the replay ({names}, ...): this version records more."
        )
    if comparison.equal:
        largest = comparison.largest
        where = f" at {largest}" if largest is not None and largest.size > 0 else ""
        others = [one.what for one in circumstances if one.verdict == "differs"]
        although = f", although these differ: {', '.join(others)}" if others else ""
        say(
            f"equal within {comparison.tolerance:g}: {comparison.num_figures:,} figures, largest difference "
            f"{0.0 if largest is None else largest.size:.3g}{where}; {weights}{although}. The replay is in {replay.location}; "
            f"next: rafce report {original.location.command} shows what holds."
        )
        return 0
    first = comparison.beyond[0]
    for one in comparison.beyond[:SHOWN_DIFFERENCES]:
        say(f"  {one} (difference {one.size:.3g})")
    if len(comparison.beyond) > SHOWN_DIFFERENCES:
        say(f"  and {len(comparison.beyond) - SHOWN_DIFFERENCES:,} more, all in {replay.location / 'replay.json'}")
    raise GateError(
        f"{replay.location} is not {original.location}: {len(comparison.beyond):,} of {comparison.num_figures:,} figures differ by more than "
        f"{comparison.tolerance:g}. The first: {first}. The largest: {comparison.largest}. Also, {weights}.\n{_causes(circumstances, same_weights)}"
    )


def _causes(circumstances: Sequence[Circumstance], same_weights: bool | None) -> str:
    if same_weights:
        return (
            "As the weights are the same, the original's records were altered, or another version measures otherwise."
        )
    lines = [
        f"  {one.what}: {one.original} in the original, {one.replay} in the replay ({one.verdict})"
        for one in circumstances
        if one.verdict != "same"
    ]
    if not lines:
        return "No circumstance that is known differs: the original's records were altered, or its hardware does not compute the same twice."
    return "What differs, or is not known to be the same:\n" + "\n".join(lines)


def _data_changed(original: RunFolder, plan: Plan) -> str:
    """What is known of a change of the data: the fingerprint tells that there is one, the audits' counts may tell which."""
    before: Records = {None: original.audit() or {}}
    now: Records = {None: json.loads(to_json(plan.prepared.audit.to_json()))}
    changed = [one for one in compare_figures(before, now, 0.0).beyond if isinstance(one.original, int | float)]
    counts = "; ".join(
        f"{one.figure} {shown(one.original)}, now {shown(one.replay)}" for one in changed[:SHOWN_DIFFERENCES]
    )
    return (
        f"the data of {original.location} have changed since it was trained: {counts or 'labels count the same, so images or single labels changed'}. "
        f"Restore them, or add data.root=PATH if they lie elsewhere; --anyway trains on what is there now."
    )


def _table(circumstances: Sequence[Circumstance]) -> Table:
    """Every circumstance; what is the same has one value."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("circumstance", "original", "now", ""):
        table.add_column(name, overflow="fold")
    for one in circumstances:
        now = "" if one.verdict == "same" else one.replay or "unknown"
        table.add_row(one.what, one.original or "unknown", now, one.verdict)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce replay",
        description="Train a finished run again from its folder alone, with its configuration, seed and data, and compare all figures of "
        "every epoch. The original is not touched. Exit code 3: figures differ, or the data have changed.",
        epilog="Example: rafce replay runs/NAME   or: rafce replay runs/STUDY/trials/NAME",
    )
    parser.add_argument(
        "run", metavar="RUN_OR_TRIAL", help="folder of a finished run, or of a study's trial; a path or URI"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="data.KEY=VALUE", help=f"where the data lie now: {', '.join(MAY_MOVE)}"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"difference up to which figures are equal, relative where they are above 1 (default {TOLERANCES['cpu']:g}; "
        f"{TOLERANCES['cuda']:g} on a GPU, whose kernels do not add up in the same order twice)",
    )
    parser.add_argument("--anyway", action="store_true", help="train although the data have changed")
    parser.add_argument("--json", action="store_true", help="print the comparison as one JSON line on standard output")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
