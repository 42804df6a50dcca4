"""From a configuration to a model that may answer: its bundle read and checked, its engine compared with torch, its canary asked."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from rafce_ray.base.errors import RafceError
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.storage import locate
from rafce_ray.bundle.bundle import MODEL_CARD, Bundle, BundleError, canary_of, find_bundle, load_bundle
from rafce_ray.bundle.canary import check_canary, draw_images
from rafce_ray.bundle.engines import MAX_DIFFERENCE, build_engine
from rafce_ray.bundle.predictor import Predictor
from rafce_ray.registry.live import read_live
from rafce_ray.registry.versions import SHORT_SHA, place_of_version, read_version, version_folder
from rafce_ray.service.answers import ModelId
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.drift_watch import DriftWatch
from rafce_ray.service.live import BundleFolder, Served, Source, Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registry:
    """A :class:`Source` whose live version is the one that was promoted last, or rolled back to."""

    place: str

    def look(self) -> Target:
        """The live version, from the live record alone: versions are never altered. RafceError where none was ever promoted."""
        registry = locate(self.place)
        live = read_live(registry)
        if live is None:
            raise RafceError(
                f"{self.place}: no version is live yet. Add one with rafce bundle add and make it live with rafce bundle promote."
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
            f"{target.place}: the canary's probabilities are off by {off:.2g}, more than {MAX_DIFFERENCE:g}: the model does not answer as "
            "when it was saved. Get the bundle again, or train it again with this version."
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
    """Every doubling of the batch up to the largest: memory is taken and kernels are chosen before a request needs them."""
    sizes = {max_batch_faces, *(2**power for power in range(max_batch_faces.bit_length()))}
    for size in sorted(sizes):
        predictor.outputs(draw_images(predictor.bundle.preprocessing.stored_px, size))
