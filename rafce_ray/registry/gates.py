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
from rafce_ray.bundle.bundle import Bundle, BundleError, load_bundle
from rafce_ray.bundle.canary import largest_difference
from rafce_ray.bundle.engines import MAX_DIFFERENCE, EngineChoice, build_engine
from rafce_ray.bundle.model import Predictor
from rafce_ray.metrics.counts import combined_score
from rafce_ray.registry.live import Gate, GateName, Verdict

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


def _gate(name: GateName, passes: bool | None, detail: str, **figures: Any) -> Gate:
    """A gate with a verdict; ``passes`` is None where there is nothing to compare with."""
    verdict: Verdict = "nothing to compare with" if passes is None else "passed" if passes else "refused"
    return Gate(name=name, verdict=verdict, detail=detail, figures=figures)


def canary_gate(candidate: Predictor) -> Gate:
    """Whether the engine answers the stored images as torch did when the bundle was made."""
    bundle, engine = candidate.bundle, candidate.engine.name
    if bundle.canary is None:
        detail = "The bundle is of a format that stores no answers; only that its weights are whole is known."
        return _gate("canary", None, detail)
    off = largest_difference(candidate.outputs(bundle.canary.images), bundle.canary.outputs, bundle.calibration)
    num_images = len(bundle.canary.images)
    return _gate(
        "canary",
        off <= MAX_DIFFERENCE,
        f"Probabilities of {num_images} stored images are off by at most {off:.1e} ({engine}); {MAX_DIFFERENCE:g} is "
        "allowed.",
        engine=engine,
        num_images=num_images,
        largest_difference=off if math.isfinite(off) else None,
        tolerance=MAX_DIFFERENCE,
    )


def taxonomy_gate(candidate: Bundle, live: Bundle | None) -> Gate:
    """Whether clients of the live version understand the candidate: the same names in the same order."""
    if live is None:
        return _gate("taxonomy", None, NO_LIVE)
    ours, theirs = candidate.taxonomy, live.taxonomy
    figures = {"num_emotions": ours.num_emotions, "num_action_units": ours.num_action_units}
    differences = "; ".join(
        f"the {what} are {', '.join(map(str, new))}; the live version's are {', '.join(map(str, old))}"
        for what, new, old in (
            ("emotions", ours.emotions, theirs.emotions),
            ("components of the emotions", ours.components, theirs.components),
            ("action units", ours.action_unit_codes, theirs.action_unit_codes),
        )
        if new != old
    )
    if differences:
        return _gate("taxonomy", False, f"{differences[0].upper()}{differences[1:]}.", **figures)
    told = f"{ours.num_emotions} emotions and {ours.num_action_units} action units"
    return _gate("taxonomy", True, f"The same {told}, in the same order as the live version's.", **figures)


def metrics_gate(candidate: Bundle, live: Bundle | None) -> Gate:
    """Whether the candidate's stored figures reach the lower ends of the live version's 95 % intervals.

    It compares the score (equal parts of both tasks' figures), or the one figure that the live version has; part by
    part where the live version's score has no interval. Figures of other data are shown and never pass.
    """
    ours, theirs = (
        {name: value for name in SCORED if bundle and (value := _number(bundle.metrics.get(name))) is not None}
        for bundle in (candidate, live)
    )
    if live is None or not theirs:
        told = NO_LIVE if live is None else "The live version's bundle has no figures."
        return _gate("metrics", None, told, candidate=ours)
    comparisons = _comparisons(ours, theirs, live)
    figures: dict[str, Any] = {"candidate": ours, "live": theirs, "comparisons": comparisons}
    if missing := [FIGURES[name].title for name in theirs if name not in ours]:
        detail = f"The candidate's bundle has no {' and no '.join(missing)}, the live version's has."
        return _gate("metrics", False, detail, **figures)
    texts = []
    for one in comparisons:
        interval = "no interval" if one["low"] is None else f"95 % interval {one['low']:.3f} to {one['high']:.3f}"
        title = FIGURES[one["figure"]].title
        texts.append(f"{title} {one['candidate']:.3f} against {one['live']:.3f} ({interval})")
    told = "; ".join(texts)
    figures["data_differs"] = differs = _data_differences(candidate, live)
    passes = False
    if differs:
        detail = (
            f"Measured on other data than the live version ({'; '.join(differs)}), so this says nothing: {told}. "
            "Measure both with rafce evaluate on the same data and, if the candidate holds, overrule this."
        )
    elif any(one["low"] is None for one in comparisons):
        detail = f"The live version's figures have no interval to compare with: {told}."
    elif all(one["candidate"] >= one["low"] for one in comparisons):
        passes, detail = True, f"{told[0].upper()}{told[1:]}, on the same data."
    else:
        detail = f"Below what luck with the images explains: {told}, on the same data."
    return _gate("metrics", passes, detail, **figures)


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
        return _gate("latency", None, detail, **figures)
    ratios = {batch: ms / measured[1][batch] for batch, ms in measured[0].items()}
    told = ", ".join(
        f"{ms:.2f} ms a face against {measured[1][batch]:.2f} in a batch of {batch} ({ratios[batch]:.2f} times)"
        for batch, ms in measured[0].items()
    )
    engines = engine if engine == live.engine.name else f"{engine} against {live.engine.name}"
    figures |= {"live_ms_per_face": measured[1], "ratios": ratios, "live_engine": live.engine.name}
    detail = f"{told}; at most {max_ratio:g} times is allowed ({engines})."
    return _gate("latency", max(ratios.values()) <= max_ratio, detail, **figures)


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
    match [*map(_number, (bundle.metrics.get("intervals") or {}).get(name) or [])]:
        case [float() as low, float() as high]:
            return low, high
    return None, None


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
        other = None if live is None else _build(load_bundle(live), engine)
    except RafceError as error:
        detail = f"The live version cannot be read, so nothing can be compared with it: {error}"
        names: tuple[GateName, ...] = ("taxonomy", "metrics", "latency")
        return (*gates, *(_gate(name, False, detail) for name in names)), candidate.bundle
    theirs = None if other is None else other.bundle
    taxonomy, metrics = taxonomy_gate(candidate.bundle, theirs), metrics_gate(candidate.bundle, theirs)
    latency = latency_gate(candidate, other, max_ratio=max_latency_ratio)
    return (*gates, taxonomy, metrics, latency), candidate.bundle


def verify(folder: Location, engine: EngineChoice) -> tuple[tuple[Gate, ...], Predictor | None]:
    """Whether a version is whole and answers as stored; without a predictor where it cannot be read."""
    try:
        bundle = load_bundle(folder)
    except BundleError as error:
        return (damaged(error),), None
    sha256, num_values = bundle.weights_sha256, sum(one.numel() for one in bundle.model.state_dict().values())
    detail = f"sha256 {sha256[:12]}… as in the manifest; {num_values:,} values, all finite."
    predictor = _build(bundle, engine)
    integrity = _gate("integrity", True, detail, sha256=sha256, num_values=num_values)
    return (integrity, canary_gate(predictor)), predictor


def damaged(error: BundleError) -> Gate:
    """The gate that refuses a bundle that cannot be loaded."""
    return _gate("integrity", False, str(error))


def _build(bundle: Bundle, engine: EngineChoice) -> Predictor:
    # The service logs the remarks on its engine.
    built, _ = build_engine(bundle, engine, choose_device("auto"))
    return Predictor(bundle, engine=built)
