"""Read label files: text in any encoding, CSV rows, titles of columns, action units, and RAF-CE's own files."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import pdtr

from rafce_ray.base.errors import Evidence, Finding, Level, UsageError
from rafce_ray.base.storage import Location
from rafce_ray.base.taxonomy import (
    ACTION_UNIT_NAMES,
    action_unit_code,
    label_key,
    parse_action_unit_token,
    split_action_unit_tokens,
)
from rafce_ray.config import DataConfig
from rafce_ray.data.listing import groups_of_equals, image_columns, match_images
from rafce_ray.data.records import (
    LABEL_SCHEMA,
    NUM_VOTES,
    SPLIT_NAMES,
    ArrowRows,
    EvidenceList,
    Labels,
    evidence_of,
    label_table,
    positions,
    release_memory,
)

AUTO = "auto"
"""The encoding of a file's byte order mark; UTF-8 without one."""

ENCODING_KEY = "data.encoding"

_SCHEMA = pa.schema([("name", pa.string()), ("value", pa.string()), ("line", pa.int32())])


@dataclass(frozen=True)
class LabelFile:
    """One label file, one row a name: what it says, on which line, and whether two of its lines disagree."""

    file: str
    names: pa.Array
    values: pa.ChunkedArray
    lines: npt.NDArray[np.int32]
    conflicting: npt.NDArray[np.bool_]
    findings: tuple[Finding, ...]
    sha256: str

    def locate(self, names: pa.Array) -> npt.NDArray[np.int64]:
        """(N,) int64: the row of each name in this file, -1 where it has none."""
        return np.arange(len(names)) if names.equals(self.names) else positions(names, self.names)

    def usable(self, row: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """(N,) bool: whether each row is there, and its lines agree."""
        return np.append(~self.conflicting, False)[row]

    def lines_at(self, row: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """(N,) int32: the line of each row; -1 for row -1."""
        return np.append(self.lines, np.int32(-1))[row]


def no_label_file() -> LabelFile:
    """Stands for a file that does not exist: it has no name."""
    nothing = pa.array([], pa.string())
    return LabelFile("", nothing, pa.chunked_array([nothing]), np.zeros(0, np.int32), np.zeros(0, bool), (), "")


def refuse_broken_link(location: Location) -> None:
    """UsageError where labels are a link that leads to nothing: they are there, and would be read as missing."""
    if location.is_broken_link():
        raise UsageError(f"{location}: is a link that leads to nothing. Put the labels themselves in its place.")


def read_label_file(location: Location, encoding: str = AUTO) -> LabelFile | None:
    """A label file read whole; None where there is none. UsageError where it is not text in ``encoding``."""
    if not location.exists():
        refuse_broken_link(location)
        return None
    raw = location.read_bytes()
    sha256, findings = hashlib.sha256(raw).hexdigest(), list(text_findings(raw, location.name, encoding))
    text = open_text(raw, location, encoding=encoding)
    del raw
    rows, malformed = ArrowRows(_SCHEMA), EvidenceList()
    for number, line in enumerate(text, start=1):
        fields = line.split(None, 1)
        if len(fields) == 2:
            rows.append((fields[0], fields[1].rstrip(), number))
        elif fields:
            malformed.add(f"{line.strip()[:80]!r}: expected a file name, a blank and a label", location.name, number)
    text.close()
    if malformed:
        message = f"{location.name}: {len(malformed)} lines are not 'name label' and are not used"
        remedy = "Write each line as NAME LABEL."
        findings.append(malformed.finding("warning", "malformed_lines", message, remedy))
    table = rows.table()
    names, lines = table["name"].combine_chunks(), np.asarray(table["line"])
    keep, conflicting, duplicates = _judge_duplicates(names, table["value"], lines, location.name)
    if duplicates:
        table = table.filter(pa.array(keep))
    return LabelFile(
        file=location.name,
        names=table["name"].combine_chunks() if duplicates else names,
        values=table["value"],
        lines=lines[keep],
        conflicting=conflicting[keep],
        findings=(*findings, *duplicates),
        sha256=sha256,
    )


def open_text(
    raw: bytes, location: Location, newline: str | None = None, encoding: str = AUTO, key: str | None = ENCODING_KEY
) -> io.TextIOWrapper:
    """A text file's lines, without a byte order mark.

    ``encoding``: a codec's name, or ``auto``: UTF-8, or what a byte order mark says. ``key``: the option that a remedy
    names, if any.

    Raises:
        UsageError: the bytes are not text in this encoding; the message names the line and the bytes.
    """
    codec = _codec_of(raw) if encoding == AUTO else "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    if b"\x00" in raw[:4096] and codec == "utf-8-sig":
        guess = "utf-16-be" if raw[:1] == b"\x00" else "utf-16-le"
        other = f", or add {key}={guess} if it is UTF-16 without a byte order mark" if key else ""
        raise UsageError(f"{location}: is not text in UTF-8: it holds NUL bytes. Save it as UTF-8{other}.")
    try:
        # As the lines are decoded: other than bytes.decode, this insists on the byte order mark of UTF-16.
        codecs.getincrementaldecoder(codec)().decode(raw, final=True)
    except UnicodeDecodeError as error:
        raise UsageError(_undecodable(raw, location, error, encoding, key)) from None
    except UnicodeError as error:
        other = f" Give another {key}, or save it as UTF-8." if key else " Save it as UTF-8."
        raise UsageError(f"{location}: is not {encoding} text: {error}.{other}") from None
    return io.TextIOWrapper(io.BytesIO(raw), encoding=codec, newline=newline)


def _codec_of(raw: bytes) -> str:
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _undecodable(raw: bytes, location: Location, error: UnicodeDecodeError, encoding: str, key: str | None) -> str:
    """Where bytes are that are not in the encoding, and what they read as in the encoding of older Windows programs."""
    # Codecs count from after a byte order mark.
    start = raw.find(error.object[error.start : error.end], error.start)
    line = raw.count(b"\n", 0, start) + 1
    text = raw[max(raw.rfind(b"\n", 0, start) + 1, start - 40) : start + 40].partition(b"\n")[0].strip()
    found = f"byte {raw[start]:02x} in {text!r}"
    name = "UTF-8" if encoding == AUTO else encoding
    if not key or encoding != AUTO:
        remedy = f" Give another {key}, or save it as UTF-8." if key else " Save it as UTF-8."
        return f"{location}:{line}: is not {name} text: {found}.{remedy}"
    legacy = next(codec for codec in ("cp1252", "latin-1") if _decodes(raw, codec))
    return (
        f"{location}:{line}: is not UTF-8 text: {found}. In {legacy} it reads {text.decode(legacy)!r}. "
        f"If that is right, add {key}={legacy}; otherwise name its encoding there, or save the file as UTF-8."
    )


def _decodes(raw: bytes, codec: str) -> bool:
    with suppress(UnicodeDecodeError):
        raw.decode(codec)
        return True
    return False


@dataclass(frozen=True)
class CsvRow:
    """Cells of one row, its first and its last line.

    ``unsure``: it runs over several lines, which may be rows that an open quote swallowed. ``lone_quotes``: of its
    first and its last line, those with a single double quote.
    """

    cells: list[str]
    first: int
    last: int
    unsure: bool = False
    lone_quotes: tuple[int, ...] = ()

    @property
    def fault(self) -> str:
        """What an unsure row shows, without its place."""
        lines = f"lines {self.first} to {self.last}"
        return f"opens a double quote that its line does not close: {lines} are read as one row"


def csv_rows(text: io.TextIOBase, delimiter: str) -> Iterator[CsvRow]:
    """Rows that are not empty. An open double quote takes in all lines up to the next double quote, or to the end."""
    # The default of 131,072 characters would end at a lone quote with an error that names no place.
    csv.field_size_limit(2**31 - 1)
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in text:
            taken.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter)
    width = 0
    for cells in reader:
        width = width or len(cells)
        first = reader.line_num - len(taken) + 1
        row = CsvRow(cells, first, reader.line_num)
        # On the last line an open quote ends with the file, and its cell with the line's end.
        if len(taken) > 1 or (cells and cells[-1].endswith("\n")):
            ends = ((first, taken[0]), (reader.line_num, taken[-1]))
            lone = tuple(number for number, line in ends if line.count('"') == 1)
            row = replace(row, unsure=_looks_swallowed(taken, width, delimiter), lone_quotes=lone)
        taken.clear()
        if cells:
            yield row


def _looks_swallowed(lines: list[str], width: int, delimiter: str) -> bool:
    """Whether one of a row's lines has as many cells as a row, or the row breaks the rules of quoting."""
    if any(line.count(delimiter) == width - 1 for line in lines):
        return True
    with suppress(csv.Error):
        list(csv.reader(lines, delimiter=delimiter, strict=True))
        return False
    return True


def text_findings(raw: bytes, file: str, encoding: str = AUTO) -> Iterator[Finding]:
    """What is unusual about a text file's bytes but read all the same."""
    codec = _codec_of(raw)
    notes = []
    if raw.startswith(b"\xef\xbb\xbf"):
        notes.append("a byte order mark")
    if encoding == AUTO and codec != "utf-8-sig":
        notes.append(f"{codec.upper()} text")
    if b"\r" in raw:
        notes.append("carriage returns")
    if notes:
        found = " and ".join(notes)
        yield Finding("info", "text_format", f"{file}: {found} read", "", 1, (Evidence(found, file),))
    if encoding != AUTO and codecs.lookup(encoding).name != "utf-8" and not raw.isascii() and _decodes(raw, codec):
        valid = codec.removesuffix("-sig").upper()
        message = f"{file}: {ENCODING_KEY} is {encoding}, but the bytes are valid {valid} text"
        remedy = f"Look at the names of the classes: if they hold strange characters, leave out {ENCODING_KEY}."
        yield Finding("warning", "encoding_looks_wrong", message, remedy)


def _judge_duplicates(
    names: pa.Array, values: pa.ChunkedArray, lines: npt.NDArray[np.int32], file: str
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], list[Finding]]:
    """Per row: whether it is its name's first one, and whether it disagrees with a later one; and what to say."""
    keep, conflicting = np.ones(len(names), bool), np.zeros(len(names), bool)
    identical_evidence, conflict_evidence = EvidenceList(), EvidenceList()
    for rows in groups_of_equals(names):
        keep[rows[1:]] = False
        said = [str(values[row].as_py()) for row in rows.tolist()]
        numbers = ", ".join(str(lines[row]) for row in rows.tolist())
        detail = f"{names[int(rows[0])].as_py()} on lines {numbers}: {' / '.join(said)}"
        conflicting[rows[0]] = len(set(said)) > 1
        (conflict_evidence if conflicting[rows[0]] else identical_evidence).add(detail, file, int(lines[rows[1]]))
    return keep, conflicting, list(duplicate_findings(identical_evidence, conflict_evidence, file))


