"""The mistakes that a model was surest of, and the pictures they are of."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rafce_ray.calibration import Calibration, calibrated
from rafce_ray.config import DataConfig
from rafce_ray.data.dataset import Dataset, open_dataset
from rafce_ray.data.store import META
from rafce_ray.errors import RafceError
from rafce_ray.split_outputs import SplitOutputs
from rafce_ray.storage import locate
from rafce_ray.taxonomy import ACTION_UNIT_NAMES, Taxonomy, action_unit_code

MAX_EMOTION_MISTAKES = 18
MAX_AU_MISTAKES = 12
THUMBNAIL_PX = 100
JPEG_QUALITY = 82


@dataclass(frozen=True)
class Mistake:
    """One image: its label, what was predicted and with what probability, and what the label was given.

    ``subject`` is the action unit that both speak of, empty where they are emotions.
    """

    name: str
    subject: str
    true: str
    predicted: str
    probability: float
    of_truth: float
    thumbnail: str | None = None


@dataclass(frozen=True)
class Mistakes:
    """The surest mistakes of each task, the surest first, and how many there are in all; ``why_no_images`` where there are none."""

    emotions: tuple[Mistake, ...]
    num_wrong_emotions: int
    action_units: tuple[Mistake, ...]
    num_wrong_action_units: int
    why_no_images: str = "Images were left out on request (--no-images)."

    def with_thumbnails(self, open_images: Callable[[], Dataset]) -> Mistakes:
        """The same with pictures; where the data cannot be opened, with the reason instead."""
        names = list(dict.fromkeys(one.name for one in (*self.emotions, *self.action_units)))
        if not names:
            return self
        try:
            dataset = open_images()
        except (RafceError, OSError) as error:
            return replace(self, why_no_images=f"There are no pictures here: {error}")
        row_of = {name: row for row, name in enumerate(dataset.names)}
        rows = np.array([row_of[name] for name in names if name in row_of], dtype=np.int64)
        pictures = dict(zip([name for name in names if name in row_of], dataset.images.gather(rows), strict=True))
        missing = len(names) - len(pictures)
        thumbnails = {name: _data_uri(pixels) for name, pixels in pictures.items()}

        def shown(mistakes: tuple[Mistake, ...]) -> tuple[Mistake, ...]:
            return tuple(replace(one, thumbnail=thumbnails.get(one.name)) for one in mistakes)

        return replace(
            self,
            emotions=shown(self.emotions),
            action_units=shown(self.action_units),
            why_no_images=f"{missing} of these images are not in the decoded store." if missing else "",
        )


def find_mistakes(split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration) -> Mistakes:
    """The most confident wrong emotions, and the action units decided wrongly whose probability is farthest from the truth.

    At most one action unit an image, so that one odd picture does not fill the list.
    """
    found = calibrated(split.outputs, calibration)
    emotions: list[Mistake] = []
    wrong: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    if taxonomy.num_emotions:
        predicted = found.emotion.argmax(axis=1)
        wrong = np.flatnonzero((split.emotion >= 0) & (predicted != split.emotion))
        surest = wrong[np.argsort(-found.emotion[wrong].max(axis=1), kind="stable")][:MAX_EMOTION_MISTAKES]
        emotions = [
            Mistake(
                name=split.names[row],
                subject="",
                true=taxonomy.emotions[split.emotion[row]],
                predicted=taxonomy.emotions[predicted[row]],
                probability=float(found.emotion[row].max()),
                of_truth=float(found.emotion[row, split.emotion[row]]),
            )
            for row in surest
        ]
    active = found.action_units >= np.array(calibration.au_thresholds)
    wrong_au = ~np.isnan(split.action_units) & (active != (split.action_units == 1))
    distance = np.where(wrong_au, np.abs(found.action_units - np.nan_to_num(split.action_units)), -1.0)
    action_units: list[Mistake] = []
    if taxonomy.num_action_units:
        farthest = distance.max(axis=1)
        rows = np.argsort(-farthest, kind="stable")[:MAX_AU_MISTAKES]
        action_units = [
            _au_mistake(split, found.action_units, taxonomy, int(row), int(distance[row].argmax()))
            for row in rows
            if farthest[row] >= 0
        ]
    return Mistakes(tuple(emotions), len(wrong), tuple(action_units), int(wrong_au.sum()))


def _au_mistake(
    split: SplitOutputs, probability: NDArray[np.floating], taxonomy: Taxonomy, row: int, column: int
) -> Mistake:
    number = taxonomy.action_units[column]
    is_present, of_present = split.action_units[row, column] == 1, float(probability[row, column])
    return Mistake(
        name=split.names[row],
        subject=f"{action_unit_code(number)} {ACTION_UNIT_NAMES.get(number, '')}".strip(),
        true="present" if is_present else "absent",
        predicted="absent" if is_present else "present",
        probability=1 - of_present if is_present else of_present,
        of_truth=of_present if is_present else 1 - of_present,
    )


def open_stored(
    data: DataConfig, provenance: dict[str, Any] | None, taxonomy: Taxonomy, store: str | None = None
) -> Dataset:
    """The run's decoded images, from ``store`` or from the store under ``data.store_dir`` that has the run's fingerprint.

    Nothing is decoded anew, and the original files are not looked at.

    Raises:
        RafceError: there is no such store.
    """
    fingerprint = (provenance or {}).get("data_fingerprint")
    if store is None:
        store = _find_store(data.store_dir, fingerprint)
    return open_dataset(store, taxonomy, data.null_policy, data.null_policy_in_evaluation)


def _find_store(store_dir: str, fingerprint: str | None) -> str:
    place = locate(store_dir)
    for info in place.list():
        meta = place / info.base_name / META
        try:
            if meta.exists() and json.loads(meta.read_bytes()).get("fingerprint") == fingerprint:
                return str(place / info.base_name)
        except (ValueError, OSError):
            continue
    raise RafceError(
        f"no decoded store in {place} has the run's fingerprint {fingerprint}. Name its folder with data.store_dir=FOLDER, or build it "
        "again with rafce evaluate."
    )


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
