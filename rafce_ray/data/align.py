"""A dataset of aligned faces made from labelled photographs: faces as ``rafce predict`` cuts them, labels as they were.

A face is stored as JPEG of quality 95 without colour subsampling: names stay, and it takes 30 % of a PNG's bytes. It
differs from the pixels that prediction cuts by 1.5 of 255 (root mean square, five photographs). ``align.jsonl`` has one
line a photograph; it is written as the work goes on, and the next run continues from it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Literal, assert_never

from PIL import Image

from rafce_ray.base.claim import claimed
from rafce_ray.base.console import pretty_json, to_json
from rafce_ray.base.errors import UsageError
from rafce_ray.base.hardware import num_cores
from rafce_ray.base.storage import Location, Records, locate
from rafce_ray.config import DataConfig
from rafce_ray.data import label_file, table
from rafce_ray.data.records import Labels, Progress, advancing
from rafce_ray.data.split import csv_bytes, read_for_copy
from rafce_ray.faces import MIN_FACE_SCORE
from rafce_ray.faces.decode import FORMATS, format_of_ending
from rafce_ray.faces.detect import build_face_finder
from rafce_ray.faces.files import MAX_BYTES, UNREADABLE, LoadedFile, load_ahead, load_image, read_file

Several = Literal["largest", "skip"]

FACES, SETTINGS, REPORT = "aligned", "align.json", "align.jsonl"
"""The folder of faces, and the files next to it: what was asked for, and what was found in each photograph."""

FACE_PX = 224
"""Side of an aligned face, px: the input of most pretrained networks."""

MISSING, SEVERAL_FACES = "missing_image", "several_faces"
"""Problems of a photograph besides those of :mod:`rafce_ray.faces.files`."""


@dataclass(frozen=True)
class AlignSettings:
    """How faces are cut. ``px``: side. ``several``: what becomes of a photograph with several faces.

    ``face_model``, ``min_face_score``: as :func:`rafce_ray.faces.detect.build_face_finder` takes them.
    """

    px: int = FACE_PX
    several: Several = "largest"
    face_model: Path | None = None
    min_face_score: float = MIN_FACE_SCORE


@dataclass(frozen=True)
class Aligned:
    """What was made in ``root``; ``records``: the lines of its ``align.jsonl``, in the order of the labels.

    A record has ``name`` (as the labels have it), ``path`` of the photograph, ``face`` (the file below ``aligned/``),
    ``num_faces``, ``faces`` (largest first: ``box`` in px, ``alignment`` and what else is known of a
    :class:`rafce_ray.faces.detect.Face`), ``problem`` (a code) and ``message``; what is unknown is null.
    """

    root: Location
    records: Records

    @property
    def left_out(self) -> Records:
        """Photographs without an aligned face."""
        return [one for one in self.records if one["face"] is None]

    @property
    def with_several(self) -> Records:
        """Photographs with more than one face, of which the largest was taken."""
        return [one for one in self.records if one["face"] is not None and one["num_faces"] > 1]


def align(data: DataConfig, out: Location, settings: AlignSettings, progress: Progress | None = None) -> Aligned:
    """Cut the faces of all labelled photographs of ``data.root`` into ``out``, a local folder, with their labels.

    Goes on where an earlier run with the same settings stopped. Photographs without a face are left out of the labels.

    Raises:
        UsageError: ``out`` holds something else or faces made with other settings, or its labels were changed.
        GateError: the labels cannot be read soundly.
    """
    labels = read_for_copy(data)
    # Folders that are searched for the photographs: the next run would take faces for them.
    searched = (labels.image_root, labels.root / "aligned", labels.root / "images")
    inside = [one for one in searched if one.local and Path(out.path).resolve().is_relative_to(one.local.resolve())]
    if inside:
        raise UsageError(
            f"--out {out.shown}: lies in {inside[0].shown}, where photographs are looked for. Give a folder outside of "
            f"it, such as --out {(inside[0].parent.parent / 'aligned_faces').command}"
        )
    with alignment_folder(out, settings, str(labels.root)):
        return cut_faces(data, labels, out, settings, progress)


@contextmanager
def alignment_folder(out: Location, settings: AlignSettings, source: str) -> Iterator[None]:
    """Hold ``out`` for aligned faces of ``source``, and record the settings in it.

    Raises:
        UsageError: it holds something else, faces made with other settings, or labels that were changed.
    """
    # An error of the model file comes before the folder is made.
    build_face_finder(settings.face_model, settings.min_face_score)
    model = None if settings.face_model is None else hashlib.sha256(settings.face_model.read_bytes()).hexdigest()
    wanted = asdict(settings) | {"source": source, "face_model": model}
    with claimed(out, "faces", key="--out"):
        if not (out / REPORT).exists():
            # No face was cut yet, so other settings may be given.
            (out / SETTINGS).write_bytes(pretty_json(wanted | {"labels": {}}))
        found = (out / SETTINGS).read_record("Then give the same command again.", keys=[*wanted, "labels"])
        for key, value in wanted.items():
            if found[key] != value:
                free = (out.parent / out.parent.free_name(out.name)).command
                raise UsageError(
                    f"{out.shown}: its faces were made with {key} {found[key]}; now it is {value}. Nothing was "
                    f"changed. Choose another folder: --out {free}"
                )
        for name, sha256 in found["labels"].items():
            file = out / name
            if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
                raise UsageError(
                    f"{file.shown}: was changed after it was written, and nothing is overwritten. Move it away: mv "
                    f"{file.command} {(out / f'{name}.mine').command}"
                )
        yield


def cut_faces(
    data: DataConfig, labels: Labels, out: Location, settings: AlignSettings, progress: Progress | None = None
) -> Aligned:
    """:func:`align` for labels that are read already and a folder that is held (:func:`alignment_folder`)."""
    names, paths, sizes, times = (
        labels.table[column].to_pylist() for column in ("name", "image_path", "image_bytes", "image_mtime_ns")
    )
    faces = _face_names(names, paths)
    report = out / REPORT
    earlier = {
        one["name"]: one
        for one in report.read_records("Its photographs are then looked at again.")
        if one["problem"] != UNREADABLE and (one["face"] is None or (out / FACES / one["face"]).exists())
    }
    done: dict[str, dict[str, Any]] = {}
    todo: dict[str, dict[str, Any]] = {}
    for name, path, size, time_ns, face in zip(names, paths, sizes, times, faces, strict=True):
        record = {"name": name, "path": path, "image_bytes": size, "image_mtime_ns": time_ns}
        found = earlier.get(name)
        if found is not None and record.items() <= found.items() and found["face"] in (face, None):
            done[name] = found
        elif path is None:
            done[name] = _completed(record, problem=MISSING, message="there is no image file of this name.")
        else:
            todo[name] = record | {"face": face}
    report.write_bytes(_json_lines(done.values()))
    load = _loader(labels.image_root, settings)
    loaded = load_ahead(load, (record["path"] for record in todo.values()), min(8, num_cores()))
    with (
        open(report.path, "a", encoding="utf-8") as stream,
        advancing(progress, "aligning faces", len(todo)) as advance,
    ):
        for record, file in zip(todo.values(), loaded, strict=True):
            done[record["name"]] = _store_face(record, file, out / FACES, settings.several)
            stream.write(to_json(done[record["name"]]) + "\n")
            stream.flush()
            advance(1)
    aligned = Aligned(out, [done[name] for name in names])
    report.write_bytes(_json_lines(aligned.records))
    face_of = {one["name"]: one["face"] for one in aligned.records if one["face"] is not None}
    files = _label_files(labels, data, face_of) if face_of else {}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (out / SETTINGS).write_bytes(pretty_json(json.loads((out / SETTINGS).read_bytes()) | {"labels": sums}))
    for name, content in files.items():
        (out / name).write_bytes(content)
    return aligned


def _face_names(names: Iterable[str], paths: Iterable[str | None]) -> list[str]:
    """A file name for each face, below the folder of faces: the label's, with the ending of a JPEG, each once."""
    given: set[str] = set()
    faces = []
    for name, path in zip(names, paths, strict=True):
        is_plain = not {"..", "/"} & set(PurePosixPath(name).parts) and "\\" not in name and ":" not in name
        stem, ending = os.path.splitext(name if is_plain or path is None else path)
        if ending.lower() not in FORMATS["JPEG"].endings:
            # The end of a name such as "face.001" is no ending.
            stem, ending = stem if format_of_ending(ending) else stem + ending, ".jpg"
        numbered = (f"{stem}{ending}" if number == 1 else f"{stem}-{number}{ending}" for number in count(1))
        faces.append(next(face for face in numbered if face.lower() not in given))
        given.add(faces[-1].lower())
    return faces


