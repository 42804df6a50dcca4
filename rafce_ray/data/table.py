"""Labels in one CSV or Parquet table: ``name, split, emotion, AU1, AU2, ...`` 1, 0 or blank (unknown)."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rafce_ray.base.errors import Evidence, Finding, UsageError
from rafce_ray.base.storage import Location
from rafce_ray.base.taxonomy import UNKNOWN_WORDS, action_unit_code, label_key
from rafce_ray.config import DataConfig
from rafce_ray.data.label_file import (
    Columns,
    CsvRow,
    csv_rows,
    duplicate_findings,
    find_columns,
    open_text,
    read_action_unit_label,
    refuse_broken_link,
    text_findings,
    unreadable_finding,
)
from rafce_ray.data.listing import groups_of_equals, image_columns, match_images
from rafce_ray.data.records import (
    LABEL_SCHEMA,
    MAX_UNREADABLE_SHARE,
    SPLIT_NAMES,
    ArrowRows,
    EvidenceList,
    Labels,
    counted,
    evidence_of,
    label_table,
)

TABLE_NAMES = ("labels.csv", "labels.parquet", "labels.tsv")
"""Files that a folder is searched for."""

TABLE_EXTENSIONS = ("csv", "tsv", "parquet")

_CELLS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0, "": None, "unknown": None, "-1.0": None}
_CELLS |= dict.fromkeys(UNKNOWN_WORDS)
"""Presence by cell, in lower case."""

_LETTERS = {letter: float(value) for value, letter in enumerate("abcde", start=1)}
"""FACS intensities: A is a trace, E the maximum."""

_MAX_INTENSITY = 5.0
_UNKNOWN_LISTS = frozenset(["", "null", "none", "0", *UNKNOWN_WORDS])
"""Cells of a list of action units that say nothing, or that there is none: data.null_policy decides."""

_WHOLE_NUMBER = re.compile(r"^-?\d+\.0+$")
_CHUNK = 4096
_PLACES_IN_REMEDY = 10


@dataclass
class _Intensities:
    """Cells of one action unit that are numbers from 0 to 5, other than 0 and 1 unless they are looked for."""

    count: int = 0
    largest: float = 0.0
    example: str = ""
    line: int = 0

    def add(self, cell: str, value: float, line: int) -> None:
        if self.count == 0:
            self.example, self.line = cell, line
        self.count += 1
        self.largest = max(self.largest, value)


_READ_SCHEMA = pa.schema(
    [LABEL_SCHEMA.field(name) for name in ("name", "split", "emotion", "au_state", "au_positive", "au_negative")]
    + [pa.field("line", pa.int32())]
)


class _Rows:
    """Rows read so far, and what was unusual about them."""

    def __init__(self) -> None:
        self.read = ArrowRows(_READ_SCHEMA)
        self.malformed, self.broken, self.unreadable = EvidenceList(), EvidenceList(), EvidenceList()
        self.line_breaks, self.swallowed = EvidenceList(), EvidenceList()
        self.swallowing: list[CsvRow] = []
        self.unknown_splits, self.without_split = EvidenceList(), EvidenceList()
        self.intensities: defaultdict[int, _Intensities] = defaultdict(_Intensities)
        self.ones: Counter[int] = Counter()
        self.splits_of: defaultdict[str, set[str]] = defaultdict(set)


def find_table(root: Location) -> Location | None:
    """The label table: the place itself, or ``labels.csv``, ``labels.parquet`` or ``labels.tsv`` in the folder.

    Raises:
        UsageError: the folder holds more than one, or a link to a table that is not there.
    """
    if root.name.rpartition(".")[2].lower() in TABLE_EXTENSIONS and root.exists() and not root.is_dir():
        return root
    tables = [root / name for name in TABLE_NAMES]
    found = [table for table in tables if table.exists()]
    for table in tables if not found else ():
        refuse_broken_link(table)
    if len(found) > 1:
        raise UsageError(
            f"{root}: {' and '.join(table.name for table in found)} are both there. Give the one to read as data.root."
        )
    return found[0] if found else None


def read_table(table: Location, data: DataConfig) -> Labels:
    """Labels of a CSV, TSV or Parquet table; images lie next to it, in ``images/``, ``aligned/`` or ``data.images``.

    Raises:
        UsageError: a needed column is missing or doubled, columns hold intensities and no threshold is set, or the file
            cannot be read.
    """
    raw = table.read_bytes()
    findings: list[Finding] = []
    if table.name.lower().endswith(".parquet"):
        header, records = _read_parquet(raw, table)
    else:
        findings += text_findings(raw, table.name, data.encoding)
        header, records = _read_csv(raw, table, data.encoding)
    columns = find_columns(header, str(table), table.name, data)
    given = shlex.quote(str(data.root)) + ("" if data.encoding == "auto" else f" data.encoding={data.encoding}")
    rows = _read_rows(records, columns, header, table.name, data.au_threshold)
    read_table = rows.read.table().combine_chunks()
    findings += [*columns.findings, *_intensity_findings(rows, columns, table, data)]
    findings += [*_line_break_findings(rows, table), *_row_findings(rows, columns, table.name, given)]
    labels, duplicates = _without_duplicates(read_table, table.name)
    matched = match_images(labels["name"].combine_chunks(), table.parent, data.images)
    counts = np.bincount(np.asarray(labels["au_positive"].combine_chunks().flatten()))
    columns_read = {name: labels[name] for name in labels.column_names}
    columns_read |= image_columns(matched.listing.table, matched.index)
    has_au = columns.has_action_units
    if columns.emotion is not None:
        columns_read["emotion_line"] = labels["line"]
    if has_au:
        columns_read["au_line"] = labels["line"]
    return Labels(
        table=label_table(columns_read),
        layout="table",
        root=table.parent,
        image_root=matched.listing.folder,
        emotion_file=table.name if columns.emotion is not None else None,
        au_file=table.name if has_au else None,
        au_columns=tuple(sorted(columns.action_units)) if columns.action_units else None,
        num_extra_images=matched.num_extras,
        findings=(*findings, *duplicates, *matched.findings),
        token_counts={action_unit_code(number): int(count) for number, count in enumerate(counts) if count},
        digests={table.name: hashlib.sha256(raw).hexdigest(), **_reading_digest(columns, table.name, data)},
        near_images=matched.near,
    )


@dataclass(frozen=True)
class Cells:
    """A table as its cells are written; ``parquet`` is the table where it is no text."""

    columns: Columns
    rows: list[list[str]]
    delimiter: str
    parquet: pa.Table | None

    def named_rows(self) -> Iterator[tuple[str, list[str]]]:
        """Rows that fit the header, with their image's name."""
        width = len(self.columns.header)
        return ((row[self.columns.name].strip(), row) for row in self.rows if len(row) == width)


