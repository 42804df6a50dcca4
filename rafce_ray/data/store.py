"""A dataset's images, decoded once for every run: found by key, built under a lock, shared between nodes.

``images.arrow`` holds record batches of ``rows_per_batch`` images each, a fixed-size list of uint8 per image.
``labels.arrow`` holds one row an image, in the same order, with the labels as they were read. ``sources.arrow`` holds
path, size and modification time of every source image. ``store.json`` is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from filelock import FileLock, Timeout

from rafce_ray.base.console import say
from rafce_ray.base.errors import GateError, RafceError
from rafce_ray.base.storage import Location, StorageError, locate, new_folder
from rafce_ray.config import DataConfig
from rafce_ray.data.records import Labels, Progress, advancing, positions
from rafce_ray.faces.decode import DECODER_VERSION, FILE_LIMITS, DecodeError, decode_face

FORMAT_VERSION = 1
IMAGES, LABELS, SOURCES, META = "images.arrow", "labels.arrow", "sources.arrow", "store.json"

_BATCH_BYTES = 32 * 2**20
_MAX_BATCH_ROWS = 4096
_SCRATCH_ROWS = 64
_CHUNK = 2048
_MAX_THREADS = 8


@dataclass(frozen=True)
class Undecodable:
    """A labelled image that has no row in the store, and why."""

    path: str
    code: str
    message: str


@dataclass(frozen=True)
class StoreMeta:
    """What a store holds and what it was made from; ``fingerprint`` changes with any pixel, name or label file."""

    format_version: int
    key: str
    root: str
    layout: str
    stored_px: int
    decoder_version: int
    rows_per_batch: int
    num_images: int
    num_missing: int
    has_emotions: bool
    has_action_units: bool
    fingerprint: str
    label_files: dict[str, str]
    undecodable: tuple[Undecodable, ...] = ()


def read_meta(folder: Path) -> StoreMeta:
    """What ``store.json`` says.

    Raises:
        RafceError: there is none, or it is of another version or damaged; the message names the folder.
    """
    try:
        values: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        undecodable = tuple(Undecodable(**item) for item in values.pop("undecodable"))
        meta = StoreMeta(**values, undecodable=undecodable)
    except (FileNotFoundError, NotADirectoryError):
        raise RafceError(
            f"{folder}: is no store ({META} is missing). Build it with 'rafce train', which does so by itself."
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise RafceError(f"{folder / META}: cannot be read ({error}). Delete the folder; it is built again.") from None
    if meta.format_version != FORMAT_VERSION:
        raise RafceError(
            f"{folder}: a store of format {meta.format_version}; this program reads {FORMAT_VERSION}. Delete it."
        )
    return meta


def open_images(folder: Path, meta: StoreMeta) -> list[npt.NDArray[np.uint8]]:
    """One read-only (R, S, S, 3) uint8 view of R images per record batch onto the memory-mapped file.

    Raises:
        RafceError: the file is missing or damaged, or holds another number of images than ``store.json`` says.
    """
    shape = (-1, meta.stored_px, meta.stored_px, 3)
    batches = read_arrow(folder / IMAGES).column(0).chunks
    views = [batch.flatten().to_numpy(zero_copy_only=True).reshape(shape) for batch in batches]
    found = sum(map(len, views))
    if found != meta.num_images:
        raise RafceError(f"{folder / IMAGES}: holds {found} images, {META} says {meta.num_images}. Delete the folder.")
    return views


def read_arrow(path: Path) -> pa.Table:
    """A memory-mapped table. RafceError where the file is missing or damaged."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise RafceError(
            f"{path}: cannot be read ({error}). Delete the folder {path.parent}; it is built again."
        ) from error