def _loader(images: Location, settings: AlignSettings) -> Callable[[str], LoadedFile]:
    """Reads a photograph and finds its faces; each thread has a finder of its own, as one works on one photograph."""
    own = threading.local()

    def load(path: str) -> LoadedFile:
        if not hasattr(own, "finder"):
            own.finder = build_face_finder(settings.face_model, settings.min_face_score)
        place = images / path
        read = (lambda _: read_file(place.path, MAX_BYTES)) if place.local is not None else lambda _: place.read_bytes()
        return load_image(place.shown, read, finder=own.finder, px=settings.px)

    return load


def _completed(record: dict[str, Any], **found: Any) -> dict[str, Any]:
    return record | {"face": None, "num_faces": 0, "faces": [], "problem": None, "message": None} | found


def _store_face(record: dict[str, Any], file: LoadedFile, folder: Location, several: Several) -> dict[str, Any]:
    """Write the largest face of a photograph; its record."""
    if file.problem is not None:
        message = f"{file.problem.message} {file.problem.remedy}".strip()
        return _completed(record, problem=file.problem.code, message=message)
    faces = [{key: value for key, value in asdict(face).items() if key != "pixels"} for face in file.faces]
    found = {"num_faces": len(faces), "faces": faces}
    if len(faces) > 1 and several == "skip":
        return _completed(record, **found, problem=SEVERAL_FACES, message=f"{len(faces)} faces were found.")
    encoded = io.BytesIO()
    Image.fromarray(file.faces[0].pixels).save(encoded, "JPEG", quality=95, subsampling=0)
    (folder / record["face"]).write_bytes(encoded.getvalue())
    return _completed(record, **found, face=record["face"])


