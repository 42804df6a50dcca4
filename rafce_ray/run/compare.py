"""Compares runs: their circumstances, all their recorded figures, and their quality on the same images.

``compare_figures`` compares a run with its replay, figure by figure. ``compare`` compares runs on the same images, with
paired bootstrap intervals of their differences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.table import Column, Table

from rafce_ray.base.console import warn
from rafce_ray.base.errors import UsageError
from rafce_ray.base.figures import FIGURES, WITH_INTERVAL
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.evaluate import data_config_for, open_for_bundle, split_outputs
from rafce_ray.config import Config, build_config, differences, flatten
from rafce_ray.metrics.calibration import Calibration, SplitOutputs
from rafce_ray.metrics.comparison import Difference, Scored, comparable_figures, difference, f1_of, same_images, score
from rafce_ray.run.folder import RunFolder, open_finished

ENDS = ("finished", "stopped_early", "diverged")
"""Events at the end of a run."""


@dataclass(frozen=True)
class Circumstance:
    """Something that figures may depend on, in one run and in another; None is unknown."""

    what: str
    original: str | None
    replay: str | None

    @property
    def verdict(self) -> str:
        """``same``, ``differs`` or ``unknown``: equal commits with uncommitted changes may be different code."""
        if self.original is None or self.replay is None:
            return "unknown"
        if self.original != self.replay:
            return "differs"
        is_code_known = self.what != "git commit" or re.fullmatch("[0-9a-f]{40,64}", self.original)
        return "same" if is_code_known else "unknown"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "verdict": self.verdict}


def circumstances_of(folder: RunFolder) -> dict[str, str | None]:
    """The circumstances of a run by name, from its folder; None is unknown."""
    provenance, events = folder.provenance(), folder.events()
    starts = [number for number, event in enumerate(events) if event["event"] == "started"]
    before_last_start = events[: starts[-1]] if starts else []
    started = [events[number] | events[number].get("hardware", {}) for number in starts]

    return {
        "configuration": str(provenance["config_hash"]),
        "data fingerprint": str(provenance["data_fingerprint"]),
        "seed": str(provenance["seed"]),
        **software_circumstances(provenance["software"]),
        "workers": distinct(started, "num_workers") or str(provenance["config"]["run"]["num_workers"]),
        "device": distinct(started, "device"),
        "processor": distinct(started, "name"),
        "threads": distinct(started, "threads"),
        "precision": distinct(started, "precision"),
        # Epochs before an extension were trained under the learning rates of a shorter run.
        "trained": "extended after its end" if any(one["event"] in ENDS for one in before_last_start) else "in one go",
    }


def distinct(records: Iterable[Mapping[str, Any]], key: str) -> str | None:
    """The values of a key in the records that have it, each once, in order: ``2 then 4``; None without any."""
    return " then ".join(dict.fromkeys(str(one[key]) for one in records if key in one)) or None


def software_circumstances(software: Mapping[str, Any]) -> dict[str, str | None]:
    """Versions and git commit under names for people."""
    return {name.replace("_", " "): str(version) for name, version in software.items()}


def compare_circumstances(
    original: Mapping[str, str | None], replay: Mapping[str, str | None]
) -> tuple[Circumstance, ...]:
    """Both runs' circumstances next to each other."""
    return tuple(Circumstance(what, original.get(what), replay.get(what)) for what in {**original, **replay})


NOT_COMPARED = frozenset(
    {"images_per_s", "data_wait", "elapsed_s", "num_workers", "run_dir", "bundle", "weights_sha256"}
)
"""Timings, places, the number of workers (a circumstance) and the weights, which are compared as a whole."""

MISSING = "missing"

Records = Mapping[int | None, Mapping[str, Any]]
"""Records by epoch; None: the record of the finished model."""