def write_store(folder: Path, labels: Labels, key: str, px: int, progress: Progress | None) -> StoreMeta:
    """Decode every labelled image into ``folder``, which must be there and empty; memory does not grow with N.

    Raises:
        GateError: not one image could be decoded.
    """
    paths = labels.table["image_path"]
    with advancing(progress, "decoding images", len(paths) - paths.null_count) as advance:
        kept, undecodable, fingerprint = _write_images(folder / IMAGES, labels, px, advance)
    if not kept.any():
        why = []
        if paths.null_count:
            why.append(f"{paths.null_count} are not in {labels.image_root}. Set data.images to the image folder.")
        if undecodable:
            first = undecodable[0]
            why.append(f"{len(undecodable)} cannot be decoded; the first is {first.path}: {first.message}")
        raise GateError(f"{labels.root}: none of {len(paths)} labelled images could be read. {' '.join(why)}")
    _write_rows(folder / LABELS, labels.table, kept)
    sources = labels.table.select(["image_path", "image_bytes", "image_mtime_ns"])
    _write_rows(folder / SOURCES, sources, np.ones(len(paths), bool))
    meta = StoreMeta(
        format_version=FORMAT_VERSION,
        key=key,
        root=str(labels.root),
        layout=labels.layout,
        stored_px=px,
        decoder_version=DECODER_VERSION,
        rows_per_batch=rows_per_batch(px),
        num_images=int(kept.sum()),
        num_missing=paths.null_count,
        has_emotions=labels.has_emotions,
        has_action_units=labels.has_action_units,
        fingerprint=fingerprint,
        label_files=labels.digests,
        undecodable=tuple(undecodable),
    )
    (folder / META).write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
    for name in (IMAGES, LABELS, SOURCES, META):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    return meta


