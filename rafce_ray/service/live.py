"""The model that answers: loaded, verified and warmed beside the one before, then put in its place by one
assignment.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from rafce_ray.base.errors import GateError, RafceError, UsageError
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.bundle import (
    MANIFEST,
    MODEL_CARD,
    WEIGHTS,
    Bundle,
    BundleError,
    canary_of,
    find_bundle,
    load_bundle,
)
from rafce_ray.bundle.canary import Canary, check_canary, draw_images
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
    """What is to be served: a version and its bundle.

    ``stamp`` changes whenever the bundle may have; None version: the weights' sha256.

    ``force``: whoever chose it accepts another taxonomy than that of the model before.
    """

    version: str | None
    place: str
    stamp: str
    force: bool = False


class Source(Protocol):
    """Where it stands which model is live."""

    def look(self) -> Target:
        """What is live now. RafceError or OSError where that cannot be told."""

    def find(self, version: str) -> Target:
        """A version by its name. RafceError where there is none."""


@dataclass(frozen=True)
class BundleFolder:
    """A :class:`Source` of one place, whose bundle may be replaced."""

    place: str

    def look(self) -> Target:
        """The bundle that is there now, by its manifest's content and its weights' size and time."""
        folder = find_bundle(self.place)
        manifest = (folder / MANIFEST).read_bytes()
        weights = (folder / WEIGHTS).info()
        stamp = hashlib.sha256(manifest + f"{folder.path} {weights.size} {weights.mtime_ns}".encode()).hexdigest()
        return Target(None, self.place, stamp)

    def find(self, version: str) -> Target:
        """A folder has no versions. UsageError."""
        raise UsageError(
            f"version {version!r}: a service of the bundle folder {self.place} has no versions. Serve a registry, or "
            "put the new bundle in the folder's place."
        )


@dataclass(frozen=True)
class Served:
    """A model that answers requests: who it is, what predicts, its canary and card, what watches its faces, and since
    when (UTC).

    ``remarks``: what there is to be said of its engine, such as why it is not the one that was asked for.
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
    """A model that was to be served and may not be: why, and when that was found (UTC)."""

    version: str | None
    place: str
    reason: str
    at: datetime


class LiveModel:
    """The served model of a process, and the thread that watches whether another is to be served.

    Whoever reads :attr:`served` keeps that model for as long as it needs it: a swap changes only what the next one
    reads.
    """

    def __init__(
        self, source: Source, load: Callable[[Target], Served], watch_s: float, meter: Meter | None = None
    ) -> None:
        """Load what is live now. RafceError where that cannot be served: there is nothing to fall back to."""
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
        """Look at the source at once, end any pin, and serve what is live there; returns what is served now.

        Raises:
            RafceError: it may not be served; the model before goes on.
        """
        with self._swapping:
            self._pinned = False
            return self._swap(self._source.look())

    def switch(self, version: str, *, force: bool = False) -> Served:
        """Serve this version and stay with it until :meth:`refresh`, whatever the source says; else as
        :meth:`refresh`.
        """
        with self._swapping:
            served = self._swap(self._source.find(version), force=force)
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
        """Serve what the source says. What was refused is not loaded again before it has changed."""
        try:
            target = self._source.look()
        except (RafceError, OSError) as error:
            self._refuse(None, "", error)
            return
        if target == self._serving:
            self.failed = None
        elif target != self._tried:
            # Why it was refused is noted.
            with suppress(RafceError):
                self._swap(target)

    def _swap(self, target: Target, *, force: bool = False) -> Served:
        if target == self._serving:
            self.failed = None
            return self.served
        self._tried = target
        try:
            served = self._load(target)
            if not (force or target.force):
                _check_taxonomy(served, self.served)
        except (RafceError, OSError) as error:
            self._refuse(target.version, target.place, error)
            raise (
                error if isinstance(error, RafceError) else RafceError(f"{target.place}: cannot be read ({error}).")
            ) from error
        before, self.served, self._serving, self.failed = self.served, served, target, None
        self._meter.swaps.add()
        log.info("model %s serves instead of %s", served.model.version, before.model.version)
        return served

    def _refuse(self, version: str | None, place: str, error: Exception) -> None:
        if self.failed is None or self.failed.reason != str(error):
            self._meter.refused_versions.add()
            log.error("a new model is refused and %s goes on: %s", self.served.model.version, error)
        self.failed = FailedSwap(version, place, str(error), datetime.now(UTC))