def duplicate_findings(identical: EvidenceList, conflicting: EvidenceList, file: str) -> Iterator[Finding]:
    """Findings for names that are more than once in a label file."""
    if identical:
        message = f"{file}: {len(identical)} names are there more than once with the same label; each counts once"
        yield identical.finding("warning", "duplicate_rows", message, "Delete the repeated lines.")
    if conflicting:
        message = f"{file}: {len(conflicting)} names are there more than once with different labels, which are unknown"
        yield conflicting.finding("error", "conflicting_rows", message, "Keep the line that is right for each name.")


@dataclass(frozen=True)
class ActionUnitLabel:
    """One label that lists action units, read: ``state`` as in ``records.LABEL_SCHEMA``."""

    state: str
    positive: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    fault: str | None = None


def read_action_unit_label(text: str) -> ActionUnitLabel:
    """The action units that ``1+4+L12`` lists; of ``null`` and of a label with an unreadable token, none."""
    if text.strip().lower() == "null":
        return ActionUnitLabel("null")
    tokens = tuple(split_action_unit_tokens(text))
    numbers = [parse_action_unit_token(token) for token in tokens]
    unreadable = [token for token, number in zip(tokens, numbers, strict=True) if number is None]
    if unreadable or not tokens:
        fault = f"unreadable {', '.join(map(repr, unreadable))} in {text[:80]!r}"
        return ActionUnitLabel("unreadable", (), tokens, fault)
    return ActionUnitLabel("full", tuple(sorted({number for number in numbers if number is not None})), tokens)


