"""The records that reading, auditing and storing labelled faces share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rafce_ray.base.errors import Evidence, Finding, Level
from rafce_ray.base.storage import Location

SPLITS = ("train", "validation", "test")
"""Names of the splits; targets hold an index into this tuple."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "publictest": "validation",
    "privatetest": "test",
}
"""Spellings of a split that are read, in lower case; the last two are FER2013's."""

NUM_VOTES = 6
"""Shares in a row of ``distribution.txt``: one a basic emotion, in the order of ``taxonomy.BASIC_EMOTIONS``."""

MAX_EVIDENCE = 1000
"""Evidence kept per finding; its count includes the rest."""

_CHUNK = 2048

MAX_UNREADABLE_SHARE = 0.01
"""Share of the labelled, non-null rows that may be unreadable before the dataset is refused."""

LABEL_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("image_path", pa.string()),
        pa.field("image_bytes", pa.int64()),
        pa.field("image_mtime_ns", pa.int64()),
        pa.field("split", pa.string()),
        pa.field("emotion", pa.string()),
        pa.field("emotion_line", pa.int32()),
        pa.field("au_state", pa.string()),
        pa.field("au_line", pa.int32()),
        pa.field("au_positive", pa.list_(pa.int16())),
        pa.field("au_negative", pa.list_(pa.int16())),
        pa.field("votes", pa.list_(pa.float32(), NUM_VOTES)),
    ]
)
"""One row a labelled image, as read, before any vocabulary is applied.

``image_path`` is relative to the image folder, null where the file is missing. ``emotion`` is the label as written,
null where there is none. ``au_state`` says how to read the two lists: ``full`` (every action unit not in
``au_positive`` was coded absent), ``partial`` (only those in ``au_negative`` were), ``null`` (the label says null),
``missing`` (no label), ``unreadable`` (a label that cannot be trusted: nothing of it is used).
"""

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``console.progress_bar`` or its like: opened with a description and a total, yields ``advance(n)``."""


def advancing(progress: Progress | None, text: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """The progress bar of some work; without ``progress`` none is shown."""
    return nullcontext(lambda n: None) if progress is None else progress(text, total)


class EvidenceList:
    """Evidence as it is gathered: all of it is counted, the first ``MAX_EVIDENCE`` pieces are kept."""

    def __init__(self) -> None:
        self._kept: list[Evidence] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, detail: str, file: str | None = None, line: int | None = None) -> None:
        """One more place."""
        self._count += 1
        if len(self._kept) < MAX_EVIDENCE:
            self._kept.append(Evidence(detail, file, line))

    def finding(self, level: Level, code: str, message: str, remedy: str = "") -> Finding:
        """The finding that all of it shows."""
        return Finding(level, code, message, remedy, self._count, tuple(self._kept))


class ArrowRows:
    """Rows gathered into an arrow table.

    Every few thousand rows, Python objects become columns: 100,000 of them would show in the peak memory.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._pending: list[tuple[Any, ...]] = []

    def append(self, row: tuple[Any, ...]) -> None:
        """One more row, a value for each column."""
        self._pending.append(row)
        if len(self._pending) == _CHUNK:
            self._flush()

    def table(self) -> pa.Table:
        """All rows."""
        self._flush()
        return pa.Table.from_batches(self._batches, self._schema)

    def _flush(self) -> None:
        columns: list[Sequence[Any]] = list(zip(*self._pending, strict=True)) or [()] * len(self._schema)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, self._schema.types, strict=True)]
        self._batches.append(pa.record_batch(arrays, schema=self._schema))
        self._pending.clear()


def positions(values: pa.Array | pa.ChunkedArray, among: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """(N,) int64: where each of N values first is in ``among``; -1 where it is not."""
    return np.asarray(pc.fill_null(pc.index_in(values, value_set=among), -1)).astype(np.int64)


def label_table(columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> pa.Table:
    """Columns in the order of :data:`LABEL_SCHEMA`; missing ones are null, missing lists of action units empty."""
    size = len(columns["name"])
    empty = {name: pa.array([[]] * size, pa.list_(pa.int16())) for name in ("au_positive", "au_negative")}
    nulls = {field.name: pa.nulls(size, field.type) for field in LABEL_SCHEMA}
    found = nulls | empty | dict(columns)
    return pa.table([found[name] for name in LABEL_SCHEMA.names], schema=LABEL_SCHEMA)


def counted(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def evidence_of(items: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """The first ``MAX_EVIDENCE`` items."""
    return tuple(islice(items, MAX_EVIDENCE))


@dataclass(frozen=True)
class NearImage:
    """A file that a name without an image may mean: how it differs (``in another letter case``), and its path."""

    difference: str
    path: str


@dataclass(frozen=True)
class Labels:
    """A dataset's labels as they were read, with everything that was odd about them.

    ``table`` has :data:`LABEL_SCHEMA`. ``au_columns`` are the action units that a table has columns for; None where a
    label lists what is present and every action unit was coded. ``token_counts`` counts action-unit tokens as written.
    ``digests`` are sha256 sums of the label files by name. ``near_images``: files that names without an image may mean.
    """

    table: pa.Table
    layout: Literal["rafce", "table", "folders"]
    root: Location
    image_root: Location
    emotion_file: str | None
    au_file: str | None
    au_columns: tuple[int, ...] | None
    num_extra_images: int
    findings: tuple[Finding, ...]
    token_counts: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    near_images: dict[str, NearImage] = field(default_factory=dict)

    @property
    def has_emotions(self) -> bool:
        """Whether there is an emotion file or column."""
        return self.emotion_file is not None

    @property
    def has_action_units(self) -> bool:
        """Whether there is an action-unit file or column."""
        return self.au_file is not None


@dataclass(frozen=True)
class Targets:
    """What the model is trained towards, one row an image.

    ``emotion`` (N,) int64: class, -1 unknown. ``action_units`` (N, A) float32: 1 present, 0 absent, NaN unknown.
    ``null_row`` (N,) bool: the action-unit label says null. ``votes`` (N, 6) float32: share of votes per basic emotion
    in the order of ``taxonomy.BASIC_EMOTIONS``, NaN unknown. ``split`` (N,) int8: index into ``SPLITS``, -1 none.
    """

    emotion: npt.NDArray[np.int64]
    action_units: npt.NDArray[np.float32]
    null_row: npt.NDArray[np.bool_]
    votes: npt.NDArray[np.float32]
    split: npt.NDArray[np.int8]


@contextmanager
def system_allocator() -> Iterator[None]:
    """Let arrow allocate from the C library: its own pools keep some 20 MB of what reading 100,000 labels has freed."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def release_memory() -> None:
    """Hand memory that is free in this process back to the operating system; later needs would come on top of it."""
    # glibc keeps what was freed; other C libraries have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
