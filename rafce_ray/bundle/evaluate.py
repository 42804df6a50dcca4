"""Measures a bundle on one split as training does, and prints the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.table import Table

from rafce_ray.base.console import progress_bar, warn
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.figures import FIGURES, WITH_INTERVAL
from rafce_ray.base.taxonomy import Taxonomy, class_named, make_taxonomy
from rafce_ray.bundle.bundle import Bundle
from rafce_ray.bundle.model import Predictor
from rafce_ray.config import DataConfig, apply_overrides, build_config
from rafce_ray.data.loader import Dataset, open_dataset, prepare
from rafce_ray.data.records import SPLITS, Progress, Targets
from rafce_ray.metrics.calibration import (
    Calibration,
    Outputs,
    SplitOutputs,
    calibrated,
    reliability_figures,
    risk_coverage,
)
from rafce_ray.metrics.counts import count_probabilities, evaluate_probabilities, summarise
from rafce_ray.metrics.text import number

EVALUATION_BATCH = 128
"""Images per forward pass; with another number the last digits of probabilities may differ."""


def evaluate_bundle(
    bundle: Bundle,
    dataset: Dataset,
    split: str,
    *,
    batch_size: int = EVALUATION_BATCH,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The figures of :func:`evaluate_outputs` on one split, and ``split``.

    The same bundle, images, device and batch size give the same figures, wherever they are computed. NaN is undefined.

    Raises:
        RafceError: the dataset's targets or images are not what the bundle predicts, or the split has no images.
    """
    if dataset.taxonomy != bundle.taxonomy:
        raise RafceError(
            f"the dataset's targets are {dataset.taxonomy}, the bundle predicts {bundle.taxonomy}. "
            "Open the dataset with the bundle's taxonomy."
        )
    if dataset.images.stored_px != bundle.preprocessing.stored_px:
        raise RafceError(
            f"the dataset's images have {dataset.images.stored_px} px a side, the bundle reads "
            f"{bundle.preprocessing.stored_px}. Set data.stored_px={bundle.preprocessing.stored_px}."
        )
    outputs = split_outputs(bundle, dataset, split, batch_size=batch_size, device=device, progress=progress)
    return {"split": split, **evaluate_outputs(outputs, bundle.taxonomy, bundle.calibration)}