HOW_TO_WRITE_ACTION_UNITS = (
    "Write action units as numbers joined by '+', such as 1+4+L12, or null; in a table as 1, 0 or blank."
)


def unreadable_finding(file: str, evidence: EvidenceList) -> Finding:
    """Rows whose action-unit label cannot be read: none of it is used, and never as an absence."""
    rows = f"{len(evidence)} rows hold action-unit labels that cannot be read"
    message = f"{file}: {rows}; all of these rows' are unknown"
    return evidence.finding("warning", "unreadable_action_units", message, HOW_TO_WRITE_ACTION_UNITS)


_NAME = re.compile(r"(file|image|img|picture|photo)(_?(name|file|filename|path))?|path|input")
_SPLIT = re.compile(r"(data_|dataset_)split|split_name|set|subset|partition|usage")
_EMOTION = re.compile(r"emotions|(emotion|expression)_(label|class|name)|(facial_)?expression|compound_emotion")
_MAYBE_EMOTION = re.compile(r"labels?|class(_name)?|category|target")
"""Titles that are read as emotions only where a table has no action units: next to them, they could mean anything."""

_ACTION_UNIT_LIST = re.compile(r"action_?units?|aus|au_?(list|labels?|codes?)|facs(_(aus|codes?))?")
_PERSON = re.compile(r"(person|subject|participant|identity|actor)(_?(id|name))?")

_PRESENCE = frozenset(["c", "present", "presence", "occurrence", "occ", "binary", "active", "label"])
"""What may follow an action unit in the title of a column of 1 and 0; ``_c`` is OpenFace's."""

_INTENSITY = frozenset(["r", "intensity"])
"""What may follow it in the title of a column of intensities; ``_r`` is OpenFace's."""

