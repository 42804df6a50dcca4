"""What a version must pass before it is live: each gate says what it found in figures, and whether that will do."""

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
from rafce_ray.registry.live import Gate, Verdict
from rafce_ray.registry.versions import load_stored

BATCHES = (1, 8)
MIN_ROUNDS = 5
MAX_ROUNDS = 25
BUDGET_S = 5.0
"""Seconds after which no more rounds of a batch size are begun, once there are MIN_ROUNDS."""

WARM_UPS = 3


def ms_per_face(predictors: Sequence[Predictor]) -> list[dict[str, float]]:
    """Of each model, by batch size, the median milliseconds of a forward pass divided by its faces.

    The models take turns, so that whatever else the machine does meets them alike.
    """
    found: list[dict[str, float]] = [{} for _ in predictors]
    for batch in BATCHES:
        images = [_images(predictor, batch) for predictor in predictors]
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


def _images(predictor: Predictor, batch: int) -> np.ndarray:
    px = predictor.bundle.preprocessing.stored_px
    return np.random.default_rng(0).integers(0, 256, (batch, px, px, 3), dtype=np.uint8)


NO_LIVE = "Nothing is live yet."


def canary_gate(candidate: Predictor) -> Gate:
    """Whether the engine gives the answer to the stored images that torch gave when the bundle was made."""
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
    return Gate(
        name="taxonomy",
        verdict="passed",
        detail=f"The same {told}, in the same order as the live version's.",
        figures=figures,
    )


def metrics_gate(candidate: Bundle, live: Bundle | None) -> Gate:
    """Whether the candidate's figures, as its bundle stores them, reach the lower end of the live version's 95 %
    intervals.

    Compared is the score (equal parts of both tasks' figures), or the one figure that the live version has; part by
    part where the live version's score has no interval. Figures of other data are shown and never pass.
    """
    ours, theirs = _figures(candidate), {} if live is None else _figures(live)
    if live is None or not theirs:
        told = NO_LIVE if live is None else "The live version's bundle has no figures."
        return Gate(name="metrics", verdict="nothing to compare with", detail=told, figures={"candidate": ours})
    comparisons = _comparisons(ours, theirs, live)
    figures: dict[str, Any] = {"candidate": ours, "live": theirs, "comparisons": comparisons}
    if missing := [FIGURES[name].title for name in theirs if name not in ours]:
        return _refused_metrics(
            f"The candidate's bundle has no {' and no '.join(missing)}, the live version's has.", figures
        )
    told = "; ".join(
        f"{FIGURES[one['figure']].title} {one['candidate']:.3f} against {one['live']:.3f} (95 % interval "
        f"{one['low']:.3f} to {one['high']:.3f})"
        if one["low"] is not None
        else f"{FIGURES[one['figure']].title} {one['candidate']:.3f} against {one['live']:.3f} (no interval)"
        for one in comparisons
    )
    figures["data_differs"] = differs = _data_differences(candidate, live)
    if differs:
        return _refused_metrics(
            f"Measured on other data than the live version ({'; '.join(differs)}), so this says nothing: {told}. "
            "Measure both with rafce evaluate on the same data and, if the candidate holds, overrule this.",
            figures,
        )
    if any(one["low"] is None for one in comparisons):
        return _refused_metrics(f"The live version's figures have no interval to compare with: {told}.", figures)
    if all(one["candidate"] >= one["low"] for one in comparisons):
        return Gate(
            name="metrics", verdict="passed", detail=f"{told[0].upper()}{told[1:]}, on the same data.", figures=figures
        )
    return _refused_metrics(f"Below what luck with the images explains: {told}, on the same data.", figures)


def latency_gate(candidate: Predictor, live: Predictor | None, *, max_ratio: float) -> Gate:
    """Whether the candidate takes at most ``max_ratio`` times as long for a face as the live version, alone and in a
    batch; takes seconds.
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
    """Those of the tasks' figures that the bundle has."""
    return {name: value for name in SCORED if (value := _number(bundle.metrics.get(name))) is not None}


def _comparisons(ours: dict[str, float], theirs: dict[str, float], live: Bundle) -> list[dict[str, Any]]:
    """Figure by figure: candidate, live and the live one's interval, None where unknown."""
    both = ours.keys() >= set(SCORED) and theirs.keys() >= set(SCORED)
    score = float(combined_score(theirs[SCORED[0]], theirs[SCORED[1]])) if both else math.nan
    interval = _interval(live, "score")
    # A training may have weighted the tasks otherwise: its score is then another figure.
    stored = _number(live.metrics.get("score"))
    if both and interval is not None and stored is not None and math.isclose(stored, score, rel_tol=1e-6):
        candidate = float(combined_score(ours[SCORED[0]], ours[SCORED[1]]))
        return [_comparison("score", candidate, score, interval)]
    return [_comparison(name, ours[name], theirs[name], _interval(live, name)) for name in theirs if name in ours]


def _comparison(figure: str, candidate: float, live: float, interval: tuple[float, float] | None) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {"figure": figure, "candidate": candidate, "live": live, "low": low, "high": high}


def _interval(bundle: Bundle, name: str) -> tuple[float, float] | None:
    bounds = (bundle.metrics.get("intervals") or {}).get(name) or []
    known = [bound for bound in map(_number, bounds) if bound is not None]
    return (known[0], known[1]) if len(known) == len(bounds) == 2 else None


def _data_differences(candidate: Bundle, live: Bundle) -> list[str]:
    """In what the data differ that both were measured on; what is not known differs."""
    pairs = [
        ("data fingerprint", candidate.provenance.get("data_fingerprint"), live.provenance.get("data_fingerprint"))
    ]
    for key, what in (
        ("split", "split"),
        ("num_images", "images"),
        ("emotion_known", "images with a known emotion"),
        ("au_known", "known labels of action units"),
    ):
        pairs.append((what, candidate.metrics.get(key), live.metrics.get(key)))
    return [
        f"{what} {_told(ours)}, live {_told(theirs)}" for what, ours, theirs in pairs if ours is None or ours != theirs
    ]


def _told(value: object) -> str:
    return "unknown" if value is None else str(value)[:12]


def _refused_metrics(detail: str, figures: dict[str, Any]) -> Gate:
    return Gate(name="metrics", verdict="refused", detail=detail, figures=figures)


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def examine(
    folder: Location, live: Location | None, *, max_latency_ratio: float, engine: EngineChoice
) -> tuple[tuple[Gate, ...], Bundle | None]:
    """What every gate finds of the version in ``folder``, and its bundle; takes seconds.

    Without a ``live`` version there is nothing to compare with; one that cannot be read makes every comparing gate say
    no. The bundle is None where it cannot be read: nothing is then compared.
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
