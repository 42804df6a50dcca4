"""Writes predictions to one file, or to a folder of Parquet shards that a later command can continue.

One file holds JSON lines, CSV or Parquet. In a folder, ``plan.json`` fixes what every shard depends on,
``.listing.parquet`` holds the names of the images, one row group per shard, and ``predictions/part-00000.parquet`` the
rows of shard 0, whose footer counts its files and faces. A shard appears whole or not at all, so an existing shard is
not predicted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from rafce_ray.base.console import pretty_json, write_json_line
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.storage import Location
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.bundle import Bundle
from rafce_ray.bundle.model import FacePrediction, FilePrediction

FORMATS = (".jsonl", ".csv", ".parquet")
ROWS_PER_GROUP = 1024
"""Rows that are buffered for one Parquet row group or piece of CSV."""

FORMAT_VERSION = 1
PLAN_FILE = "plan.json"
LISTING_FILE = ".listing.parquet"
PREDICTIONS_FOLDER = "predictions"
SUMMARY_FILE = "summary.json"

DEFAULT_SHARD_FILES = 2000
FOOTER_READERS = 16
LISTING_SCHEMA = pa.schema([("path", pa.string())])
PLAN_KEY, COUNTS_KEY = b"rafce_plan_sha256", b"rafce_counts"
"""Keys of a shard's footer."""

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

    A file is written under a temporary name and renamed at the end; after an error nothing is left. Every row names the
    model by the first 12 hex digits of its weights' sha256.
    """
    model = bundle.weights_sha256[:12]

    def lines_to(stream: TextIO) -> Write:
        return lambda result: write_json_line(stream, result.to_json() | {"model": model})

    if out is None:
        yield lines_to(sys.stdout)
        return
    scratch = out.with_name(f".{out.stem[:20]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if out.suffix.lower() == ".jsonl":
            with scratch.open("w", encoding="utf-8") as stream:
                yield lines_to(stream)
        else:
            schema = flat_schema(bundle.taxonomy, top_k)
            is_csv = out.suffix.lower() == ".csv"
            with (
                # Opened here: pyarrow takes no path that is not UTF-8.
                scratch.open("wb") as sink,
                pacsv.CSVWriter(sink, schema) if is_csv else pq.ParquetWriter(sink, schema) as writer,
                table_rows(writer, schema, model) as write,
            ):
                yield write
        if out.exists():
            raise UsageError(
                f"--out {out}: was made by another program meanwhile and is left as it is. Run again with another name."
            )
        scratch.rename(out)
    except OSError as error:
        raise RafceError(
            f"--out {out}: cannot be written ({error.strerror or error}). Make room, or choose another place, and run "
            "again."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def table_rows(writer: pacsv.CSVWriter | pq.ParquetWriter, schema: pa.Schema, model: str) -> Iterator[Write]:
    """Yields ``write(result)``, which buffers rows; the last ones are written when the block ends without an error."""
    rows: list[dict[str, Any]] = []

    def write(result: FilePrediction | None, least: int = ROWS_PER_GROUP) -> None:
        rows.extend(() if result is None else flat_rows(result, model))
        if len(rows) >= least:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows.clear()

    yield write
    write(None, least=1)


def flat_schema(taxonomy: Taxonomy, top_k: int, *, distribution: bool = False) -> pa.Schema:
    """Columns of the rows, of which each face has one.

    ``face`` counts from 0; a file without faces has one row with ``error_code``; null is unknown. ``distribution``: add
    a column with the probability of each emotion, which rows have if all emotions were predicted as ``top``.
    """
    text, whole, real = pa.string(), pa.int32(), pa.float32()
    fields = [("path", text), ("width", whole), ("height", whole), ("num_faces", whole), ("face", whole)]
    fields += [(f"box_{name}", whole) for name in ("x", "y", "width", "height")]
    fields += [("alignment", text), ("detector", text), ("detection_score", real)]
    for rank in range(1, min(top_k, taxonomy.num_emotions) + 1):
        name = _emotion_column(rank)
        fields += [(name, text), (f"{name}_index", whole), (f"{name}_probability", real)]
    if taxonomy.num_emotions:
        fields += [("emotion_unsure", pa.bool_())]
    if distribution:
        fields += [(f"distribution_{label}", real) for label in taxonomy.emotions]
    fields += [(f"basic_{basic}_probability", real) for basic in taxonomy.basic_emotions]
    for code in taxonomy.action_unit_codes:
        fields += [(f"{code}_probability", real), (f"{code}_threshold", real), (f"{code}_active", pa.bool_())]
    if taxonomy.num_emotions and taxonomy.num_action_units:
        fields += [("consistency_score", real), ("consistency_contradicting", text)]
    fields += [(f"error_{name}", text) for name in ("code", "message", "remedy")]
    return pa.schema([*fields, ("model", text)])


def flat_rows(result: FilePrediction, model: str) -> Iterator[dict[str, Any]]:
    """The rows of one file by column name; missing columns are null, and some are not in every schema."""
    shared = {name: getattr(result, name) for name in ("path", "width", "height")}
    shared |= {"num_faces": len(result.faces), "model": model}
    if result.error is not None:
        yield shared | {f"error_{name}": value for name, value in result.error.items()}
    for position, face in enumerate(result.faces):
        yield shared | {"face": position} | _face_columns(face)


def _face_columns(face: FacePrediction) -> dict[str, Any]:
    columns: dict[str, Any] = {f"box_{name}": value for name, value in vars(face.box).items()}
    columns["alignment"] = face.alignment
    columns |= {"detector": face.detection.detector, "detection_score": face.detection.score}
    if face.emotion is not None:
        for rank, score in enumerate(face.emotion.top, start=1):
            name = _emotion_column(rank)
            columns |= {name: score.label, f"{name}_index": score.index, f"{name}_probability": score.probability}
            columns[f"distribution_{score.label}"] = score.probability
        columns["emotion_unsure"] = face.emotion.unsure
        columns |= {f"basic_{score.label}_probability": score.probability for score in face.emotion.basic}
    if face.consistency is not None:
        columns["consistency_score"] = face.consistency.score
        columns["consistency_contradicting"] = "+".join(face.consistency.contradicting)
    for unit in face.action_units:
        columns |= {f"{unit.code}_{name}": getattr(unit, name) for name in ("probability", "threshold", "active")}
    return columns


def _emotion_column(rank: int) -> str:
    return "emotion" if rank == 1 else f"emotion_{rank}"


@dataclass(frozen=True)
class Options:
    """What every row depends on besides the image.

    ``bundle_sha256`` is that of the bundle's manifest, which has the sha256 of the weights and the calibration;
    ``face_model_sha256`` and ``min_face_score`` are None for the bundled cascades and for aligned faces.
    """

    bundle_sha256: str
    faces: str
    face_model_sha256: str | None
    top_k: int
    min_face_score: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is predicted and with which options: ``num_files`` images of one listing in shards of ``shard_files``."""

    options: Options
    shard_files: int
    num_files: int
    listing_sha256: str

    @property
    def num_shards(self) -> int:
        """How many shards the listing has; the last one may be smaller."""
        return -(-self.num_files // self.shard_files)

    def files_of(self, shard: int) -> int:
        """Number of files of a shard."""
        return min(self.shard_files, self.num_files - shard * self.shard_files)

    def to_bytes(self) -> bytes:
        """The content of ``plan.json``."""
        plain = {"format_version": FORMAT_VERSION, **asdict(self)}
        if self.options.min_face_score is None:
            # Plans from before there was a limit, whose sha256 is in their shards, have no such line.
            del plain["options"]["min_face_score"]
        return pretty_json(plain)

    @property
    def sha256(self) -> str:
        """The plan's identity in each shard's footer."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class Shards:
    """The folder of a plan, on a local disk or an object store."""

    def __init__(self, folder: Location, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.predictions = folder / PREDICTIONS_FOLDER

    @cached_property
    def _listing(self) -> pq.ParquetFile:
        place = self.folder / LISTING_FILE
        return pq.ParquetFile(place.filesystem.open_input_file(place.path))

    def paths(self, shard: int) -> list[str]:
        """The names of a shard's images."""
        names: list[str] = self._listing.read_row_group(shard)["path"].to_pylist()
        return names

    def write(
        self,
        shard: int,
        results: Iterable[FilePrediction],
        bundle: Bundle,
        outcomes: Callable[[FilePrediction], Counter[str]],
    ) -> None:
        """Write a shard once its last result is there; its footer keeps the sums of ``outcomes``."""
        schema = flat_schema(bundle.taxonomy, self.plan.options.top_k, distribution=True)
        counts: Counter[str] = Counter()
        content = pa.BufferOutputStream()
        with pq.ParquetWriter(content, schema) as writer:
            with table_rows(writer, schema, bundle.weights_sha256[:12]) as write:
                for result in results:
                    write(result)
                    counts.update(outcomes(result))
            writer.add_key_value_metadata({PLAN_KEY: self.plan.sha256, COUNTS_KEY: json.dumps(counts)})
        (self.predictions / _file_name(shard)).write_bytes(content.getvalue().to_pybytes())

    def finished(self) -> dict[int, Counter[str]]:
        """The finished shards with their counts.

        Raises:
            RafceError: a file in the folder is not a whole shard of this plan.
        """
        expected = {_file_name(shard): shard for shard in range(self.plan.num_shards)}
        names = [info.base_name for info in self.predictions.list() if not info.base_name.startswith(".")]
        strange = [name for name in names if name not in expected]
        if strange:
            raise RafceError(
                f"{self.predictions / strange[0]}: is none of the {len(expected)} shards of {PLAN_FILE}, and programs "
                "that read the folder would read it. Move it elsewhere, then give the same command again."
            )
        with ThreadPoolExecutor(FOOTER_READERS, thread_name_prefix="footers") as pool:
            return dict(pool.map(self._counts, [expected[name] for name in names]))

    def _counts(self, shard: int) -> tuple[int, Counter[str]]:
        place = self.predictions / _file_name(shard)
        remedy = "Remove it, and the same command predicts its images again."
        try:
            with place.filesystem.open_input_file(place.path) as file:
                footer = pq.read_metadata(file).metadata or {}
        except (pa.ArrowInvalid, OSError) as error:
            raise RafceError(f"{place}: cannot be read ({str(error).splitlines()[0]}). {remedy}") from None
        if footer.get(PLAN_KEY, b"").decode() != self.plan.sha256:
            raise RafceError(f"{place}: was not made by the plan of {self.folder / PLAN_FILE}. {remedy}")
        counts: Counter[str] = Counter(json.loads(footer[COUNTS_KEY]))
        if counts["files"] != self.plan.files_of(shard):
            raise RafceError(
                f"{place}: holds {counts['files']:,} files; its shard has {self.plan.files_of(shard):,}. {remedy}"
            )
        return shard, counts

    def close(self, skipped: Mapping[str, int]) -> Counter[str]:
        """Write ``summary.json`` and remove temporary files of killed workers; returns the sums of all shards' counts.

        ``skipped``: files that are no images, by ending.

        Raises:
            RafceError: a shard is missing.
        """
        finished = self.finished()
        missing = [shard for shard in range(self.plan.num_shards) if shard not in finished]
        if missing:
            raise RafceError(
                f"{self.predictions}: {len(missing)} of {self.plan.num_shards} shards are missing, "
                f"{_file_name(missing[0])} first. The same command predicts them."
            )
        totals = sum(finished.values(), Counter())
        for info in self.predictions.list():
            if info.base_name.startswith(".part-") and info.base_name.endswith(".tmp"):
                (self.predictions / info.base_name).delete()
        summary = {
            "shards": self.plan.num_shards,
            **dict(sorted(totals.items())),
            "skipped": dict(sorted(skipped.items())),
            "plan": asdict(self.plan),
        }
        (self.folder / SUMMARY_FILE).write_bytes(pretty_json(summary))
        return totals


def open_shards(
    folder: Location, options: Options, shard_files: int | None, list_files: Callable[[], Iterator[str]]
) -> Shards:
    """The shards of a folder, by its plan, which must be of the same images and options, or by a new plan.

    ``list_files()`` gives the names of all images. ``shard_files``: None takes the plan's number or
    ``DEFAULT_SHARD_FILES``.

    Raises:
        UsageError: the folder holds something else, or a plan of other images or options; or it cannot be written.
    """
    folder.check_writable()
    found = read_plan(folder)
    if found is None:
        return Shards(folder, _make_plan(folder, options, shard_files or DEFAULT_SHARD_FILES, list_files))
    there = {**asdict(found.options), "shard_files": found.shard_files}
    here = {**asdict(options), "shard_files": shard_files or found.shard_files}
    changed = [f"  {key}: {there[key]} there, {here[key]} here" for key in there if there[key] != here[key]]
    if changed:
        raise UsageError(
            f"--out {folder.shown}: holds predictions of another bundle or with other options, and rows of both would "
            "be mixed:\n" + "\n".join(changed) + "\nGive the same ones to go on, or another --out."
        )
    shards = Shards(folder, found)
    digest, num_files = hashlib.sha256(), 0
    for path in list_files():
        digest.update(_encoded(path))
        num_files += 1
    if digest.hexdigest() != found.listing_sha256:
        listed = (name for shard in range(found.num_shards) for name in shards.paths(shard))
        first = next((pair for pair in zip_longest(listed, list_files()) if pair[0] != pair[1]), (None, None))
        raise UsageError(
            f"--out {folder.shown}: was begun with other images: {found.num_files:,} files there, {num_files:,} now; "
            f"the first that differs is {first[0] or 'none'} there, {first[1] or 'none'} now. Give the same images to "
            "go on, or another --out for these."
        )
    return shards


def read_plan(folder: Location) -> Plan | None:
    """The plan of a folder; None where there is none; RafceError where it cannot be read."""
    place = folder / PLAN_FILE
    try:
        plain = json.loads(place.read_bytes())
        version = plain.pop("format_version")
        if version != FORMAT_VERSION:
            raise RafceError(
                f"{place}: is of version {version}; this program reads {FORMAT_VERSION}. Choose another --out, or "
                "predict with the version that began it."
            )
        return Plan(Options(**plain.pop("options")), **plain)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RafceError(f"{place}: is no plan of rafce predict ({error}). Choose another --out.") from None


def _make_plan(folder: Location, options: Options, shard_files: int, list_files: Callable[[], Iterator[str]]) -> Plan:
    """Write the listing, then the plan, which makes it valid."""
    others = [info.base_name for info in folder.list() if not info.base_name.startswith(".")]
    if others:
        raise UsageError(
            f"--out {folder.shown}: holds something else "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}), and nothing of it is touched. Name a new "
            "folder."
        )
    place, digest, num_files = folder / LISTING_FILE, hashlib.sha256(), 0
    files = list_files()
    with (
        place.filesystem.open_output_stream(place.path, compression=None) as stream,
        pq.ParquetWriter(stream, LISTING_SCHEMA) as writer,
    ):
        while names := list(islice(files, shard_files)):
            for name in names:
                digest.update(_encoded(name))
            num_files += len(names)
            writer.write_table(pa.table({"path": names}, schema=LISTING_SCHEMA), row_group_size=shard_files)
    plan = Plan(options, shard_files, num_files, digest.hexdigest())
    (folder / PLAN_FILE).write_bytes(plan.to_bytes())
    return plan


def _encoded(name: str) -> bytes:
    """A name's part of the listing's digest."""
    return name.encode() + b"\0"


def _file_name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"