_PLAIN_ACTION_UNIT = re.compile(r"^A[UD]_?[LRTB]{0,2}\d{1,2}$", re.IGNORECASE)
_ACTION_UNIT = re.compile(r"^(?:facs_)?(a[ud]_?[lrtb]{0,2}\d{1,2})(?:_(\w+))?$")
_MENTIONED = re.compile(r"(?:^|_)(?:(?:f|is|has)?a[ud]_?(?:[lrtb]{0,2}|[a-z]+_)|facs_?)0*(\d{1,2})(?!\d)")
_ABOUT = re.compile(r"(^|_)(aus|facs|action_?units?)(_|$)|^au$")
_NOT_LABELS = re.compile(
    r"(^|_)(coders?|raters?|annotators?|notes?|comments?|date|version|num|number|count|total)(_|$)"
)
"""Words of titles that tell of the coding of action units, not of the units."""

_ENDINGS = re.compile(r"(?:ers?|e|r|s)$")


@dataclass(frozen=True)
class Columns:
    """Positions of the columns that are read, and the findings about the titles.

    ``action_units`` maps a number to its position, ``action_unit_list`` is a column such as ``1+4+12``. ``presence``:
    action units whose title says that they are 1 or 0, not intensities. ``person`` names the person, which is no label;
    splits can go by it. ``read_as``: the titles of what is read, where they differ from its own.
    """

    header: tuple[str, ...]
    name: int
    split: int | None
    emotion: int | None
    action_units: dict[int, int]
    presence: frozenset[int]
    action_unit_list: int | None
    person: int | None
    read_as: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def read(self) -> set[int]:
        """Positions of all that are read."""
        given = (self.name, self.split, self.emotion, self.action_unit_list, *self.action_units.values())
        return {position for position in given if position is not None}

    @property
    def has_action_units(self) -> bool:
        """Whether any column holds action units."""
        return bool(self.action_units) or self.action_unit_list is not None


def title_key(title: str) -> str:
    """A title in lower case with one ``_`` for whatever stands between its words: ``" AU01_c"`` -> ``"au01_c"``."""
    text = unicodedata.normalize("NFKC", title).replace("\N{ZERO WIDTH NO-BREAK SPACE}", "")
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", text)
    return re.sub(r"action_?unit_?(?=\d)", "au", re.sub(r"[\W_]+", "_", text).strip("_").lower())


def find_name(header: Sequence[str], place: str) -> int | None:
    """The column of image file names: ``name``, or the only one of another usual title; None where there is none.

    Raises:
        UsageError: two columns could be meant.
    """
    return _find_one(header, [title_key(title) for title in header], place, "name", _NAME, "the image file names")


def find_columns(header: Sequence[str], place: str, file: str, data: DataConfig) -> Columns:
    """Which column is which. ``place`` and ``file`` are what messages call the table.

    Raises:
        UsageError: there are no names or no labels, or two columns could mean the same.
    """
    titles = [title.strip().strip("\N{ZERO WIDTH NO-BREAK SPACE}").strip() for title in header]
    keys = [title_key(title) for title in titles]
    units = _find_action_units(titles, keys, place, use_intensities=data.au_threshold is not None)
    lists = [position for position, key in enumerate(keys) if _ACTION_UNIT_LIST.fullmatch(key)]
    if len(lists) > 1 and not units.read and data.action_units != "none":
        raise _ambiguous(f"{place}:1", titles, lists, "the action units", "action_units")
    action_unit_list = lists[0] if lists and not units.read else None
    has_units = bool(units.read) or action_unit_list is not None
    name = find_name(titles, f"{place}:1")
    if name is None:
        raise UsageError(
            f"{place}:1: no column 'name' among {titles}. It holds the image file names; the titles filename, file, "
            "path and image are also read. Rename the column."
        )
    split = _find_one(titles, keys, f"{place}:1", "split", _SPLIT, "the split")
    emotion = None
    if "emotion" in keys or data.emotions != "none":
        emotion = _find_one(titles, keys, f"{place}:1", "emotion", _EMOTION, "the emotions")
        if emotion is None and not has_units:
            emotion = _find_one(titles, keys, f"{place}:1", "emotion", _MAYBE_EMOTION, "the emotions")
    read = {name, split, emotion, action_unit_list, *units.read.values()}
    others = [position for position in range(len(titles)) if position not in read]
    unread = _unread_action_units(titles, keys, others, units, lists)
    findings = []
    if unread:
        findings.append(_unread_finding(titles, unread, file, has_units=has_units, wanted=data.action_units != "none"))
    perhaps = [position for position in others if _MAYBE_EMOTION.fullmatch(keys[position])]
    if emotion is None and perhaps and data.emotions != "none":
        named = ", ".join(repr(titles[position]) for position in perhaps)
        message = f"{file}: {named} may hold emotions, which are not read"
        general = f"{titles[perhaps[0]]!r} is too general a title next to action units"
        remedy = f"Rename it to 'emotion' if it does: {general}."
        findings.append(Finding("warning", "unread_emotions", message, remedy, len(perhaps)))
    if emotion is None and not has_units:
        hint = "".join(f" {finding.message}. {finding.remedy}" for finding in findings)
        raise UsageError(f"{place}:1: neither a column 'emotion' nor AU columns such as 'AU12' among {titles}.{hint}")
    read_as = {
        what: titles[position]
        for what, position in (("name", name), ("split", split), ("emotion", emotion))
        if position is not None and keys[position] != what
    }
    for number, position in units.read.items():
        if not _PLAIN_ACTION_UNIT.match(titles[position]):
            read_as[action_unit_code(number)] = titles[position]
    if action_unit_list is not None:
        read_as["a list of action units"] = titles[action_unit_list]
    if read_as:
        listed = ", ".join(f"{title!r} is read as {what}" for what, title in read_as.items())
        findings.append(Finding("info", "titles_read", f"{file}: {listed}", "", len(read_as)))
    ignored = [titles[position] for position in others if position not in unread]
    if ignored:
        found = "1 column is no label and is" if len(ignored) == 1 else f"{len(ignored)} columns are no labels and are"
        message = f"{file}: {found} not read: {', '.join(ignored)}"
        findings.append(Finding("info", "ignored_columns", message, "", len(ignored)))
    return Columns(
        header=tuple(titles),
        name=name,
        split=split,
        emotion=emotion,
        action_units=units.read,
        presence=units.presence,
        action_unit_list=action_unit_list,
        person=next((position for position in others if _PERSON.fullmatch(keys[position])), None),
        read_as=read_as,
        findings=tuple(findings),
    )


