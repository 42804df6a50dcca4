"""What the answers of tools about smiling and neutral faces are worth: figures of one tool, and of one against another.

A photograph in which a tool finds no face is a wrong answer of it, in accuracies and in the AUC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rafce_ray.metrics.counts import percentile_interval, resample_weights

RESAMPLES = 10_000

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Truth:
    """Of N photographs: whether the person smiles, whether a threshold may be fitted on it, and who it is."""

    smiling: Bools
    train: Bools
    person: NDArray[np.str_]


@dataclass(frozen=True)
class Answers:
    """Of one tool for the same N photographs; scores are those of the largest face, NaN where there is none.

    ``first``: the highest of all its emotions; empty where there is no face.
    """

    num_faces: NDArray[np.int64]
    happy: Floats
    neutral: Floats
    first: NDArray[np.str_]


@dataclass(frozen=True)
class Judged:
    """A tool on M held-out photographs, S of which smile: what is right, and which pairs are in the right order.

    ``own``, ``first``, ``fitted`` (M,) are 1 where the answer is right: the larger of happy and neutral; the highest
    of all its emotions; the score above ``threshold``. ``pairs`` (S, M - S): 1 where the smile scores higher, 0.5
    where both score the same. Of several models these are means over them. ``score``: what the threshold is of.
    """

    own: Floats
    first: Floats
    fitted: Floats
    pairs: Floats
    score: str
    threshold: float


def fitted_threshold(scores: Floats, smiling: Bools) -> float:
    """The threshold with the most right answers, smiling where the score lies above it; of several the middle one.

    Candidates are halfway between neighbouring scores; NaN scores are left out.
    """
    known = ~np.isnan(scores)
    scores, smiling = scores[known], smiling[known]
    values = np.unique(scores)
    candidates = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    right = ((scores > candidates[:, None]) == smiling).sum(axis=1)
    best = np.flatnonzero(right == right.max())
    return float(candidates[best[len(best) // 2]])


def ordered_pairs(scores: Floats, smiling: Bools) -> Floats:
    """(S, N - S): 1 where a smile scores higher than a neutral face, 0.5 where the same; 0 with a NaN. The mean is the
    AUC.
    """
    high, low = scores[smiling][:, None], scores[~smiling][None, :]
    return (high > low) + 0.5 * (high == low)


def judge(answers: Answers, truth: Truth) -> Judged:
    """One tool on the photographs outside of train.

    The threshold is fitted on train, on happy or on happy minus neutral, whichever orders the train part better.
    """
    train, held = truth.train, ~truth.train
    scores = {"happy": answers.happy, "happy - neutral": answers.happy - answers.neutral}
    name = max(scores, key=lambda one: ordered_pairs(scores[one][train], truth.smiling[train]).mean())
    threshold = fitted_threshold(scores[name][train], truth.smiling[train])
    found, score, smiling = answers.num_faces[held] > 0, scores[name][held], truth.smiling[held]
    wanted = np.where(smiling, "happy", "neutral")
    return Judged(
        own=1.0 * (found & ((answers.happy[held] > answers.neutral[held]) == smiling)),
        first=1.0 * (answers.first[held] == wanted),
        fitted=1.0 * (found & ((score > threshold) == smiling)),
        pairs=ordered_pairs(score, smiling),
        score=name,
        threshold=threshold,
    )


def mean_of(judged: Sequence[Judged]) -> Judged:
    """Several models as one: means over them. Score and threshold are the first one's."""
    means = {
        name: np.mean([getattr(one, name) for one in judged], axis=0) for name in ("own", "first", "fitted", "pairs")
    }
    return replace(judged[0], **means)


def figures(judged: Judged) -> dict[str, float]:
    """Accuracies and AUC, 0 to 1."""
    return {
        "own": float(judged.own.mean()),
        "first": float(judged.first.mean()),
        "fitted": float(judged.fitted.mean()),
        "auc": float(judged.pairs.mean()),
    }


def draws(judged: Judged, truth: Truth, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Floats]:
    """The figures (R,) in resamples of the held-out people. Tools on the same photographs get the same resamples."""
    held = ~truth.train
    people, index = np.unique(truth.person[held], return_inverse=True)
    drawn = np.concatenate(list(resample_weights(len(people), resamples, seed))).astype(np.float64)[:, index]
    smiles, neutral = drawn[:, truth.smiling[held]], drawn[:, ~truth.smiling[held]]
    pairs = np.einsum("rs,sn,rn->r", smiles, judged.pairs, neutral, optimize=True)
    accuracies = {name: drawn @ getattr(judged, name) / drawn.sum(axis=1) for name in ("own", "first", "fitted")}
    return accuracies | {"auc": pairs / (smiles.sum(axis=1) * neutral.sum(axis=1))}


def intervals(judged: Judged, truth: Truth) -> dict[str, list[float]]:
    """[low, high]: 95 % bootstrap interval by person of each figure."""
    return {name: percentile_interval(values) for name, values in draws(judged, truth).items()}


def differences(ours: Judged, theirs: Judged, truth: Truth) -> dict[str, dict[str, float]]:
    """Each figure of ours minus theirs, with the paired 95 % bootstrap interval by person."""
    our_draws, their_draws = draws(ours, truth), draws(theirs, truth)
    our_figures, their_figures = figures(ours), figures(theirs)
    found = {}
    for name in our_figures:
        low, high = percentile_interval(our_draws[name] - their_draws[name])
        found[name] = {"value": our_figures[name] - their_figures[name], "low": low, "high": high}
    return found


def faces_found(num_faces: NDArray[np.int64]) -> dict[str, float]:
    """Shares of the photographs with exactly one face, with none and with several."""
    return {
        "one": float((num_faces == 1).mean()),
        "none": float((num_faces == 0).mean()),
        "several": float((num_faces > 1).mean()),
    }
