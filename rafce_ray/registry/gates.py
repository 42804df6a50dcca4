"""The gates that a version must pass before it is live; each reports its figures and a verdict."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rafce_ray.base.errors import RafceError
from rafce_ray.base.figures import FIGURES, SCORED
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.storage import Location
from rafce_ray.bundle.bundle import Bundle, BundleError
from rafce_ray.bundle.canary import check_canary
from rafce_ray.bundle.engines import MAX_DIFFERENCE, EngineChoice, build_engine
from rafce_ray.bundle.model import Predictor
from rafce_ray.metrics.counts import combined_score
from rafce_ray.registry.live import Gate, GateName, Verdict
from rafce_ray.registry.versions import load_stored

BATCHES = (1, 8)
MIN_ROUNDS = 5
MAX_ROUNDS = 25
BUDGET_S = 5.0
"""Seconds after which no more rounds of a batch size are begun, once there are MIN_ROUNDS."""

WARM_UPS = 3


def ms_per_face(predictors: Sequence[Predictor]) -> list[dict[str, float]]:
    """Of each model, by batch size, the median milliseconds of a forward pass divided by its faces.

    The models take turns, so that other load on the machine affects them alike.
    """
    found: list[dict[str, float]] = [{} for _ in predictors]
    for batch in BATCHES:
        shapes = [(batch, px, px, 3) for px in (one.bundle.preprocessing.stored_px for one in predictors)]
        images = [np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        times: list[list[float]] = [[] for _ in predictors]
        until = time.perf_counter() + BUDGET_S
        for turn in range(-WARM_UPS, MAX_ROUNDS):
            if turn >= MIN_ROUNDS and time.perf_counter() > until:
                break
            for predictor, faces, taken in zip(predictors, images, times, strict=True):
                since = time.perf_counter()
                predictor.outputs(faces)
                if turn >= 0:
                    taken.append(1000 * (time.perf_counter() - since) / batch)
        for one, taken in zip(found, times, strict=True):
            one[str(batch)] = statistics.median(taken)
    return found


NO_LIVE = "Nothing is live yet."


def canary_gate(candidate: Predictor) -> Gate:
    """Whether the engine answers the stored images as torch did when the bundle was made."""
    bundle = candidate.bundle
    if bundle.canary is None:
        detail = "The bundle is of a format that stores no answers; only that its weights are whole is known."
        return Gate(name="canary", verdict="nothing to compare with", detail=detail)
    off = check_canary(candidate.outputs(bundle.canary.images), bundle.canary, bundle.calibration)
    figures = {
        "engine": candidate.engine.name,
        "num_images": len(bundle.canary.images),
        "largest_difference": off if math.isfinite(off) else None,
        "tolerance": MAX_DIFFERENCE,
    }
    detail = (
        f"Probabilities of {figures['num_images']} stored images are off by at most {off:.1e} "
        f"({candidate.engine.name}); {MAX_DIFFERENCE:g} is allowed."
    )
    verdict: Verdict = "passed" if off <= MAX_DIFFERENCE else "refused"
    return Gate(name="canary", verdict=verdict, detail=detail, figures=figures)


def taxonomy_gate(candidate: Bundle, live: Bundle | None) -> Gate:
    """Whether clients of the live version understand the candidate: the same names in the same order."""
    if live is None:
        return Gate(name="taxonomy", verdict="nothing to compare with", detail=NO_LIVE)
    ours, theirs = candidate.taxonomy, live.taxonomy
    told = f"{ours.num_emotions} emotions and {ours.num_action_units} action units"
    figures = {"num_emotions": ours.num_emotions, "num_action_units": ours.num_action_units}
    differences = [
        f"the {what} are {', '.join(map(str, new))}; the live version's are {', '.join(map(str, old))}"
        for what, new, old in (
            ("emotions", ours.emotions, theirs.emotions),
            ("components of the emotions", ours.components, theirs.components),
            ("action units", ours.action_unit_codes, theirs.action_unit_codes),
        )
        if new != old
    ]
    if differences:
        text = "; ".join(differences)
        return Gate(name="taxonomy", verdict="refused", detail=f"{text[0].upper()}{text[1:]}.", figures=figures)
    detail = f"The same {told}, in the same order as the live version's."
    return Gate(name="taxonomy", verdict="passed", detail=detail, figures=figures)


def metrics_gate(candidate: Bundle, live: Bundle | None) -> Gate:
    """Whether the candidate's stored figures reach the lower ends of the live version's 95 % intervals.

    It compares the score (equal parts of both tasks' figures), or the one figure that the live version has; part by
    part where the live version's score has no interval. Figures of other data are shown and never pass.
    """
    ours, theirs = _figures(candidate), {} if live is None else _figures(live)
    if live is None or not theirs:
        told = NO_LIVE if live is None else "The live version's bundle has no figures."
        return Gate(name="metrics", verdict="nothing to compare with", detail=told, figures={"candidate": ours})
    comparisons = _comparisons(ours, theirs, live)
    figures: dict[str, Any] = {"candidate": ours, "live": theirs, "comparisons": comparisons}
    if missing := [FIGURES[name].title for name in theirs if name not in ours]:
        detail = f"The candidate's bundle has no {' and no '.join(missing)}, the live version's has."
        return Gate(name="metrics", verdict="refused", detail=detail, figures=figures)
    texts = []
    for one in comparisons:
        interval = "no interval" if one["low"] is None else f"95 % interval {one['low']:.3f} to {one['high']:.3f}"
        title = FIGURES[one["figure"]].title
        texts.append(f"{title} {one['candidate']:.3f} against {one['live']:.3f} ({interval})")
    told = "; ".join(texts)
    figures["data_differs"] = differs = _data_differences(candidate, live)
    verdict: Verdict = "refused"
    if differs:
        detail = (
            f"Measured on other data than the live version ({'; '.join(differs)}), so this says nothing: {told}. "
            "Measure both with rafce evaluate on the same data and, if the candidate holds, overrule this."
        )
    elif any(one["low"] is None for one in comparisons):
        detail = f"The live version's figures have no interval to compare with: {told}."
    elif all(one["candidate"] >= one["low"] for one in comparisons):
        verdict, detail = "passed", f"{told[0].upper()}{told[1:]}, on the same data."
    else:
        detail = f"Below what luck with the images explains: {told}, on the same data."
    return Gate(name="metrics", verdict=verdict, detail=detail, figures=figures)


def latency_gate(candidate: Predictor, live: Predictor | None, *, max_ratio: float) -> Gate:
    """Whether a face takes at most ``max_ratio`` times as long as in the live version, alone and in a batch.

    Measuring takes seconds.
    """
    measured = ms_per_face([candidate] if live is None else [candidate, live])
    engine = candidate.engine.name
    figures: dict[str, Any] = {"engine": engine, "max_ratio": max_ratio, "candidate_ms_per_face": measured[0]}
    if live is None:
        told = ", ".join(f"{ms:.2f} ms a face in a batch of {batch}" for batch, ms in measured[0].items())
        detail = f"{told} ({engine}). {NO_LIVE}"
        return Gate(name="latency", verdict="nothing to compare with", detail=detail, figures=figures)
    ratios = {batch: ms / measured[1][batch] for batch, ms in measured[0].items()}
    told = ", ".join(
        f"{ms:.2f} ms a face against {measured[1][batch]:.2f} in a batch of {batch} ({ratios[batch]:.2f} times)"
        for batch, ms in measured[0].items()
    )
    engines = engine if engine == live.engine.name else f"{engine} against {live.engine.name}"
    return Gate(
        name="latency",
        verdict="passed" if max(ratios.values()) <= max_ratio else "refused",
        detail=f"{told}; at most {max_ratio:g} times is allowed ({engines}).",
        figures=figures | {"live_ms_per_face": measured[1], "ratios": ratios, "live_engine": live.engine.name},
    )


def _figures(bundle: Bundle) -> dict[str, float]:
    return {name: value for name in SCORED if (value := _number(bundle.metrics.get(name))) is not None}


def _comparisons(ours: dict[str, float], theirs: dict[str, float], live: Bundle) -> list[dict[str, Any]]:
    """Figure by figure: candidate, live and the live one's interval, None where unknown."""
    pairs = {name: (ours[name], theirs[name]) for name in theirs if name in ours}
    if pairs.keys() >= set(SCORED):
        candidate, score = (float(combined_score(one[SCORED[0]], one[SCORED[1]])) for one in (ours, theirs))
        # A training may have weighted the tasks otherwise: its score is then another figure.
        stored = _number(live.metrics.get("score"))
        known = stored is not None and _interval(live, "score")[0] is not None
        if known and math.isclose(stored or 0.0, score, rel_tol=1e-6):
            pairs = {"score": (candidate, score)}
    found = []
    for name, (candidate, score) in pairs.items():
        low, high = _interval(live, name)
        found.append({"figure": name, "candidate": candidate, "live": score, "low": low, "high": high})
    return found


def _interval(bundle: Bundle, name: str) -> tuple[float, float] | tuple[None, None]:
    bounds = (bundle.metrics.get("intervals") or {}).get(name) or []
    known = [bound for bound in map(_number, bounds) if bound is not None]
    return (known[0], known[1]) if len(known) == len(bounds) == 2 else (None, None)


def _data_differences(candidate: Bundle, live: Bundle) -> list[str]:
    """How the data differ that both were measured on; unknown data count as different."""
    names = {
        "data_fingerprint": "data fingerprint",
        "split": "split",
        "num_images": "images",
        "emotion_known": "images with a known emotion",
        "au_known": "known labels of action units",
    }
    differences = []
    for key, name in names.items():
        place = "provenance" if key == "data_fingerprint" else "metrics"
        ours, theirs = getattr(candidate, place).get(key), getattr(live, place).get(key)
        if ours is None or ours != theirs:
            texts = ["unknown" if value is None else str(value)[:12] for value in (ours, theirs)]
            differences.append(f"{name} {texts[0]}, live {texts[1]}")
    return differences


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def examine(
    folder: Location, live: Location | None, *, max_latency_ratio: float, engine: EngineChoice
) -> tuple[tuple[Gate, ...], Bundle | None]:
    """The gates of the version in ``folder``, and its bundle; takes seconds.

    Without a ``live`` version there is nothing to compare with; where it is unreadable, every comparing gate refuses.
    The bundle is None where it is unreadable: nothing is then compared.
    """
    gates, candidate = verify(folder, engine)
    if candidate is None:
        return gates, None
    try:
        other = None if live is None else _build(load_stored(live), engine)
    except RafceError as error:
        detail = f"The live version cannot be read, so nothing can be compared with it: {error}"
        names: tuple[GateName, ...] = ("taxonomy", "metrics", "latency")
        return (*gates, *(Gate(name=name, verdict="refused", detail=detail) for name in names)), candidate.bundle
    theirs = None if other is None else other.bundle
    taxonomy, metrics = taxonomy_gate(candidate.bundle, theirs), metrics_gate(candidate.bundle, theirs)
    latency = latency_gate(candidate, other, max_ratio=max_latency_ratio)
    return (*gates, taxonomy, metrics, latency), candidate.bundle


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
    """The gate that refuses a bundle that cannot be loaded."""
    return Gate(name="integrity", verdict="refused", detail=str(error))


def _build(bundle: Bundle, engine: EngineChoice) -> Predictor:
    # The service logs the remarks on its engine.
    built, _ = build_engine(bundle, engine, choose_device("auto"))
    return Predictor(bundle, engine=built)