@dataclass(frozen=True)
class _ActionUnitColumns:
    """Positions by action unit: ``read``; ``intensities``, read or not. ``presence``: read ones that are 1 or 0."""

    read: dict[int, int]
    intensities: dict[int, int]
    presence: frozenset[int]


def _find_action_units(
    titles: Sequence[str], keys: Sequence[str], place: str, *, use_intensities: bool
) -> _ActionUnitColumns:
    """Of an action unit's presence and its intensity, both of which OpenFace writes, one is read."""
    presence: dict[int, int] = {}
    intensities: dict[int, int] = {}
    said_to_be_presence = set()
    for position, key in enumerate(keys):
        match = _ACTION_UNIT.match(key)
        number = parse_action_unit_token(match.group(1).replace("_", "")) if match else None
        if match is None or number is None:
            continue
        kind = match.group(2)
        if kind == "r" and (not titles[position].rstrip(")]").endswith("r") or f"{match.group(1)}_l" in keys):
            # AU1_R next to AU1_L, or alone in capitals: the right side of a face.
            continue
        if kind is not None and kind not in _PRESENCE | _INTENSITY and _facs_number(kind) != number:
            continue
        columns = intensities if kind in _INTENSITY else presence
        if number in columns:
            both = f"{titles[columns[number]]!r} and {titles[position]!r}"
            raise UsageError(f"{place}:1: the columns {both} both say {action_unit_code(number)}. Keep one.")
        columns[number] = position
        if kind in _PRESENCE:
            said_to_be_presence.add(number)
    read = presence | intensities if use_intensities else dict(presence)
    order = sorted(read, key=lambda number: read[number])
    return _ActionUnitColumns(
        read={number: read[number] for number in order},
        intensities=intensities,
        presence=frozenset(number for number in said_to_be_presence if read[number] == presence[number]),
    )


def _find_one(
    titles: Sequence[str], keys: Sequence[str], place: str, title: str, others: re.Pattern[str], what: str
) -> int | None:
    """The column of the very title, or the only one of another title for it."""
    exact = [position for position, key in enumerate(keys) if key == title]
    found = exact or [position for position, key in enumerate(keys) if others.fullmatch(key)]
    if len(found) > 1:
        raise _ambiguous(place, titles, found, what, title)
    return found[0] if found else None


def _ambiguous(place: str, titles: Sequence[str], found: Sequence[int], what: str, title: str) -> UsageError:
    named = " and ".join(repr(titles[position]) for position in found)
    return UsageError(
        f"{place}: the columns {named} could each hold {what}. Keep one, or rename the one that is meant to {title!r} "
        "and the others to something else."
    )


