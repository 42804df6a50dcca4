"""From what a command line names (files, folders, globs, URIs) to image files, one after the other."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote_to_bytes

import pyarrow.fs as pafs

from rafce_ray.base.console import printable
from rafce_ray.base.errors import Finding, UsageError
from rafce_ray.base.storage import Location, StorageError, ask, locate
from rafce_ray.faces.decode import (
    FILE_LIMITS,
    HEAD_BYTES,
    READ_ENDINGS,
    READ_FORMATS,
    UNREAD_PICTURE_ENDINGS,
    DecodeError,
    Format,
    decode_image,
    decode_sized_face,
    format_of,
    format_of_ending,
)
from rafce_ray.faces.detect import Face, FaceFinder, given_face, may_be_aligned

_PICTURES = (*READ_ENDINGS, *UNREAD_PICTURE_ENDINGS)
"""Endings, in any case, of files that are taken as images without a look into them."""

_SYSTEM_NAMES = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found")
"""Names, in lower case, that operating systems put into folders. Names with a leading dot count, too."""

HIDDEN = "hidden"
"""What :class:`Skipped` calls hidden files and those of operating systems."""


class Skipped:
    """Files that are no images: ``counts`` by ending in lower case, ``without ending`` or ``hidden``."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, tuple[Format, str]] = {}

    def clear(self) -> None:
        """Forget all: the files are listed again."""
        self.counts.clear()
        self._examples.clear()

    def add(self, name: str, form: Format | None) -> None:
        """One more file; ``form`` is its format where that is known."""
        ending = os.path.splitext(name)[1].lower() or "without ending"
        self.counts[ending] += 1
        if form is not None:
            self._examples.setdefault(ending, (form, name))

    def in_words(self) -> str:
        """``2 .txt, 1 .mp4``, and for a known format the command that converts its first file; empty for none."""
        if not self.counts:
            return ""
        shown = ", ".join(f"{number:,} {printable(ending)}" for ending, number in sorted(self.counts.items()))
        reasons = (
            f" {form.name} is not read. {form.remedy(printable(name))}" for form, name in self._examples.values()
        )
        number = self.counts.total()
        files = "1 file that is not an image" if number == 1 else f"{number:,} files that are not images"
        return f"Skipped {files}: {shown}.{''.join(reasons)}"


Stores = Mapping[str, pafs.FileSystem]
"""Filesystems by ``scheme://bucket``."""


def file_name(path: str) -> str:
    """The name of a file in results: its path or, where that is not UTF-8, its ``file://`` URI (``%E9`` for a byte).

    :func:`local_path` gives the path again.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(os.path.abspath(path)))
    return path


def local_path(name: str) -> str:
    """The path of a file or folder from its name in results, or from any path or ``file://`` URI."""
    return os.fsdecode(unquote_to_bytes(name.removeprefix("file://"))) if name.startswith("file:///") else name


def find_images(places: Sequence[str], skipped: Skipped | None = None) -> Iterator[Path]:
    """The image files at ``places`` in order: files, folders with all below them, globs (``**`` goes through folders).

    A file that is named is always taken. In folders and globs, a file is an image by its ending or else by its first
    bytes; the others are counted in ``skipped``. Links to folders are followed, each folder once. Names of one folder
    are sorted; no more than one folder's names are held at a time.

    Raises:
        UsageError: a place does not exist, cannot be read, or has no image file.
    """
    for place in places:
        found, others = False, Skipped() if skipped is None else skipped
        for path in _expand(local_path(place), others):
            found = True
            yield path
        if not found:
            raise _no_images(place, others)


def list_images(places: Sequence[str], skipped: Skipped | None = None) -> Iterator[str]:
    """As :func:`find_images`, by names that hold on every machine: absolute paths, and ``scheme://bucket/key`` on
    object stores.

    A place may also be a URI of a file or a folder; a URI's query is no part of the names. Files of a store are images
    by their ending alone: a look into each would be a request.

    Raises:
        UsageError: as :func:`find_images`.
        StorageError: a store refuses or does not recover.
    """
    for place in places:
        location = _store_of(place)
        if location is None:
            yield from (file_name(os.path.abspath(path)) for path in find_images([place], skipped))
        else:
            yield from _list_store(place, location, Skipped() if skipped is None else skipped)