def _label_files(labels: Labels, data: DataConfig, face_of: dict[str, str]) -> dict[str, bytes]:
    """The label files of the photographs that have a face, by file name: all columns, with the names of the faces."""
    if labels.layout == "table":
        source = table.find_table(locate(str(data.root)))
        assert source is not None
        cells = table.read_cells(source, data)
        at = cells.columns.name
        rows = [[*row[:at], face_of[name], *row[at + 1 :]] for name, row in cells.named_rows() if name in face_of]
        return {"labels.csv": csv_bytes(cells.columns.header, rows)}
    if labels.layout == "folders":
        columns = ["name", "split", "emotion"]
        found = [one for one in labels.table.select(columns).to_pylist() if one["name"] in face_of]
        if not any(one["split"] for one in found):
            columns.remove("split")
        rows = [[(one | {"name": face_of[one["name"]]})[column] for column in columns] for one in found]
        return {"labels.csv": csv_bytes(columns, rows)}
    if labels.layout == "rafce":
        files = (label_file.EMOTION_FILE, label_file.ACTION_UNIT_FILE, label_file.PARTITION_FILE, label_file.VOTES_FILE)
        there = [labels.root / name for name in files if (labels.root / name).exists()]
        return {file.name: _renamed_lines(file, data.encoding, face_of) for file in there}
    # A new layout must say here how a copy keeps all of its labels.
    assert_never(labels.layout)


def _renamed_lines(file: Location, encoding: str, face_of: dict[str, str]) -> bytes:
    fields = (line.split(None, 1) for line in label_file.open_text(file.read_bytes(), file, encoding=encoding))
    kept = (one for one in fields if len(one) == 2 and one[0] in face_of)
    return "".join(f"{face_of[name]} {label.rstrip()}\n" for name, label in kept).encode()


def _json_lines(records: Iterable[dict[str, Any]]) -> bytes:
    return "".join(to_json(one) + "\n" for one in records).encode()