def _unread_action_units(
    titles: Sequence[str], keys: Sequence[str], others: Sequence[int], units: _ActionUnitColumns, lists: Sequence[int]
) -> dict[int, str]:
    """Columns that look like action units and are not read: what to do about each, by its position."""
    unread = {}
    already = {action_unit_code(number) for number in units.read}
    numbered = [position for position in others if keys[position].isdecimal()]
    for position in others:
        key = keys[position]
        match = _ACTION_UNIT.match(key)
        number = parse_action_unit_token(match.group(1).replace("_", "")) if match else None
        if number in units.read and match is not None and match.group(2) in _PRESENCE | _INTENSITY | {None}:
            continue
        if position in units.intensities.values():
            unread[position] = f"{titles[position]!r} holds intensities: set data.au_threshold (usual: 2 of 0 to 5)"
        elif position in lists:
            unread[position] = f"{titles[position]!r} is a list, next to columns that are read: keep one of both"
        elif (title := _suggested_title(key, numbered=len(numbered) > 1)) is None or title in already:
            continue
        elif match is not None and match.group(2) in ("l", "r"):
            unread[position] = f"{titles[position]!r} looks like a side: write {title!r}, 1 where either side shows it"
        elif "+" in titles[position]:
            unread[position] = f"give each action unit of {titles[position]!r} a column of its own"
        else:
            unread[position] = f"rename {titles[position]!r} to {title!r}"
    return unread


def _unread_finding(
    titles: Sequence[str], unread: dict[int, str], file: str, *, has_units: bool, wanted: bool
) -> Finding:
    level: Level = "info" if not wanted else "warning" if has_units else "error"
    named = ", ".join(repr(titles[position]) for position in unread)
    columns = "1 column looks" if len(unread) == 1 else f"{len(unread)} columns look"
    message = f"{file}: {columns} like action units and {'is' if len(unread) == 1 else 'are'} not read: {named}"
    if not has_units:
        message += "; no action unit is read"
    advice = "; ".join(unread.values())
    remedy = f"{advice[0].upper()}{advice[1:]}. A column 'AU12' holds 1, 0 or blank, a column 'action_units' 1+4+12."
    evidence = tuple(Evidence(text, file, 1) for text in unread.values())
    return Finding(level, "unread_action_units", message, remedy, len(unread), evidence)


def _suggested_title(key: str, *, numbered: bool) -> str | None:
    """The title under which a column would be read that looks like action units; None where it does not look so."""
    if _NOT_LABELS.search(key):
        return None
    mentioned = {int(text) for text in _MENTIONED.findall(key)} - {0}
    if key.isdecimal() and numbered and int(key) in ACTION_UNIT_NAMES:
        mentioned = {int(key)}
    named = _facs_number(key)
    if named is not None:
        mentioned = {named}
    if mentioned:
        return action_unit_code(min(mentioned))
    return "action_units" if _ABOUT.search(key) else None


def _facs_number(key: str) -> int | None:
    """The action unit whose FACS name, or a form of it, is in a title: ``lip_corner_puller``, ``inner_brow_raise``."""
    titles = (key, *map(title_key, ACTION_UNIT_NAMES.values()))
    words, *names = ([_ENDINGS.sub("", word) for word in title.split("_")] for title in titles)
    for number, wanted in zip(ACTION_UNIT_NAMES, names, strict=True):
        found = any(words[start : start + len(wanted)] == wanted for start in range(len(words)))
        if found and (len(wanted) > 1 or len(words) == 1):
            return number
    return None


NUM_LABELLED = 4549
"""Labelled images of RAF-CE."""

SPLIT_SIZES = {"train": 2709, "validation": 931, "test": 909}
"""Labelled images per split of RAF-CE."""

CLASS_COUNTS = {
    "train": (394, 171, 109, 136, 71, 495, 120, 352, 24, 124, 582, 108, 6, 17),
    "validation": (156, 54, 26, 50, 24, 162, 32, 138, 6, 42, 201, 32, 4, 4),
    "test": (126, 54, 36, 44, 25, 178, 43, 113, 6, 44, 194, 37, 1, 8),
}
"""Images per class of RAF-CE, in label order."""

NUM_NULL_TRAIN = 136
"""Train rows of RAF-CE whose action-unit label is null."""

TRAIN_POSITIVES = {
    25: 1661, 4: 1060, 10: 820, 12: 732, 1: 654, 26: 647, 5: 577, 2: 480, 27: 472, 9: 449, 16: 426, 17: 337, 6: 265,
    7: 208, 22: 205, 15: 172, 20: 145, 24: 134, 43: 101, 14: 79, 18: 74, 23: 69, 28: 25, 19: 19, 29: 12, 45: 0,
}  # fmt: skip
"""Train positives of RAF-CE per action unit; those not listed have fewer than 8."""


def is_surprisingly_few(count: int, expected: float) -> bool:
    """Whether ``count`` or fewer of an event expected ``expected`` times has a chance below 1 in 1000 (Poisson)."""
    return expected > 0 and count < expected and bool(pdtr(count, expected) < 1e-3)


