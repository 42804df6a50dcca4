"""Text files of ``name label`` lines: read line by line into arrow columns, and every odd line reported."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rafce_ray.data.records import Evidence, Finding, evidence_of
from rafce_ray.errors import UsageError
from rafce_ray.storage import Location

_CHUNK = 8192


@dataclass(frozen=True)
class LabelFile:
    """One label file, one row a name: what it says, on which line, and whether two of its lines disagree."""

    file: str
    names: pa.Array
    values: pa.Array
    lines: npt.NDArray[np.int32]
    conflicting: npt.NDArray[np.bool_]
    findings: tuple[Finding, ...]
    sha256: str

    def locate(self, names: pa.Array) -> npt.NDArray[np.int64]:
        """Row of each name in this file, -1 where it has none."""
        return np.asarray(pc.fill_null(pc.index_in(names, value_set=self.names), -1)).astype(np.int64)


def read_label_file(location: Location) -> LabelFile | None:
    """A label file read whole; None where there is none. UsageError where it is not UTF-8 text."""
    if not location.exists():
        return None
    raw = location.read_bytes()
    names: list[pa.Array] = []
    values: list[pa.Array] = []
    lines: list[npt.NDArray[np.int32]] = []
    malformed: list[Evidence] = []
    num_malformed = 0
    chunk: list[tuple[str, str, int]] = []
    for number, line in enumerate(open_text(raw, location), start=1):
        fields = line.split(None, 1)
        if len(fields) == 2 and "\N{REPLACEMENT CHARACTER}" not in line:
            chunk.append((fields[0], fields[1].rstrip(), number))
        elif fields:
            num_malformed += 1
            malformed.append(
                Evidence(f"{line.strip()[:80]!r}: expected a file name, a blank and a label", location.name, number)
            )
        if len(chunk) == _CHUNK:
            _flush(chunk, names, values, lines)
    _flush(chunk, names, values, lines)
    findings = text_findings(raw, location.name)
    if num_malformed:
        message = f"{location.name}: {num_malformed} lines are not 'name label' and are not used"
        remedy = "Write each line as NAME LABEL, in UTF-8."
        findings.append(Finding("warning", "malformed_lines", message, remedy, num_malformed, evidence_of(malformed)))
    every_name = pa.concat_arrays(names)
    every_value = pa.concat_arrays(values)
    first, conflicting, duplicate_findings = drop_duplicates(
        every_name, every_value, np.concatenate(lines), location.name
    )
    keep = pa.array(first)
    return LabelFile(
        file=location.name,
        names=every_name.take(keep),
        values=every_value.take(keep),
        lines=np.concatenate(lines)[first],
        conflicting=conflicting,
        findings=(*findings, *duplicate_findings),
        sha256=hashlib.sha256(raw).hexdigest(),
    )


def _flush(
    chunk: list[tuple[str, str, int]], names: list[pa.Array], values: list[pa.Array], lines: list[npt.NDArray[np.int32]]
) -> None:
    names.append(pa.array([name for name, _, _ in chunk], pa.string()))
    values.append(pa.array([value for _, value, _ in chunk], pa.string()))
    lines.append(np.array([line for _, _, line in chunk], np.int32))
    chunk.clear()


def open_text(raw: bytes, location: Location, newline: str | None = None) -> io.TextIOWrapper:
    """A label file's lines, without a byte order mark; bytes that are not UTF-8 become replacement characters.

    Raises:
        UsageError: the file is UTF-16, or binary.
    """
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in raw[:4096]:
        raise UsageError(f"{location}: is not UTF-8 text (found UTF-16 or binary content). Save it as UTF-8.")
    return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig", errors="replace", newline=newline)


def text_findings(raw: bytes, file: str) -> list[Finding]:
    """What is unusual about a text file's bytes but read all the same."""
    notes = []
    if raw.startswith(b"\xef\xbb\xbf"):
        notes.append("a byte order mark")
    if b"\r" in raw:
        notes.append("carriage returns")
    if not notes:
        return []
    return [
        Finding(
            "info",
            "text_format",
            f"{file}: {' and '.join(notes)} read and left out",
            "",
            1,
            (Evidence(", ".join(notes), file),),
        )
    ]


def drop_duplicates(
    names: pa.Array, values: pa.Array, lines: npt.NDArray[np.int32], file: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], list[Finding]]:
    """Row of each name's first line, whether its lines disagree, and findings for names that have more than one."""
    codes = np.asarray(names.dictionary_encode().indices)
    _, first, inverse, counts = np.unique(codes, return_index=True, return_inverse=True, return_counts=True)
    conflicting = np.zeros(len(first), bool)
    if len(first) == len(codes):
        return first, conflicting, []
    identical_evidence, conflict_evidence = [], []
    order = np.argsort(inverse, kind="stable")
    for rows in np.split(order, np.cumsum(counts)[:-1]):
        if len(rows) == 1:
            continue
        said = [str(values[i].as_py()) for i in rows.tolist()]
        numbers = ", ".join(str(lines[i]) for i in rows.tolist())
        evidence = Evidence(
            f"{names[int(rows[0])].as_py()} on lines {numbers}: {' / '.join(said)}", file, int(lines[rows[1]])
        )
        if len(set(said)) == 1:
            identical_evidence.append(evidence)
        else:
            conflict_evidence.append(evidence)
            conflicting[inverse[rows[0]]] = True
    return first, conflicting, duplicate_findings(identical_evidence, conflict_evidence, file)


def duplicate_findings(identical: list[Evidence], conflicting: list[Evidence], file: str) -> list[Finding]:
    """Findings for names that a label file holds more than once."""
    findings = []
    if identical:
        message = f"{file}: {len(identical)} names are there more than once with the same label; each counts once"
        findings.append(
            Finding(
                "warning",
                "duplicate_rows",
                message,
                "Delete the repeated lines.",
                len(identical),
                evidence_of(identical),
            )
        )
    if conflicting:
        message = (
            f"{file}: {len(conflicting)} names are there more than once and disagree; what they disagree on is unknown"
        )
        remedy = "Keep the line that is right for each name."
        findings.append(
            Finding("error", "conflicting_rows", message, remedy, len(conflicting), evidence_of(conflicting))
        )
    return findings


def unreadable_finding(file: str, count: int, evidence: tuple[Evidence, ...]) -> Finding:
    """Rows whose action-unit label cannot be read: none of it is used, and never as an absence."""
    message = (
        f"{file}: {count} rows hold action-unit labels that cannot be read; all action units of these rows are unknown"
    )
    remedy = "Write action units as numbers joined by '+', such as 1+4+L12, or null; in a table as 1, 0 or blank."
    return Finding("warning", "unreadable_action_units", message, remedy, count, evidence)
