"""The model that answers: where it is found, how it is loaded, verified and replaced, and whether its faces drift.

A new model is loaded and warmed next to the old one; one assignment then replaces it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from rafce_ray.base.errors import GateError, RafceError, UsageError
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.bundle import MANIFEST, MODEL_CARD, WEIGHTS, BundleError, canary_of, find_bundle, load_bundle
from rafce_ray.bundle.canary import Canary, draw_images, largest_difference
from rafce_ray.bundle.engines import MAX_DIFFERENCE, build_engine
from rafce_ray.bundle.model import Prediction, Predictor
from rafce_ray.metrics.drift import LARGE, DriftReference, Light, faces_needed, psi
from rafce_ray.registry.gates import taxonomy_gate
from rafce_ray.registry.live import read_live
from rafce_ray.registry.versions import SHORT_SHA, place_of_version, read_version, version_folder
from rafce_ray.service.answers import ModelId
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.meter import Meter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A version to serve, and its bundle.

    ``version`` is None for a bundle folder: the weights' sha256 then names the model. ``stamp`` changes whenever the
    bundle may have changed. ``force``: the taxonomy may differ from that of the model before.
    """

    version: str | None
    place: str
    stamp: str
    force: bool = False


@dataclass(frozen=True)
class Source:
    """Where models come from: a bundle's folder or a registry, a path or URI each; the other one is None."""

    bundle: str | None
    registry: str | None

    def look(self) -> Target:
        """The bundle that is in the folder now, or the live version by its record alone: versions never change.

        RafceError or OSError where it cannot be read, or no version was ever promoted.
        """
        if self.registry is None:
            assert self.bundle is not None, "ServiceConfig has one of the two"
            folder = find_bundle(self.bundle)
            weights = (folder / WEIGHTS).info()
            told = f"{folder.path} {weights.size} {weights.mtime_ns}"
            stamp = hashlib.sha256((folder / MANIFEST).read_bytes() + told.encode()).hexdigest()
            return Target(None, self.bundle, stamp)
        registry = locate(self.registry)
        live = read_live(registry)
        if live is None:
            raise RafceError(
                f"{self.registry}: no version is live yet. Add one with rafce bundle add and make it live with rafce "
                "bundle promote."
            )
        folder = place_of_version(registry, live.version)
        return Target(live.version, folder.uri, live.sha256, force=live.may_change_taxonomy)

    def find(self, version: str) -> Target:
        """A version by its name. UsageError where there is none, as of every folder."""
        if self.registry is None:
            raise UsageError(
                f"version {version!r}: a service of the bundle folder {self.bundle} has no versions. Serve a registry, "
                "or put the new bundle in the folder's place."
            )
        registry = locate(self.registry)
        folder = version_folder(registry, version)
        return Target(version, folder.uri, read_version(registry, version).sha256 or "")


@dataclass(frozen=True)
class Served:
    """A model that answers requests, with its canary, its model card and the watch for drift.

    ``remarks``: notes on its engine, such as why it is not the configured one. ``since``: start of service, UTC.
    """

    model: ModelId
    place: str
    predictor: Predictor
    canary: Canary
    card: str | None
    remarks: tuple[str, ...]
    drift: DriftWatch
    since: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class FailedSwap:
    """A model that was refused: why, and when (UTC)."""

    version: str | None
    place: str
    reason: str
    at: datetime