def split_outputs(
    bundle: Bundle,
    dataset: Dataset,
    split: str,
    *,
    batch_size: int = EVALUATION_BATCH,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> SplitOutputs:
    """A bundle's raw outputs on one split of a dataset that fits it; RafceError where the split has no images."""
    indices = dataset.indices(split)
    if len(indices) == 0:
        raise RafceError(
            f"the {split} split has no images. Choose another of {', '.join(SPLITS)}, or look at the audit."
        )
    predictor = Predictor(bundle, device)
    found = []
    with (progress or progress_bar)(f"evaluating {split}", len(indices)) as advance:
        for batch in np.split(indices, range(batch_size, len(indices), batch_size)):
            found.append(predictor.outputs(dataset.images.gather(batch)))
            advance(len(batch))
    return SplitOutputs(
        names=[dataset.names[index] for index in indices],
        emotion=dataset.targets.emotion[indices],
        action_units=dataset.targets.action_units[indices],
        outputs=Outputs.concatenate(found),
    )


def evaluate_outputs(outputs: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration) -> dict[str, Any]:
    """The figures of :func:`rafce_ray.metrics.counts.evaluate_probabilities` and those of the calibration.

    ``au_f1_mean_at_half``, and ``f1_at_half`` per AU: F1 at 0.5 of the network's own probabilities. ``reliability``:
    ``before`` and ``after`` calibration (:func:`rafce_ray.metrics.calibration.reliability_figures`). ``risk_coverage``:
    see there. ``unsure``: share of images marked unsure and the accuracy of the others, None without a limit.
    """
    raw = calibrated(outputs.outputs, Calibration.uncalibrated(taxonomy.num_action_units))
    found = calibrated(outputs.outputs, calibration)
    figures = evaluate_probabilities(found, outputs, taxonomy, calibration.au_thresholds)
    at_half = summarise(count_probabilities(raw, outputs), taxonomy)
    for entry, half in zip(figures["per_au"], at_half["per_au"], strict=True):
        entry["f1_at_half"] = half["f1"]
    unsure, known, limit = None, outputs.emotion >= 0, calibration.unsure_below
    if limit is not None and found.emotion.shape[1] and known.any():
        sure = found.emotion[known].max(axis=1).astype(np.float64) >= limit
        right = found.emotion[known].argmax(axis=1) == outputs.emotion[known]
        accuracy = float(right[sure].mean()) if sure.any() else math.nan
        unsure = {"below": limit, "share": float(1 - sure.mean()), "accuracy_of_the_others": accuracy}
    return figures | {
        "au_f1_mean_at_half": at_half["au_f1_mean"],
        "reliability": {"before": reliability_figures(raw, outputs), "after": reliability_figures(found, outputs)},
        "risk_coverage": risk_coverage(found.emotion, outputs.emotion),
        "unsure": unsure,
    }


def data_config_for(bundle: Bundle, overrides: Sequence[str]) -> DataConfig:
    """The data that the bundle was trained on, by its provenance, with ``data.key=value`` overrides on top.

    Raises:
        UsageError: an override is no data key, or asks for images of another size than the bundle reads.
    """
    others = [text for text in overrides if not text.strip().startswith("data.")]
    if others:
        raise UsageError(f"{others[0]!r}: evaluation takes data.key=value only, for example data.root=FOLDER.")
    trained_on = dict(bundle.provenance.get("config", {}).get("data", {}))
    stored_px = bundle.preprocessing.stored_px
    data = build_config(apply_overrides({"data": trained_on | {"stored_px": stored_px}}, overrides)).data
    if data.stored_px != stored_px:
        raise UsageError(f"data.stored_px={data.stored_px}: this bundle reads images of {stored_px} px. Leave it out.")
    given = [text.partition("=")[0].strip() for text in overrides]
    differs = data.null_policy_in_evaluation != data.null_policy
    if differs and "data.null_policy" in given and "data.evaluation_null_policy" not in given:
        warn(
            f"data.null_policy={data.null_policy} is for train images only: null in validation and test is read as in "
            f"this bundle's training, by data.evaluation_null_policy={data.evaluation_null_policy}. Set that key to "
            "read them otherwise."
        )
    # Action unit codes mean the same everywhere, so the bundle's are read whatever the vocabulary in training.
    return data.model_copy(update={"action_units": bundle.taxonomy.action_units or "none"})


def open_for_bundle(bundle: Bundle, data: DataConfig) -> Dataset:
    """A labelled dataset with targets in the bundle's order of classes and action units, matched by name.

    Raises:
        RafceError: the dataset has emotions that the bundle does not know, or nothing that it predicts.
    """
    prepared = prepare(data, progress=progress_bar, for_training=False)
    for finding in prepared.audit.findings:
        if finding.code == "unread_action_units" and finding.level != "info":
            warn(f"{finding.message}. {finding.remedy}")
    theirs = prepared.taxonomy.emotions if bundle.taxonomy.emotions else ()
    classes = [class_named(name, bundle.taxonomy.emotions) for name in theirs]
    unknown = [name for name, index in zip(theirs, classes, strict=True) if index < 0]
    if unknown:
        raise RafceError(
            f"{data.root}: its emotions {unknown} are none of the bundle's {list(bundle.taxonomy.emotions)}. "
            "Name them as the bundle does with data.emotions=[...], in label order, or choose another bundle."
        )
    taxonomy = make_taxonomy(theirs, bundle.taxonomy.action_units)
    dataset = open_dataset(prepared.store, taxonomy, data.null_policy, data.null_policy_in_evaluation)
    # The extra last entry keeps an unknown emotion at -1.
    order = np.array([*classes, -1], dtype=np.int64)
    targets = replace(dataset.targets, emotion=order[dataset.targets.emotion])
    _warn_of_unlabelled(data, targets, bundle.taxonomy)
    return replace(dataset, targets=targets, taxonomy=bundle.taxonomy)


def _warn_of_unlabelled(data: DataConfig, targets: Targets, taxonomy: Taxonomy) -> None:
    """Warn of outputs without any label; RafceError where no output has labels."""
    num_labelled = np.count_nonzero(~np.isnan(targets.action_units), axis=0).tolist()
    silent = [code for code, count in zip(taxonomy.action_unit_codes, num_labelled, strict=True) if count == 0]
    if taxonomy.num_emotions and not (targets.emotion >= 0).any():
        silent.insert(0, "emotions")
    if len(silent) == taxonomy.num_action_units + bool(taxonomy.num_emotions):
        raise RafceError(
            f"{data.root}: nothing that the bundle predicts ({', '.join(silent)}) is labelled. Give another data.root."
        )
    if silent:
        warn(f"{data.root} has no labels of {', '.join(silent)}: their figures are undefined.")


def render(figures: dict[str, Any]) -> list[Table]:
    """Tables for the terminal: overall with intervals, per class, per action unit; a dash is undefined."""
    overall = _table("figure", "value", "95 % interval", "without a model")
    for key in WITH_INTERVAL:
        floor = FIGURES[key].floor
        without = number(figures[floor]) if floor else ""
        overall.add_row(FIGURES[key].title, number(figures[key]), _interval(figures["intervals"][key]), without)
    tables = [overall]
    if figures["per_class"]:
        table = _table("emotion", "images", "predicted", "precision", "recall", "F1", "95 % int.")
        for entry in figures["per_class"]:
            cells = [str(entry["support"]), str(entry["predicted"])]
            cells += [number(entry[key]) for key in ("precision", "recall", "f1")]
            table.add_row(entry["emotion"], *cells, _interval(entry["f1_interval"]))
        tables.append(table)
    if figures["per_au"]:
        table = _table("action unit", "positive", "known", "floor", "F1", "95 % int.", "at 0.5", "AP")
        for entry in figures["per_au"]:
            cells = [f"{entry['action_unit']} {entry['name']}", str(entry["support"]), str(entry["known"])]
            cells += [number(entry["floor"]), number(entry["f1"]), _interval(entry["f1_interval"])]
            table.add_row(*cells, number(entry["f1_at_half"]), number(entry["ap"]))
        table.caption = "floor: F1 of always saying present; F1 at the bundle's threshold"
        tables.append(table)
    return [*tables, _probabilities_table(figures)]


def _probabilities_table(figures: dict[str, Any]) -> Table:
    """How well probabilities match outcomes, before and after calibration."""
    table = _table("probabilities", "raw", "calibrated", "95 % interval")
    before, after = figures["reliability"]["before"], figures["reliability"]["after"]
    for task, name in (("emotion", "emotion"), ("action_units", "action units")):
        if before[task] is None:
            continue
        for key, measure in (("nll", "log loss"), ("brier", "Brier score"), ("ece", "calibration error")):
            values = [number(one[task][key]) for one in (before, after)]
            table.add_row(f"{measure}, {name}", *values, _interval(after[task]["intervals"][key]))
    if figures["per_au"]:
        values = [number(figures[key]) for key in ("au_f1_mean_at_half", "au_f1_mean")]
        table.add_row("AU F1, at 0.5 and at the thresholds", *values, _interval(figures["intervals"]["au_f1_mean"]))
    table.caption = "lower is better but for F1"
    if figures["unsure"] is not None:
        share, accuracy = figures["unsure"]["share"], number(figures["unsure"]["accuracy_of_the_others"])
        table.caption += f"; {share:.0%} of emotions are marked unsure, the others have an accuracy of {accuracy}"
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), caption_justify="left", title=" ", title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.2f}-{bounds[1]:.2f}" if math.isfinite(bounds[0]) else "–"