def read_cells(table: Location, data: DataConfig) -> Cells:
    """All cells of a table, for a copy of it. UsageError as of :func:`read`."""
    raw = table.read_bytes()
    if table.name.lower().endswith(".parquet"):
        header, records = _read_parquet(raw, table)
        delimiter, parquet = "", pq.read_table(pa.BufferReader(raw))
    else:
        header, records = _read_csv(raw, table, data.encoding)
        delimiter, parquet = _delimiter(raw, table, data.encoding), None
    columns = find_columns(header, str(table), table.name, data)
    return Cells(columns, [row.cells for row in records], delimiter, parquet)


def _delimiter(raw: bytes, table: Location, encoding: str) -> str:
    first = open_text(raw, table, encoding=encoding).readline()
    return max((",", ";", "\t"), key=first.count)


def _read_csv(raw: bytes, table: Location, encoding: str) -> tuple[list[str], Iterator[CsvRow]]:
    rows = csv_rows(open_text(raw, table, "", encoding), _delimiter(raw, table, encoding))
    header = next(rows, None)
    if header is None:
        raise UsageError(f"{table}: is empty. Expected a header line such as 'name,split,emotion,AU1,AU2'.")
    if header.last > header.first:
        raise UsageError(
            f"{table}:{header.first}: the header {header.fault}. Remove the quote; write every title on one line."
        )
    return header.cells, rows


def _read_parquet(raw: bytes, table: Location) -> tuple[list[str], Iterator[CsvRow]]:
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
    except pa.ArrowInvalid as error:
        raise UsageError(f"{table}: is no Parquet file: {error}. Write it again, or give a CSV table.") from error
    return list(file.schema_arrow.names), _parquet_rows(file, table)


