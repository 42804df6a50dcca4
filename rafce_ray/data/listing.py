"""Image files of a dataset: where they lie, and which file belongs to which labelled name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from rafce_ray.base.errors import Finding, UsageError
from rafce_ray.base.storage import Location, locate
from rafce_ray.data.records import ArrowRows, EvidenceList, NearImage, counted, positions
from rafce_ray.faces.decode import READ_ENDINGS, UNREAD_PICTURE_ENDINGS


def groups_of_equals(values: pa.Array) -> list[npt.NDArray[np.int64]]:
    """Positions (G,) int64 of each value that occurs G > 1 times, ascending; groups by their first position."""
    # Sorting takes a tenth of the memory of a hash table.
    order = pc.array_sort_indices(values)
    ordered = values.take(order)
    same = np.asarray(pc.equal(ordered[1:], ordered[:-1]))
    if not same.any():
        return []
    rows = np.asarray(order).astype(np.int64)
    groups = np.split(rows, np.flatnonzero(~same) + 1)
    return sorted((np.sort(group) for group in groups if len(group) > 1), key=lambda group: int(group[0]))


_ENDINGS = (*READ_ENDINGS, *UNREAD_PICTURE_ENDINGS)
"""Endings that count as an image, in lower case. One that is not read is refused by its format when it is decoded."""

_READ = f"(?i)({'|'.join(map(re.escape, READ_ENDINGS))})$"
_ANY = "|".join(map(re.escape, _ENDINGS))
_SUFFIX = f"(?i)(_aligned)?({_ANY})$|_aligned$"
_MAX_LOOKED_AT = 100_000


@dataclass(frozen=True)
class Listing:
    """Image files of one folder: ``path`` relative to it, ``image_bytes`` and ``image_mtime_ns`` as arrow columns.

    ``unreadable``: files and folders in it of which nothing is known, with the reason.
    """

    folder: Location
    table: pa.Table
    unreadable: EvidenceList


@dataclass(frozen=True)
class Matched:
    """Which image belongs to which name: ``index`` (N,) int64 into ``listing``, -1 where the image is missing."""

    listing: Listing
    index: npt.NDArray[np.int64]
    num_extras: int
    findings: tuple[Finding, ...]
    near: dict[str, NearImage] = field(default_factory=dict)

    @property
    def num_found(self) -> int:
        """Names with an image."""
        return int((self.index >= 0).sum())


_SCHEMA = pa.schema([("path", pa.string()), ("image_bytes", pa.int64()), ("image_mtime_ns", pa.int64())])


def list_images(folder: Location, *, recursive: bool, limit: int | None = None) -> Listing:
    """Image files of a folder, sorted by path; none where the folder does not exist. ``limit``: most files to look at.

    Raises:
        OSError: the folder itself cannot be read.
    """
    local, unreadable = folder.local, EvidenceList()
    if local is not None:
        entries = _scan(local, recursive, unreadable)
    else:
        files = (info for info in folder.list(recursive=recursive) if info.type == pafs.FileType.File)
        skip = len(folder.path.rstrip("/")) + 1
        entries = ((info.path[skip:], info.size or 0, info.mtime_ns or 0) for info in files)
    rows = ArrowRows(_SCHEMA)
    for entry in islice(entries, limit):
        if entry[0].lower().endswith(_ENDINGS):
            rows.append(entry)
    table = _without_converted(rows.table())
    return Listing(folder, table.sort_by("path").combine_chunks(), unreadable)


def _without_converted(table: pa.Table) -> pa.Table:
    """Without the images in a format that is not read of which one that is read lies next to them."""
    is_read = pc.match_substring_regex(table["path"], _READ)
    if pc.all(is_read).as_py() is not False:
        return table
    keys = _keys(table["path"])
    return table.filter(pc.or_(is_read, pc.invert(pc.is_in(keys, value_set=keys.filter(is_read)))))


def match_images(names: pa.Array, root: Location, images: str | None) -> Matched:
    """Find every name's image: the very file name first, else one that differs by ``_aligned`` or its extension.

    A name without a file is read again with slashes for backslashes and with composed letters. Looks in ``images`` if
    given, else in ``aligned/``, ``aligned/aligned/``, ``images/`` and the root. Takes the folder with most names.

    Raises:
        UsageError: ``images`` is no folder.
        OSError: a folder cannot be read.
    """
    recursive = bool(pc.any(pc.match_substring_regex(names, r"[/\\]")).as_py())
    candidates = _candidates(root, images)
    best = Matched(Listing(candidates[-1], _SCHEMA.empty_table(), EvidenceList()), np.full(len(names), -1), 0, ())
    elsewhere = EvidenceList()
    for folder in candidates:
        listing = list_images(folder, recursive=recursive)
        if listing.table.num_rows == 0:
            continue
        loser = _match(names, listing)
        if not best.listing.table.num_rows or loser.num_found > best.num_found:
            best, loser = loser, best
        if loser.num_found:
            elsewhere.add(f"{loser.num_found} also in {loser.listing.folder}")
    if not best.listing.table.num_rows:
        best = replace(best, listing=list_images(candidates[-1], recursive=False))
    findings = [*best.findings]
    if unreadable := best.listing.unreadable:
        message = f"{best.listing.folder}: files or folders in it that cannot be read are not used: {len(unreadable)}"
        remedy = "Remove them, or give access to them (chmod)."
        findings.append(unreadable.finding("warning", "unreadable_images", message, remedy))
    findings += _shared_findings(names, best)
    if elsewhere:
        message = f"images of the labelled names lie in more than one folder; {best.listing.folder} is used"
        remedy = "Name the folder to use: data.images=FOLDER."
        findings.append(elsewhere.finding("info", "images_in_several_folders", message, remedy))
    missing = names.filter(pa.array(best.index < 0))
    return replace(best, findings=tuple(findings), near=_near_images(missing, best, candidates[-1]))


def _shared_findings(names: pa.Array, matched: Matched) -> Iterator[Finding]:
    """Names that are written differently and mean one image."""
    rows = np.flatnonzero(matched.index >= 0)
    shared = EvidenceList()
    for group in groups_of_equals(pa.array(matched.index[rows])):
        written = ", ".join(str(names[int(row)].as_py()) for row in rows[group].tolist())
        shared.add(written, str(matched.listing.table["path"][int(matched.index[rows[group[0]]])].as_py()))
    if shared:
        message = f"images that more than one name means: {len(shared)}; each counts as often as it is named"
        yield shared.finding("error", "shared_images", message, "Keep one row an image.")


def image_columns(listing: pa.Table, index: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    """Path, bytes and time of each labelled name's image, by ``index`` (N,) int64; null where it is -1."""
    taken = listing.take(pa.array(index, mask=index < 0)).combine_chunks()
    return dict(zip(("image_path", "image_bytes", "image_mtime_ns"), taken.columns, strict=True))


