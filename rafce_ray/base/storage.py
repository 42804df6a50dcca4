"""One way to name a place for files: a local path or any pyarrow filesystem URI (``s3://``, ``gs://``, ``file://``)."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from rafce_ray.base.errors import DamagedFile, RafceError, UsageError

log = logging.getLogger(__name__)

PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Seconds between two tries; together with pyarrow's own retries they bridge an outage of about 45 s."""

_UNREACHABLE = re.compile(r"NETWORK_CONNECTION|curlCode|Could ?n.t resolve host|\bUNAVAILABLE\b")
_MAY_PASS = re.compile(
    r"SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|HTTP status (429|5\d\d)"
    # Of a deletion of many objects pyarrow passes on S3's words alone.
    r"|reduce your request rate|internal error"
    # Google's.
    r"|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '[^']*' not found|specified bucket does not exist")
_NO_PERMISSION = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|MISSING_AUTHENTICATION_TOKEN|EXPIRED_TOKEN"
    r"|INVALID_SIGNATURE|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|[Aa]ccess [Dd]enied"
)
_CERTIFICATE = re.compile(r"curlCode: (35|58|59|60|77)\b")
_OTHER_REGION = re.compile("configured region|PERMANENT_REDIRECT|HTTP status 301|AUTHORIZATION_HEADER_MALFORMED")
_CLOCK = re.compile("REQUEST_TIME_TOO_SKEWED")

_has_answered: set[str] = set()
"""Stores that have answered this process: silence of any other store may mean a wrong address, not an outage."""


class StorageError(RafceError, OSError):
    """An object store failed; the message names the place, the problem and the remedy, ``why`` leaves out the place."""

    def __init__(self, message: str, why: str = "", may_pass: bool = False) -> None:
        super().__init__(message)
        self.why, self.may_pass = why or message, may_pass


def ask(uri: str, request: Callable[[], Answer], *, patient: bool = True) -> Answer:
    """The result of ``request``, which must be safe to repeat; ``patient``: retry after failures that may pass.

    A store that has never answered this process is not retried: its address may be wrong.

    Raises:
        FileNotFoundError: as ``request`` raises it.
        StorageError: the store refuses, or does not recover.
    """
    store, pauses = _store_of(uri), iter(PAUSES_S if patient else ())
    while True:
        try:
            answer = request()
        except FileNotFoundError:
            _has_answered.add(store)
            raise
        except StorageError:
            raise
        except OSError as error:
            text = str(error)
            unreachable = _UNREACHABLE.search(text) is not None
            if not unreachable:
                _has_answered.add(store)
            may_pass = unreachable or _MAY_PASS.search(text) is not None
            pause = next(pauses, None)
            if not may_pass or pause is None or store not in _has_answered:
                why = explain(uri, error)
                raise StorageError(f"{uri}: {why}", why, may_pass) from error
            log.warning("%s: %s Trying again in %.0f s.", uri, _what(error), pause)
            time.sleep(pause)
        else:
            _has_answered.add(store)
            return answer


def explain(uri: str, error: OSError) -> str:
    """What is wrong with a storage, with its remedy."""
    text, what = str(error), _what(error)
    scheme, bucket = uri.partition("://")[0], uri.partition("://")[2].partition("?")[0].partition("/")[0]
    if error.errno is not None:
        # A store's errors have no number: this one is of the disk that was copied to or from.
        return f"{what} Make room on this machine's disk, or set TMPDIR to a folder on another."
    if _NO_BUCKET.search(text):
        return no_bucket(bucket)
    if _CLOCK.search(text):
        return f"{what} Set this machine's clock."
    if _NO_PERMISSION.search(text):
        return f"the credentials may not do this: {what} {_credentials(scheme)}"
    if _CERTIFICATE.search(text):
        return (
            f"{what} Add its authority to the machine's certificates, or name it with tls_ca_file_path=FILE in the "
            "URI's query."
        )
    if _OTHER_REGION.search(text):
        return f"{what} Name the bucket's region in the URI: s3://{bucket}/...?region=REGION."
    if _UNREACHABLE.search(text):
        return f"no answer: {what} {_address(scheme, uri)}"
    if _MAY_PASS.search(text):
        return f"{what} It did not recover in time: try again later; what was written whole is kept."
    return f"{what} Check the address, the network and the credentials."


def no_bucket(name: str) -> str:
    """That a bucket is missing, with the remedy."""
    return f"there is no bucket {name!r}. Make it, or correct the URI."


