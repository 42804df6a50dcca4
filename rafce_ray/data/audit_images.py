"""Checks of a dataset's pixels: images that cannot be decoded, are blank, or appear more than once.

Near duplicates are found in near-linear time by perceptual hashes in buckets.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.fft import dctn

from rafce_ray.base.errors import Evidence, Finding, Level
from rafce_ray.data.listing import groups_of_equals
from rafce_ray.data.records import SPLITS, EvidenceList, Labels, Progress, Targets, advancing, evidence_of
from rafce_ray.data.store import Undecodable, face_decoder
from rafce_ray.faces.decode import format_of_ending

BLANK_STD = 3.0
"""Standard deviation of grey values (0-255) below which an image shows nothing; faces have 20 and more."""

_MAX_UNDECODABLE_SHARE = 0.05
_MAX_COMMANDS = 5
_CHUNK = 256
_MAX_THREADS = 8
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class _Pixels:
    """What was measured of the images that could be decoded; ``rows`` are their label rows."""

    rows: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    hashes: npt.NDArray[np.uint8]
    std: npt.NDArray[np.float32]
    undecodable: list[Undecodable]


@dataclass(frozen=True)
class _Images:
    """Paths, split names and labels by label row, for telling what was found."""

    labels: Labels
    targets: Targets

    def path(self, row: int) -> str:
        return str(self.labels.table["image_path"][row].as_py())

    def describe(self, row: int) -> str:
        code = int(self.targets.split[row])
        return f"{self.path(row)} ({SPLITS[code] if code >= 0 else 'no split'})"

    def same_labels(self, one: int, other: int) -> bool:
        labels = self.labels.table.select(["emotion", "au_positive", "au_negative"]).take([one, other]).to_pylist()
        return bool(labels[0] == labels[1])

    def in_several_splits(self, rows: npt.NDArray[np.int64]) -> bool:
        return len({int(code) for code in self.targets.split[rows] if code >= 0}) > 1


def image_findings(labels: Labels, targets: Targets, progress: Progress | None) -> list[Finding]:
    """Undecodable and blank images, exact and near duplicates, within a split and across splits."""
    images = _Images(labels, targets)
    pixels = _measure(labels, progress)
    blank = pixels.std < BLANK_STD
    findings = [_undecodable_finding(labels, pixels.undecodable)] if pixels.undecodable else []
    if blank.any():
        rows = pixels.rows[blank]
        evidence = evidence_of(Evidence(images.describe(row)) for row in rows.tolist())
        message = f"{len(rows)} images are blank: one colour, or nearly"
        remedy = "Replace the images, or delete their rows."
        findings.append(Finding("warning", "blank_images", message, remedy, len(rows), evidence))
    shown = np.flatnonzero(~blank)
    groups = [pixels.rows[shown[group]] for group in groups_of_equals(pa.array(pixels.digests[shown]))]
    exact = [(int(group[0]), row, group) for group in groups for row in group[1:].tolist()]
    codes = "exact_duplicates", "exact_duplicates_across_splits"
    findings += _pair_findings(images, codes, "images are exact duplicates of another", "more than one split", exact)
    near = _near_pairs_of(images, pixels, shown, groups)
    codes = "near_duplicates", "near_duplicates_across_splits"
    findings += _pair_findings(images, codes, "pairs of images are nearly the same", "different splits", near)
    return findings


def _measure(labels: Labels, progress: Progress | None) -> _Pixels:
    paths = labels.table["image_path"]
    present = np.flatnonzero(np.asarray(pc.is_valid(paths)))
    decode = face_decoder(labels.image_root, HASH_PX)
    rows: list[npt.NDArray[np.int64]] = [present[:0]]
    digests: list[bytes] = []
    hashes, std = [np.zeros((0, HASH_BITS // 8), np.uint8)], [np.zeros(0, np.float32)]
    undecodable: list[Undecodable] = []
    with (
        advancing(progress, "looking at images", len(present)) as advance,
        ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool,
    ):
        for start in range(0, len(present), _CHUNK):
            chunk = present[start : start + _CHUNK]
            results = list(pool.map(decode, paths.take(chunk).to_pylist()))
            undecodable += [result for result in results if isinstance(result, Undecodable)]
            faces = [result for result in results if not isinstance(result, Undecodable)]
            if faces:
                grey = np.stack(faces).astype(np.float32) @ _GREY
                rows.append(chunk[[not isinstance(result, Undecodable) for result in results]])
                digests += [hashlib.blake2b(face.tobytes(), digest_size=8).digest() for face in faces]
                hashes.append(perceptual_hashes(grey))
                std.append(grey.std(axis=(1, 2)))
            advance(len(chunk))
    digest = np.frombuffer(b"".join(digests), np.uint64)
    return _Pixels(np.concatenate(rows), digest, np.concatenate(hashes), np.concatenate(std), undecodable)


def _undecodable_finding(labels: Labels, undecodable: list[Undecodable]) -> Finding:
    num_rows = labels.table.num_rows
    level: Level = "error" if len(undecodable) > _MAX_UNDECODABLE_SHARE * num_rows else "warning"
    if len(undecodable) == num_rows - labels.table["image_path"].null_count:
        level = "refusal"
    evidence = evidence_of(Evidence(f"{item.code}: {item.message}", item.path) for item in undecodable)
    # Commands for formats that are not read, folder by folder.
    root = labels.image_root.shown
    unread = [item.path for item in undecodable if item.code == "unsupported_format"]
    commands = []
    for folder, ending in sorted({(os.path.dirname(path), os.path.splitext(path)[1]) for path in unread}):
        form = format_of_ending(ending)
        if form is not None and form.convert:
            commands.append(form.remedy_for_folder(f"{root}/{folder}" if folder else root, ending))
    remedy = "\n".join(commands[:_MAX_COMMANDS]) or "Get the images again from their source, or delete their rows."
    message = f"{len(undecodable)} images cannot be decoded and are left out"
    return Finding(level, "undecodable_images", message, remedy, len(undecodable), evidence)


_Pair = tuple[int, int, npt.NDArray[np.int64]]
"""Two label rows, and all rows of their images."""


def _near_pairs_of(
    images: _Images, pixels: _Pixels, shown: npt.NDArray[np.int64], groups: list[npt.NDArray[np.int64]]
) -> Iterator[_Pair]:
    """Near duplicates among images that are no exact ones; each group of exact duplicates counts as its first image."""
    repeated = np.concatenate([group[1:] for group in groups]) if groups else np.zeros(0, np.int64)
    distinct = shown[~np.isin(pixels.rows[shown], repeated)]
    group_of = {int(group[0]): group for group in groups}
    decode = face_decoder(images.labels.image_root, HASH_PX)
    for one, other in pixels.rows[distinct][near_pairs(pixels.hashes[distinct])].tolist():
        faces = [face for row in (one, other) if not isinstance(face := decode(images.path(row)), Undecodable)]
        grey = [face.astype(np.float32) @ _GREY for face in faces]
        if len(grey) == 2 and correlation(*grey) >= MIN_CORRELATION:
            yield one, other, np.concatenate([group_of.get(row, np.array([row])) for row in (one, other)])


def _pair_findings(
    images: _Images, codes: tuple[str, str], what: str, across: str, pairs: Iterable[_Pair]
) -> Iterator[Finding]:
    """The pairs within a split, then those across splits."""
    within_split, across_splits = EvidenceList(), EvidenceList()
    for one, other, rows in pairs:
        differs = "" if images.same_labels(one, other) else ", labelled differently"
        found = across_splits if images.in_several_splits(rows) else within_split
        found.add(f"{images.describe(one)} = {images.describe(other)}{differs}")
    remedy = "Keep one of each, or all in the same split."
    if within_split:
        yield within_split.finding("warning", codes[0], f"{len(within_split)} {what} within a split", remedy)
    if across_splits:
        message = f"{len(across_splits)} {what} in {across}: what is tested was trained on"
        yield across_splits.finding("error", codes[1], message, remedy)


HASH_PX = 64
"""Side of the grey images that are hashed."""

_HASH_SIDE = 12
HASH_BITS = _HASH_SIDE**2

MAX_HASH_DISTANCE = 10
"""Bits of 144 in which near duplicates may differ.

