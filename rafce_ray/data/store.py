"""A dataset's images, decoded once for every run: found by key, built under a lock, shared between nodes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.fs as pafs

from rafce_ray.config import DataConfig
from rafce_ray.console import say
from rafce_ray.data.records import Labels, Progress
from rafce_ray.data.store_files import (
    FORMAT_VERSION,
    IMAGES,
    LABELS,
    META,
    SOURCES,
    StoreMeta,
    Undecodable,
    describe_changes,
    open_images,
    read_arrow,
    read_meta,
    write_store,
)
from rafce_ray.decode import DECODER_VERSION
from rafce_ray.errors import RafceError
from rafce_ray.storage import Location, locate

LOCAL_STORES = str(DataConfig.model_fields["store_dir"].default)
"""Where a node keeps its copies of stores that live on an object store."""

_CHUNK = 2048


@dataclass(frozen=True)
class StoreHandle:
    """A whole store: its local folder, where other nodes find it (``uri``), whether and why it was just built."""

    path: Path
    uri: str
    key: str
    built: bool
    reason: str
    fingerprint: str
    num_images: int
    num_missing: int
    undecodable: tuple[Undecodable, ...]


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
        return _handle(meta, path, shared / key, built=False, reason="")
    with _locked(local, key):
        _remove_leftovers(local)
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
    return _handle(meta, path, shared / key, built=built, reason=reason)


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


def _handle(meta: StoreMeta, path: Path, shared: Location, *, built: bool, reason: str) -> StoreHandle:
    uri = shared.uri if shared.local is None else str(path)
    return StoreHandle(
        path, uri, meta.key, built, reason, meta.fingerprint, meta.num_images, meta.num_missing, meta.undecodable
    )


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
    """Hold the lock of one key; the operating system lets go of it when its holder dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / f".{key}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RafceError(
            f"{folder}: cannot be written ({error.strerror}). Set data.store_dir to a folder that can."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another process is preparing the store {key}; waiting for it.")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise RafceError(
                f"{folder}: its filesystem has no file locks. Set data.store_dir to a local folder."
            ) from error
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Delete half-made stores whose builder is gone: nobody holds their lock."""
    for leftover in folder.glob(".*.tmp"):
        key = leftover.name.split(".")[1]
        lock = folder / f".{key}.lock"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(leftover, ignore_errors=True)
            say(f"Removed a half-made store that an ended process left behind: {leftover.name}")
        finally:
            os.close(descriptor)


def _why_build(path: Path, labels: Labels, data: DataConfig) -> str:
    if path.exists():
        return f"the store {path} is damaged"
    old = _previous(path.parent, labels)
    if old is None:
        return "there is none for this dataset yet"
    folder, meta = old
    reasons = []
    changes = describe_changes(read_arrow(folder / SOURCES), labels.table)
    if changes:
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


def _previous(folder: Path, labels: Labels) -> tuple[Path, StoreMeta] | None:
    """The newest whole store of the same root."""
    found = []
    for path in folder.glob(f"*/{META}"):
        meta = _whole(path.parent)
        if meta is not None and meta.root == str(labels.root):
            found.append((path.stat().st_mtime_ns, path.parent, meta))
    if not found:
        return None
    _, newest, meta = max(found, key=lambda item: item[0])
    return newest, meta


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
    beside = path.with_name(f".{path.name}.{socket.gethostname().replace('.', '-')}-{os.getpid()}.tmp")
    # The lock is held: whatever has this name was left by a dead process.
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        meta = write_store(beside, labels, path.name, data.stored_px, progress)
        os.rename(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return meta


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
