"""A study's winner and base on the test split: measured once, at the end, never to choose by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from rafce_ray.base.console import pretty_json, say, warn
from rafce_ray.base.figures import FIGURES, WITH_INTERVAL
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.bundle import Bundle, load_bundle
from rafce_ray.bundle.evaluate import data_config_for, open_for_bundle, split_outputs
from rafce_ray.data.loader import Dataset
from rafce_ray.data.records import Progress
from rafce_ray.metrics.calibration import SplitOutputs
from rafce_ray.metrics.comparison import (
    NO_SPREAD,
    Difference,
    Figure,
    OverSeeds,
    Scored,
    Spread,
    comparable_figures,
    difference_of_means,
    mean_half_width,
)
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.finalists import (
    Basis,
    TaggedOutputs,
    Verdict,
    on_labels_of_first,
    over_seeds,
    runs_of,
    score_with_losses,
    words,
)
from rafce_ray.study.folder import StudyFolder

TEST_FILE = "test.json"

MEASURED = (*WITH_INTERVAL, "emotion_loss", "au_loss")
"""What is measured, calibrated; the losses in nats, per image and per AU label."""

COMPARED = ("accuracy", "macro_f1", "macro_f1_supported", "au_f1_mean", "score", "au_ap_mean", "emotion_loss")
"""Figures whose difference to the base is reported."""


@dataclass(frozen=True)
class MeanFigure:
    """A trial's figure: ``values`` of its runs, their ``mean`` and its 95 % interval; NaN: undefined or unknown."""

    values: tuple[Figure, ...]
    mean: Figure
    low: Figure
    high: Figure