Measured on 200 photographs of faces and 200 drawn ones: saving again as JPEG of quality 40, brightness or contrast
changed by a fifth, another size, blur of 1 px or noise of 8 grey levels changes 10 bits at most (once 12, where
highlights are clipped). Two expressions of one person under the same light differ in 6 or more, hence the correlation;
two drawn faces in 18 or more. A shift by 1 px changes up to 34 bits: it is not found.
"""

MIN_CORRELATION = 0.993
"""Correlation of grey values that near duplicates must also have; two expressions of one person reach 0.9915."""

_MAX_NEIGHBOURS = 64


def perceptual_hashes(grey: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """(N, 18) uint8: 144 bits per image of ``grey`` (N, 64, 64), set where a low frequency is above their median."""
    low = dctn(grey, axes=(1, 2))[:, :_HASH_SIDE, :_HASH_SIDE].reshape(len(grey), HASH_BITS)
    return np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)


def near_pairs(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """(P, 2) positions of hashes that differ in at most ``MAX_HASH_DISTANCE`` bits, each pair once, ordered.

    The bits are dealt into one band more than may differ: near duplicates agree in at least one whole band, so only
    images that share a band are compared. A band shared by very many is compared with the next 64 only.
    """
    bits = np.unpackbits(hashes, axis=1)
    # Neighbouring frequencies go together in faces: dealing the bits out at random keeps bands apart.
    dealt = np.random.default_rng(0).permutation(HASH_BITS)
    found = [np.zeros((0, 2), np.int64)]
    for band in np.array_split(dealt, MAX_HASH_DISTANCE + 1):
        keys = bits[:, band] @ (np.uint32(1) << np.arange(len(band), dtype=np.uint32))
        found.extend(_close_in_band(keys, hashes))
    pairs = np.sort(np.concatenate(found), axis=1)
    return np.unique(pairs, axis=0)


def _close_in_band(keys: npt.NDArray[np.uint32], hashes: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.int64]]:
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    for offset in range(1, min(_MAX_NEIGHBOURS, len(keys) - 1) + 1):
        same = np.flatnonzero(ordered[offset:] == ordered[:-offset])
        if not len(same):
            return
        left, right = order[same], order[same + offset]
        distance = np.unpackbits(hashes[left] ^ hashes[right], axis=1).sum(axis=1)
        close = distance <= MAX_HASH_DISTANCE
        yield np.stack([left[close], right[close]], axis=1)


def correlation(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Pearson correlation of the values of two images (S, S) float32, -1 to 1; NaN where one is constant."""
    left, right = one.ravel() - one.mean(), other.ravel() - other.mean()
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale > 0 else float("nan")
