"""What training and evaluation read: stored images and targets, opened from a store alone, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rafce_ray.base.console import say, warn
from rafce_ray.base.errors import GateError
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.config import DataConfig
from rafce_ray.data.audit import Audit, audit_labels, require_readable, require_trainable
from rafce_ray.data.audit_checks import audit_command
from rafce_ray.data.labels import read_labels, resolve_targets, resolve_taxonomy
from rafce_ray.data.records import SPLITS, Progress, Targets, release_memory, system_allocator
from rafce_ray.data.store import (
    LABELS,
    StoreHandle,
    StoreMeta,
    ensure_store,
    fetch_store,
    open_images,
    read_arrow,
    read_meta,
)


class ImageArray:
    """Stored images, memory-mapped: every process of a node shares the same pages."""

    def __init__(self, batches: list[npt.NDArray[np.uint8]], meta: StoreMeta) -> None:
        self._batches = batches
        self._rows_per_batch = meta.rows_per_batch
        self._num_images = meta.num_images
        self.stored_px = meta.stored_px

    def __len__(self) -> int:
        return self._num_images

    def gather(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        """A uint8 (n, S, S, 3) copy of the images at ``indices``, in their order; IndexError out of range."""
        images = np.empty((len(indices), self.stored_px, self.stored_px, 3), np.uint8)
        for row, index in enumerate(np.asarray(indices).tolist()):
            if not 0 <= index < self._num_images:
                raise IndexError(f"image {index} of a store with {self._num_images}")
            images[row] = self._batches[index // self._rows_per_batch][index % self._rows_per_batch]
        return images


@dataclass(frozen=True)
class Dataset:
    """Images with their targets: row i of ``names``, ``images`` and every array of ``targets`` belong together."""

    names: list[str]
    images: ImageArray
    targets: Targets
    taxonomy: Taxonomy
    fingerprint: str

    def indices(self, split: str) -> npt.NDArray[np.int64]:
        """Rows of one split ("train", "validation", "test"), ascending."""
        return np.flatnonzero(self.targets.split == SPLITS.index(split))


@dataclass(frozen=True)
class Prepared:
    """A dataset made ready: its store on this node, where other nodes find it, and what was found out about it."""

    store: Path
    store_uri: str
    taxonomy: Taxonomy
    audit: Audit
    fingerprint: str
    handle: StoreHandle


class Readings:
    """Prepares the data of a study's trials, once for each way of reading them."""

    def __init__(self, prepare: Callable[[DataConfig], Prepared]) -> None:
        self._prepare = prepare
        self._prepared: dict[str, Prepared] = {}

    def of(self, data: DataConfig) -> Prepared:
        """The data of one trial."""
        if data.reading not in self._prepared:
            self._prepared[data.reading] = self._prepare(data)
        return self._prepared[data.reading]

    def prepare_all(self, ways: Mapping[str, DataConfig]) -> None:
        """Read the data in every way that trials will, before anything starts.

        Raises:
            GateError: the data may not be trained on, with the name of the way.
        """
        for name, data in ways.items():
            try:
                self.of(data)
            except GateError as error:
                raise GateError(f"with {name}: {error}") from error


def open_dataset(
    store: Path | str, taxonomy: Taxonomy, null_policy: str, evaluation_null_policy: str | None = None
) -> Dataset:
    """The dataset in a store, by path or URI, with targets for a taxonomy; the original files are not needed.

    Null is read as :func:`rafce_ray.data.labels.resolve_targets` says.

    Raises:
        RafceError: there is no whole store at that place.
    """
    folder = fetch_store(store)
    meta = read_meta(folder)
    images = ImageArray(open_images(folder, meta), meta)
    table: pa.Table = read_arrow(folder / LABELS)
    targets = resolve_targets(table, taxonomy, null_policy, evaluation_null_policy)
    return Dataset(table["name"].to_pylist(), images, targets, taxonomy, meta.fingerprint)


def prepare(data: DataConfig, *, progress: Progress | None = None, for_training: bool = True) -> Prepared:
    """Read the labels, check that they may be trained on, and make sure that there is a store.

    ``for_training=False`` only checks that they were read without doubt: a dataset without a train split can still be
    evaluated on.

    Raises:
        UsageError: the dataset cannot be read as configured.
        GateError: it may not be trained on; the message says what is wrong, where, and what to do.
    """
    with system_allocator():
        labels = read_labels(data)
        release_memory()
        taxonomy = resolve_taxonomy(labels, data)
        audit = audit_labels(labels, taxonomy, data)
        if for_training:
            require_trainable(audit, data)
        else:
            require_readable(labels, data)
        release_memory()
        handle = ensure_store(labels, data, progress=progress)
    meta = handle.meta
    if handle.built:
        say(f"Store built with {meta.num_images} images ({handle.reason}): {handle.path}")
    if meta.num_missing or meta.undecodable:
        examples = ", ".join(f"{item.path} ({item.code})" for item in meta.undecodable[:3])
        warn(
            f"{meta.num_missing} labelled images are missing and {len(meta.undecodable)} cannot be decoded"
            f"{': ' + examples if examples else ''}; they are left out. All of them: {audit_command(data)}"
        )
    return Prepared(handle.path, handle.uri, taxonomy, audit, meta.fingerprint, handle)
