"""From an image file to its faces: read, decoded, found and cut out, a few files ahead of whoever predicts them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rafce_ray.base.errors import Finding
from rafce_ray.base.object_store import StorageError
from rafce_ray.faces.decode import FILE_LIMITS, DecodeError, decode_image, decode_sized_face
from rafce_ray.faces.detect import Face, FaceFinder, given_face, may_be_aligned
from rafce_ray.faces.files import file_name, read_file

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
    """:func:`load_file` for what ``read(path)`` gives; an OSError of it is a problem of this file, but a StorageError, which is raised."""
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
