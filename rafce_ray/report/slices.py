"""Figures by group: what a model does for the images that have one value of an attribute.

Attributes come from a CSV file: wide (``name, age, gender, ...``: a row an image) or long (``name,column,value``: a row an image and
attribute). A blank value is unknown. Groups are of one attribute each. What is too small to measure is listed with its size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rafce_ray.base.console import finite
from rafce_ray.base.errors import UsageError
from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.data.label_file import csv_rows, find_name, open_text
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs, calibrated
from rafce_ray.metrics.counts import evaluate_probabilities

_LONG = ("name", "column", "value")


@dataclass(frozen=True)
class SliceFile:
    """Attributes of images: ``columns[attribute][image name]`` is a value, without those that are blank. ``names`` are all images."""

    place: str
    names: tuple[str, ...]
    columns: dict[str, dict[str, str]]


def read_slices(place: str) -> SliceFile:
    """Read a file of attributes, wide or long.

    Raises:
        UsageError: it cannot be read, or a line is not as the header says; the message names line and column.
    """
    rows = _rows(place)
    if not rows:
        raise UsageError(f"{place}: is empty. Expected a header such as name,age,gender and a row an image.")
    line, header = rows[0][0], [cell.strip() for cell in rows[0][1]]
    name = find_name(header, f"{place}:{line}")
    if name is not None:
        header[name] = "name"
    _check_header(place, line, header)
    if len(rows) == 1:
        raise UsageError(f"{place}: holds a header and no row. Expected a row an image.")
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise UsageError(
                f"{place}:{line}: {len(cells)} columns, but the header has {len(header)} ({', '.join(header)}). "
                "Give every row as many; put a value that holds a comma in double quotes."
            )
        if not cells[header.index("name")].strip():
            raise UsageError(f"{place}:{line}: column 'name' is blank. Give the image's name.")
    is_long = sorted(header) == sorted(_LONG)
    return _read_long(place, header, rows[1:]) if is_long else _read_wide(place, header, rows[1:])


def _rows(place: str) -> list[tuple[int, list[str]]]:
    """Rows that are not blank, each with its first line."""
    file = locate(place)
    try:
        text = open_text(file.read_bytes(), file, "", key=None)
    except OSError as error:
        raise UsageError(f"{place}: cannot be read ({error.strerror or error}). Give the path of a CSV file.") from None
    rows = []
    for row in csv_rows(text, ","):
        if row.unsure:
            raise UsageError(f"{place}:{row.first}: the row {row.fault}. Remove the quote, or close it on its line.")
        if any(cell.strip() for cell in row.cells):
            rows.append((row.first, row.cells))
    return rows


def _check_header(place: str, line: int, header: list[str]) -> None:
    doubled = [name for name, count in Counter(header).items() if count > 1 and name]
    if doubled:
        raise UsageError(f"{place}:{line}: column {doubled[0]!r} is there twice. Name each column once.")
    if "name" not in header or len(header) < 2:
        raise UsageError(
            f"{place}:{line}: the header is {', '.join(map(repr, header))}. Expected comma-separated columns: name and at least one "
            "attribute, or name,column,value."
        )
    if "" in header:
        raise UsageError(f"{place}:{line}: column {header.index('') + 1} has no name. Name it, or take it out.")


def _read_wide(place: str, header: list[str], rows: list[tuple[int, list[str]]]) -> SliceFile:
    columns: dict[str, dict[str, str]] = {name: {} for name in header if name != "name"}
    first_line: dict[str, int] = {}
    for line, cells in rows:
        values = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        name = values.pop("name")
        if name in first_line:
            raise UsageError(
                f"{place}:{line}: column 'name': {name!r} is on line {first_line[name]} already. Keep one row an image."
            )
        first_line[name] = line
        for column, value in values.items():
            if value:
                columns[column][name] = value
    return SliceFile(place, tuple(first_line), columns)


def _read_long(place: str, header: list[str], rows: list[tuple[int, list[str]]]) -> SliceFile:
    columns: dict[str, dict[str, str]] = {}
    first_line: dict[tuple[str, str], int] = {}
    for line, cells in rows:
        values = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        name, column = values["name"], values["column"]
        if not column:
            raise UsageError(f"{place}:{line}: column 'column' is blank. Name the attribute.")
        if (name, column) in first_line:
            raise UsageError(
                f"{place}:{line}: column 'column': {column!r} of {name!r} is on line {first_line[name, column]} already. Keep one."
            )
        first_line[name, column] = line
        values_of = columns.setdefault(column, {})
        if values["value"]:
            values_of[name] = values["value"]
    return SliceFile(place, tuple(dict.fromkeys(name for name, _ in first_line)), columns)


MIN_GROUP = 30
"""Images that a group needs before its figures are shown: of fewer, accuracy is known to no better than 18 points."""

MAX_VALUES = 20
"""Distinct values, in the file, up to which a column makes groups; more are taken for an identifier."""

MAX_NUMBERS = 10
"""Distinct numbers, in the file, up to which each is a group of its own; more are cut into ranges."""

MIN_NUMBER_SHARE = 0.9
"""Share of numbers among a column's values from which it is one of numbers; other values, such as NA, are groups beside the ranges."""