EMOTION_FILE = "RAFCE_emolabel.txt"
ACTION_UNIT_FILE = "RAFCE_AUlabel.txt"
PARTITION_FILE = "RAFCE_partition.txt"
VOTES_FILE = "distribution.txt"

PARTITIONS = {"0": "train", "1": "test", "2": "validation"}
"""RAF-CE's partition codes."""

_VOTES_TOLERANCE = 0.02


def is_rafce(root: Location) -> bool:
    """Whether a folder has one of RAF-CE's label files."""
    return any((root / name).exists() for name in (EMOTION_FILE, ACTION_UNIT_FILE, PARTITION_FILE))


def read_rafce(root: Location, images: str | None, encoding: str = AUTO) -> Labels:
    """Labels of a folder in RAF-CE's layout, rows in the order of the emotion file, then of the action-unit file.

    Raises:
        UsageError: there is neither an emotion nor an action-unit file, or a file is not text.
    """
    emotions = read_label_file(root / EMOTION_FILE, encoding)
    action_units = read_label_file(root / ACTION_UNIT_FILE, encoding)
    labelled = [file for file in (emotions, action_units) if file is not None]
    if not labelled:
        raise UsageError(
            f"{root}: neither {EMOTION_FILE} nor {ACTION_UNIT_FILE} is there. Point data.root at their folder."
        )
    names = labelled[0].names
    if len(labelled) == 2 and not names.equals(labelled[1].names):
        names = pc.unique(pa.concat_arrays([file.names for file in labelled]))
    unit_columns, tokens, unit_findings = _action_units(names, action_units or no_label_file())
    emotion_rows = emotions or no_label_file()
    row = emotion_rows.locate(names)
    columns = {
        "name": names,
        "emotion": emotion_rows.values.combine_chunks().take(pa.array(row, mask=~emotion_rows.usable(row))),
        "emotion_line": pa.array(emotion_rows.lines_at(row), mask=row < 0),
        **unit_columns,
    }
    findings = [
        *_file_findings(names, emotions, "rows_without_emotion", "their emotion is unknown"),
        *_file_findings(names, action_units, "rows_without_action_units", "their action units are unknown"),
        *unit_findings,
    ]
    # One file after the other: only what is kept of each stays in memory.
    partition = read_label_file(root / PARTITION_FILE, encoding)
    columns["split"], split_findings = _splits(names, partition, root)
    findings += _file_findings(names, partition, "rows_without_split", "they are in no split and are not used")
    release_memory()
    votes = read_label_file(root / VOTES_FILE, encoding)
    columns["votes"], votes_findings = _votes(names, votes)
    findings += votes.findings if votes else ()
    findings += [
        *split_findings,
        *votes_findings,
        *_spare_findings(names, partition, "warning", "split_without_label"),
        *_spare_findings(names, votes, "info", "votes_without_label"),
    ]
    digests = {file.file: file.sha256 for file in (*labelled, partition, votes) if file}
    emotion_file, au_file = (file.file if file else None for file in (emotions, action_units))
    del emotions, emotion_rows, action_units, labelled, partition, votes
    release_memory()
    matched = match_images(names, root, images)
    columns |= image_columns(matched.listing.table, matched.index)
    return Labels(
        table=label_table(columns),
        layout="rafce",
        root=root,
        image_root=matched.listing.folder,
        emotion_file=emotion_file,
        au_file=au_file,
        au_columns=None,
        num_extra_images=matched.num_extras,
        findings=(*findings, *matched.findings),
        token_counts=tokens,
        digests=digests,
        near_images=matched.near,
    )


def _file_findings(names: pa.Array, file: LabelFile | None, code: str, consequence: str) -> Iterator[Finding]:
    """What was odd in a file, and labelled names that it lacks."""
    if file is None:
        return
    yield from file.findings
    absent = np.flatnonzero(file.locate(names) < 0).tolist()
    if absent:
        evidence = evidence_of(Evidence(f"{names[row].as_py()} is not in it", file.file) for row in absent)
        message = f"{file.file}: {len(absent)} labelled names of the other files are missing; {consequence}"
        yield Finding("warning", code, message, f"Add their lines to {file.file}.", len(absent), evidence)


def _spare_findings(names: pa.Array, file: LabelFile | None, level: Level, code: str) -> Iterator[Finding]:
    """Names of a file that have no label."""
    if file is not None and (unknown := np.flatnonzero(positions(file.names, names) < 0).tolist()):
        evidence = evidence_of(
            Evidence(f"{file.names[row].as_py()} has no label", file.file, int(file.lines[row])) for row in unknown
        )
        message = f"{file.file}: {len(unknown)} names have neither an emotion nor an action-unit label: not used"
        yield Finding(level, code, message, "Add their labels, or delete the lines.", len(unknown), evidence)


