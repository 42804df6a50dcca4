"""Datasets made ready for training, the order of an epoch, oversampling and batches.

Nothing random is saved: an order comes from (seed, epoch), a step's draws from its seed.

Every worker knows the whole order and every label, so the number of known labels in the global batch, by which losses
are divided, needs no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from rafce_ray.base.console import say, warn
from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.config import DataConfig
from rafce_ray.data.audit import Audit, audit_command, audit_labels, require_readable, require_trainable
from rafce_ray.data.labels import read_labels, resolve_targets, resolve_taxonomy
from rafce_ray.data.records import SPLITS, Progress, Targets, counted, release_memory, system_allocator
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
        self._batches, self._meta = batches, meta
        self.stored_px = meta.stored_px

    def __len__(self) -> int:
        return self._meta.num_images

    def gather(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        """A uint8 (n, S, S, 3) copy of the images at ``indices``, in their order; IndexError out of range."""
        images = np.empty((len(indices), self.stored_px, self.stored_px, 3), np.uint8)
        for row, index in enumerate(np.asarray(indices).tolist()):
            if not 0 <= index < len(self):
                raise IndexError(f"image {index} of a store with {len(self)}")
            batch, position = divmod(index, self._meta.rows_per_batch)
            images[row] = self._batches[batch][position]
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
        """(N,) int64: rows of one split ("train", "validation", "test"), ascending."""
        return np.flatnonzero(self.targets.split == SPLITS.index(split))


@dataclass(frozen=True)
class Prepared:
    """A dataset that is ready for training: its store on this node, the URI for other nodes, and its audit."""

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
        missing = f"{meta.num_missing} labelled images are missing and {len(meta.undecodable)} cannot be decoded"
        shown = f": {examples}" if examples else ""
        warn(f"{missing}{shown}; they are left out. All of them: {audit_command(data)}")
    return Prepared(handle.path, handle.uri, taxonomy, audit, meta.fingerprint, handle)


class Batch(NamedTuple):
    """One worker's part of a global batch, on its device.

    images (B, S, S, 3) uint8 as stored, or (B, 3, P, P) float once prepared for the network; emotion (B,) int64, -1
    unknown; action_units (B, A) float, 1 / 0 / NaN unknown; votes (B, 6) float in the order of ``BASIC_EMOTIONS``,
    summing to 1, NaN unknown. The norms are scalars over the global batch of all workers: emotion_norm is the sum of
    the class weights of known emotions (their number without weights), au_norm the number of known AU elements,
    votes_norm the number of images with votes. rows (B,) int64 says which rows of the dataset these images are.
    """

    images: Tensor
    emotion: Tensor
    action_units: Tensor
    votes: Tensor
    emotion_norm: Tensor
    au_norm: Tensor
    votes_norm: Tensor
    rows: np.ndarray


RESIDENT_SHARE = 0.4
"""Share of the free device memory that stored images may take to stay on the device."""


def step_seed(*parts: int) -> int:
    """A 63-bit seed that mixes all parts, such as (seed, epoch, step, rank)."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> 1)


def epoch_order(indices: np.ndarray, seed: int, epoch: int, sampling_weights: np.ndarray | None = None) -> np.ndarray:
    """The order (N,) int64 of one epoch: a permutation of ``indices`` (N,), or N draws by ``sampling_weights`` (N,)."""
    generator = np.random.default_rng([seed, epoch])
    if sampling_weights is None:
        return generator.permutation(indices)
    return generator.choice(indices, size=len(indices), replace=True, p=sampling_weights / sampling_weights.sum())


def balancing_weights(emotion: np.ndarray) -> np.ndarray:
    """Sampling weights (N,) float64 that make classes equally frequent; unknown ones (-1 in ``emotion`` (N,)) get 1."""
    known = emotion >= 0
    counts = np.bincount(emotion[known])
    weights = np.ones(len(emotion))
    weights[known] = known.sum() / (np.count_nonzero(counts) * counts[emotion[known]])
    return weights


def num_steps(num_images: int, batch_size: int) -> int:
    """Global batches of an epoch; their sizes differ by at most one image."""
    return max(1, round(num_images / batch_size))


def batch_remark(num_images: int, batch_size: int) -> str | None:
    """A warning where a batch would take more images than there are; None where it does not."""
    if batch_size <= num_images:
        return None
    images = counted(num_images, "train image")
    return f"optim.batch_size={batch_size} is more than the {images}: every epoch is one step with all of them."


def check_shares(num_images: int, batch_size: int, num_workers: int) -> None:
    """UsageError where a step leaves a worker fewer than 2 images, of which batch statistics cannot be taken."""
    if num_images // num_steps(num_images, batch_size) < 2 * num_workers:
        raise UsageError(
            f"{num_images} train images in batches of {batch_size} leave fewer than 2 a step for each of {num_workers} "
            "workers. Lower run.num_workers or raise optim.batch_size."
        )