@dataclass(frozen=True)
class FigureDifference:
    """One figure of both runs; ``epoch`` None: of the finished model.

    ``size`` is |original - replay|, divided by the larger of both where that is above 1 (counts, norms). It is infinite
    where one value is missing or undefined, or where values that are not numbers differ.
    """

    epoch: int | None
    figure: str
    original: Any
    replay: Any
    size: float

    def __str__(self) -> str:
        where = "of the finished model" if self.epoch is None else f"in epoch {self.epoch}"
        return f"{self.figure} {where}: {shown(self.original)} in the original, {shown(self.replay)} in the replay"


@dataclass(frozen=True)
class Comparison:
    """The original's figures compared with the replay's: those ``beyond`` the tolerance, and the ``largest``.

    ``only_in_replay`` are figures that the original did not record.
    """

    num_figures: int
    tolerance: float
    beyond: tuple[FigureDifference, ...]
    largest: FigureDifference | None
    only_in_replay: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether no figure differs by more than the tolerance."""
        return not self.beyond

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite size is null in JSON text."""
        return {"equal": self.equal, **asdict(self)}


def compare_figures(original: Records, replay: Records, tolerance: float) -> Comparison:
    """Compare everything in the original's records with the replay's, except what NOT_COMPARED names."""
    found: list[FigureDifference] = []
    only_in_replay: set[str] = set()
    for epoch in sorted({*original, *replay}, key=lambda epoch: math.inf if epoch is None else epoch):
        if epoch not in original or epoch not in replay:
            there, here = ("there" if epoch in records else MISSING for records in (original, replay))
            found.append(FigureDifference(epoch, "the whole record", there, here, math.inf))
            continue
        before, after = dict(_leaves(original[epoch])), dict(_leaves(replay[epoch]))
        only_in_replay |= after.keys() - before.keys()
        for name, value in before.items():
            again = after.get(name, MISSING)
            found.append(FigureDifference(epoch, name, value, again, _size(value, again)))
    return Comparison(
        num_figures=len(found),
        tolerance=tolerance,
        beyond=tuple(one for one in found if one.size > tolerance),
        largest=max(found, key=lambda one: one.size, default=None),
        only_in_replay=tuple(sorted(only_in_replay)),
    )


