"""From what a command line names (files, folders, globs, URIs) to image files, one after the other."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs

from rafce_ray.errors import UsageError
from rafce_ray.object_store import ask
from rafce_ray.storage import Location, locate

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Endings, in any case, by which files in folders and globs count as images; a file that is named is always taken."""

Stores = Mapping[str, pafs.FileSystem]
"""Filesystems by ``scheme://bucket``."""


def find_images(places: Sequence[str]) -> Iterator[Path]:
    """The image files at ``places`` in order: files, folders with all below them, globs (``**`` goes through folders).

    Names of one folder are sorted; no more than one folder's names are held at a time.

    Raises:
        UsageError: a place does not exist, or has no image file.
    """
    for place in places:
        found = False
        for path in _expand(place):
            found = True
            yield path
        if not found:
            raise _no_images(place)


def list_images(places: Sequence[str]) -> Iterator[str]:
    """As :func:`find_images`, by names that hold on every machine: absolute paths, and ``scheme://bucket/key`` on object stores.

    A place may also be a URI of a file or a folder; a URI's query is no part of the names.

    Raises:
        UsageError: as :func:`find_images`.
        StorageError: a store refuses or does not recover.
    """
    for place in places:
        location = locate(place) if "://" in place else None
        if location is None or location.local is not None:
            local = place if location is None else str(location.local)
            yield from (os.path.abspath(path) for path in find_images([local]))
        else:
            yield from _list_store(place, location)


def stores_of(places: Sequence[str]) -> Stores:
    """The object stores among ``places``. UsageError where two of them are buckets of one name at different addresses."""
    stores: dict[str, pafs.FileSystem] = {}
    for place in places:
        location = locate(place) if "://" in place else None
        if location is None or location.local is not None:
            continue
        root = _root(_name(place, location.path))
        if not stores.setdefault(root, location.filesystem).equals(location.filesystem):
            raise UsageError(
                f"{place}: another {root} at a different address is among the paths. Predict them by two commands."
            )
    return stores


def read_image(path: str, stores: Stores, max_bytes: int) -> bytes:
    """The first ``max_bytes`` of an image by its name of :func:`list_images`.

    Raises:
        OSError: the file is not there or may not be read.
        StorageError: its store refuses or does not recover: nothing is known of the file.
    """
    if "://" not in path:
        with open(path, "rb") as stream:
            return stream.read(max_bytes)
    filesystem, key = stores[_root(path)], path.partition("://")[2]

    def read() -> bytes:
        with filesystem.open_input_file(key) as file:
            return bytes(file.read(max_bytes))

    return ask(path, read)


def _list_store(place: str, location: Location) -> Iterator[str]:
    """A file, or the images below a folder in :func:`find_images`'s order, a folder's names at a time."""
    store = location.filesystem
    kind = ask(location.uri, lambda: store.get_file_info(location.path)).type
    if kind == pafs.FileType.File:
        yield _name(place, location.path)
        return
    if kind == pafs.FileType.NotFound:
        raise UsageError(f"{place}: no such file or folder. Give image files, folders or globs of local paths.")
    found = False
    waiting = [location.path]
    while waiting:
        infos = ask(location.uri, partial(store.get_file_info, pafs.FileSelector(waiting.pop())))
        folders = sorted(info.path for info in infos if info.type == pafs.FileType.Directory)
        names = sorted(info.path for info in infos if info.type == pafs.FileType.File and _is_image(info.path))
        del infos
        waiting += reversed(folders)
        found = found or bool(names)
        yield from (_name(place, path) for path in names)
    if not found:
        raise _no_images(place)


def _name(uri: str, path: str) -> str:
    """A path of a store as it is named everywhere: bucket and key after the scheme."""
    return f"{uri.partition('://')[0]}://{path}"


def _root(name: str) -> str:
    """``s3://bucket/a/b.jpg`` -> ``s3://bucket``."""
    scheme, _, path = name.partition("://")
    return f"{scheme}://{path.partition('/')[0]}"


def _no_images(place: str) -> UsageError:
    return UsageError(
        f"{place}: no image files here; looked for {', '.join(IMAGE_SUFFIXES)}. Name the files or another folder."
    )


def _expand(place: str) -> Iterator[Path]:
    path = Path(place).expanduser()
    if path.is_dir():
        yield from _below(path)
    elif path.exists():
        yield path
    elif glob.has_magic(place):
        for match in sorted(glob.iglob(str(path), recursive=True)):
            if os.path.isdir(match):
                if "**" not in place:
                    yield from _below(Path(match))
            elif _is_image(match):
                yield Path(match)
    else:
        raise UsageError(f"{place}: no such file or folder. Give image files, folders or globs (in quotes).")


def _below(folder: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise UsageError(
            f"{error.filename}: the folder cannot be read ({error.strerror}). Leave it out, or allow reading it."
        )

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names) if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)