def tally(rows: np.ndarray) -> Tensor:
    """(2,) int64: how many rows these are, and the sum of a hash of each, modulo 2^64.

    Tallies add up over steps and workers, in any order; equal ones are of the same rows, each as often.
    """
    mixed = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return torch.tensor([len(rows), int(mixed.sum(dtype=np.uint64).view(np.int64))], dtype=torch.int64)


class TrainLoader:
    """Batches of the train split for one of ``num_workers`` workers.

    An epoch uses every image exactly once (oversampling: as many draws), in ``steps_per_epoch`` global batches whose
    sizes differ by at most one (``batch_sizes``, by step), so that no batch is ragged. Where the stored images fit on
    the device, they stay there.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        oversample: bool,
        class_weights: np.ndarray | None,
        rank: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        check_shares(len(indices), batch_size, num_workers)
        self.steps_per_epoch = num_steps(len(indices), batch_size)
        smallest, larger = divmod(len(indices), self.steps_per_epoch)
        self.batch_sizes = [smallest + (step < larger) for step in range(self.steps_per_epoch)]
        self._indices = indices
        self._seed, self._rank, self._num_workers, self._device = seed, rank, num_workers, device
        targets = dataset.targets
        self._sampling_weights = balancing_weights(targets.emotion[indices]) if oversample else None
        weights = np.ones(dataset.taxonomy.num_emotions) if class_weights is None else class_weights
        # The norms' parts by image; -1, an unknown emotion, takes the last weight.
        self._known: list[np.ndarray] = [
            np.append(weights, 0.0)[targets.emotion],
            (~np.isnan(targets.action_units)).sum(axis=1),
            np.asarray(~np.isnan(targets.votes).any(axis=1)),
        ]
        arrays = targets.emotion, targets.action_units, targets.votes
        self._targets = [torch.from_numpy(array).to(device) for array in arrays]
        self._images = ImageSource(dataset, indices, device)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This worker's batches of an epoch from ``first_step`` on."""
        whole = np.array_split(self.order(epoch), self.steps_per_epoch)[first_step:]
        mine = [batch[self._rank :: self._num_workers] for batch in whole]
        for batch, part, images in zip(whole, mine, self._images.gather_all(mine), strict=True):
            yield self._batch(batch, part, images)

    def order(self, epoch: int) -> np.ndarray:
        """(N,) int64: rows of the dataset in the order in which all workers together use them."""
        return epoch_order(self._indices, self._seed, epoch, self._sampling_weights)

    def batch_of(self, indices: np.ndarray) -> Batch:
        """A batch of the train images at ``indices`` (B,) int64, for this worker alone."""
        (images,) = self._images.gather_all([indices])
        return self._batch(indices, indices, images)

    def _batch(self, whole: np.ndarray, mine: np.ndarray, images: Tensor) -> Batch:
        at = torch.from_numpy(mine).to(self._device)
        norms = [torch.tensor(float(known[whole].sum()), device=self._device) for known in self._known]
        return Batch._make([images, *(values[at] for values in self._targets), *norms, mine])


class ImageSource:
    """Stored images by index as uint8 tensors on a device: resident there if they fit, else read ahead by one batch."""

    def __init__(self, dataset: Dataset, indices: np.ndarray, device: torch.device) -> None:
        self._images = dataset.images
        self._device = device
        self._resident: Tensor | None = None
        num_bytes = len(indices) * self._images.stored_px**2 * 3
        if device.type == "cuda" and num_bytes < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._row = np.full(len(dataset.names), -1, dtype=np.int64)
            self._row[indices] = np.arange(len(indices))
            self._resident = torch.from_numpy(self._images.gather(indices)).to(device)

    def gather_all(self, batches: list[np.ndarray]) -> Iterator[Tensor]:
        """(B, S, S, 3) uint8 on the device for each batch of indices, in order."""
        if self._resident is not None:
            for batch in batches:
                yield self._resident[torch.from_numpy(self._row[batch]).to(self._device)]
        elif self._device.type == "cpu":
            for batch in batches:
                yield torch.from_numpy(self._images.gather(batch))
        else:
            with ThreadPoolExecutor(1, thread_name_prefix="images") as reader:
                ahead = [reader.submit(self._pinned, batch) for batch in batches[:2]]
                for position in range(len(batches)):
                    if position + 2 < len(batches):
                        ahead.append(reader.submit(self._pinned, batches[position + 2]))
                    yield ahead.pop(0).result().to(self._device, non_blocking=True)

    def _pinned(self, batch: np.ndarray) -> Tensor:
        return torch.from_numpy(self._images.gather(batch)).pin_memory()
