"""Writing predictions as they come: JSON lines, CSV or Parquet, into a file that appears whole or not at all."""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from rafce_ray.base.console import write_json_line
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.bundle import Bundle
from rafce_ray.bundle.model import FacePrediction, FilePrediction

FORMATS = (".jsonl", ".csv", ".parquet")
ROWS_PER_GROUP = 1024
"""Rows held before they are written as one Parquet row group or piece of CSV."""

Write = Callable[[FilePrediction], None]


def check_out(out: Path | None) -> Path | None:
    """The file to write, before any work is done for it.

    Raises:
        UsageError: it exists, its folder does not or may not be written, or its ending names no format.
    """
    if out is None:
        return None
    if out.suffix.lower() not in FORMATS:
        raise UsageError(f"--out {out}: the ending names no format. Use one of {', '.join(FORMATS)}.")
    if os.path.lexists(out):
        raise UsageError(f"--out {out}: exists already and is never overwritten. Choose another name or remove it.")
    if not os.path.isdir(out.parent):
        raise UsageError(
            f"--out {out}: there is no folder {out.parent}. Make it first: mkdir -p {shlex.quote(str(out.parent))}"
        )
    try:
        out.open("x").close()
        out.unlink()
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}). Choose another place.") from error
    return out


@contextmanager
def open_output(out: Path | None, bundle: Bundle, top_k: int) -> Iterator[Write]:
    """Yields ``write(result)``; None writes JSON lines to standard output.

    A file is written beside its place and renamed at the end; on an error nothing is left. Every row names the model by
    the first 12 hex digits of its weights' sha256.
    """
    model = bundle.weights_sha256[:12]
    if out is None:
        yield lambda result: _write_line(sys.stdout, result, model)
        return
    beside = out.with_name(f".{out.stem[:20]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if out.suffix.lower() == ".jsonl":
            with beside.open("w", encoding="utf-8") as stream:
                yield lambda result: _write_line(stream, result, model)
        else:
            schema = flat_schema(bundle.taxonomy, top_k)
            is_csv = out.suffix.lower() == ".csv"
            with (
                # Opened here: pyarrow takes no path that is not UTF-8.
                beside.open("wb") as sink,
                pacsv.CSVWriter(sink, schema) if is_csv else pq.ParquetWriter(sink, schema) as writer,
                table_rows(writer, schema, model) as write,
            ):
                yield write
        if out.exists():
            raise UsageError(
                f"--out {out}: was made by another program meanwhile and is left as it is. Run again with another name."
            )
        beside.rename(out)
    except OSError as error:
        raise RafceError(
            f"--out {out}: cannot be written ({error.strerror or error}). Make room, or choose another place, and run "
            "again."
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def _write_line(stream: TextIO, result: FilePrediction, model: str) -> None:
    write_json_line(stream, result.to_json() | {"model": model})


@contextmanager
def table_rows(writer: pacsv.CSVWriter | pq.ParquetWriter, schema: pa.Schema, model: str) -> Iterator[Write]:
    """Yields ``write(result)``, which keeps some rows at a time; the last ones are written when the block ends without an error."""
    rows: list[dict[str, Any]] = []

    def flush() -> None:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        rows.clear()

    def write(result: FilePrediction) -> None:
        rows.extend(flat_rows(result, model))
        if len(rows) >= ROWS_PER_GROUP:
            flush()

    yield write
    if rows:
        flush()


def flat_schema(taxonomy: Taxonomy, top_k: int, *, distribution: bool = False) -> pa.Schema:
    """Columns of a row a face. ``face`` counts from 0; a file without faces has one row with ``error_code``; null is unknown.

    ``distribution``: also each emotion's probability under its own name, which rows have of faces predicted with all emotions as ``top``.
    """
    fields = [
        ("path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_faces", pa.int32()),
        ("face", pa.int32()),
    ]
    fields += [(f"box_{name}", pa.int32()) for name in ("x", "y", "width", "height")]
    fields += [("alignment", pa.string())]
    for rank in range(1, min(top_k, taxonomy.num_emotions) + 1):
        name = _emotion_column(rank)
        fields += [(name, pa.string()), (f"{name}_index", pa.int32()), (f"{name}_probability", pa.float32())]
    if taxonomy.num_emotions:
        fields += [("emotion_unsure", pa.bool_())]
    if distribution:
        fields += [(_distribution_column(label), pa.float32()) for label in taxonomy.emotions]
    fields += [(_basic_column(basic), pa.float32()) for basic in taxonomy.basic_emotions]
    for code in taxonomy.action_unit_codes:
        fields += [
            (f"{code}_probability", pa.float32()),
            (f"{code}_threshold", pa.float32()),
            (f"{code}_active", pa.bool_()),
        ]
    if taxonomy.num_emotions and taxonomy.num_action_units:
        fields += [("consistency_score", pa.float32()), ("consistency_contradicting", pa.string())]
    fields += [(f"error_{name}", pa.string()) for name in ("code", "message", "remedy")]
    return pa.schema([*fields, ("model", pa.string())])


def flat_rows(result: FilePrediction, model: str) -> Iterator[dict[str, Any]]:
    """The rows of one file by column name; columns left out are null, and some are not in every schema."""
    shared = {
        "path": result.path,
        "width": result.width,
        "height": result.height,
        "num_faces": len(result.faces),
        "model": model,
    }
    if result.error is not None:
        yield shared | {f"error_{name}": value for name, value in result.error.items()}
    for position, face in enumerate(result.faces):
        yield shared | {"face": position} | _face_columns(face)


def _face_columns(face: FacePrediction) -> dict[str, Any]:
    columns: dict[str, Any] = {f"box_{name}": value for name, value in vars(face.box).items()}
    columns["alignment"] = face.alignment
    emotion = face.emotion
    for rank, score in enumerate(emotion.top if emotion is not None else (), start=1):
        name = _emotion_column(rank)
        columns |= {name: score.label, f"{name}_index": score.index, f"{name}_probability": score.probability}
        columns[_distribution_column(score.label)] = score.probability
    if emotion is not None:
        columns["emotion_unsure"] = emotion.unsure
        columns |= {_basic_column(score.label): score.probability for score in emotion.basic}
    consistency = face.consistency
    if consistency is not None:
        columns["consistency_score"] = consistency.score
        columns["consistency_contradicting"] = "+".join(consistency.contradicting)
    for unit in face.action_units:
        columns |= {f"{unit.code}_{name}": getattr(unit, name) for name in ("probability", "threshold", "active")}
    return columns


def _emotion_column(rank: int) -> str:
    return "emotion" if rank == 1 else f"emotion_{rank}"


def _distribution_column(label: str) -> str:
    return f"distribution_{label}"


def _basic_column(basic: str) -> str:
    return f"basic_{basic}_probability"