MAX_RANGES = 4

SHOWN = ("accuracy", "macro_f1", "au_f1_mean")

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
_IDENTIFIER = re.compile(r"(^|[^A-Za-z])id$", re.IGNORECASE)


@dataclass(frozen=True)
class WithInterval:
    """A figure and its bootstrap 95 % interval over the group's images; None is undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Group:
    """Images with one value. A figure that would rest on under MIN_GROUP labelled images is not in ``figures``."""

    value: str
    num_images: int
    figures: dict[str, WithInterval]

    @property
    def hidden(self) -> bool:
        """Whether the group is too small for any figure."""
        return self.num_images < MIN_GROUP


@dataclass(frozen=True)
class Column:
    """The groups of one attribute. ``remark`` says how they were made or why there are none; ``num_unknown`` images have no value."""

    name: str
    remark: str
    num_unknown: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class GroupTable:
    """All attributes. ``num_unmatched``: names in the file that are no image measured here, with the first few of them."""

    place: str
    num_names: int
    num_unmatched: int
    unmatched: tuple[str, ...]
    num_without_row: int
    overall: Group
    columns: tuple[Column, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "file": self.place,
            "names": self.num_names,
            "names_without_image": self.num_unmatched,
            "images_without_row": self.num_without_row,
            "overall": _plain(self.overall),
            "columns": [
                {
                    "column": column.name,
                    "remark": column.remark,
                    "images_without_value": column.num_unknown,
                    "groups": [_plain(group) for group in column.groups],
                }
                for column in self.columns
            ],
        }


def group_table(split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration, slices: SliceFile) -> GroupTable:
    """Figures of every group of a split under a calibration.

    Accuracy, macro-F1 over the classes that occur in the group, and mean F1 of the AUs that have positives in it.

    Raises:
        UsageError: the file names none of the images.
    """
    here, there = set(split.names), set(slices.names)
    unmatched = [name for name in slices.names if name not in here]
    if len(unmatched) == len(slices.names):
        raise UsageError(
            f"{slices.place}: column 'name': none of its {len(unmatched)} names ({unmatched[0]!r}, ...) is one of the {len(here)} "
            f"images measured ({split.names[0]!r}, ...). Write the names as the labels do."
        )
    everything = np.ones(len(split.names), dtype=bool)
    return GroupTable(
        place=slices.place,
        num_names=len(slices.names),
        num_unmatched=len(unmatched),
        unmatched=tuple(unmatched[:3]),
        num_without_row=len(here - there),
        overall=_measure("all images", everything, split, taxonomy, calibration),
        columns=tuple(_column(name, values, split, taxonomy, calibration) for name, values in slices.columns.items()),
    )


def _column(
    name: str, values: dict[str, str], split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration
) -> Column:
    found = [values.get(image) for image in split.names]
    num_unknown = found.count(None)
    is_number = {value: bool(_NUMBER.fullmatch(value)) for value in values.values()}
    share = np.mean([is_number[value] for value in values.values()]) if values else 0.0
    has_ranges = share >= MIN_NUMBER_SHARE and sum(is_number.values()) > MAX_NUMBERS
    num_distinct = len(is_number) - (sum(is_number.values()) if has_ranges else 0)
    reason = _why_none(name, len(is_number), num_distinct, num_unknown == len(found))
    if reason:
        return Column(name, reason, num_unknown, ())
    members, remark = _ranges(found) if has_ranges else ([], "")
    rest = {value for value in found if value is not None and not (has_ranges and is_number[value])}
    for value in sorted(
        rest, key=lambda one: (not is_number[one], float(one) if is_number[one] else 0, one.casefold())
    ):
        members.append((value, np.array([one == value for one in found])))
    groups = (_measure(value, rows, split, taxonomy, calibration) for value, rows in members)
    return Column(name, remark, num_unknown, tuple(groups))


def _why_none(name: str, num_values: int, num_distinct: int, is_unknown: bool) -> str:
    """Why a column makes no groups; empty where it does. ``num_distinct`` values would each be one."""
    if is_unknown:
        return "left out: no image measured here has a value"
    if _IDENTIFIER.search(name):
        return f"left out: named as an identifier, {num_values} distinct values"
    if num_distinct > MAX_VALUES:
        return f"left out: {num_distinct} distinct values are more than {MAX_VALUES}, as of an identifier"
    return ""


def _ranges(found: Sequence[str | None]) -> tuple[list[tuple[str, NDArray[np.bool_]]], str]:
    """Ranges of numbers, cut near the quantiles of the images measured into MAX_RANGES, or fewer so that each holds MIN_GROUP; never under 2."""
    numbers = np.array([float(one) if one is not None and _NUMBER.fullmatch(one) else np.nan for one in found])
    known = numbers[~np.isnan(numbers)]
    if not len(known):
        return [], ""
    num_ranges = min(MAX_RANGES, max(2, len(known) // MIN_GROUP))
    distinct, counts = np.unique(known, return_counts=True)
    # Equal numbers stay together, so a cut goes where the count below it is nearest to the quantile.
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    nearest = [int(np.abs(below - len(known) * part / num_ranges).argmin()) for part in range(1, num_ranges)]
    edges = distinct[np.unique(nearest)]
    range_of = np.where(np.isnan(numbers), -1, np.searchsorted(edges, numbers, side="right"))
    members = []
    for number in np.unique(range_of[range_of >= 0]):
        rows = range_of == number
        low, high = numbers[rows].min(), numbers[rows].max()
        members.append((f"{low:g}" if low == high else f"{low:g} to {high:g}", rows))
    return members, f"numbers, cut at quantiles of these images into {len(members)} ranges"


def _measure(
    value: str, rows: NDArray[np.bool_], split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration
) -> Group:
    num_images = int(rows.sum())
    if num_images < MIN_GROUP:
        return Group(value, num_images, {})
    outputs = Outputs(split.outputs.emotion[rows], split.outputs.action_units[rows])
    names = [name for name, chosen in zip(split.names, rows, strict=True) if chosen]
    part = SplitOutputs(names, split.emotion[rows], split.action_units[rows], outputs)
    found = calibrated(outputs, calibration)
    all_figures = finite(
        evaluate_probabilities(found.emotion, found.action_units, part, taxonomy, calibration.au_thresholds)
    )
    num_labelled = {
        "accuracy": int((part.emotion >= 0).sum()) if taxonomy.num_emotions else 0,
        "au_f1_mean": int((~np.isnan(part.action_units)).any(axis=1).sum()),
    }
    num_labelled["macro_f1"] = num_labelled["accuracy"]
    shown = [name for name in SHOWN if num_labelled[name] >= MIN_GROUP]
    return Group(
        value, num_images, {name: WithInterval(all_figures[name], *all_figures["intervals"][name]) for name in shown}
    )


def _plain(group: Group) -> dict[str, Any]:
    figures = {name: {"value": one.value, "interval": [one.low, one.high]} for name, one in group.figures.items()}
    return {"value": group.value, "images": group.num_images, "hidden": group.hidden, "figures": figures}
