"""What is known of the real RAF-CE: counts that tell a complete copy, and what is natural, from a fault.

Li, Deng, Li and Li, CVPR Workshops 2023; counted on the published label files.
"""

from __future__ import annotations

import math

NUM_LABELLED = 4549
"""Labelled images of RAF-CE."""

SPLIT_SIZES = {"train": 2709, "validation": 931, "test": 909}
"""Labelled images per split of RAF-CE."""

CLASS_COUNTS = {
    "train": (394, 171, 109, 136, 71, 495, 120, 352, 24, 124, 582, 108, 6, 17),
    "validation": (156, 54, 26, 50, 24, 162, 32, 138, 6, 42, 201, 32, 4, 4),
    "test": (126, 54, 36, 44, 25, 178, 43, 113, 6, 44, 194, 37, 1, 8),
}
"""Images per class of RAF-CE, in label order."""

NUM_NULL_TRAIN = 136
"""Train rows of RAF-CE whose action-unit label is null."""

TRAIN_POSITIVES = {
    25: 1661, 4: 1060, 10: 820, 12: 732, 1: 654, 26: 647, 5: 577, 2: 480, 27: 472, 9: 449, 16: 426, 17: 337, 6: 265,
    7: 208, 22: 205, 15: 172, 20: 145, 24: 134, 43: 101, 14: 79, 18: 74, 23: 69, 28: 25, 19: 19, 29: 12, 45: 0,
}  # fmt: skip
"""Train positives of RAF-CE per action unit; those not listed have fewer than 8."""


def is_surprisingly_few(count: int, expected: float) -> bool:
    """Whether ``count`` or fewer of an event expected ``expected`` times has a chance below 1 in 1000 (Poisson)."""
    if expected <= 0 or count >= expected:
        return False
    log_terms = [k * math.log(expected) - expected - math.lgamma(k + 1) for k in range(count + 1)]
    return math.fsum(math.exp(term) for term in log_terms) < 1e-3
