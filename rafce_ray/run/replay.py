"""Trains a run again from its folder alone, and compares all figures with the original's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from rich.table import Column, Table

from rafce_ray.base.console import progress_bar, to_json
from rafce_ray.base.errors import UsageError
from rafce_ray.base.hardware import choose_device, describe_hardware, describe_software
from rafce_ray.base.storage import Location, locate
from rafce_ray.config import LONGEST_NAME, Config, apply_overrides, build_config, config_hash, differences
from rafce_ray.data.loader import Prepared, prepare
from rafce_ray.run.compare import (
    Circumstance,
    Comparison,
    Records,
    circumstances_of,
    compare_circumstances,
    compare_figures,
    shown,
    software_circumstances,
)
from rafce_ray.run.folder import TRIALS, RunFolder

TOLERANCES = {"cpu": 1e-6, "cuda": 1e-2}
"""Difference up to which figures count as equal, by device.

A GPU's kernels add up in another order each time, and such differences grow in training."""

MAY_MOVE = ("data.root", "data.images", "data.store_dir")
"""Keys that a replay may set: the same data may be elsewhere, and their fingerprint shows it."""

SHOWN_DIFFERENCES = 10


@dataclass(frozen=True)
class Plan:
    """A replay before it runs: the original's configuration as trained, the replay's, and the circumstances of both.

    ``edited``: keys of the stored configuration that were changed after training, with both values.
    """

    trained: Config
    config: Config
    edited: dict[str, tuple[Any, Any]]
    before: tuple[Circumstance, ...]
    prepared: Prepared

    @property
    def data_changed(self) -> bool:
        """Whether the original was trained on other data."""
        return any(one.what == "data fingerprint" and one.verdict == "differs" for one in self.before)


def plan_replay(original: RunFolder, overrides: Sequence[str] = ()) -> Plan:
    """Read the configuration of a finished run, prepare its data, and compare the circumstances before training.

    Raises:
        UsageError: an override is not one of MAY_MOVE, the run took over another's weights, or the data have moved.
        GateError: the data may not be trained on any more.
    """
    if wrong := [text for text in overrides if text.partition("=")[0].strip() not in MAY_MOVE]:
        raise UsageError(f"{wrong[0]!r}: a replay trains what was trained; only {', '.join(MAY_MOVE)} may be set.")
    _refuse_unrepeatable(original)
    provenance, known = original.provenance(), circumstances_of(original)
    trained = build_config(provenance["config"])
    values = apply_overrides(trained.model_dump(mode="json"), overrides)
    if trained.model.weights == "auto":
        values["model"]["weights"] = provenance["weights"]["source"]
    if known["threads"] and known["threads"].isdigit():
        values["run"]["cpus_per_worker"] = int(known["threads"])
    # A range of workers is replayed with the most that there were: changes of their number are not repeated.
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
    """UsageError for a trial that was stopped early or that took over the weights of another trial."""
    result, place = original.result() or {}, original.location
    command = f"rafce train --config {(place / 'config.yaml').command} run.name=NAME run.storage=FOLDER"
    if result.get("status") in ("stopped_by_scheduler", "failed"):
        raise UsageError(
            f"{place} did not come to its own end ({result['status'].replace('_', ' ')} after {result['epochs']} "
            f"epochs), so there are no final figures to repeat. To train its configuration to the end: {command}"
        )
    # Population-based training is gone, but its trials are still on disk.
    if any(event["event"] == "adopted" for event in original.events()):
        raise UsageError(
            f"{place} is a trial of population-based training and took over the weights of another trial. Its "
            f"configuration does not give the same figures. To train its last values from scratch: {command}"
        )


def _place_beside(location: Location) -> tuple[str, str]:
    """Storage and name of a replay: next to its run; for a trial in ``replays`` next to ``trials``.

    Readers of ``trials`` do not count it. The name is the first that is free, or whose replay was
    interrupted and continues.
    """
    storage = location.parent
    if storage.name == TRIALS:
        storage = storage.parent / "replays"
    # With room for a number.
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", location.name).lstrip("._-")[: LONGEST_NAME - 16] + "-replay"
    names = (base if number == 1 else f"{base}-{number}" for number in count(1))
    return str(storage), next(name for name in names if RunFolder(str(storage / name)).result() is None)


def compare_runs(original: RunFolder, replay: RunFolder, tolerance: float | None) -> tuple[Comparison, bool | None]:
    """All figures of two finished runs, and whether their weights are identical (None: one has none)."""
    if tolerance is None:
        on_gpu = any("cuda" in str(circumstances_of(folder)["device"]) for folder in (original, replay))
        tolerance = TOLERANCES["cuda" if on_gpu else "cpu"]
    comparison = compare_figures(_records(original), _records(replay), tolerance)
    weights = [(folder.result() or {}).get("weights_sha256") for folder in (original, replay)]
    return comparison, None if None in weights else weights[0] == weights[1]


def _records(folder: RunFolder) -> Records:
    records: dict[int | None, dict[str, Any]] = {record["epoch"]: record for record in folder.metrics()}
    return records | {None: folder.result() or {}}


def data_changes(original: RunFolder, plan: Plan) -> str:
    """Describes a change of the data: the fingerprint shows that there is one, the audits' counts may show which."""
    before: Records = {None: original.audit() or {}}
    now: Records = {None: json.loads(to_json(plan.prepared.audit.to_json()))}
    changed = [one for one in compare_figures(before, now, 0.0).beyond if isinstance(one.original, int | float)]
    counts = "; ".join(
        f"{one.figure} {shown(one.original)}, now {shown(one.replay)}" for one in changed[:SHOWN_DIFFERENCES]
    )
    return (
        f"the data of {original.location} have changed since it was trained: "
        f"{counts or 'labels count the same, so images or single labels changed'}. Restore them, or add data.root=PATH "
        "if they lie elsewhere; --anyway trains on what is there now."
    )


def circumstances_table(circumstances: Sequence[Circumstance]) -> Table:
    """Every circumstance as a table row; one that is the same has one value."""
    columns = (Column(name, overflow="fold") for name in ("circumstance", "original", "now", ""))
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for one in circumstances:
        now = "" if one.verdict == "same" else one.replay or "unknown"
        table.add_row(one.what, one.original or "unknown", now, one.verdict)
    return table