def _what(error: OSError) -> str:
    """pyarrow's message as one sentence."""
    text = (error.strerror or str(error)).partition(" error_info=")[0].strip() or type(error).__name__
    # Its first lines may be a heading, as that of a deletion of many objects.
    return " ".join(line.strip() for line in text.splitlines()[:2]).rstrip(".") + "."


def _credentials(scheme: str) -> str:
    """Which credentials were used, and how to give others; of a key it shows the first four characters."""
    if scheme != "s3":
        found = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
        used = (
            f"Used were those of GOOGLE_APPLICATION_CREDENTIALS={found}"
            if found
            else "Used were the machine's own, if any"
        )
        return (
            f"{used}. Set GOOGLE_APPLICATION_CREDENTIALS to the file of an account that may read, write and delete "
            "there."
        )
    key, profile = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_PROFILE")
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    if key:
        used = f"Used was AWS_ACCESS_KEY_ID={key[:4]}…"
    elif file.is_file():
        used = f"Used was the profile {profile or 'default'!r} of {file}"
    else:
        used = (
            f"There are none: AWS_ACCESS_KEY_ID is not set and there is no {file}, so at most the machine's role "
            "was used"
        )
    return (
        f"{used}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or the machine's role) to "
        "credentials that may read, write and delete there."
    )


def _address(scheme: str, uri: str) -> str:
    """Where the store's address is set."""
    if "endpoint_override=" in uri:
        return "Check endpoint_override and scheme in the URI, and the network."
    variable = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)), None)
    if scheme == "s3" and variable is not None:
        return f"Check {variable}={os.environ[variable]} and the network."
    if scheme == "s3":
        return (
            "Check the network; a store other than Amazon's is named in the URI's query "
            "(endpoint_override=HOST:PORT&scheme=http) or by AWS_ENDPOINT_URL."
        )
    return "Check the network and GOOGLE_APPLICATION_CREDENTIALS."


def _store_of(uri: str) -> str:
    base, _, query = uri.partition("?")
    return f"{base.partition('://')[2].partition('/')[0]}?{query}"


COPY_CHUNK = 16 * 2**20
"""Bytes of a request when files are copied; pyarrow's own 1 MiB makes hundreds of requests of a model."""

Answer = TypeVar("Answer")

Records = list[dict[str, Any]]

UPLOADED = "working_dir_files"
"""Folder in which Ray unpacks the working directory of a submitted job, and from which it removes it after the job."""

_URI = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")


