"""Find faces in photographs: YuNet where its model is installed or given, else the bundled cascades."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rafce_ray.faces import MIN_FACE_SCORE
from rafce_ray.faces.cascades import CascadeFinder
from rafce_ray.faces.decode import Photograph
from rafce_ray.faces.face import Face, Pixels
from rafce_ray.faces.yunet import YuNetFinder, bundled_model


class FaceFinder(Protocol):
    """What finds faces in one photograph; safe to call from several threads."""

    def find(self, photograph: Photograph | Pixels, px: int) -> list[Face]:
        """The faces of an upright photograph, largest first, as crops of ``px`` a side.

        Raises:
            DecodeError: the photograph is damaged or cut short.
        """


def build_face_finder(model: str | Path | None = None, min_score: float = MIN_FACE_SCORE) -> FaceFinder:
    """YuNet with a model file, by default the installed package's; the cascades where there is none.

    ``min_score``: confidence, 0 to 1, from which YuNet's boxes count as faces; the cascades have none.

    Raises:
        UsageError: the model file is missing or is no YuNet model.
    """
    file = bundled_model() if model is None else Path(model)
    return CascadeFinder() if file is None else YuNetFinder(file, min_score)
