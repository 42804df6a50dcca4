"""Text files of ``name label`` lines: read line by line into arrow columns, and every odd line reported."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rafce_ray.data.names import duplicate_groups
from rafce_ray.data.records import Evidence, EvidenceList, Finding
from rafce_ray.errors import UsageError
from rafce_ray.storage import Location
from rafce_ray.taxonomy import parse_action_unit_token, split_action_unit_tokens

AUTO = "auto"
"""The encoding that a file's byte order mark tells, UTF-8 without one."""

ENCODING_KEY = "data.encoding"

_CHUNK = 2048


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
        """Row of each name in this file, -1 where it has none."""
        if names.equals(self.names):
            return np.arange(len(names))
        return np.asarray(pc.fill_null(pc.index_in(names, value_set=self.names), -1)).astype(np.int64)

    def not_among(self, names: pa.Array) -> npt.NDArray[np.int64]:
        """Rows of this file whose name is not among ``names``."""
        if names.equals(self.names):
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.asarray(pc.is_null(pc.index_in(self.names, value_set=names))))

    def lines_at(self, row: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The line of each row; -1 for row -1."""
        return np.append(self.lines, np.int32(-1))[row]

    def conflicting_at(self, row: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each row's lines disagree; False for row -1."""
        return np.append(self.conflicting, False)[row]


def no_label_file() -> LabelFile:
    """Stands for a file that is not there: it holds no name."""
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
    sha256, findings = hashlib.sha256(raw).hexdigest(), text_findings(raw, location.name, encoding)
    text = open_text(raw, location, encoding=encoding)
    del raw
    names: list[pa.Array] = []
    values: list[pa.Array] = []
    lines: list[npt.NDArray[np.int32]] = []
    malformed = EvidenceList()
    chunk: list[tuple[str, str, int]] = []
    for number, line in enumerate(text, start=1):
        fields = line.split(None, 1)
        if len(fields) == 2:
            chunk.append((fields[0], fields[1].rstrip(), number))
        elif fields:
            malformed.add(f"{line.strip()[:80]!r}: expected a file name, a blank and a label", location.name, number)
        if len(chunk) == _CHUNK:
            _flush(chunk, names, values, lines)
    _flush(chunk, names, values, lines)
    text.close()
    if malformed:
        message = f"{location.name}: {len(malformed)} lines are not 'name label' and are not used"
        remedy = "Write each line as NAME LABEL."
        findings.append(malformed.finding("warning", "malformed_lines", message, remedy))
    every_name, every_line = pa.concat_arrays(names), np.concatenate(lines)
    every_value = pa.chunked_array(values, pa.string())
    keep, conflicting, duplicates = _judge_duplicates(every_name, every_value, every_line, location.name)
    if duplicates:
        kept = pa.array(keep)
        every_name, every_value, every_line = every_name.filter(kept), every_value.filter(kept), every_line[keep]
    return LabelFile(
        file=location.name,
        names=every_name,
        values=every_value,
        lines=every_line,
        conflicting=conflicting[keep],
        findings=(*findings, *duplicates),
        sha256=sha256,
    )


def _flush(
    chunk: list[tuple[str, str, int]], names: list[pa.Array], values: list[pa.Array], lines: list[npt.NDArray[np.int32]]
) -> None:
    names.append(pa.array([name for name, _, _ in chunk], pa.string()))
    values.append(pa.array([value for _, value, _ in chunk], pa.string()))
    lines.append(np.array([line for _, _, line in chunk], np.int32))
    chunk.clear()


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
    for mark, codec in (
        (b"\xff\xfe\x00\x00", "utf-32"),
        (b"\x00\x00\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if raw.startswith(mark):
            return codec
    return "utf-8-sig"


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
    try:
        raw.decode(codec)
    except UnicodeDecodeError:
        return False
    return True


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
        return (
            f"opens a double quote that its line does not close: lines {self.first} to {self.last} are read as one row"
        )


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
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return True
    return False


def text_findings(raw: bytes, file: str, encoding: str = AUTO) -> list[Finding]:
    """What is unusual about a text file's bytes but read all the same."""
    findings = []
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
        findings.append(Finding("info", "text_format", f"{file}: {found} read", "", 1, (Evidence(found, file),)))
    if encoding != AUTO and codecs.lookup(encoding).name != "utf-8" and not raw.isascii() and _decodes(raw, codec):
        message = (
            f"{file}: {ENCODING_KEY} is {encoding}, but the bytes are valid {codec.removesuffix('-sig').upper()} text"
        )
        remedy = f"Look at the names of the classes: if they hold strange characters, leave out {ENCODING_KEY}."
        findings.append(Finding("warning", "encoding_looks_wrong", message, remedy))
    return findings


def _judge_duplicates(
    names: pa.Array, values: pa.ChunkedArray, lines: npt.NDArray[np.int32], file: str
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], list[Finding]]:
    """Per row: whether it is its name's first one, and whether it disagrees with a later one; and what to say."""
    keep, conflicting = np.ones(len(names), bool), np.zeros(len(names), bool)
    identical_evidence, conflict_evidence = EvidenceList(), EvidenceList()
    for rows in duplicate_groups(names):
        keep[rows[1:]] = False
        said = [str(values[row].as_py()) for row in rows.tolist()]
        numbers = ", ".join(str(lines[row]) for row in rows.tolist())
        detail = f"{names[int(rows[0])].as_py()} on lines {numbers}: {' / '.join(said)}"
        conflicting[rows[0]] = len(set(said)) > 1
        (conflict_evidence if conflicting[rows[0]] else identical_evidence).add(detail, file, int(lines[rows[1]]))
    return keep, conflicting, duplicate_findings(identical_evidence, conflict_evidence, file)


def duplicate_findings(identical: EvidenceList, conflicting: EvidenceList, file: str) -> list[Finding]:
    """Findings for names that a label file holds more than once."""
    findings = []
    if identical:
        message = f"{file}: {len(identical)} names are there more than once with the same label; each counts once"
        findings.append(identical.finding("warning", "duplicate_rows", message, "Delete the repeated lines."))
    if conflicting:
        message = f"{file}: {len(conflicting)} names are there more than once with different labels, which are unknown"
        findings.append(
            conflicting.finding("error", "conflicting_rows", message, "Keep the line that is right for each name.")
        )
    return findings


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


def unreadable_finding(file: str, evidence: EvidenceList) -> Finding:
    """Rows whose action-unit label cannot be read: none of it is used, and never as an absence."""
    message = (
        f"{file}: {len(evidence)} rows hold action-unit labels that cannot be read; all of these rows' are unknown"
    )
    remedy = "Write action units as numbers joined by '+', such as 1+4+L12, or null; in a table as 1, 0 or blank."
    return evidence.finding("warning", "unreadable_action_units", message, remedy)
