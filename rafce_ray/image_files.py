"""From what a command line names (files, folders, globs) to image files, one after the other."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rafce_ray.errors import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Endings, in any case, by which files in folders and globs count as images; a file that is named is always taken."""


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
            raise UsageError(
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