def _store_of(place: str) -> Location | None:
    """An object store's place; None for local paths and ``file://`` URIs."""
    return locate(place) if "://" in place and not place.startswith("file://") else None


def stores_of(places: Sequence[str]) -> Stores:
    """The object stores among ``places``.

    UsageError where two of them are buckets of one name at different addresses.
    """
    stores: dict[str, pafs.FileSystem] = {}
    for place in places:
        location = _store_of(place)
        if location is None:
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
        OSError: the file is not there, is no regular file or may not be read.
        StorageError: its store refuses or does not recover: nothing is known of the file.
    """
    if "://" not in path or path.startswith("file://"):
        return read_file(local_path(path), max_bytes)
    filesystem, key = stores[_root(path)], path.partition("://")[2]

    def read() -> bytes:
        with filesystem.open_input_file(key) as file:
            return bytes(file.read(max_bytes))

    return ask(path, read)


def read_file(path: str, max_bytes: int) -> bytes:
    """The first ``max_bytes`` of a local file. OSError where it is not there, is no regular file or may not be read."""
    # Opening a pipe without a writer waits for ever, and /dev/zero has no end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device and no file")
        return stream.read(max_bytes)


def _list_store(place: str, location: Location, skipped: Skipped) -> Iterator[str]:
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
        folders = sorted(
            info.path for info in infos if info.type == pafs.FileType.Directory and not _is_hidden(info.base_name)
        )
        files = sorted(info.path for info in infos if info.type == pafs.FileType.File)
        del infos
        names = [path for path in files if _is_image(os.path.basename(path), path, skipped, look_into=False)]
        waiting += reversed(folders)
        found = found or bool(names)
        yield from (_name(place, path) for path in names)
    if not found:
        raise _no_images(place, skipped)


def _name(uri: str, path: str) -> str:
    """A path of a store as it is named everywhere: bucket and key after the scheme."""
    return f"{uri.partition('://')[0]}://{path}"


def _root(name: str) -> str:
    """``s3://bucket/a/b.jpg`` -> ``s3://bucket``."""
    scheme, _, path = name.partition("://")
    return f"{scheme}://{path.partition('/')[0]}"


def _no_images(place: str, skipped: Skipped) -> UsageError:
    looked_for = ", ".join(READ_FORMATS)
    others = f" {skipped.in_words()}" if skipped.counts else ""
    return UsageError(
        f"{printable(place)}: no image files here; looked for {looked_for}. Name the files or another folder.{others}"
    )


def _expand(place: str, skipped: Skipped) -> Iterator[Path]:
    found = next((path for path in (place, os.path.expanduser(place)) if _is_there(path)), None)
    if found is not None:
        if os.path.isdir(found):
            yield from _below(found, skipped)
        else:
            yield Path(found)
        return
    if not glob.has_magic(place):
        raise UsageError(f"{printable(place)}: no such file or folder. Give image files, folders or globs (in quotes).")
    for match in sorted(glob.iglob(os.path.expanduser(place), recursive=True)):
        if os.path.isdir(match):
            if "**" not in place:
                yield from _below(match, skipped)
        elif _is_image(os.path.basename(match), match, skipped):
            yield Path(match)