@dataclass(frozen=True)
class OnTest:
    """What the test split says of the winner and of the base.

    ``runs``: the run folders measured, by trial; ``figures``: by trial and MEASURED. ``differences``: winner minus base
    as it is (a loss below 0 is better), by COMPARED; those that mean something else for both, and all where the base
    could not be measured, are absent. ``looks``: winners of this study that were measured on test so far, this one
    included.
    """

    winner: str
    base: str
    num_images: int
    runs: dict[str, tuple[str, ...]]
    figures: dict[str, dict[str, MeanFigure]]
    differences: dict[str, Difference]
    basis: Basis
    looks: int
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is undefined."""
        differences = {name: {**asdict(one), "real": one.is_real} for name, one in self.differences.items()}
        return asdict(self) | {"differences": differences}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> OnTest:
        """What :meth:`to_json` wrote, also after JSON has made null of NaN."""
        return TypeAdapter(cls).validate_python(record)

    def sentences(self) -> list[str]:
        """What the test split says, in plain lines."""
        return words("on_test.txt.j2", found=self, directions=FIGURES).splitlines()


_Run = tuple[str, Bundle, TaggedOutputs]
"""The name of a measured run of a trial, its bundle, and its outputs, which name the trial."""


def measure_on_test(
    study: StudyFolder, verdict: Verdict, *, device: str = "auto", progress: Progress | None = None
) -> OnTest | None:
    """Measure all runs of winner and base on the test split and write ``test.json``; None if the split has no labels.

    What was measured is never measured again: neither a winner that has a record, nor a run that has kept its outputs.
    The record of an earlier winner becomes ``test-TRIAL.json``.

    Raises:
        RafceError: a bundle or its data cannot be used.
    """
    records = read_records(study)
    if verdict.winner in records:
        found = records.pop(verdict.winner)
        _tell_later_runs(study, found, verdict)
    else:
        measured = _measure(study, verdict, choose_device(device), progress)
        if measured is None:
            return None
        found = measured
    found = replace(found, looks=max(found.looks, 1 + len(records)))
    for winner, record in records.items():
        (study.location / f"test-{winner}.json").write_bytes(pretty_json(record.to_json()))
    (study.location / TEST_FILE).write_bytes(pretty_json(found.to_json()))
    (study.location / f"test-{found.winner}.json").delete()
    return found


def read_records(study: StudyFolder) -> dict[str, OnTest]:
    """What was measured on the test split, by winner, from ``test.json`` and each earlier winner's ``test-TRIAL.json``.

    DamagedFile where one cannot be read.
    """
    names = [info.base_name for info in study.location.list() if re.fullmatch(r"test(-.+)?\.json", info.base_name)]
    remedy = "The study's command then measures on test again."
    found = [OnTest.from_json((study.location / name).read_record(remedy)) for name in names]
    return {one.winner: one for one in found}


def _measure(study: StudyFolder, verdict: Verdict, device: torch.device, progress: Progress | None) -> OnTest | None:
    trials = list(dict.fromkeys([verdict.winner, verdict.base]))
    folders = {trial: runs_of(study, verdict, trial) for trial in trials}
    if not folders[verdict.winner]:
        warn(f"{verdict.winner} has no bundle: it is not measured on the test split.")
        return None
    total = sum(map(len, folders.values()))
    say(f"Measuring {total} model{'s' if total != 1 else ''} on the test split: {', '.join(trials)}.")
    datasets: dict[tuple[str, Taxonomy], Dataset] = {}
    runs: list[_Run] = []
    # The base first: its labels are the ones that both are measured by.
    for trial in reversed(trials):
        for folder in folders[trial]:
            bundle = load_bundle(folder.bundle.uri)
            outputs = _outputs(folder, bundle, datasets, device, progress)
            if outputs is None:
                warn(
                    f"no image of the test split of {folder.config().data.root} is labelled: nothing is measured on it."
                )
                return None
            runs.append((folder.location.name, bundle, TaggedOutputs(trial, outputs, bundle.taxonomy)))
    return _compare(verdict, runs)


def _tell_later_runs(study: StudyFolder, current: OnTest, verdict: Verdict) -> None:
    """Name the trainings that were not measured on test. Measuring again with more seeds would be choosing by it."""
    later = [
        folder.location.name
        for trial, measured in current.runs.items()
        for folder in runs_of(study, verdict, trial)
        if folder.location.name not in measured
    ]
    if later:
        say(
            f"{', '.join(later)} {'was' if len(later) == 1 else 'were'} trained since: not measured on the test split, "
            f"whose figures stay those of the first look ({TEST_FILE})."
        )


def _outputs(
    folder: RunFolder,
    bundle: Bundle,
    datasets: dict[tuple[str, Taxonomy], Dataset],
    device: torch.device,
    progress: Progress | None,
) -> SplitOutputs | None:
    """The run's raw outputs on test, measured and kept if it has none; None where no test image is labelled.

    ``datasets``: the open ones, each reading of the data once for all runs that share it.
    """
    kept = folder.outputs("test")
    if kept is not None:
        return kept
    data = data_config_for(bundle, [])
    # How a training drew and changed its images makes no difference here.
    key = (data.reading, bundle.taxonomy)
    if key not in datasets:
        datasets[key] = open_for_bundle(bundle, data)
    dataset = datasets[key]
    indices, targets = dataset.indices("test"), dataset.targets
    if not ((targets.emotion[indices] >= 0).any() or (~np.isnan(targets.action_units[indices])).any()):
        return None
    outputs = split_outputs(bundle, dataset, "test", device=device, progress=progress)
    folder.write_outputs("test", outputs)
    return outputs


def _compare(verdict: Verdict, runs: Sequence[_Run]) -> OnTest:
    comparable = on_labels_of_first([tagged for _, _, tagged in runs])
    scored: dict[str, list[Scored]] = {}
    names: dict[str, list[str]] = {}
    for (name, bundle, tagged), split in zip(runs, comparable.splits, strict=True):
        found = score_with_losses(split, bundle.taxonomy, bundle.calibration)
        scored.setdefault(tagged.trial, []).append(found)
        names.setdefault(tagged.trial, []).append(name)
    measured, spreads = over_seeds(scored, MEASURED)
    spreads = {name: spread if spread.freedom else NO_SPREAD for name, spread in spreads.items()}
    differences = {}
    if verdict.base != verdict.winner and verdict.base in scored:
        ours, theirs = measured[verdict.winner], measured[verdict.base]
        one, other = {tagged.trial: tagged.taxonomy for _, _, tagged in runs}.values()
        same = {*comparable_figures(one, other), *(["emotion_loss"] if one.emotions == other.emotions else [])}
        for name in (name for name in COMPARED if name in same):
            value, half_width = difference_of_means(ours[name], theirs[name], spreads[name])
            differences[name] = Difference(value, value - half_width, value + half_width)
    trials = [name for name in dict.fromkeys([verdict.winner, verdict.base]) if name in scored]
    return OnTest(
        winner=verdict.winner,
        base=verdict.base,
        num_images=len(comparable.splits[0].names),
        runs={trial: tuple(names[trial]) for trial in trials},
        figures={
            trial: {name: _mean_figure(one, spreads[name]) for name, one in measured[trial].items()} for trial in trials
        },
        differences=differences,
        basis="seeds and images" if any(spread.freedom for spread in spreads.values()) else "images only",
        looks=1,
        remarks=tuple(comparable.remarks),
    )


def _mean_figure(one: OverSeeds, spread: Spread) -> MeanFigure:
    half_width = mean_half_width(one, spread)
    return MeanFigure(one.values, one.mean, one.mean - half_width, one.mean + half_width)
