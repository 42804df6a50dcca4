"""Image files of a dataset: where they lie, and which one belongs to which labelled name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from rafce_ray.data.names import duplicate_groups
from rafce_ray.data.records import Evidence, EvidenceList, Finding, evidence_of
from rafce_ray.errors import UsageError
from rafce_ray.storage import Location, locate

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "gif")
"""Extensions that count as an image, in lower case."""

_EXTENSION = r"(?i)\.(" + "|".join(IMAGE_EXTENSIONS) + r")$"
_SUFFIX = r"(?i)(_aligned)?\.(" + "|".join(IMAGE_EXTENSIONS) + r")$|_aligned$"
_CHUNK = 2048


@dataclass(frozen=True)
class Listing:
    """Image files of one folder: ``path`` relative to it, ``image_bytes`` and ``image_mtime_ns`` as arrow columns."""

    folder: Location
    table: pa.Table


@dataclass(frozen=True)
class Matched:
    """Which image belongs to which name: ``index`` (N,) int64 into ``listing``, -1 where the image is missing."""

    listing: Listing
    index: npt.NDArray[np.int64]
    num_extras: int
    findings: tuple[Finding, ...]


_SCHEMA = pa.schema([("path", pa.string()), ("image_bytes", pa.int64()), ("image_mtime_ns", pa.int64())])


def list_images(folder: Location, *, recursive: bool) -> Listing:
    """Image files of a folder, sorted by path; none where the folder does not exist."""
    local = folder.local
    entries = _scan(local, recursive) if local is not None else _list_remote(folder, recursive)
    batches, chunk = [], []
    for entry in entries:
        if entry[0].rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
            chunk.append(entry)
        # Python objects are turned into columns every so often: 100,000 of them would show in the peak memory.
        if len(chunk) == _CHUNK:
            batches.append(_to_batch(chunk))
            chunk = []
    table = pa.Table.from_batches([*batches, _to_batch(chunk)], _SCHEMA)
    return Listing(folder, table.sort_by("path").combine_chunks())


def match_images(names: pa.Array, root: Location, images: str | None) -> Matched:
    """Find every name's image: the very file name first, else one that differs by ``_aligned`` or its extension.

    Looks in ``images`` if given, else in ``aligned/``, ``aligned/aligned/``, ``images/`` and the root, and takes the
    folder that holds most of the names.

    Raises:
        UsageError: ``images`` is no folder.
    """
    recursive = bool(pc.any(pc.match_substring(names, "/")).as_py())
    best: Matched | None = None
    elsewhere: list[Evidence] = []
    for folder in _candidates(root, images):
        listing = list_images(folder, recursive=recursive)
        if listing.table.num_rows == 0:
            continue
        matched = _match(names, listing)
        found = int((matched.index >= 0).sum())
        if best is None or found > (best.index >= 0).sum():
            best, loser = matched, best
        else:
            loser = matched
        if loser is not None and (loser.index >= 0).any():
            elsewhere.append(Evidence(f"{int((loser.index >= 0).sum())} also in {loser.listing.folder}"))
    if best is None:
        empty = Listing(root / "aligned" if images is None else _candidates(root, images)[0], _SCHEMA.empty_table())
        return Matched(empty, np.full(len(names), -1, np.int64), 0, ())
    if not elsewhere:
        return best
    several = Finding(
        "info",
        "images_in_several_folders",
        f"images of the labelled names lie in more than one folder; {best.listing.folder} is used",
        "Name the folder to use: data.images=FOLDER.",
        len(elsewhere),
        evidence_of(elsewhere),
    )
    return Matched(best.listing, best.index, best.num_extras, (*best.findings, several))


def image_columns(listing: pa.Table, index: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    """``image_path``, ``image_bytes`` and ``image_mtime_ns`` of each labelled name; null where the image is missing."""
    taken = listing.take(pa.array(index, mask=index < 0))
    return {
        "image_path": taken["path"].combine_chunks(),
        "image_bytes": taken["image_bytes"].combine_chunks(),
        "image_mtime_ns": taken["image_mtime_ns"].combine_chunks(),
    }


def _candidates(root: Location, images: str | None) -> list[Location]:
    if images is None:
        return [root / "aligned", root / "aligned" / "aligned", root / "images", root]
    is_relative = "://" not in images and not Path(images).expanduser().is_absolute()
    given = root / images if is_relative and (root / images).is_dir() else locate(images)
    if not given.is_dir():
        raise UsageError(
            f"data.images={images!r}: no such folder, neither below {root} nor here. Give a folder of images."
        )
    return [given]


def _scan(folder: Path, recursive: bool, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                status = entry.stat()
                yield prefix + entry.name, status.st_size, status.st_mtime_ns
            elif recursive and entry.is_dir() and not entry.name.startswith("."):
                yield from _scan(Path(entry.path), recursive, f"{prefix}{entry.name}/")


def _list_remote(folder: Location, recursive: bool) -> Iterator[tuple[str, int, int]]:
    skip = len(folder.path.rstrip("/")) + 1
    for info in folder.list(recursive=recursive):
        if info.type == pafs.FileType.File:
            yield info.path[skip:], info.size or 0, info.mtime_ns or 0


def _to_batch(chunk: list[tuple[str, int, int]]) -> pa.RecordBatch:
    columns: list[Sequence[Any]] = list(zip(*chunk, strict=True)) if chunk else [(), (), ()]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, _SCHEMA.types, strict=True)]
    return pa.record_batch(arrays, schema=_SCHEMA)


def _match(names: pa.Array, listing: Listing) -> Matched:
    paths = listing.table["path"].chunk(0)
    keys = _keys(paths)
    repeated = duplicate_groups(keys)
    if repeated:
        index = _match_repeated(names, paths, keys)
    else:
        index = np.asarray(pc.fill_null(pc.index_in(_keys(names), value_set=keys), -1)).astype(np.int64)
    used = np.zeros(len(paths), bool)
    used[index[index >= 0]] = True
    return Matched(listing, index, int((~used).sum()), _ambiguous(repeated, paths, used))


def _match_repeated(names: pa.Array, paths: pa.Array, keys: pa.Array) -> npt.NDArray[np.int64]:
    """Where files differ only by suffix or extension: the very name first, then the file with the suffix."""
    exact = pc.index_in(names, value_set=paths)
    # index_in takes the first of equal keys: files with the suffix come first.
    is_aligned = np.asarray(pc.ends_with(pc.replace_substring_regex(paths, _EXTENSION, ""), "_aligned"))
    order = pa.array(np.argsort(~is_aligned, kind="stable"))
    by_key = order.take(pc.index_in(_keys(names), value_set=keys.take(order)))
    return np.asarray(pc.fill_null(pc.coalesce(pc.cast(exact, pa.int64()), by_key), -1))


def _keys(names: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(names, _SUFFIX, "")


def _ambiguous(
    repeated: list[npt.NDArray[np.int64]], paths: pa.Array, used: npt.NDArray[np.bool_]
) -> tuple[Finding, ...]:
    """Names for which two files could be meant, of which one was taken and the other is nobody's."""
    spare = EvidenceList()
    for group in repeated:
        for row in group[~used[group]].tolist() if used[group].any() else ():
            spare.add("another image of the same name is used instead", str(paths[row].as_py()))
    if not spare:
        return ()
    message = f"{len(spare)} images are second candidates for a labelled name and are not used"
    return (spare.finding("warning", "ambiguous_images", message, "Keep one image file per labelled name."),)