def _is_there(path: str) -> bool:
    """Whether a file, folder or link exists. UsageError where the system refuses to say."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        if glob.has_magic(path):
            return False
        raise UsageError(
            f"{printable(path)}: cannot be read ({error.strerror}). Give image files, folders or globs (in quotes)."
        ) from error
    return True


def _below(top: str, skipped: Skipped) -> Iterator[Path]:
    """The images of a folder and all below it, through links to other folders, each of which is gone through once."""

    def unreadable(error: OSError) -> None:
        place = printable(str(error.filename))
        raise UsageError(f"{place}: the folder cannot be read ({error.strerror}). Leave it out, or allow reading it.")

    real_top = os.path.realpath(top)
    gone_through: set[str] = set()
    for parent, folders, names in os.walk(top, onerror=unreadable, followlinks=True):
        real = os.path.realpath(parent)
        # What a link leads to and what lies below the top anyway would be there twice, or without end.
        is_known = real in gone_through or (os.path.islink(parent) and parent != top and _is_within(real, real_top))
        if is_known:
            folders.clear()
            continue
        gone_through.add(real)
        if num_hidden := sum(_is_hidden(name) for name in (*folders, *names)):
            skipped.counts[HIDDEN] += num_hidden
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(name for name in names if not _is_hidden(name)):
            path = os.path.join(parent, name)
            if _is_image(name, path, skipped):
                yield Path(path)


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _is_image(name: str, path: str, skipped: Skipped, *, look_into: bool = True) -> bool:
    """Whether a file of a folder is an image, by its ending or else by its first bytes; if not, it is counted."""
    ending = os.path.splitext(name)[1].lower()
    if _is_hidden(name):
        skipped.counts[HIDDEN] += 1
        return False
    if ending in _PICTURES:
        return True
    form = format_of_ending(ending)
    if form is None and look_into:
        try:
            form = format_of(read_file(path, HEAD_BYTES))
        except OSError:
            form = None
        if form is not None and not form.is_video:
            return True
    skipped.add(path, form)
    return False


NO_FACE = "no_face"
UNREADABLE = "unreadable"

MAX_BYTES = FILE_LIMITS.max_bytes + 1
"""Bytes of a file that are read: one more than may be decoded, which tells that there are too many."""

Place = TypeVar("Place", Path, str)


@dataclass(frozen=True)
class LoadedFile:
    """What was found in one file, before prediction; ``problem`` where there is no face to predict.

    ``path`` is the :func:`rafce_ray.faces.files.file_name` of the file.
    """

    path: str
    width: int | None
    height: int | None
    faces: tuple[Face, ...]
    problem: Finding | None


def load_file(path: Path, *, finder: FaceFinder | None, px: int) -> LoadedFile:
    """Read and decode one file and cut out its faces at ``px`` a side; without a finder the image is one aligned face.

    Never raises for what a file holds: a broken file gives a ``problem``.
    """
    return load_image(file_name(str(path)), lambda _: read_file(str(path), MAX_BYTES), finder=finder, px=px)


def load_image(path: str, read: Callable[[str], bytes], *, finder: FaceFinder | None, px: int) -> LoadedFile:
    """:func:`load_file` for what ``read(path)`` gives; an OSError of it is a problem of this file, but a StorageError,
    which is raised.
    """
    width = height = None
    # What a remedy calls the file: that of a store is converted where it has been copied to.
    name = path.rpartition("/")[2] if "://" in path else path
    try:
        content = read(path)
        if finder is None:
            face = decode_sized_face(content, px, limits=FILE_LIMITS, name=name)
            whole = given_face(face.pixels, face.width, face.height)
            return LoadedFile(path, face.width, face.height, (whole,), None)
        photograph = decode_image(content, limits=FILE_LIMITS, name=name)
    except StorageError:
        raise
    except OSError as error:
        problem = Finding(
            "error",
            UNREADABLE,
            f"the file cannot be read ({error.strerror or error}).",
            "Check that it is there and may be read.",
        )
    except DecodeError as error:
        problem = error.finding
    else:
        height, width = photograph.shape[:2]
        faces = finder.find(photograph, px)
        if faces:
            return LoadedFile(path, width, height, tuple(faces), None)
        problem = Finding("error", NO_FACE, "no face was found.", _no_face_remedy(width, height))
    return LoadedFile(path, width, height, (), problem)


def load_ahead(load: Callable[[Place], LoadedFile], paths: Iterable[Place], num_readers: int) -> Iterator[LoadedFile]:
    """``load`` of every path in order, by so many threads, a few files ahead of whoever takes them."""
    window: deque[Future[LoadedFile]] = deque()
    with ThreadPoolExecutor(num_readers, thread_name_prefix="images") as pool:
        for path in paths:
            window.append(pool.submit(load, path))
            if len(window) > 2 * num_readers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()


def _no_face_remedy(width: int, height: int) -> str:
    if may_be_aligned(width, height):
        return "If this is an aligned face already, use --faces aligned."
    return "Use a picture in which the face is larger and seen from the front, or give --face-model a YuNet file."
