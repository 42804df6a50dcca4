"""A batch: what the loader gives, training prepares, and the loss reads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Batch(NamedTuple):
    """One worker's part of a global batch, on its device.

    images (B, S, S, 3) uint8 as stored, or (B, 3, P, P) float once prepared for the network; emotion (B,) int64, -1 unknown;
    action_units (B, A) float, 1 / 0 / NaN unknown; votes (B, 6) float in the order of ``BASIC_EMOTIONS``, summing to 1, NaN
    unknown. The norms are scalars over the global batch of all workers: emotion_norm is the sum of the class weights of known
    emotions (their number without weights), au_norm the number of known AU elements, votes_norm the number of images with votes.
    rows (B,) int64 says which rows of the dataset these images are.
    """

    images: Tensor
    emotion: Tensor
    action_units: Tensor
    votes: Tensor
    emotion_norm: Tensor
    au_norm: Tensor
    votes_norm: Tensor
    rows: np.ndarray