class LiveModel:
    """The served model of a process, and the thread that watches for another one.

    A caller reads :attr:`served` once and keeps that model: a swap changes only what the next caller reads.
    """

    def __init__(
        self, source: Source, load: Callable[[Target], Served], watch_s: float, meter: Meter | None = None
    ) -> None:
        """Load what is live now. RafceError where it cannot be served: there is nothing to fall back to."""
        self._source = source
        self._load = load
        self._watch_s = watch_s
        self._meter = meter or Meter()
        self._swapping = threading.Lock()
        self._serving = self._tried = source.look()
        self._pinned = False
        self.served = load(self._serving)
        self.failed: FailedSwap | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch-model", daemon=True)
        self._thread.start()

    def refresh(self) -> Served:
        """End any pin and serve what is live now in the source; returns what is then served.

        RafceError where the new model may not be served: the old one stays.
        """
        with self._swapping:
            self._pinned = False
            return self._swap(self._source.look())

    def switch(self, version: str) -> Served:
        """Serve this version until the next call, or with ``""`` what is live in the source; RafceError as there."""
        if not version:
            return self.refresh()
        with self._swapping:
            served = self._swap(self._source.find(version))
            self._pinned = True
            return served

    def close(self) -> None:
        """End the watch."""
        self._stop.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._stop.wait(self._watch_s):
            try:
                with self._swapping:
                    if not self._pinned:
                        self._follow()
            except Exception:
                log.exception("looking for a new model failed; the one that is served goes on")

    def _follow(self) -> None:
        try:
            target = self._source.look()
        except (RafceError, OSError) as error:
            self._refuse(None, "", error)
            return
        # A refused model is loaded again only after it has changed.
        if target == self._serving or target != self._tried:
            with suppress(RafceError):  # _swap notes why it refused.
                self._swap(target)

    def _swap(self, target: Target) -> Served:
        if target == self._serving:
            self.failed = None
            return self.served
        self._tried = target
        try:
            served = self._load(target)
            gate = taxonomy_gate(served.predictor.bundle, self.served.predictor.bundle)
            if gate.verdict == "refused" and not target.force:
                raise GateError(
                    f"{served.place}: {gate.detail} Clients rely on them: serve it by itself under another name, or "
                    "force it if they know."
                )
        except (RafceError, OSError) as error:
            self._refuse(target.version, target.place, error)
            if isinstance(error, RafceError):
                raise
            raise RafceError(f"{target.place}: cannot be read ({error}).") from error
        before, self.served, self._serving, self.failed = self.served, served, target, None
        self._meter.swaps.inc()
        log.info("model %s serves instead of %s", served.model.version, before.model.version)
        return served

    def _refuse(self, version: str | None, place: str, error: Exception) -> None:
        if self.failed is None or self.failed.reason != str(error):
            self._meter.refused_versions.inc()
            log.error("a new model is refused and %s goes on: %s", self.served.model.version, error)
        self.failed = FailedSwap(version, place, str(error), datetime.now(UTC))


def load_served(target: Target, config: ServiceConfig) -> Served:
    """A model ready to answer: verified, and warm for every size of batch.

    RafceError where its bundle, its engine or its canary's answer is wrong; the message says which.
    """
    bundle = load_bundle(target.place)
    device = choose_device("auto")
    engine, remarks = build_engine(bundle, config.engine, device, config.threads, config.engine_precision)
    predictor = Predictor(bundle, engine=engine)
    canary = canary_of(bundle)
    if bundle.canary is None:
        remarks = (*remarks, "The bundle stores no canary: its answers are those that torch gave when it was loaded.")
    off = largest_difference(predictor.outputs(canary.images), canary.outputs, bundle.calibration)
    if not off <= MAX_DIFFERENCE:
        raise BundleError(
            f"{target.place}: the canary's probabilities are off by {off:.2g}, more than {MAX_DIFFERENCE:g}: the model "
            "does not answer as when it was saved. Get the bundle again, or train it again with this version."
        )
    # Every doubling of the batch: memory is allocated and kernels are chosen before a request needs them.
    largest = config.max_batch_faces
    for size in sorted({largest, *(2**power for power in range(largest.bit_length()))}):
        predictor.outputs(draw_images(bundle.preprocessing.stored_px, size))
    version = target.version or bundle.weights_sha256[:SHORT_SHA]
    drift = DriftWatch(bundle.drift_reference, bundle.taxonomy, version)
    for remark in filter(None, (*remarks, drift.remark)):
        log.warning("%s: %s", target.place, remark)
    card = find_bundle(target.place) / MODEL_CARD
    return Served(
        model=ModelId(config.name, version, bundle.weights_sha256),
        place=target.place,
        predictor=predictor,
        canary=canary,
        card=card.read_bytes().decode(errors="replace") if card.exists() else None,
        remarks=tuple(remarks),
        drift=drift,
    )