@dataclass(frozen=True)
class Location:
    """A file or folder on a filesystem; ``/`` joins, ``local`` is its path where it is local and None elsewhere.

    On an object store every method raises :class:`rafce_ray.base.storage.StorageError` where the store refuses or does
    not recover.
    """

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
        path = f"{self.path.rstrip('/')}/{part}"
        if not _URI.match(self.uri):
            return Location(self.filesystem, path, path)
        base, mark, query = self.uri.partition("?")
        return Location(self.filesystem, path, f"{base.rstrip('/')}/{quote(part)}{mark}{query}")

    @property
    def parent(self) -> Location:
        """The folder that holds this place; a bucket holds itself, as ``/`` does."""
        if self.local is not None:
            return locate(self.local.parent)
        path = self.path.rstrip("/").rpartition("/")[0]
        if not path:
            return self
        base, mark, query = self.uri.partition("?")
        return Location(self.filesystem, path, base.rstrip("/").rpartition("/")[0] + mark + query)

    @property
    def shown(self) -> str:
        """The place as a person would type it: relative to the working directory where it is below."""
        is_below = self.local is not None and self.local.is_relative_to(Path.cwd())
        return os.path.relpath(self.path) if is_below else self.uri

    @property
    def command(self) -> str:
        """The place as an argument of a shell command: as :attr:`shown`, quoted where necessary."""
        return shlex.quote(self.shown)

    def info(self) -> pafs.FileInfo:
        """Type, size and time of what is there; times of an object store are whole seconds."""
        return self._ask(lambda: self.filesystem.get_file_info(self.path))

    def exists(self) -> bool:
        """Whether a file or folder is there."""
        return bool(self.info().type != pafs.FileType.NotFound)

    def free_name(self, wanted: str) -> str:
        """``wanted``, or the first of ``wanted-2``, ``wanted-3``, ... that nothing in this folder has."""
        names = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
        return next(name for name in names if not (self / name).exists())

    def is_broken_link(self) -> bool:
        """Whether it is a local link to nothing or to itself, for which :meth:`exists` is False."""
        return self.local is not None and self.local.is_symlink() and not self.exists()

    def is_dir(self) -> bool:
        """Whether a folder is there."""
        return bool(self.info().type == pafs.FileType.Directory)

    def list(self, *, recursive: bool = False) -> list[pafs.FileInfo]:
        """Files and folders below this folder, sorted by path; empty where there is no such folder."""
        selector = pafs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        found: list[pafs.FileInfo] = self._ask(lambda: self.filesystem.get_file_info(selector))
        return sorted(found, key=lambda info: str(info.path))

    def read_bytes(self) -> bytes:
        """The whole file. FileNotFoundError where it is missing."""

        def read() -> bytes:
            # A file knows its size and is read by one request; a stream comes in pieces of 256 kB, each a request.
            with self.filesystem.open_input_file(self.path) as file:
                return bytes(file.read())

        return self._ask(read)

    def read_record(self, remedy: str, *, keys: Collection[str] = ()) -> dict[str, Any]:
        """The JSON object in the file, which has at least these ``keys``.

        Raises:
            FileNotFoundError: the file is missing.
            DamagedFile: it holds something else; ``remedy``: what happens once it is removed.
        """
        content = self.read_bytes()
        try:
            record = _parse(content)
            if missing := [key for key in keys if key not in record]:
                raise ValueError(f"{missing[0]!r} is missing")
        except ValueError as error:
            raise self.damaged(error, remedy) from None
        return record

    def read_records(self, remedy: str) -> Records:
        """The JSON objects in the file, one a line; empty where it is missing. A last line cut short is left out.

        Raises:
            DamagedFile: another line holds something else; ``remedy``: what happens once it is removed.
        """
        try:
            *lines, last = self.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(_parse(line))
            except ValueError as error:
                how = f"Remove that line{'' if self.local is None else f': sed -i {number}d {self.command}'}\n{remedy}"
                raise DamagedFile(f"{self.shown}: line {number} is cut short or altered: {error}. {how}") from None
        with suppress(ValueError):
            records.append(_parse(last))
        return records

    def damaged(self, reason: object, remedy: str) -> DamagedFile:
        """The error that the file cannot be read; ``remedy``: what happens once it is removed."""
        removal = self.command if self.local is None else f"rm {self.command}"
        return DamagedFile(f"{self.shown}: is cut short or altered: {reason}. Remove it: {removal}\n{remedy}")

    def write_bytes(self, content: bytes, *, patient: bool = True) -> None:
        """Write the whole file at once: a reader sees the old content or the new one, never a part.

        ``patient=False``: an object store that is busy or does not answer is not waited for.
        """

        def put() -> None:
            with self.filesystem.open_output_stream(self.path, compression=None) as stream:
                stream.write(content)

        local = self.local
        if local is None:
            self._ask(put, patient)
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        scratch = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}.tmp")
        with scratch.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, local)

    def check_writable(self) -> None:
        """Write a small file into this folder, read it and remove it.

        Raises:
            UsageError: that cannot be done; which of the three, and why; or the folder will not last.
        """
        if self.local is not None and UPLOADED in self.local.parts:
            raise UsageError(
                f"{self.uri} lies in the copy of the working directory that Ray made for this job and removes after "
                "it: nothing would be left. Set storage to a folder that all machines share, or to a URI such as "
                "s3://bucket/runs."
            )
        probe = self / f".writable-{uuid.uuid4().hex[:8]}"
        try:
            probe.write_bytes(b"x")
            probe.read_bytes()
            probe.delete()
        except OSError as error:
            raise UsageError(f"{self.uri} cannot be used as storage: {_why(error)}") from error

    def check_reachable(self) -> None:
        """UsageError with the reason where the place cannot be reached, or its bucket does not exist."""
        try:
            if self.info().type != pafs.FileType.NotFound or self.local is not None:
                return
            bucket = Location(self.filesystem, self.path.partition("/")[0], self.uri)
            if bucket.info().type != pafs.FileType.NotFound:
                return
        except OSError as error:
            raise UsageError(f"{self.uri} cannot be reached: {_why(error)}") from error
        raise UsageError(f"{self.uri} cannot be reached: {no_bucket(bucket.path)}")

    def delete(self) -> None:
        """Remove the file or folder, if it is there."""

        def remove() -> None:
            info = self.filesystem.get_file_info(self.path)
            if info.type == pafs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            elif info.type == pafs.FileType.File:
                self.filesystem.delete_file(self.path)

        self._ask(remove)

    def put(self, file: Path) -> None:
        """Copy a local file here, however large; on an object store it appears whole or not at all."""
        self._ask(lambda: _copy(pafs.LocalFileSystem(), str(file), self.filesystem, self.path))

    def upload(self, folder: Path) -> None:
        """Copy a local folder here.

        On a local filesystem it appears whole or not at all; elsewhere its JSON files, which describe it, go last.
        """
        local = self.local
        if local is None:
            # Not pyarrow's copy of folders: it writes an empty object for every folder and each one above it.
            files = [path for path in folder.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
                (self / path.relative_to(folder).as_posix()).put(path)
            return
        with new_folder(local) as scratch:
            shutil.copytree(folder, scratch, dirs_exist_ok=True)

    def download(self, folder: Path) -> None:
        """Copy this folder to a local one, which must not exist; it appears whole or not at all."""
        with new_folder(folder) as scratch:
            self._ask(lambda: _copy(self.filesystem, self.path, pafs.LocalFileSystem(), str(scratch)))

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """The folder as a local one: itself, or a copy that lasts as long as the block."""
        if self.local is not None:
            yield self.local
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / self.name
            self.download(copy)
            yield copy

    def _ask(self, request: Callable[[], Answer], patient: bool = True) -> Answer:
        if self.local is None:
            return ask(self.uri, request, patient=patient)
        try:
            return request()
        except OSError as error:
            raise _plain_error(error, self.path) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``folder``, which must be empty or absent, when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    scratch.mkdir()
    try:
        yield scratch
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def locate(place: str | Path | Location) -> Location:
    """A :class:`Location` from a local path (made absolute, ``~`` expanded) or a pyarrow filesystem URI.

    Object stores other than AWS are named in the URI (``s3://bucket/p?endpoint_override=host:9000&scheme=http``) or by
    AWS_ENDPOINT_URL.

    Raises:
        UsageError: the URI's scheme is unknown, its parts cannot be read, it is not UTF-8, it holds a secret, or its
            bucket's region cannot be found out.
    """
    if isinstance(place, Location):
        return place
    text = str(place)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{text!r}: the name is not UTF-8, which pyarrow does not take. Rename it.") from None
    if not _URI.match(text):
        path = Path(os.path.expanduser(text)).absolute()
        return Location(pafs.LocalFileSystem(), str(path), str(path))
    base, _, query = text.partition("?")
    scheme, _, rest = base.partition("://")
    root, _, _ = rest.partition("/")
    if scheme == "s3" and "@" in root:
        raise UsageError(
            f"s3://…@{root.rpartition('@')[2]} holds credentials, which would be written into configurations and logs. "
            "Leave them out of the URI, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        )
    try:
        path_text = str(pafs.FileSystem.from_uri(text)[1])
        return Location(_filesystem(scheme, root, query), path_text, text)
    except OSError as error:
        raise UsageError(f"{text} cannot be reached: {explain(text, error)}") from error
    except (pa.ArrowInvalid, ValueError) as error:
        raise UsageError(
            f"{text!r} is not a place that can be reached: {error}. Give a local path or a URI such as "
            "s3://bucket/path."
        ) from error


def _plain_error(error: OSError, path: str) -> OSError:
    """The operating system's own error with its reason and its path, instead of pyarrow's wording."""
    if error.errno is None and str(error).endswith("is a directory"):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return error if error.errno is None else OSError(error.errno, os.strerror(error.errno), error.filename or path)


def _why(error: OSError) -> str:
    """What is wrong with a storage, with its remedy."""
    if isinstance(error, StorageError):
        return error.why
    return f"{(error.strerror or str(error)).strip().splitlines()[0].rstrip('.')}. Give a folder that can be written."


def _parse(content: bytes) -> dict[str, Any]:
    """A JSON object; ValueError, with the reason, for anything else."""
    try:
        record = json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError("it is empty" if not content.strip() else f"no JSON at {where}") from None
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__}, expected an object")
    return record


def _copy(source: pafs.FileSystem, path: str, destination: pafs.FileSystem, target: str) -> None:
    """Copy a file, or what is in a folder."""
    pafs.copy_files(path, target, source_filesystem=source, destination_filesystem=destination, chunk_size=COPY_CHUNK)


@lru_cache
def _filesystem(scheme: str, root: str, query: str) -> pafs.FileSystem:
    """One filesystem for all places in a bucket: each has its own connections, and opening one costs a handshake."""
    if scheme == "s3" and "allow_delayed_open" not in query:
        # A small file is then one request instead of the three of a multipart upload.
        query = "&".join(filter(None, (query, "allow_delayed_open=true")))
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        # Its own limit is 15 minutes, without a word.
        query = "&".join(filter(None, (query, "retry_limit_seconds=10")))
    return pafs.FileSystem.from_uri(f"{scheme}://{root}/{'?' if query else ''}{query}")[0]
