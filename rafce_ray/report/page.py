"""A run's report as one HTML page: the sections, rows and words of the page; the template lays them out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rafce_ray import __version__
from rafce_ray.base import figures
from rafce_ray.base.errors import UsageError
from rafce_ray.base.storage import Location, locate
from rafce_ray.base.taxonomy import ACTION_UNIT_NAMES, parse_action_unit_token
from rafce_ray.bundle import model_card
from rafce_ray.config import Config, flatten
from rafce_ray.metrics import text
from rafce_ray.report import plots
from rafce_ray.report.data import MIN_GROUP, ReportData, gather
from rafce_ray.run.compare import distinct
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.watch import duration
from rafce_ray.study.listing import as_text
from rafce_ray.study.watch import roughly

REPORT_FILE = "report.html"
NUM_CONFUSIONS = 8
SHOWN_TRIALS = 6
"""Trials that are named where many could be."""


def write_report(folder: RunFolder, *, out: str | None = None, **arguments: Any) -> Location:
    """Write a run's report and return its place: ``report.html`` in the run's folder, replaced, or ``out``, if new.

    ``arguments`` are those of :func:`rafce_ray.report.data.gather`. Validation figures are the run's own and need no
    forward pass.

    Raises:
        UsageError: there is no run here, ``out`` exists, or the run lacks what the arguments need.
        RafceError: the split cannot be measured.
    """
    place = report_place(folder.location, out)
    place.write_bytes(render_page(gather(folder, **arguments)).encode())
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
    matrix = (data.figures or {}).get("confusion", [])
    if any(count is None for row in matrix for count in row):
        # The outputs were not finite.
        matrix = []
    return (
        template_environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            run=data.run,
            figures=data.figures,
            trained=_trained_on(data),
            matrix=matrix,
            confusions=_confusions(data.taxonomy.emotions, matrix),
            settings=_settings(data.run.config),
            made=_time(time.time(), "%Y-%m-%d %H:%M UTC"),
        )
    )


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
        "number": text.number,
        "percent": text.percent,
        "interval": text.interval,
        "percent_interval": percent_interval,
        "count": count_or_dash,
        "duration": duration,
        "roughly": roughly,
        "named": named,
        "time": _time,
        "patched": patch_lines,
    }
    environment.globals |= {
        "figure_table": figures,
        "card": model_card,
        "text": text,
        "MIN_GROUP": MIN_GROUP,
        "distinct": distinct,
        "plots": plots,
        "version": __version__,
    }
    return environment


def named(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - SHOWN_TRIALS
    return ", ".join(names[:SHOWN_TRIALS]) + (f" and {more} more" if more > 0 else "")


def number_html(value: float | None, digits: int = 3) -> Markup:
    """A number for people, with its exact value for programs; a marked dash for None."""
    return _data(value, text.number(value, digits))


def percent_html(value: float | None, digits: int = 1) -> Markup:
    """A share in [0, 1] as a percentage, with its exact value for programs; a marked dash for None."""
    return _data(value, text.percent(value, digits))


def _data(value: float | None, shown: str) -> Markup:
    if value is None or not math.isfinite(value):
        return Markup('<span class="undefined">{}</span>').format(text.UNDEFINED)
    return Markup('<data value="{}">{}</data>').format(value, shown)


def percent_interval(bounds: Sequence[float | None] | None) -> str:
    """``44.0 to 53.0``: bounds in [0, 1] in percent; a dash where undefined."""
    return text.interval(bounds and [None if one is None else 100 * one for one in bounds], 1)


def count_or_dash(value: int | None) -> str:
    """A count with a comma between thousands; a dash for None."""
    return text.UNDEFINED if value is None else f"{value:,}"


def _trained_on(data: ReportData) -> dict[str, Any]:
    audit, targets = data.run.audit or None, data.run.targets
    counts, findings = model_card.action_unit_counts(audit, targets), [] if audit is None else audit["findings"]
    return {
        "audit": audit,
        "sizes": model_card.split_sizes(audit, targets),
        "classes": model_card.class_counts(audit, targets),
        "action_units": counts,
        "names": {code: ACTION_UNIT_NAMES.get(parse_action_unit_token(code) or 0, "") for code in counts},
        "differences": model_card.label_differences(audit, targets),
        "is_recorded": targets is not None,
        "findings": [one for one in findings if one["level"] != "info"],
        "remarks": [one for one in findings if one["level"] == "info"],
    }


def _confusions(names: Sequence[str], matrix: list[list[int]]) -> list[tuple[str, str, int, float]]:
    """The commonest confusions: true and predicted class, images, and their share of the true class."""
    found = [
        (names[i], names[j], int(count), count / sum(row))
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(found, key=lambda one: -one[2])[:NUM_CONFUSIONS]


def _settings(config: Config) -> dict[str, list[tuple[str, str, str]]]:
    """Settings that are not at their default, and those that are: key, value, default."""
    default = flatten(Config())
    rows = [(key, as_text(value), as_text(default[key])) for key, value in flatten(config).items()]
    return {"changed": [row for row in rows if row[1] != row[2]], "default": [row for row in rows if row[1] == row[2]]}


def _time(seconds: float, form: str = "%Y-%m-%d %H:%M:%S UTC") -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(form)


def patch_lines(patch: dict[str, Any]) -> list[str]:
    """A patch as the command line takes it."""
    return [f"{key}={as_text(value)}" for key, value in patch.items()]