def _action_units(names: pa.Array, file: LabelFile) -> tuple[dict[str, pa.Array], dict[str, int], list[Finding]]:
    """The action-unit columns, how often each token was written, and findings."""
    # There are far fewer distinct labels than rows: each is read once.
    distinct = file.values.combine_chunks().dictionary_encode()
    labels = [read_action_unit_label(text) for text in distinct.dictionary.to_pylist()]
    labels += [ActionUnitLabel("unreadable"), ActionUnitLabel("missing")]
    row = file.locate(names)
    code = np.append(np.asarray(distinct.indices), len(labels) - 1)[row]
    code[(row >= 0) & ~file.usable(row)] = len(labels) - 2
    lines = file.lines_at(row)
    faults = EvidenceList()
    faulty = np.flatnonzero(np.array([label.fault is not None for label in labels])[code])
    for i in faulty[np.argsort(lines[faulty])].tolist():
        faults.add(f"{names[i].as_py()}: {labels[code[i]].fault}", file.file, int(lines[i]))
    tokens: Counter[str] = Counter()
    for label, count in zip(labels, np.bincount(code, minlength=len(labels)).tolist(), strict=True):
        for token in label.tokens if count else ():
            tokens[token] += count
    taken = pa.array(code)
    columns = {
        "au_state": pa.array([label.state for label in labels]).take(taken),
        "au_line": pa.array(lines, mask=row < 0),
        "au_positive": pa.array([list(label.positive) for label in labels], pa.list_(pa.int16())).take(taken),
    }
    return columns, dict(tokens), [unreadable_finding(file.file, faults)] if faults else []


def _splits(names: pa.Array, file: LabelFile | None, root: Location) -> tuple[pa.Array, list[Finding]]:
    if file is None:
        message = f"{PARTITION_FILE} is missing: no image is in a split"
        lines = "lines such as '0001.jpg 0' (0 train, 1 test, 2 validation)"
        remedy = f"Add {PARTITION_FILE} with {lines}, or draw one: rafce data split {root.command}"
        return pa.nulls(len(names), pa.string()), [Finding("refusal", "no_partition_file", message, remedy)]
    distinct = file.values.combine_chunks().dictionary_encode()
    known = [PARTITIONS.get(text) or SPLIT_NAMES.get(label_key(text)) for text in distinct.dictionary.to_pylist()]
    codes = np.asarray(distinct.indices)
    unknown = EvidenceList()
    for i in np.flatnonzero(np.array([split is None for split in known], bool)[codes]).tolist():
        unknown.add(f"{file.names[i].as_py()}: {file.values[i].as_py()!r}", file.file, int(file.lines[i]))
    row = file.locate(names)
    splits = pa.array(known, pa.string()).take(pa.array(np.append(codes, 0)[row], mask=~file.usable(row)))
    if not unknown:
        return splits, []
    message = f"{file.file}: {len(unknown)} rows name an unknown partition and are in no split"
    remedy = "Use 0 train, 1 test, 2 validation."
    return splits, [unknown.finding("error", "unknown_partitions", message, remedy)]


def _votes(names: pa.Array, file: LabelFile | None) -> tuple[pa.Array, list[Finding]]:
    kind = LABEL_SCHEMA.field("votes").type
    if file is None:
        return pa.nulls(len(names), kind), []
    row = file.locate(names)
    shares = np.full((len(names), NUM_VOTES), np.nan, np.float32)
    for i in np.flatnonzero(file.usable(row)).tolist():
        parts = file.values[row[i]].as_py().replace(",", " ").split()
        if len(parts) == NUM_VOTES:
            # What is no number stays NaN, and NaN fails the check below.
            with suppress(ValueError):
                shares[i] = [float(part) for part in parts]
    known = (shares >= 0).all(axis=1) & (np.abs(shares.sum(axis=1) - 1) <= _VOTES_TOLERANCE)
    shares[~known] = 0
    array = pa.FixedSizeListArray.from_arrays(pa.array(shares.reshape(-1)), type=kind, mask=pa.array(~known))
    faults = EvidenceList()
    for i in np.flatnonzero((row >= 0) & ~known).tolist():
        faults.add(f"{names[i].as_py()}: {file.values[row[i]].as_py()[:80]!r}", file.file, int(file.lines[row[i]]))
    if not faults:
        return array, []
    message = f"{file.file}: votes of {len(faults)} rows are not {NUM_VOTES} shares that sum to 1; they are unknown"
    remedy = "Write six shares in the order surprise, fear, disgust, happiness, sadness, anger."
    return array, [faults.finding("warning", "unreadable_votes", message, remedy)]
