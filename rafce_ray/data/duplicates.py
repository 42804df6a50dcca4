"""Images that are the same or nearly so, found in near-linear time by perceptual hashes in buckets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.fft import dctn

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
"""Correlation of grey values that near duplicates must have besides; two expressions of one person reach 0.9915."""

_MAX_NEIGHBOURS = 64


def perceptual_hashes(grey: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """(N, 18) uint8: 144 bits per image of ``grey`` (N, 64, 64), set where a low frequency is above their median."""
    low = dctn(grey, axes=(1, 2))[:, :_HASH_SIDE, :_HASH_SIDE].reshape(len(grey), HASH_BITS)
    return np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)


def exact_groups(digests: npt.NDArray[np.uint64]) -> list[npt.NDArray[np.int64]]:
    """Positions of equal digests, one ascending array for each that occurs more than once."""
    _, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    groups = np.split(order, np.cumsum(counts)[:-1])
    return [groups[i] for i in np.flatnonzero(counts > 1).tolist()]


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
        distance = _BIT_COUNT[hashes[left] ^ hashes[right]].sum(axis=1)
        close = distance <= MAX_HASH_DISTANCE
        yield np.stack([left[close], right[close]], axis=1)


_BIT_COUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint16)


def correlation(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Pearson correlation of two images' values; NaN where one is constant."""
    left, right = one.ravel() - one.mean(), other.ravel() - other.mean()
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale > 0 else float("nan")