def _check_taxonomy(new: Served, live: Served) -> None:
    """GateError where a client of the live model would not understand the new one's answers."""
    gate = taxonomy_gate(new.predictor.bundle, live.predictor.bundle)
    if gate.verdict == "refused":
        raise GateError(
            f"{new.place}: {gate.detail} Clients rely on them: serve it by itself under another name, or force it if "
            "they know."
        )


@dataclass(frozen=True)
class Registry:
    """A :class:`Source` whose live version is the one that was promoted last, or rolled back to."""

    place: str

    def look(self) -> Target:
        """The live version, from the live record alone: versions are never altered.

        RafceError where none was ever promoted.
        """
        registry = locate(self.place)
        live = read_live(registry)
        if live is None:
            raise RafceError(
                f"{self.place}: no version is live yet. Add one with rafce bundle add and make it live with rafce "
                "bundle promote."
            )
        folder = place_of_version(registry, live.version)
        return Target(live.version, folder.uri, live.sha256, force=live.may_change_taxonomy)

    def find(self, version: str) -> Target:
        """A version by its name. UsageError where there is none."""
        registry = locate(self.place)
        folder = version_folder(registry, version)
        return Target(version, folder.uri, read_version(registry, version).sha256 or "")


def source_of(config: ServiceConfig) -> Source:
    """Where the configuration says that the live model is to be found."""
    if config.registry is not None:
        return Registry(config.registry)
    assert config.bundle is not None, "one of the two is there: ServiceConfig"
    return BundleFolder(config.bundle)


def load_served(target: Target, config: ServiceConfig) -> Served:
    """A model ready to answer: verified, and warm for every size of batch.

    Raises:
        RafceError: its bundle, its engine or its canary's answer is not as it should be; the message says what.
    """
    bundle = load_bundle(target.place)
    predictor, remarks = _build_predictor(bundle, config)
    canary = canary_of(bundle)
    if bundle.canary is None:
        remarks.append("The bundle stores no canary: its answers are those that torch gave when it was loaded.")
    off = check_canary(predictor.outputs(canary.images), canary, bundle.calibration)
    if not off <= MAX_DIFFERENCE:
        raise BundleError(
            f"{target.place}: the canary's probabilities are off by {off:.2g}, more than {MAX_DIFFERENCE:g}: the model "
            "does not answer as when it was saved. Get the bundle again, or train it again with this version."
        )
    _warm(predictor, config.max_batch_faces)
    version = target.version or bundle.weights_sha256[:SHORT_SHA]
    drift = DriftWatch(bundle.drift_reference, bundle.taxonomy, version)
    for remark in [*remarks, *([drift.remark] if drift.remark else [])]:
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


def _build_predictor(bundle: Bundle, config: ServiceConfig) -> tuple[Predictor, list[str]]:
    device = choose_device("auto")
    engine, remarks = build_engine(bundle, config.engine, device, config.threads, config.engine_precision)
    return Predictor(bundle, engine=engine), list(remarks)


def _warm(predictor: Predictor, max_batch_faces: int) -> None:
    """Every doubling of the batch up to the largest: memory is taken and kernels are chosen before a request needs
    them.
    """
    sizes = {max_batch_faces, *(2**power for power in range(max_batch_faces.bit_length()))}
    for size in sorted(sizes):
        predictor.outputs(draw_images(predictor.bundle.preprocessing.stored_px, size))


BLOCK_FACES = 50


WINDOW_BLOCKS = 40


WINDOW_FACES = BLOCK_FACES * WINDOW_BLOCKS
"""So many of the latest faces are compared, however long ago they came."""


RETURNED = 0.2
"""PSI under which what was above ``LARGE`` counts as returned: at one limit for both, chance would speak every few
faces.
"""


@dataclass(frozen=True)
class _Statistic:
    """Where a statistic's counts stand in a block, and what they are compared with; ``num_bins`` is 1 for an AU: those
    that are active.
    """

    name: str
    start: int
    num_bins: int
    reference: tuple[int, ...]
    min_faces: int | None


class DriftWatch:
    """Watches the faces of one model; one event loop uses it. :attr:`psi` is replaced as a whole, so any thread may
    read it.
    """

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