def _parquet_rows(file: pq.ParquetFile, table: Location) -> Iterator[CsvRow]:
    line = 0
    try:
        for batch in file.iter_batches(batch_size=_CHUNK):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                line += 1
                yield CsvRow([_cell_text(cell) for cell in row], line, line)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{table}: after row {line}: text that is not UTF-8 ({error.object!r}). Write it again."
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{table}: after row {line}: damaged ({error}). Write it again.") from error


def _cell_text(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return cell.decode() if isinstance(cell, bytes) else str(cell)


def _reading_digest(columns: Columns, file: str, data: DataConfig) -> dict[str, str]:
    """A digest of how the file is read, as the same file may be read otherwise; empty for tables with plain titles."""
    reading = columns.read_as | ({} if data.au_threshold is None else {"au_threshold": str(data.au_threshold)})
    if not reading:
        return {}
    return {f"{file} (how it is read)": hashlib.sha256(json.dumps(reading, sort_keys=True).encode()).hexdigest()}


def _read_rows(
    records: Iterator[CsvRow], columns: Columns, header: list[str], file: str, au_threshold: float | None
) -> _Rows:
    rows, width = _Rows(), len(header)
    for row in records:
        line, cells = row.first, row.cells
        if (row.unsure or row.last > row.first) and not _keep_line_break(row, columns, header, file, rows):
            continue
        name = cells[columns.name].strip() if len(cells) > columns.name else ""
        if len(cells) != width or not name:
            found = ", ".join(cells)[:60]
            rows.malformed.add(f"{len(cells)} cells ({found}): expected {width} with a name", file, line)
            continue
        split = _read_split(cells, columns, Evidence(name, file, line), rows)
        if columns.person is not None and split is not None and cells[columns.person].strip():
            rows.splits_of[cells[columns.person].strip()].add(split)
        emotion = cells[columns.emotion].strip() if columns.emotion is not None else ""
        if len(name.splitlines()) > 1 or len(emotion.splitlines()) > 1:
            # Only Parquet tables come as far with one.
            rows.broken.add(f"name {name!r}, emotion {emotion!r}", file, line)
            continue
        if _WHOLE_NUMBER.match(emotion):
            emotion = emotion.partition(".")[0]
        state, positive, negative, fault = _read_action_units(cells, columns, line, au_threshold, rows)
        if fault is not None:
            rows.unreadable.add(f"{name}: {fault}", file, line)
        rows.read.append((name, split, emotion or None, state, positive, negative, line))
    return rows


def _keep_line_break(row: CsvRow, columns: Columns, header: list[str], file: str, rows: _Rows) -> bool:
    """Whether a row of several lines is one row: only cells that are not read may hold a line break."""
    broken = [position for position, cell in enumerate(row.cells) if "\n" in cell or "\r" in cell]
    title = header[broken[0]].strip() if broken and broken[0] < len(header) else "?"
    if row.unsure or len(row.cells) != len(header) or columns.read & set(broken):
        rows.swallowed.add(f"column {title!r} {row.fault}", file, row.first)
        rows.swallowing.append(row)
        return False
    rows.line_breaks.add(f"the cell of column {title!r} runs to line {row.last}", file, row.first)
    return True


def _line_break_findings(rows: _Rows, table: Location) -> Iterator[Finding]:
    if rows.line_breaks:
        found = counted(len(rows.line_breaks), "row")
        message = f"{table.name}: a column that is not read holds line breaks in {found}"
        yield rows.line_breaks.finding("info", "line_breaks", message)
    if rows.swallowed:
        num_lines = sum(row.last - row.first + 1 for row in rows.swallowing)
        found = counted(len(rows.swallowed), "place")
        lines = f"{counted(num_lines, 'line')} cannot be split into rows and {'is' if num_lines == 1 else 'are'}"
        message = f"{table.name}: a double quote opens and is not closed on its line in {found}: {lines} not used"
        remedy = "Remove the quote, or close it on its line; a quote within a quoted cell is written twice."
        # The quote that closes may be a second lone one.
        lone = dict.fromkeys(line for row in rows.swallowing[:_PLACES_IN_REMEDY] for line in row.lone_quotes)
        if lone and table.local is not None:
            edits = ";".join(f'{line}s/"//' for line in lone)
            remedy += f" For example: sed -i.bak '{edits}' {table.command}"
        yield rows.swallowed.finding("refusal", "open_quotes", message, remedy)


def _read_split(cells: list[str], columns: Columns, at: Evidence, rows: _Rows) -> str | None:
    if columns.split is None:
        return None
    text = cells[columns.split].strip()
    split = SPLIT_NAMES.get(label_key(text))
    if split is None and text and label_key(text) not in UNKNOWN_WORDS:
        rows.unknown_splits.add(f"{at.detail}: {text!r}", at.file, at.line)
    elif split is None:
        rows.without_split.add(at.detail, at.file, at.line)
    return split


def _read_action_units(
    cells: list[str], columns: Columns, line: int, au_threshold: float | None, rows: _Rows
) -> tuple[str, Sequence[int], Sequence[int], str | None]:
    if columns.action_unit_list is not None:
        return _read_action_unit_list(cells[columns.action_unit_list])
    positive: list[int] = []
    negative: list[int] = []
    fault = None
    for number, position in columns.action_units.items():
        cell = cells[position].strip()
        value = _CELLS.get(cell.lower(), -1)
        if number not in columns.presence and (value == -1 or au_threshold is not None):
            intensity = _intensity(cell)
            if intensity is not None:
                rows.intensities[number].add(cell, intensity, line)
                value = value if au_threshold is None else int(intensity >= au_threshold)
        if value == -1:
            fault = fault or f"unreadable {cell[:40]!r} for {action_unit_code(number)}"
        elif value is not None:
            rows.ones[number] += value
            (positive if value else negative).append(number)
    if fault is not None:
        return "unreadable", [], [], fault
    return ("partial" if positive or negative else "missing"), positive, negative, None


def _read_action_unit_list(cell: str) -> tuple[str, Sequence[int], Sequence[int], str | None]:
    """A cell such as ``1 + 12``, ``AU 1, AU 12`` or ``['AU1', 'AU12']``. Any other action unit was coded absent."""
    text = re.sub(r"[\[\](){}'\"]", " ", cell).strip()
    if text.lower() in _UNKNOWN_LISTS:
        return "null", [], [], None
    label = read_action_unit_label(re.sub(r"(?i)\b(A[UD])[ _-]+(?=[LRTB]{0,2}\d)", r"\1", text))
    return label.state, label.positive, [], label.fault


def _intensity(cell: str) -> float | None:
    """The intensity from 0 to 5 that a cell holds; None where it holds something else, such as 9 (not codable)."""
    try:
        value = _LETTERS.get(cell.lower()) or float(cell.replace(",", "."))
    except ValueError:
        return None
    return value if 0 <= value <= _MAX_INTENSITY else None


def _intensity_findings(rows: _Rows, columns: Columns, table: Location, data: DataConfig) -> Iterator[Finding]:
    """What is read as intensities; UsageError where data.au_threshold is not set for them, or set for none."""
    if data.action_units == "none":
        return
    root = shlex.quote(str(data.root))
    if data.au_threshold is None:
        # A single number among zeros and ones is a slip, reported as an unreadable cell. A scale has many of them.
        found = {
            number: one
            for number, one in rows.intensities.items()
            if one.count > MAX_UNREADABLE_SHARE * (one.count + rows.ones[number])
        }
        if not found:
            return
        titles = ", ".join(repr(columns.header[columns.action_units[number]]) for number in sorted(found))
        first = min(found.values(), key=lambda one: one.line)
        what, threshold, usual = "intensities", "2", "=2 is usual for 0 to 5 (DISFA), 1 also counts traces"
        if max(one.largest for one in found.values()) <= 1:
            what, threshold, usual = "probabilities", "0.5", "=0.5 is usual"
        raise UsageError(
            f"{table}:{first.line}: {titles}: found {first.example!r}; AU columns hold 1, 0 or blank. These look like "
            f"{what}: set the value from which on an AU is present (data.au_threshold{usual}). To try it: "
            f"rafce data audit {root} data.au_threshold={threshold}"
        )
    if not rows.intensities:
        return
    if max(one.largest for one in rows.intensities.values()) <= 1 < data.au_threshold:
        raise UsageError(
            f"{table}: no AU column has a value above 1, so at data.au_threshold={data.au_threshold:g} no AU is ever "
            f"present. Leave the threshold out if the columns hold 1 and 0: rafce data audit {root} "
            "data.au_threshold=null"
        )
    evidence = tuple(
        Evidence(f"{action_unit_code(number)}: {rows.ones[number]} of {one.count} rows", table.name)
        for number, one in sorted(rows.intensities.items())
    )
    found_in = "1 AU column holds" if len(evidence) == 1 else f"{len(evidence)} AU columns hold"
    message = f"{table.name}: {found_in} intensities: present from data.au_threshold={data.au_threshold:g} on"
    yield Finding("info", "intensities", message, "", len(evidence), evidence)


def _row_findings(rows: _Rows, columns: Columns, file: str, root: str) -> Iterator[Finding]:
    if rows.malformed:
        message = f"{file}: {len(rows.malformed)} rows do not fit the header or have no name, and are not used"
        remedy = "Give every row as many cells as the header."
        yield rows.malformed.finding("warning", "malformed_lines", message, remedy)
    if rows.broken:
        message = f"{file}: a name or an emotion holds a line break in {counted(len(rows.broken), 'row')}, not used"
        remedy = "Write names and emotions on one line."
        yield rows.broken.finding("warning", "line_breaks_in_labels", message, remedy)
    if rows.unreadable:
        yield unreadable_finding(file, rows.unreadable)
    if columns.split is None:
        by = "" if columns.person is None else f" --by {shlex.quote(columns.header[columns.person])}"
        remedy = f"Write a copy with one: rafce data split {root}{by}"
        yield Finding("refusal", "no_split_column", f"{file}: no column 'split'", remedy)
    across = sorted((person, splits) for person, splits in rows.splits_of.items() if len(splits) > 1)
    if across and columns.person is not None:
        title = columns.header[columns.person]
        seen = evidence_of(Evidence(f"{person}: {', '.join(sorted(splits))}", file) for person, splits in across)
        values = counted(len(across), "value")
        message = f"{file}: {values} of column {title!r} in more than one split: test then contains people from train"
        remedy = f"Write a copy that keeps each in one: rafce data split {root} --by {shlex.quote(title)}"
        yield Finding("warning", "persons_across_splits", message, remedy, len(across), seen)
    if rows.unknown_splits:
        message = f"{file}: {len(rows.unknown_splits)} rows name an unknown split and are in none"
        remedy = "Use train, validation (or val, valid, dev) and test; numbers are read only in RAF-CE's layout."
        yield rows.unknown_splits.finding("error", "unknown_partitions", message, remedy)
    if rows.without_split:
        message = f"{file}: {len(rows.without_split)} rows have a blank split and are not used"
        yield rows.without_split.finding("warning", "rows_without_split", message, "Fill in their split.")


def _without_duplicates(table: pa.Table, file: str) -> tuple[pa.Table, list[Finding]]:
    """One row a name; where rows of a name disagree on a label, that label becomes unknown."""
    groups = groups_of_equals(table["name"].combine_chunks())
    if not groups:
        return table, []
    identical, conflicting = EvidenceList(), EvidenceList()
    keep = np.ones(table.num_rows, bool)
    disagree = {name: np.zeros(table.num_rows, bool) for name in ("split", "emotion", "au_state")}
    for rows in groups:
        keep[rows[1:]] = False
        said = table.take(pa.array(rows)).to_pylist()
        different = [name for name in said[0] if name != "line" and any(row[name] != said[0][name] for row in said)]
        place = f"{said[0]['name']} on lines {', '.join(str(row['line']) for row in said)}"
        if different:
            conflicting.add(f"{place}: {', '.join(different)} differ", file, said[1]["line"])
        else:
            identical.add(place, file, said[1]["line"])
        for name in different:
            disagree["au_state" if name.startswith("au_") else name][rows[0]] = True
    kept = _masked(table, disagree).filter(pa.array(keep)).combine_chunks()
    return kept, list(duplicate_findings(identical, conflicting, file))


def _masked(table: pa.Table, disagree: dict[str, npt.NDArray[np.bool_]]) -> pa.Table:
    """The table with labels that rows disagree about as unknown: null, unreadable, and no action unit."""
    empty = pa.array([[]], pa.list_(pa.int16()))
    unknown = {"au_state": pa.array(["unreadable"]), "au_positive": empty, "au_negative": empty}
    columns = {}
    for name in table.column_names:
        values = table[name].combine_chunks()
        mask = disagree.get("au_state" if name.startswith("au_") else name)
        if mask is not None:
            values = pa.concat_arrays([values, unknown.get(name, pa.nulls(1, values.type))])
            values = values.take(pa.array(np.where(mask, len(mask), np.arange(len(mask)))))
        columns[name] = values
    return pa.table(columns, schema=table.schema)
