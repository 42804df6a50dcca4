"""One way to name a place for files: a local path or any pyarrow filesystem URI (``s3://``, ``gs://``, ``file://``)."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from rafce_ray.errors import UsageError

_URI = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")


@dataclass(frozen=True)
class Location:
    """A file or folder on a filesystem; ``/`` joins, ``local`` is its path where it is local and None elsewhere."""

    filesystem: pafs.FileSystem
    path: str
    uri: str

    @property
    def local(self) -> Path | None:
        """The place as a local path; None on object stores."""
        return Path(self.path) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, part: str) -> Location:
        base, mark, query = self.uri.partition("?")
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{part}", f"{base.rstrip('/')}/{part}{mark}{query}")

    @property
    def parent(self) -> Location:
        """The folder that holds this place."""
        base, mark, query = self.uri.partition("?")
        return locate(base.rstrip("/").rpartition("/")[0] + mark + query)

    @property
    def shown(self) -> str:
        """The place as a person would type it: relative to here where it lies below."""
        local = self.local
        return (
            str(local.relative_to(Path.cwd())) if local is not None and local.is_relative_to(Path.cwd()) else self.uri
        )

    def exists(self) -> bool:
        """Whether a file or folder is there."""
        return bool(self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound)

    def is_dir(self) -> bool:
        """Whether a folder is there."""
        return bool(self.filesystem.get_file_info(self.path).type == pafs.FileType.Directory)

    def list(self, *, recursive: bool = False) -> list[pafs.FileInfo]:
        """Files and folders below this folder, sorted by path; empty where there is no such folder."""
        selector = pafs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        return sorted(self.filesystem.get_file_info(selector), key=lambda info: str(info.path))

    def read_bytes(self) -> bytes:
        """The whole file. FileNotFoundError where it is missing."""
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            return bytes(stream.read())

    def write_bytes(self, content: bytes) -> None:
        """Write the whole file at once: a reader sees the old content or the new one, never a part."""
        local = self.local
        if local is None:
            with self.filesystem.open_output_stream(self.path, compression=None) as stream:
                stream.write(content)
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        beside = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}.tmp")
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, local)

    def delete(self) -> None:
        """Remove the file or folder, if it is there."""
        info = self.filesystem.get_file_info(self.path)
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif info.type == pafs.FileType.File:
            self.filesystem.delete_file(self.path)

    def upload(self, folder: Path) -> None:
        """Put a local folder here. On a local filesystem it appears whole or not at all."""
        local = self.local
        if local is None:
            pafs.copy_files(
                str(folder), self.path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.filesystem
            )
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        beside = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}.tmp")
        shutil.copytree(folder, beside)
        os.rename(beside, local)

    def download(self, folder: Path) -> None:
        """Copy this folder to a local one, which must not exist; it appears whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        beside.mkdir()
        pafs.copy_files(
            self.path, str(beside), source_filesystem=self.filesystem, destination_filesystem=pafs.LocalFileSystem()
        )
        os.rename(beside, folder)


def locate(place: str | Path) -> Location:
    """A :class:`Location` from a local path (made absolute, ``~`` expanded) or a pyarrow filesystem URI.

    Object stores other than AWS are named in the URI: ``s3://bucket/p?endpoint_override=host:9000&scheme=http``.

    Raises:
        UsageError: the URI's scheme is unknown or its parts cannot be read.
    """
    text = str(place)
    if not _URI.match(text):
        path = Path(text).expanduser().absolute()
        return Location(pafs.LocalFileSystem(), str(path), str(path))
    try:
        filesystem, path_text = pafs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        raise UsageError(
            f"{text!r} is not a place that can be reached: {error}. Give a local path or a URI such as s3://bucket/path."
        ) from error
    return Location(filesystem, path_text, text)
