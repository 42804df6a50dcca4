"""Attributes of images from a CSV file.

The file is wide (``name, age, gender, ...``: a row an image) or long (``name,column,value``: a row an image and attribute). A blank
value is unknown. Names are read under the titles of a label table, such as ``filename``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rafce_ray.data.label_file import csv_rows, find_name, open_text
from rafce_ray.errors import UsageError
from rafce_ray.storage import locate

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