BLOCK_FACES = 50
"""Faces after which the window is compared again."""

WINDOW_FACES = 2000
"""Number of latest faces that are compared, however long ago they came."""

RETURNED = 0.2
"""Drift has ended when the PSI is below this. With ``LARGE`` for both, the log would change its mind by chance."""


class DriftWatch:
    """Watches the faces of one model for drift. One event loop uses it; any thread may read :attr:`psi`.

    ``min_faces``, by statistic: faces from which its PSI is known; None: never, the reference has too few images.
    ``num_reference_images``: 0 where there is no reference.
    """

    def __init__(self, reference: DriftReference | None, taxonomy: Taxonomy, version: str) -> None:
        self._version = version
        self._reference = reference
        self._counts = {} if reference is None else reference.counts(taxonomy.action_unit_codes)
        self.num_reference_images = 0 if reference is None else reference.num_images
        self.min_faces: dict[str, int | None] = {}
        for name, counts in self._counts.items():
            needed = faces_needed(counts)
            self.min_faces[name] = None if needed is None or needed > WINDOW_FACES else needed
        # The bin of each statistic (columns) of the latest faces (rows).
        self._bins = np.zeros((WINDOW_FACES, len(self._counts)), np.intp)
        self._num_added = 0
        self._drifted: set[str] = set()
        self.psi = dict.fromkeys(self._counts, math.nan)

    @property
    def num_faces(self) -> int:
        """Faces that are compared now."""
        return min(self._num_added // BLOCK_FACES * BLOCK_FACES, WINDOW_FACES)

    @property
    def remark(self) -> str | None:
        """Why some or all drift is unknown, and the remedy; None where all is known."""
        if self._reference is None:
            return (
                "Drift is unknown: the bundle keeps no reference of validation's faces. Train it again with this "
                "version."
            )
        silent = [name for name, needed in self.min_faces.items() if needed is None]
        if not silent:
            return None
        return (
            f"Drift of {', '.join(silent)} is unknown: the reference's {self.num_reference_images:,} images of "
            "validation are too few to tell it from chance. Train with a larger validation split."
        )

    def add(self, prediction: Prediction, light: Light) -> None:
        """Count an answered face."""
        reference, emotion = self._reference, prediction.emotion
        if reference is None:
            return
        bins = [reference.brightness.place(light.brightness), reference.contrast.place(light.contrast)]
        if emotion is not None and reference.confidence is not None:
            bins = [emotion.index, reference.confidence.place(emotion.probability), *bins]
        self._bins[self._num_added % WINDOW_FACES] = [*bins, *(unit.active for unit in prediction.action_units)]
        self._num_added += 1
        if self._num_added % BLOCK_FACES == 0:
            self._compare()

    def _compare(self) -> None:
        found = dict.fromkeys(self._counts, math.nan)
        for (name, reference), bins in zip(self._counts.items(), self._bins[: self.num_faces].T, strict=True):
            needed = self.min_faces[name]
            if needed is not None and self.num_faces >= needed:
                found[name] = psi(reference, np.bincount(bins, minlength=len(reference)).tolist())
        self.psi = found
        for name, value in found.items():
            if name in self._drifted and value < RETURNED:
                self._drifted.remove(name)
                said = f"drift of {name} has returned: its PSI is below {RETURNED}"
            elif name not in self._drifted and value > LARGE:
                self._drifted.add(name)
                said = f"drift of {name}: the latest faces are not like validation's, its PSI is above {LARGE}"
            else:
                continue
            fields = {"statistic": name, "psi": round(value, 4), "faces": self.num_faces, "model": self._version}
            log.warning(said, extra={"fields": fields})