def _candidates(root: Location, images: str | None) -> list[Location]:
    if images is None:
        return [root / "aligned", root / "aligned" / "aligned", root / "images", root]
    is_relative = "://" not in images and not Path(os.path.expanduser(images)).is_absolute()
    given = root / images if is_relative and (root / images).is_dir() else locate(images)
    if not given.is_dir():
        raise UsageError(
            f"data.images={images!r}: no such folder, neither below {root} nor here. Give a folder of images."
        )
    return [given]


def _scan(
    folder: Path,
    recursive: bool,
    unreadable: EvidenceList,
    prefix: str = "",
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[tuple[str, int, int]]:
    """Path, bytes and time of every file; ``above``: the folders on the way here, by device and inode."""
    if not folder.is_dir():
        return
    status = folder.stat()
    here = above | {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            relative = prefix + entry.name
            try:
                relative.encode()
                if entry.is_file():
                    status = entry.stat()
                    yield relative, status.st_size, status.st_mtime_ns
                elif recursive and entry.is_dir() and not entry.name.startswith("."):
                    status = entry.stat()
                    if (status.st_dev, status.st_ino) in here:
                        unreadable.add("links to a folder that holds it", relative)
                    else:
                        yield from _scan(Path(entry.path), recursive, unreadable, f"{relative}/", here)
            except UnicodeEncodeError:
                unreadable.add("its name is not UTF-8", ascii(relative)[1:-1])
            except OSError as error:
                unreadable.add(error.strerror or str(error), relative)


def _match(names: pa.Array, listing: Listing) -> Matched:
    paths = listing.table["path"].chunk(0)
    keys = _keys(paths)
    repeated = groups_of_equals(keys)
    index = positions(_keys(names), keys)
    if repeated:
        # Files differ only by suffix or extension: the very name comes first, then the file with the suffix.
        is_aligned = np.asarray(pc.match_substring_regex(paths, f"_aligned((?i){_ANY})?$"))
        order = np.argsort(~is_aligned, kind="stable")
        by_key = np.append(order, -1)[positions(_keys(names), keys.take(pa.array(order)))]
        exact = positions(names, paths)
        index = np.where(exact >= 0, exact, by_key)
    index, findings = _match_plain(names, paths, index)
    used = np.zeros(len(paths), bool)
    used[index[index >= 0]] = True
    return Matched(listing, index, int((~used).sum()), (*_ambiguous(repeated, paths, used), *findings))


def _match_plain(
    names: pa.Array, paths: pa.Array, index: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], list[Finding]]:
    """``index`` with files for names that match only when slashes and letters are written alike, and their finding."""
    missing = np.flatnonzero(index < 0)
    if not len(missing):
        return index, []
    wanted = names.take(pa.array(missing))
    row = positions(_keys(_plain(wanted)), _keys(_plain(paths)))
    index = index.copy()
    index[missing] = row
    found = EvidenceList()
    for i in np.flatnonzero(row >= 0).tolist():
        found.add(f"{wanted[i].as_py()}: {paths[int(row[i])].as_py()}")
    names_found = counted(len(found), "name")
    message = f"{names_found} with backslashes, or letters in another Unicode form: read as the files are named"
    return index, [found.finding("info", "names_read_as_files", message)] if found else []


def _plain(names: pa.Array) -> pa.Array:
    """With slashes between folders, and letters composed (macOS writes the names of files in parts)."""
    slashes = pc.replace_substring_regex(pc.replace_substring(names, "\\", "/"), r"^(\./)+", "")
    return pc.utf8_normalize(slashes, "NFC")


_IN_FOLDER = "in another folder"
_OTHERWISE = " and named otherwise"
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")
_DIFFERENCES: tuple[tuple[str, Callable[[pa.Array], pa.Array]], ...] = (
    ("with another ending", lambda keys: pc.replace_substring_regex(keys, r"\.\w{1,5}$", "")),
    ("in another letter case", pc.utf8_lower),
    ("with other leading zeros", lambda keys: pc.replace_substring_regex(keys, r"(^|\D)0+(\d)", r"\1\2")),
    (_IN_FOLDER, lambda keys: pc.replace_substring_regex(keys, r"^.*/", "")),
)
"""How a file's name may differ from the one that labels give it, and what makes both the same."""


def _near_images(missing: pa.Array, best: Matched, folder: Location) -> dict[str, NearImage]:
    """For names without an image: a file that may be meant. Where no name has an image, looks in all folders below."""
    if not len(missing):
        return {}
    near = _alike(missing, best.listing) | _unlisted(missing, best.listing.folder)
    if not near and not (best.index >= 0).any():
        near = _alike(missing, list_images(folder, recursive=True, limit=_MAX_LOOKED_AT))
    return near


def _alike(missing: pa.Array, listing: Listing) -> dict[str, NearImage]:
    """For names without an image: the file of a listing whose name differs least."""
    near: dict[str, NearImage] = {}
    paths = listing.table["path"].combine_chunks()
    names, keys = (_keys(_plain(array)) for array in (missing, paths))
    together = (names, keys)
    for difference, alike in _DIFFERENCES:
        together = (alike(together[0]), alike(together[1]))
        for also, (wanted, among) in (("", (alike(names), alike(keys))), (_OTHERWISE, together)):
            row = positions(wanted, among)
            for i in np.flatnonzero(row >= 0).tolist():
                name = missing[i].as_py()
                is_end = difference == _IN_FOLDER and _ABSOLUTE.match(name)
                how = "at the end of an absolute path" if is_end else difference
                how += also if difference == _IN_FOLDER else ""
                near.setdefault(name, NearImage(how, str(paths[int(row[i])].as_py())))
    return near


def _unlisted(missing: pa.Array, folder: Location) -> dict[str, NearImage]:
    """Names under which something lies that is not taken as an image; the first thousand are looked for."""
    local, found = folder.local, {}
    for name in missing[:1000].to_pylist() if local is not None else ():
        path = os.path.join(str(local), name)
        if os.path.isfile(path):
            found[name] = NearImage("without the ending of an image", name)
        elif os.path.islink(path):
            found[name] = NearImage("as a link to a file that is missing", name)
    return found


def _keys(names: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(names, _SUFFIX, "")


def _ambiguous(
    repeated: list[npt.NDArray[np.int64]], paths: pa.Array, used: npt.NDArray[np.bool_]
) -> Iterator[Finding]:
    """Names for which two files could be meant, of which one was taken and the other has no name."""
    spare = EvidenceList()
    for group in repeated:
        for row in group[~used[group]].tolist() if used[group].any() else ():
            spare.add("another image of the same name is used instead", str(paths[row].as_py()))
    if spare:
        message = f"{len(spare)} images are second candidates for a labelled name and are not used"
        yield spare.finding("warning", "ambiguous_images", message, "Keep one image file per labelled name.")
