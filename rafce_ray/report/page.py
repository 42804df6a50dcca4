"""A run's report as one HTML page: the sections, rows and words of the page; the template lays them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rafce_ray import __version__
from rafce_ray.base.errors import UsageError
from rafce_ray.base.figures import FIGURES, MAIN, MIN_SUPPORT, WITH_INTERVAL
from rafce_ray.base.storage import Location, locate
from rafce_ray.base.taxonomy import ACTION_UNIT_NAMES, parse_action_unit_token
from rafce_ray.bundle.model_card import (
    INTENDED_USE,
    PERCEIVED,
    PROHIBITED_USE,
    SPLIT_NOTES,
    action_unit_counts,
    class_counts,
    label_differences,
    split_sizes,
)
from rafce_ray.config import Config, flatten
from rafce_ray.metrics.text import UNDEFINED, against_floor, constant_f1, headline, interval, number, percent, summary
from rafce_ray.report import plots
from rafce_ray.report.data import MIN_GROUP, ReportData, Split, gather
from rafce_ray.run.compare import distinct
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.watch import duration
from rafce_ray.study.listing import as_text
from rafce_ray.study.watch import roughly

REPORT_FILE = "report.html"
NUM_CONFUSIONS = 8
EVIDENCE_SHOWN = 5
SHOWN_TRIALS = 6
"""Trials that are named where many could be."""

NOTABLE_EVENTS = (
    "resumed",
    "warning",
    "invalid_checkpoint",
    "hung_worker",
    "workers_failed",
    "waiting_for_room",
    "resized",
    "calibration",
    "finding",
    "diverged",
)

STATUS = {"stopped_early": "stopped early", None: "not finished"}
"""Statuses whose words differ from their names."""


def write_report(
    folder: RunFolder,
    *,
    split: Split = "validation",
    slices: str | None = None,
    images: bool = True,
    out: str | None = None,
    overrides: Sequence[str] = (),
    store: str | None = None,
    device: str = "auto",
) -> Location:
    """Write a run's report and return its place: ``report.html`` in the run's folder, replaced, or ``out``, if new.

    The other arguments are those of :func:`rafce_ray.report.data.gather`. Validation figures are the run's own and need
    no forward pass.

    Raises:
        UsageError: there is no run here, ``out`` exists, or the run lacks what the arguments need.
        RafceError: the split cannot be measured.
    """
    place = report_place(folder.location, out)
    data = gather(folder, split=split, slices=slices, images=images, overrides=overrides, store=store, device=device)
    place.write_bytes(render_page(data).encode())
    return place


def report_place(folder: Location, out: str | None) -> Location:
    """The place of the report of a run or a study: in its folder, or ``out``. UsageError where ``out`` exists."""
    if out is None:
        return folder / REPORT_FILE
    place = locate(out)
    if place.exists():
        raise UsageError(f"--out {place}: exists already. Give a new name, or remove it.")
    return place


def render_page(data: ReportData) -> str:
    """The whole page, without scripts and external resources."""
    page = (
        template_environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            run=data.run,
            figures=data.figures,
            status=STATUS.get(data.run.status, data.run.status),
            headline=None if data.figures is None else headline(data.figures, data.split),
            summary=[] if data.figures is None else summary(data.figures),
            tiles=list(_tiles(data)),
            alerts=list(_alerts(data)),
            diagnoses=[(one, patch_lines(one.patch)) for one in data.diagnoses],
            trained=_trained_on(data),
            charts=_charts(data),
            epochs=_epochs(data),
            confusion=_confusion(data),
            per_class=_per_class(data),
            per_au=_per_au(data),
            calibration=list(_calibration_rows(data)),
            groups=data.groups,
            settings=_settings(data.run.config),
            provenance=list(_provenance(data)),
            events=[
                (_time(one["time"]), one["event"], one["message"])
                for one in data.run.events
                if one["event"] in NOTABLE_EVENTS and one.get("message")
            ],
            text={
                "split_note": SPLIT_NOTES[data.split],
                "perceived": PERCEIVED,
                "intended": INTENDED_USE,
                "prohibited": PROHIBITED_USE,
                "of_emotions": [name for name in WITH_INTERVAL if FIGURES[name].task == "emotion"],
                "titles": {name: one.title for name, one in FIGURES.items()},
                "undefined": UNDEFINED,
            },
            limits={"support": MIN_SUPPORT, "group": MIN_GROUP, "evidence": EVIDENCE_SHOWN},
            version=__version__,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    return str(page)


@cache
def template_environment() -> Environment:
    """The Jinja environment of the reports' templates."""
    environment = Environment(
        loader=PackageLoader("rafce_ray.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "num": number_html,
        "pct": percent_html,
        "interval": interval,
        "count": count_or_dash,
        "duration": duration,
        "roughly": roughly,
        "named": named,
    }
    return environment


def named(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - SHOWN_TRIALS
    return ", ".join(names[:SHOWN_TRIALS]) + (f" and {more} more" if more > 0 else "")


def number_html(value: float | None, digits: int = 3) -> Markup:
    """A number for people, with its exact value for programs; a marked dash for None."""
    return _data(value, number(value, digits))


def percent_html(value: float | None, digits: int = 1) -> Markup:
    """A share in [0, 1] as a percentage, with its exact value for programs; a marked dash for None."""
    return _data(value, percent(value, digits))


def _data(value: float | None, text: str) -> Markup:
    if value is None:
        return Markup('<span class="undefined">{}</span>').format(UNDEFINED)
    return Markup('<data value="{}">{}</data>').format(value, text)


def count_or_dash(value: int | None) -> str:
    """A count with a comma between thousands; a dash for None."""
    return UNDEFINED if value is None else f"{value:,}"


def _tiles(data: ReportData) -> Iterator[dict[str, Any]]:
    """The few numbers that are read first: a figure, its interval, and its constant baseline."""
    figures = data.figures
    if figures is None:
        return
    intervals = figures.get("intervals", {})
    if figures["emotion_known"]:
        floor = f"commonest class alone: {percent(figures['majority_accuracy'])}"
        yield _tile("Accuracy", percent_html(figures["accuracy"]), intervals.get("accuracy"), floor, as_percent=True)
        supported = f"classes with {MIN_SUPPORT} images or more: {number(figures['macro_f1_supported'])}"
        yield _tile("Macro-F1", number_html(figures["macro_f1"]), intervals.get("macro_f1"), supported)
    if data.taxonomy.num_action_units:
        notes = [f"always \u201cpresent\u201d: {number(figures['au_floor_mean'])}"]
        if data.cross_fitted is not None:
            notes.append(f"cross-fitted: {number(data.cross_fitted['au_f1_mean_after'])}")
        yield _tile("AU-F1, mean", number_html(figures["au_f1_mean"]), intervals.get("au_f1_mean"), "; ".join(notes))
    reliability = data.cross_fitted or figures.get("reliability") or {}
    if found := (reliability.get("after") or {}).get("emotion"):
        label = "Calibration error" + (", cross-fitted" if data.cross_fitted else "")
        note = f"before calibration: {number(reliability['before']['emotion']['ece'])}"
        yield _tile(label, number_html(found["ece"]), found["intervals"]["ece"], note)


def _tile(label: str, value: Markup, bounds: Any, note: str, *, as_percent: bool = False) -> dict[str, Any]:
    written = interval(bounds)
    if as_percent and bounds:
        written = interval([None if one is None else 100 * one for one in bounds], 1)
    return {"label": label, "value": value, "interval": written, "note": note}


def _alerts(data: ReportData) -> Iterator[tuple[str, str]]:
    """What a reader must know before any figure: level and sentence."""
    run = data.run
    for remark in data.remarks:
        yield "serious", remark
    for difference in label_differences(run.audit, run.targets):
        yield "serious", f"Training did not see what the labels say: {difference[0].lower()}{difference[1:]}"
    if run.status == "diverged":
        kept = "The bundle is of the best epoch before." if run.metrics else "There is no bundle."
        epochs = run.result["epochs"] if run.result else 0
        yield "serious", f"Training diverged after epoch {epochs}: a loss was not finite. {kept}"
    if run.result is None:
        recorded = f"{len(run.records)} of {run.config.optim.epochs} epochs are on record"
        yield "warning", f"This run has not finished: {recorded}. The page shows what is there."
    if not run.audit:
        yield "info", "The labels were not audited: there is no audit.json."
    if data.figures is not None:
        yield "info", SPLIT_NOTES[data.split]


def _trained_on(data: ReportData) -> dict[str, Any]:
    audit, targets = data.run.audit or None, data.run.targets
    counts, findings = action_unit_counts(audit, targets), [] if audit is None else audit["findings"]
    return {
        "audit": audit,
        "sizes": split_sizes(audit, targets),
        "classes": class_counts(audit, targets),
        "action_units": counts,
        "names": {code: ACTION_UNIT_NAMES.get(parse_action_unit_token(code) or 0, "") for code in counts},
        "differs": bool(label_differences(audit, targets)),
        "is_recorded": targets is not None,
        "findings": [one for one in findings if one["level"] != "info"],
        "remarks": [one for one in findings if one["level"] == "info"],
    }


def _charts(data: ReportData) -> dict[str, Markup | None]:
    figures, run = data.figures or {}, data.run
    reliability, risk = figures.get("reliability"), figures.get("risk_coverage")
    limit = None if data.calibration is None else data.calibration.unsure_below
    return {
        "losses": plots.loss_curves(run) if run.records else None,
        "metrics": plots.metric_curves(run) if run.records else None,
        "gradients": plots.gradient_curves(run),
        "reliability": None if reliability is None else plots.reliability_diagrams(reliability),
        "risk_coverage": None if risk is None else plots.risk_coverage_curve(risk, limit),
    }


def _epochs(data: ReportData) -> list[dict[str, Any]]:
    """The best and the last epoch: train, validation and gap of each headline figure."""
    run = data.run
    if not run.records:
        return []
    is_one = run.best["epoch"] == run.last["epoch"]
    chosen = [("best and last", run.last)] if is_one else [("best", run.best), ("last", run.last)]
    return [
        {
            "label": label,
            "epoch": record["epoch"],
            "rows": [
                (FIGURES[key].title, record["train_natural"][key], record["validation"][key], record["gap"][key])
                for key in MAIN
                if record["validation"][key] is not None or record["train_natural"][key] is not None
            ],
        }
        for label, record in chosen
    ]


def _confusion(data: ReportData) -> dict[str, list[dict[str, Any]]]:
    """``rows`` of the confusion matrix, and the ``commonest`` confusions by count; empty for outputs not finite."""
    names, matrix = data.taxonomy.emotions, (data.figures or {}).get("confusion", [])
    if any(count is None for row in matrix for count in row):
        return {"rows": [], "commonest": []}
    rows: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    for i, row in enumerate(matrix):
        total, cells = int(sum(row)), []
        for j, count in enumerate(row):
            cells.append({"count": int(count), "share": count / max(total, 1), "is_hit": i == j})
            if i != j and count:
                wrong.append({"true": names[i], "predicted": names[j], "count": int(count), "of": total})
        rows.append({"true": names[i], "cells": cells})
    return {"rows": rows, "commonest": sorted(wrong, key=lambda one: -one["count"])[:NUM_CONFUSIONS]}


def _per_class(data: ReportData) -> list[dict[str, Any]]:
    if data.figures is None:
        return []
    known = data.figures["emotion_known"]
    return [
        {**entry, "floor": constant_f1(entry["support"], known), "f1_interval": entry.get("f1_interval")}
        for entry in data.figures["per_class"]
    ]


def _per_au(data: ReportData) -> list[dict[str, Any]]:
    if data.figures is None:
        return []
    optional = dict.fromkeys(("f1_interval", "f1_at_half", "threshold", "ap"))
    return [{**optional, **entry, "against": against_floor(entry)} for entry in data.figures["per_au"]]


def _calibration_rows(data: ReportData) -> Iterator[dict[str, Any]]:
    """Log loss, Brier and calibration error of each task: before, after, and after on images not used in the fit."""
    reliability = (data.figures or {}).get("reliability")
    if reliability is None:
        return
    stages = {"before": reliability["before"], "after": reliability["after"]}
    if data.cross_fitted is not None:
        stages["after, cross-fitted"] = data.cross_fitted["after"]
    for task, key in (("Emotions", "emotion"), ("Action units", "action_units")):
        for when, found in stages.items():
            if found[key] is not None:
                yield {"task": task, "when": when, **found[key]}


def _settings(config: Config) -> dict[str, list[tuple[str, str, str]]]:
    """Settings that are not at their default, and those that are: key, value, default."""
    default = flatten(Config())
    rows = [(key, as_text(value), as_text(default[key])) for key, value in flatten(config).items()]
    return {"changed": [row for row in rows if row[1] != row[2]], "default": [row for row in rows if row[1] == row[2]]}


def _provenance(data: ReportData) -> Iterator[tuple[str, str]]:
    run, provenance = data.run, data.run.provenance or {}
    started = [event for event in run.events if event["event"] == "started"]
    yield "run folder", run.place
    yield "data", str((run.audit or {}).get("root") or run.config.data.root)
    yield "data fingerprint", str(provenance.get("data_fingerprint", UNDEFINED))
    yield "configuration hash", str(provenance.get("config_hash", UNDEFINED))
    yield "seed", str(provenance.get("seed", UNDEFINED))
    if run.result is not None and run.result.get("weights_sha256"):
        yield "weights, sha256", str(run.result["weights_sha256"])
    if started:
        hardware = started[-1].get("hardware", {})
        device = f"{hardware.get('device')}, {hardware.get('threads')} threads"
        yield "hardware", f"{hardware.get('name')} ({device}), {started[-1].get('precision')}"
        if workers := distinct(started, "num_workers"):
            yield "workers", workers
        again = f", {len(started) - 1} more times after" if len(started) > 1 else ""
        yield "started", _time(started[0]["time"]) + again
    if run.result is not None:
        yield "training time", f"{duration(run.result['elapsed_s'])} for {run.result['epochs']} epochs"
    yield from ((name, str(version)) for name, version in provenance.get("software", {}).items())


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def patch_lines(patch: dict[str, Any]) -> list[str]:
    """A patch as the command line takes it."""
    return [f"{key}={as_text(value)}" for key, value in patch.items()]