def rows_per_batch(px: int) -> int:
    """Images in a record batch: about 32 MiB of them, whatever the size of the dataset."""
    return int(np.clip(_BATCH_BYTES // (px * px * 3), 1, _MAX_BATCH_ROWS))


def _write_images(
    path: Path, labels: Labels, px: int, advance: Callable[[int], None]
) -> tuple[npt.NDArray[np.bool_], list[Undecodable], str]:
    """Which label rows have an image, which cannot be decoded, and the fingerprint of names, labels and pixels."""
    size, capacity = px * px * 3, rows_per_batch(px)
    kind = pa.list_(pa.uint8(), size)
    schema = pa.schema([pa.field("image", kind, nullable=False)])
    # Every thread writes its pixels into a row of its own: nothing piles up, whatever the number of images.
    scratch = np.empty((min(_SCRATCH_ROWS, capacity), size), np.uint8)
    buffer = np.empty((capacity, size), np.uint8)
    filled = 0
    present = np.flatnonzero(np.asarray(pc.is_valid(labels.table["image_path"])))
    kept = np.zeros(labels.table.num_rows, bool)
    undecodable: list[Undecodable] = []
    digest = hashlib.blake2b(json.dumps(sorted(labels.digests.items())).encode(), digest_size=16)
    decode_image = face_decoder(labels.image_root, px)

    def decode(slot: int, relative: str) -> Undecodable | None:
        face = decode_image(relative)
        if isinstance(face, Undecodable):
            return face
        scratch[slot] = face.reshape(-1)
        return None

    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
        ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool,
    ):

        def write() -> None:
            images = pa.FixedSizeListArray.from_arrays(pa.array(buffer[:filled].reshape(-1)), type=kind)
            writer.write_batch(pa.record_batch([images], schema=schema))

        for start in range(0, len(present), len(scratch)):
            rows = present[start : start + len(scratch)]
            paths = labels.table["image_path"].take(rows).to_pylist()
            for slot, fault in enumerate(pool.map(decode, range(len(paths)), paths)):
                if fault is not None:
                    undecodable.append(fault)
                    continue
                buffer[filled] = scratch[slot]
                digest.update(paths[slot].encode())
                digest.update(buffer[filled])
                kept[rows[slot]] = True
                filled += 1
                if filled == capacity:
                    write()
                    filled = 0
            advance(len(paths))
        if filled:
            write()
    return kept, undecodable, digest.hexdigest()


def face_decoder(folder: Location, px: int) -> Callable[[str], npt.NDArray[np.uint8] | Undecodable]:
    """A function from an image's relative path to its pixels (S, S, 3) uint8, S = ``px``, or to why there are none.

    Raises:
        StorageError: (the function) the store did not answer, which says nothing about the image.
    """
    # Much faster than a Location for each of many files.
    local = folder.local

    def decode(relative: str) -> npt.NDArray[np.uint8] | Undecodable:
        try:
            content = (folder / relative if local is None else local / relative).read_bytes()
            return decode_face(content, px, limits=FILE_LIMITS, name=f"{folder.shown}/{relative}")
        except DecodeError as error:
            return Undecodable(relative, error.code, str(error))
        except StorageError:
            # The image may be sound: left out, it would be missing from every run.
            raise
        except OSError as error:
            return Undecodable(relative, "unreadable_file", str(error))

    return decode


def _write_rows(path: Path, table: pa.Table, kept: npt.NDArray[np.bool_]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for start in range(0, table.num_rows, _CHUNK):
            part = table.slice(start, _CHUNK).filter(pa.array(kept[start : start + _CHUNK]))
            writer.write_table(part.combine_chunks())


def describe_changes(old: pa.Table, new: pa.Table) -> str:
    """Which source images changed, were added or removed between two tables of sources; empty where none did."""
    matched = positions(new["image_path"], old["image_path"])
    named = np.asarray(pc.is_valid(new["image_path"]))
    both = (matched >= 0) & named
    differs = np.zeros(len(matched), bool)
    for name in ("image_bytes", "image_mtime_ns"):
        before = np.asarray(pc.fill_null(old[name], -1))[matched[both]]
        differs[both] |= before != np.asarray(pc.fill_null(new[name], -1))[both]
    num_removed = int((positions(old["image_path"].drop_null(), new["image_path"]) < 0).sum())
    parts = []
    for mask, verb in ((differs, "changed"), ((matched < 0) & named, "added")):
        rows = np.flatnonzero(mask)
        if len(rows):
            examples = ", ".join(str(new["image_path"][row].as_py()) for row in rows[:3].tolist())
            parts.append(f"{len(rows)} source images {verb} ({examples}{', ...' if len(rows) > 3 else ''})")
    if num_removed:
        parts.append(f"{num_removed} source images removed")
    return ", ".join(parts)


LOCAL_STORES = str(DataConfig.model_fields["store_dir"].default)
"""Where a node keeps its copies of stores that live on an object store."""


@dataclass(frozen=True)
class StoreHandle:
    """A whole store: its local folder, its ``uri`` for other nodes, whether and why it was just built, its contents."""

    path: Path
    uri: str
    built: bool
    reason: str
    meta: StoreMeta


def store_key(labels: Labels, data: DataConfig) -> str:
    """Twenty hex digits that change with the label files, labels, an image's name, length or time, size or decoder."""
    recipe: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "decoder": DECODER_VERSION,
        "px": data.stored_px,
        "labels": sorted(labels.digests.items()),
    }
    if data.encoding != "auto":
        recipe["encoding"] = data.encoding
    digest = hashlib.blake2b(json.dumps(recipe).encode(), digest_size=10)
    for start in range(0, labels.table.num_rows, _CHUNK):
        rows = labels.table.slice(start, _CHUNK)
        for name in ("name", "image_path"):
            digest.update("\n".join(pc.fill_null(rows[name], "").to_pylist()).encode())
        for name in ("image_bytes", "image_mtime_ns"):
            digest.update(np.asarray(pc.fill_null(rows[name], -1)).tobytes())
        # The store keeps the labels as read: other options, or another version, may read the same files differently.
        for name in ("split", "emotion", "au_state"):
            digest.update("\n".join(pc.fill_null(rows[name], "").to_pylist()).encode())
        for name in ("au_positive", "au_negative"):
            digest.update(np.asarray(pc.fill_null(pc.list_value_length(rows[name]), -1)).tobytes())
            digest.update(np.asarray(pc.list_flatten(rows[name])).tobytes())
    return digest.hexdigest()


def ensure_store(labels: Labels, data: DataConfig, *, progress: Progress | None = None) -> StoreHandle:
    """The store of these labels: the one that is there, a copy of the shared one, or one built now.

    Processes that start together build it once: the others wait. A kill leaves nothing that a later start would take
    for a store.

    Raises:
        GateError: not one image could be decoded.
        RafceError: the place cannot be written or has too little room.
    """
    shared = locate(data.store_dir)
    local = shared.local or Path(LOCAL_STORES).expanduser()
    return ensure_store_at(shared, local, labels, data, progress)


def ensure_store_at(
    shared: Location, local: Path, labels: Labels, data: DataConfig, progress: Progress | None
) -> StoreHandle:
    """:func:`ensure_store` with its places given: ``shared`` is where all nodes look, ``local`` this node's folder."""
    key = store_key(labels, data)
    path = local / key
    is_remote = shared.local is None
    meta = _whole(path)
    if meta is not None and not is_remote:
        return StoreHandle(path, str(path), False, "", meta)
    with _locked(local, key):
        _remove_leftovers(local, key)
        built, reason = False, ""
        meta = _whole(path)
        if meta is None and is_remote and (shared / key / META).exists():
            _download(shared / key, path)
            meta, reason = _whole(path), f"copied from {shared / key}"
        if meta is None:
            built, reason = True, _why_build(path, labels, data)
            meta = _build(path, labels, data, progress)
        if is_remote and not (shared / key / META).exists():
            _publish(path, shared / key)
    return StoreHandle(path, (shared / key).uri if is_remote else str(path), built, reason, meta)


def fetch_store(store: str | Path, *, local: Path | None = None) -> Path:
    """A local folder with the store at a path or URI; what lies on an object store is copied to this node once.

    Raises:
        RafceError: there is no store at that place.
    """
    location = locate(store)
    if location.local is not None:
        return location.local
    folder = local or Path(LOCAL_STORES).expanduser()
    path = folder / location.name
    with _locked(folder, location.name):
        if _whole(path) is None:
            if not (location / META).exists():
                raise RafceError(
                    f"{location}: is no store ({META} is missing). Start training once from the node that has the data."
                )
            _download(location, path)
    return path


def _whole(path: Path) -> StoreMeta | None:
    """The store's description where it is there and opens; None otherwise."""
    try:
        meta = read_meta(path)
        open_images(path, meta)
        rows = read_arrow(path / LABELS).num_rows
    except RafceError:
        return None
    return meta if rows == meta.num_images else None


@contextmanager
def _locked(folder: Path, key: str) -> Iterator[None]:
    """Hold the lock of one key; the operating system releases it when its holder dies."""
    lock = _lock(folder, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            say(f"Another process is preparing the store {key}; waiting for it.")
            lock.acquire()
    except OSError as error:
        raise RafceError(
            f"{folder}: cannot be written or locked ({error.strerror or error}). Set data.store_dir to a local folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path, key: str) -> FileLock:
    return FileLock(folder / f".{key}.lock")


def _remove_leftovers(folder: Path, held: str) -> None:
    """Delete half-made stores whose builder is gone: nobody else holds their lock. ``held``: this process's key."""
    for leftover in folder.glob(".*.tmp"):
        key = leftover.name.split(".")[1]
        with suppress(Timeout), nullcontext() if key == held else _lock(folder, key).acquire(blocking=False):
            shutil.rmtree(leftover, ignore_errors=True)
            say(f"Removed a half-made store that an ended process left behind: {leftover.name}")


def _why_build(path: Path, labels: Labels, data: DataConfig) -> str:
    if path.exists():
        return f"the store {path} is damaged"
    metas = {one.parent: _whole(one.parent) for one in path.parent.glob(f"*/{META}")}
    same_root = {one: meta for one, meta in metas.items() if meta is not None and meta.root == str(labels.root)}
    if not same_root:
        return "there is none for this dataset yet"
    folder, meta = max(same_root.items(), key=lambda item: (item[0] / META).stat().st_mtime_ns)
    reasons = []
    if changes := describe_changes(read_arrow(folder / SOURCES), labels.table):
        reasons.append(changes)
    files = sorted(
        name for name in {*meta.label_files, *labels.digests} if meta.label_files.get(name) != labels.digests.get(name)
    )
    if files:
        reasons.append(f"label files changed ({', '.join(files)})")
    if meta.stored_px != data.stored_px:
        reasons.append(f"data.stored_px is {data.stored_px}, was {meta.stored_px}")
    if meta.decoder_version != DECODER_VERSION:
        reasons.append("the image decoder is a newer one")
    return f"{'; '.join(reasons) or 'names changed'} since {folder.name}, which may be deleted"


def _build(path: Path, labels: Labels, data: DataConfig, progress: Progress | None) -> StoreMeta:
    if path.exists():
        shutil.rmtree(path)
    needed = labels.table.num_rows * data.stored_px**2 * 3
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise RafceError(
            f"{path.parent}: {free / 1e9:.1f} GB are free, the store needs {needed / 1e9:.1f} GB. Free some, set "
            "data.store_dir to another disk, or lower data.stored_px."
        )
    with new_folder(path) as unfinished:
        return write_store(unfinished, labels, path.name, data.stored_px, progress)


def _download(shared: Location, path: Path) -> None:
    say(f"Copying the store {shared} to {path}")
    if path.exists():
        shutil.rmtree(path)
    shared.download(path)


def _publish(path: Path, shared: Location) -> None:
    """Upload a store; ``store.json`` goes last, for object stores cannot rename: without it there is no store."""
    say(f"Copying the store to {shared}")
    if not isinstance(shared.filesystem, pafs.S3FileSystem):
        shared.filesystem.create_dir(shared.path, recursive=True)
    for name in (IMAGES, LABELS, SOURCES, META):
        (shared / name).put(path / name)