def _leaves(record: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``validation/per_class/sadly angry/f1`` and its value, for every compared value in a record."""
    if isinstance(record, dict):
        for key, value in record.items():
            if key not in NOT_COMPARED:
                yield from _leaves(value, f"{path}/{key}" if path else str(key))
    elif isinstance(record, list):
        for index, value in enumerate(record):
            named = value if isinstance(value, dict) else {}
            yield from _leaves(value, f"{path}/{named.get('emotion', named.get('action_unit', index))}")
    else:
        yield path, record


def _size(original: Any, replay: Any) -> float:
    if isinstance(original, int | float) and isinstance(replay, int | float):
        return abs(original - replay) / max(1.0, abs(original), abs(replay))
    return 0.0 if original == replay else math.inf


def shown(value: Any) -> str:
    """A figure for people."""
    return f"{value:.6g}" if isinstance(value, float) else "undefined" if value is None else str(value)


@dataclass(frozen=True)
class Run:
    """A finished run and its raw outputs on the compared split."""

    name: str
    place: str
    config: Config
    taxonomy: Taxonomy
    calibration: Calibration
    outputs: SplitOutputs
    circumstances: dict[str, str | None]


@dataclass(frozen=True)
class Compared:
    """Compared runs, of which the first is the reference.

    ``scored`` has one entry per run; ``against_first`` one per run, by figure, empty for the first. A figure that
    cannot be compared is missing there, and ``remarks`` say why.
    """

    runs: tuple[Run, ...]
    scored: tuple[Scored, ...]
    against_first: tuple[dict[str, Difference], ...]
    config_differences: dict[str, list[Any]]
    remarks: tuple[str, ...]


def compare(runs: Sequence[Run], *, resamples: int = 1000) -> Compared:
    """Compare runs on the images that they were measured on, matched by name.

    Raises:
        UsageError: their images or their emotions differ, or they predict nothing in common.
    """
    first = runs[0]
    for other in runs[1:]:
        _check_emotions(first, other)
    aligned = same_images([run.outputs for run in runs])
    remarks: list[str] = []
    for number, other in enumerate(runs[1:], start=1):
        remarks += _data_remarks(first, other)
        ours, theirs = aligned[0].action_units, aligned[number].action_units
        if first.taxonomy.action_units == other.taxonomy.action_units:
            changed = ~((ours == theirs) | (np.isnan(ours) & np.isnan(theirs))).all(axis=1)
            if changed.any():
                remarks.append(
                    f"{changed.sum()} images have other AU labels in {other.name} than in {first.name}: both are "
                    f"measured by those of {first.name}."
                )
            aligned[number] = replace(aligned[number], action_units=ours)
    scored = [
        score(one, run.taxonomy, run.calibration, resamples=resamples) for one, run in zip(aligned, runs, strict=True)
    ]
    against_first: list[dict[str, Difference]] = [{}]
    for other, measured in zip(runs[1:], scored[1:], strict=True):
        figures = comparable_figures(first.taxonomy, other.taxonomy)
        against_first.append({figure: difference(measured, scored[0], figure) for figure in figures})
    keys = {key for other in runs[1:] for key in differences(first.config, other.config)}
    flat = [flatten(run.config) for run in runs]
    changed_keys = {key: [one[key] for one in flat] for key in flat[0] if key in keys}
    return Compared(tuple(runs), tuple(scored), tuple(against_first), changed_keys, tuple(remarks))


def _check_emotions(first: Run, other: Run) -> None:
    ours, theirs = first.taxonomy, other.taxonomy
    if ours.emotions and theirs.emotions and ours.emotions != theirs.emotions:
        raise UsageError(
            f"{first.name} predicts the emotions {list(ours.emotions)}, {other.name} {list(theirs.emotions)}. "
            "Compare runs with the same data.emotions."
        )
    if not comparable_figures(ours, theirs):
        raise UsageError(
            f"{first.name} and {other.name} predict nothing in common: {_described(ours)} and {_described(theirs)}. "
            "Compare runs of the same task."
        )


def _data_remarks(first: Run, other: Run) -> list[str]:
    remarks = []
    ours, theirs = (str(run.circumstances["data fingerprint"]) for run in (first, other))
    if ours != theirs:
        remarks.append(
            f"{other.name} was trained on other data than {first.name} (fingerprint {theirs[:12]}, {ours[:12]}); the "
            "images compared here have the same names and emotions."
        )
    if first.taxonomy.action_units != other.taxonomy.action_units:
        units = [_described(replace(run.taxonomy, emotions=(), components=())) for run in (first, other)]
        remarks.append(f"action units are not compared: {first.name} predicts {units[0]}, {other.name} {units[1]}.")
    if first.taxonomy.emotions != other.taxonomy.emotions:
        silent = other if first.taxonomy.emotions else first
        remarks.append(f"emotions are not compared: {silent.name} does not predict them.")
    return remarks


def _described(taxonomy: Taxonomy) -> str:
    parts = [f"{taxonomy.num_emotions} emotions"] if taxonomy.emotions else []
    if taxonomy.action_units:
        parts.append(f"{taxonomy.num_action_units} action units ({', '.join(taxonomy.action_unit_codes)})")
    return " and ".join(parts) or "none"


def load_run(place: str, name: str, split: str, *, data: Sequence[str] = (), device: str = "auto") -> Run:
    """A finished run with its bundle's raw outputs on a split: the stored ones, else measured now on its data.

    ``data``: overrides of the configuration of the data.

    Raises:
        UsageError: there is no finished run with a bundle at that place.
        RafceError: its bundle or its data cannot be used.
    """
    folder = open_finished(place)
    if not folder.bundle.exists():
        result = folder.result() or {}
        raise UsageError(
            f"{folder.location} has no bundle: it ended as {str(result.get('status')).replace('_', ' ')} after "
            f"{result.get('epochs')} epochs. Compare runs that have one."
        )
    bundle, circumstances = load_bundle(folder.bundle.uri), circumstances_of(folder)
    outputs = folder.outputs(split)
    if outputs is None:
        dataset = open_for_bundle(bundle, data_config_for(bundle, data))
        if dataset.fingerprint != circumstances["data fingerprint"]:
            warn(f"the data of {name} have changed since it was trained: it is measured on what is there now.")
        outputs = split_outputs(bundle, dataset, split, device=choose_device(device))
    config = build_config(folder.provenance()["config"])
    return Run(name, str(folder.location), config, bundle.taxonomy, bundle.calibration, outputs, circumstances)


def render(compared: Compared) -> list[Table]:
    """Tables for the terminal: configurations, figures with intervals, differences to the first run.

    The last table has the classes and AUs whose F1 really differs.
    """
    runs, others = compared.runs, compared.against_first[1:]
    configuration = _table("configuration", runs)
    for key, values in compared.config_differences.items():
        configuration.add_row(key, *("null" if value is None else str(value) for value in values))
    for row in _other_circumstances(compared):
        configuration.add_row(*row)
    figures = _table("figure (95 % interval)", runs)
    apart = _table(f"difference to {runs[0].name}", runs[1:])
    for figure in WITH_INTERVAL:
        values = [_with_interval(one.figures[figure], one.interval(figure)) for one in compared.scored]
        figures.add_row(FIGURES[figure].title, *values)
        apart.add_row(FIGURES[figure].title, *(_cell(one.get(figure)) for one in others))
    really = _table("F1 that really differs", runs[1:])
    names = (name for run in runs for name in (*run.taxonomy.emotions, *run.taxonomy.action_unit_codes))
    for name in dict.fromkeys(names):
        found = [one.get(f1_of(name)) for one in others]
        if any(one is not None and one.is_real for one in found):
            really.add_row(name, *map(_cell, found))
    if not really.row_count:
        really.add_row("of no class and no action unit")
    return [*([configuration] if configuration.row_count else []), figures, apart, really]


def _other_circumstances(compared: Compared) -> list[list[str]]:
    """Rows of the circumstances, except the configuration, in which any run differs from the first."""
    all_of_them = [run.circumstances for run in compared.runs]
    compared_ones = (one for other in all_of_them[1:] for one in compare_circumstances(all_of_them[0], other))
    differing = {one.what for one in compared_ones if one.verdict == "differs"} - {"configuration", "seed"}
    names = dict.fromkeys(what for one in all_of_them for what in one if what in differing)
    return [[what, *(str(one.get(what))[:20] for one in all_of_them)] for what in names]


def _table(first: str, runs: Sequence[Run]) -> Table:
    others = (Column(run.name, justify="right", overflow="fold") for run in runs)
    return Table(Column(first, no_wrap=True), *others, box=None, padding=(0, 2, 0, 0), title=" ", title_justify="left")


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} ({interval[0]:.2f}-{interval[1]:.2f})" if math.isfinite(value) else "–"


def _cell(one: Difference | None) -> str:
    if one is None:
        return "not compared"
    if not math.isfinite(one.low):
        return "–"
    return f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f}) {'real' if one.is_real else 'noise'}"


def to_json_record(compared: Compared, split: str) -> dict[str, Any]:
    """The comparison as plain values; NaN is undefined."""
    return {
        "split": split,
        "num_images": len(compared.runs[0].outputs.names),
        "config_differences": compared.config_differences,
        "remarks": list(compared.remarks),
        "runs": [
            {
                "run": run.place,
                "circumstances": run.circumstances,
                "figures": {
                    figure: {"value": value, "interval": scored.interval(figure)}
                    for figure, value in scored.figures.items()
                },
                "against_first": {
                    figure: {"value": one.value, "interval": [one.low, one.high], "real": one.is_real}
                    for figure, one in against_first.items()
                },
            }
            for run, scored, against_first in zip(compared.runs, compared.scored, compared.against_first, strict=True)
        ],
    }
