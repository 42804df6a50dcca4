"""Find the image files that a command line names (files, folders, globs, URIs), and load each with its faces."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
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
    decode_sized_face,
    format_of,
    format_of_ending,
    open_photograph,
)
from rafce_ray.faces.detect import FaceFinder
from rafce_ray.faces.face import Face, given_face, may_be_aligned

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

    def hide(self, number: int) -> None:
        """So many more hidden files and folders."""
        if number:
            self.counts[HIDDEN] += number

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
        others = Skipped() if skipped is None else skipped
        yield from _some(_expand(local_path(place), others), place, others)


def list_images(places: Sequence[str], skipped: Skipped | None = None) -> Iterator[str]:
    """As :func:`find_images`, by names for every machine: absolute paths, ``scheme://bucket/key`` on object stores.

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
            others = Skipped() if skipped is None else skipped
            yield from _some(_list_store(place, location, others), place, others)


def _store_of(place: str) -> Location | None:
    """An object store's place; None for local paths and ``file://`` URIs."""
    return locate(place) if "://" in place and not place.startswith("file://") else None


def stores_of(places: Sequence[str]) -> Stores:
    """The object stores among ``places``. UsageError where buckets of one name are at different addresses."""
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
    waiting = [location.path]
    while waiting:
        infos = ask(location.uri, partial(store.get_file_info, pafs.FileSelector(waiting.pop())))
        infos.sort(key=lambda info: info.path)
        folders = [info for info in infos if info.type == pafs.FileType.Directory]
        files = [info.path for info in infos if info.type == pafs.FileType.File]
        waiting += reversed([info.path for info in folders if not _is_hidden(info.base_name)])
        del infos, folders
        for path in files:
            if _is_image(os.path.basename(path), path, skipped, look_into=False):
                yield _name(place, path)


def _name(uri: str, path: str) -> str:
    """A path of a store as it is named everywhere: bucket and key after the scheme."""
    return f"{uri.partition('://')[0]}://{path}"


def _root(name: str) -> str:
    """``s3://bucket/a/b.jpg`` -> ``s3://bucket``."""
    scheme, _, path = name.partition("://")
    return f"{scheme}://{path.partition('/')[0]}"


def _some(names: Iterator[Place], place: str, skipped: Skipped) -> Iterator[Place]:
    """All ``names``; UsageError where there are none."""
    first = next(names, None)
    if first is None:
        looked_for = f"no image files here; looked for {', '.join(READ_FORMATS)}"
        others = f" {skipped.in_words()}" if skipped.counts else ""
        raise UsageError(f"{printable(place)}: {looked_for}. Name the files or another folder.{others}")
    yield first
    yield from names


def _expand(place: str, skipped: Skipped) -> Iterator[Path]:
    found = next((path for path in (place, os.path.expanduser(place)) if _is_there(path)), None)
    if found is not None:
        yield from _below(found, skipped) if os.path.isdir(found) else (Path(found),)
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
        # A link to a folder below the top would list it twice, or without end.
        leads_back = os.path.islink(parent) and parent != top and os.path.commonpath((real, real_top)) == real_top
        if real in gone_through or leads_back:
            folders.clear()
            continue
        gone_through.add(real)
        skipped.hide(sum(map(_is_hidden, folders)))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if _is_image(name, path, skipped):
                yield Path(path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _is_image(name: str, path: str, skipped: Skipped, *, look_into: bool = True) -> bool:
    """Whether a file of a folder is an image, by its ending or else by its first bytes; if not, it is counted."""
    ending = os.path.splitext(name)[1].lower()
    if _is_hidden(name):
        skipped.hide(1)
        return False
    if ending in _PICTURES:
        return True
    form = format_of_ending(ending)
    if form is None and look_into:
        with suppress(OSError):
            form = format_of(read_file(path, HEAD_BYTES))
        if form is not None and not form.is_video:
            return True
    skipped.add(path, form)
    return False


NO_FACE = "no_face"
UNREADABLE = "unreadable"

MAX_BYTES = FILE_LIMITS.max_bytes + 1
"""Bytes of a file that are read: one more than the limit, to detect larger files."""

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

    Never raises for the contents of a file: a broken file gives a ``problem``.
    """
    return load_image(file_name(str(path)), lambda _: read_file(str(path), MAX_BYTES), finder=finder, px=px)


def load_image(path: str, read: Callable[[str], bytes], *, finder: FaceFinder | None, px: int) -> LoadedFile:
    """:func:`load_file` for what ``read(path)`` returns. It raises StorageError; an OSError becomes a ``problem``."""
    width = height = None
    # What a remedy calls the file: that of a store is converted where it has been copied to.
    name = path.rpartition("/")[2] if "://" in path else path
    try:
        content = read(path)
        if finder is None:
            face = decode_sized_face(content, px, limits=FILE_LIMITS, name=name)
            whole = given_face(face.pixels, face.width, face.height)
            return LoadedFile(path, face.width, face.height, (whole,), None)
        photograph = open_photograph(content, limits=FILE_LIMITS, name=name)
        width, height = photograph.width, photograph.height
        faces = finder.find(photograph, px)
    except StorageError:
        raise
    except OSError as error:
        message = f"the file cannot be read ({error.strerror or error})."
        problem = Finding("error", UNREADABLE, message, "Check that it is there and may be read.")
    except DecodeError as error:
        problem = error.finding
    else:
        if faces:
            return LoadedFile(path, width, height, tuple(faces), None)
        remedy = "Use a picture in which the face is larger and seen from the front, or lower --min-face-score."
        if may_be_aligned(width, height):
            remedy = "If this is an aligned face already, use --faces aligned."
        problem = Finding("error", NO_FACE, "no face was found.", remedy)
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
