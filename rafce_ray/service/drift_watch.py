"""The latest faces of one model against its validation's: a sliding window of counts, and a word in the log when they drift apart.

No image is kept, nor anything of a single face: 50 faces at a time become counts, of which the last 40 sets are compared.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass

from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.model import Prediction
from rafce_ray.metrics.drift import LARGE, DriftReference, Light, faces_needed, psi

BLOCK_FACES = 50
WINDOW_BLOCKS = 40
WINDOW_FACES = BLOCK_FACES * WINDOW_BLOCKS
"""So many of the latest faces are compared, however long ago they came."""

RETURNED = 0.2
"""PSI under which what was above ``LARGE`` counts as returned: at one limit for both, chance would speak every few faces."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Statistic:
    """Where a statistic's counts stand in a block, and what they are compared with; ``num_bins`` is 1 for an AU: those that are active."""

    name: str
    start: int
    num_bins: int
    reference: tuple[int, ...]
    min_faces: int | None


class DriftWatch:
    """Watches the faces of one model; one event loop uses it. :attr:`psi` is replaced as a whole, so any thread may read it."""

    def __init__(self, reference: DriftReference | None, taxonomy: Taxonomy, version: str) -> None:
        self._version = version
        self._reference = reference
        self._statistics: list[_Statistic] = []
        self._start: dict[str, int] = {}
        start = 0
        for name, counts in ({} if reference is None else reference.counts(taxonomy.action_unit_codes)).items():
            num_bins = 1 if name in taxonomy.action_unit_codes else len(counts)
            needed = faces_needed(counts)
            if needed is not None and needed > WINDOW_FACES:
                needed = None
            self._statistics.append(_Statistic(name, start, num_bins, counts, needed))
            self._start[name] = start
            start += num_bins
        self._first_unit = start - taxonomy.num_action_units
        self._total = [0] * start
        self._block = [0] * start
        self._num_in_block = 0
        self._blocks: deque[list[int]] = deque()
        self._drifted: set[str] = set()
        self.psi: dict[str, float] = {statistic.name: math.nan for statistic in self._statistics}

    @property
    def num_reference_images(self) -> int:
        """Images of the reference; 0: there is none."""
        return 0 if self._reference is None else self._reference.num_images

    @property
    def num_faces(self) -> int:
        """Faces that are compared now."""
        return BLOCK_FACES * len(self._blocks)

    @property
    def min_faces(self) -> dict[str, int | None]:
        """By statistic: faces from which its PSI is known; None: never, the reference has too few images."""
        return {statistic.name: statistic.min_faces for statistic in self._statistics}

    @property
    def remark(self) -> str | None:
        """Why drift cannot be told, or not all of it, and the remedy; None where all can."""
        if self._reference is None:
            return "Drift is unknown: the bundle keeps no reference of validation's faces. Train it again with this version."
        silent = [name for name, needed in self.min_faces.items() if needed is None]
        if not silent:
            return None
        return (
            f"Drift of {', '.join(silent)} is unknown: the reference's {self.num_reference_images:,} images of validation are too few to "
            "tell it from chance. Train with a larger validation split."
        )

    def add(self, prediction: Prediction, light: Light) -> None:
        """A face has been answered."""
        reference, block, start = self._reference, self._block, self._start
        if reference is None:
            return
        emotion = prediction.emotion
        if emotion is not None and reference.confidence is not None:
            block[start["emotion"] + emotion.index] += 1
            block[start["confidence"] + reference.confidence.place(emotion.probability)] += 1
        block[start["brightness"] + reference.brightness.place(light.brightness)] += 1
        block[start["contrast"] + reference.contrast.place(light.contrast)] += 1
        for place, unit in enumerate(prediction.action_units, self._first_unit):
            block[place] += unit.active
        self._num_in_block += 1
        if self._num_in_block == BLOCK_FACES:
            self._slide()
            self._compare()

    def _slide(self) -> None:
        self._blocks.append(self._block)
        self._total = [total + new for total, new in zip(self._total, self._block, strict=True)]
        if len(self._blocks) > WINDOW_BLOCKS:
            self._total = [total - old for total, old in zip(self._total, self._blocks.popleft(), strict=True)]
        self._block, self._num_in_block = [0] * len(self._total), 0

    def _compare(self) -> None:
        num_faces, found = self.num_faces, {}
        for statistic in self._statistics:
            counts = self._total[statistic.start : statistic.start + statistic.num_bins]
            if statistic.num_bins == 1:
                counts = [num_faces - counts[0], counts[0]]
            known = statistic.min_faces is not None and num_faces >= statistic.min_faces
            found[statistic.name] = psi(statistic.reference, counts) if known else math.nan
        self.psi = found
        for name, value in found.items():
            self._tell(name, value)

    def _tell(self, name: str, value: float) -> None:
        drifted = name in self._drifted
        if drifted and value < RETURNED:
            self._drifted.remove(name)
            said = f"drift of {name} has returned: its PSI is below {RETURNED}"
        elif not drifted and value > LARGE:
            self._drifted.add(name)
            said = f"drift of {name}: the latest faces are not like validation's, its PSI is above {LARGE}"
        else:
            return
        fields = {"statistic": name, "psi": round(value, 4), "faces": self.num_faces, "model": self._version}
        log.warning(said, extra={"fields": fields})
