"""All gates in order: a version is whole, answers as stored, and is no worse than what is live."""

from __future__ import annotations

from rafce_ray.base.errors import RafceError
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.storage import Location
from rafce_ray.bundle.bundle import Bundle, BundleError
from rafce_ray.bundle.engines import EngineChoice, build_engine
from rafce_ray.bundle.predictor import Predictor
from rafce_ray.registry.gates import canary_gate, latency_gate, metrics_gate, taxonomy_gate
from rafce_ray.registry.live import Gate
from rafce_ray.registry.versions import load_stored


def examine(
    folder: Location, live: Location | None, *, max_latency_ratio: float, engine: EngineChoice
) -> tuple[tuple[Gate, ...], Bundle | None]:
    """What every gate finds of the version in ``folder``, and its bundle; takes seconds.

    Without a ``live`` version there is nothing to compare with; one that cannot be read makes every comparing gate say no. The
    bundle is None where it cannot be read: nothing is then compared.
    """
    gates, candidate = verify(folder, engine)
    if candidate is None:
        return gates, None
    try:
        other = None if live is None else _build(load_stored(live), engine)
    except RafceError as error:
        detail = f"The live version cannot be read, so nothing can be compared with it: {error}"
        return (
            *gates,
            Gate(name="taxonomy", verdict="refused", detail=detail),
            Gate(name="metrics", verdict="refused", detail=detail),
            Gate(name="latency", verdict="refused", detail=detail),
        ), candidate.bundle
    theirs = None if other is None else other.bundle
    compared = (
        taxonomy_gate(candidate.bundle, theirs),
        metrics_gate(candidate.bundle, theirs),
        latency_gate(candidate, other, max_ratio=max_latency_ratio),
    )
    return (*gates, *compared), candidate.bundle


def verify(folder: Location, engine: EngineChoice) -> tuple[tuple[Gate, ...], Predictor | None]:
    """Whether a version is whole and answers as stored; without a predictor where it cannot be read."""
    try:
        bundle = load_stored(folder)
    except BundleError as error:
        return (damaged(error),), None
    num_values = sum(tensor.numel() for tensor in bundle.model.state_dict().values())
    detail = f"sha256 {bundle.weights_sha256[:12]}… as in the manifest; {num_values:,} values, all finite."
    figures = {"sha256": bundle.weights_sha256, "num_values": num_values}
    predictor = _build(bundle, engine)
    return (Gate(name="integrity", verdict="passed", detail=detail, figures=figures), canary_gate(predictor)), predictor


def damaged(error: BundleError) -> Gate:
    """The gate that a bundle does not pass that cannot be loaded."""
    return Gate(name="integrity", verdict="refused", detail=str(error))


def _build(bundle: Bundle, engine: EngineChoice) -> Predictor:
    # What there is to remark of an engine is told where it serves.
    built, _ = build_engine(bundle, engine, choose_device("auto"))
    return Predictor(bundle, engine=built)
