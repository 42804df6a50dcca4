"""Whether probabilities mean what they say: against hand-computed cases, scikit-learn, plain Python and simulated
truths.
"""

import json
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import brier_score_loss, log_loss

from rafce_ray.metrics.calibration import (
    MIN_PER_BIN,
    NUM_BINS,
    Calibration,
    Outputs,
    Probabilities,
    calibrated,
    equal_mass_bins,
    reliability_figures,
    risk_coverage,
)

NAN = math.nan


@dataclass(frozen=True)
class Targets:
    emotion: np.ndarray
    action_units: np.ndarray


def of_action_units(probability: np.ndarray, target: np.ndarray, **more) -> dict:
    """Figures of action units alone, (N,) being one of them."""
    probability, target = (np.asarray(one, dtype=np.float64).reshape(len(one), -1) for one in (probability, target))
    nothing = np.zeros((len(probability), 0))
    emotion = np.full(len(probability), -1)
    return reliability_figures(Probabilities(nothing, probability), Targets(emotion, target), **more)["action_units"]


def random_case(seed: int, size: int = 400) -> tuple[Probabilities, Targets]:
    generator = np.random.default_rng(seed)
    emotion = generator.integers(-1, 5, size)
    logits = generator.normal(size=(size, 5)) + 1.5 * np.eye(5)[np.maximum(emotion, 0)]
    action_units = (generator.random((size, 3)) < [0.5, 0.2, 0.02]).astype(np.float64)
    action_units[generator.random((size, 3)) < 0.2] = NAN
    found = Probabilities(
        softmax(logits, axis=1), expit(generator.normal(size=(size, 3)) + np.nan_to_num(action_units))
    )
    return found, Targets(emotion, action_units)


def test_expected_calibration_error_by_hand():
    """20 predictions make two bins of 10: at 0.1 three of ten come true, at 0.9 eight of ten."""
    probability = np.concatenate([np.full(10, 0.9), np.full(10, 0.1)])
    target = np.concatenate([[1] * 8 + [0] * 2, [1] * 3 + [0] * 7])
    figures = of_action_units(probability, target)
    assert figures["ece"] == pytest.approx(0.5 * 0.2 + 0.5 * 0.1)
    assert figures["bins"] == [
        {"confidence": pytest.approx(0.1), "hits": pytest.approx(0.3), "count": 10},
        {"confidence": pytest.approx(0.9), "hits": pytest.approx(0.8), "count": 10},
    ]
    assert figures["brier"] == pytest.approx((8 * 0.01 + 2 * 0.81 + 3 * 0.81 + 7 * 0.01) / 20)
    assert figures["nll"] == pytest.approx(-(15 * math.log(0.9) + 5 * math.log(0.1)) / 20)


def test_an_emotions_confidence_is_that_of_the_class_that_is_said():
    emotion = np.array([0, 1, -1, 0])
    found = Probabilities(np.array([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5], [0.2, 0.8]]), np.zeros((4, 0)))
    figures = reliability_figures(found, Targets(emotion, np.zeros((4, 0))))
    assert figures["action_units"] is None
    # Said 0, 0, 1 with 0.7, 0.6, 0.8; only the first is right. One bin: fewer than 20 images.
    (only,) = figures["emotion"]["bins"]
    assert only == {"confidence": pytest.approx(0.7), "hits": pytest.approx(1 / 3), "count": 3}
    assert figures["emotion"]["ece"] == pytest.approx(0.7 - 1 / 3)
    assert figures["emotion"]["brier"] == pytest.approx((2 * 0.09 + 2 * 0.36 + 2 * 0.64) / 3)
    assert figures["emotion"]["nll"] == pytest.approx(-math.log(0.7 * 0.4 * 0.2) / 3)


def plain_ece(confidence: list[float], hit: list[float]) -> float:
    """The definition, in plain Python: sort, cut into bins whose sizes differ by at most one, add up distances."""
    pairs = sorted(zip(confidence, hit, strict=True), key=lambda pair: pair[0])
    num_bins = max(1, min(NUM_BINS, len(pairs) // MIN_PER_BIN))
    total, start = 0.0, 0
    for number in range(num_bins):
        size = len(pairs) // num_bins + (number < len(pairs) % num_bins)
        members = pairs[start : start + size]
        start += size
        mean = sum(one for one, _ in members) / size
        total += size / len(pairs) * abs(mean - sum(one for _, one in members) / size)
    assert start == len(pairs)
    return total


@pytest.mark.parametrize("size", [1, 7, 19, 20, 151, 400])
def test_figures_equal_plain_python_and_scikit_learn(size):
    found, targets = random_case(size, size)
    figures = reliability_figures(found, targets, resamples=5)
    image = np.flatnonzero(targets.emotion >= 0)
    if len(image):
        true, probability = targets.emotion[image], found.emotion[image]
        hit = (probability.argmax(axis=1) == true).astype(float)
        assert figures["emotion"]["ece"] == pytest.approx(plain_ece(probability.max(axis=1).tolist(), hit.tolist()))
        assert figures["emotion"]["nll"] == pytest.approx(log_loss(true, probability, labels=range(5)))
        one_vs_rest = [((probability[:, i] - (true == i)) ** 2).mean() for i in range(5)]
        assert figures["emotion"]["brier"] == pytest.approx(sum(one_vs_rest))
        assert sum(one["count"] for one in figures["emotion"]["bins"]) == len(image)
    known = ~np.isnan(targets.action_units)
    truth, probability = targets.action_units[known], found.action_units[known]
    assert figures["action_units"]["ece"] == pytest.approx(plain_ece(probability.tolist(), truth.tolist()))
    assert figures["action_units"]["nll"] == pytest.approx(log_loss(truth, probability, labels=[0, 1]))
    assert figures["action_units"]["brier"] == pytest.approx(brier_score_loss(truth, probability))


def test_nothing_known_or_predicted_has_no_figures():
    found, targets = random_case(0, 20)
    unknown = Targets(np.full(20, -1), np.full((20, 3), NAN))
    assert reliability_figures(found, unknown) == {"emotion": None, "action_units": None}
    nothing = Probabilities(np.zeros((20, 0)), np.zeros((20, 0)))
    assert reliability_figures(nothing, Targets(targets.emotion, np.zeros((20, 0)))) == {
        "emotion": None,
        "action_units": None,
    }


def test_bins_have_equal_mass():
    confidence = np.random.default_rng(0).random(1000)
    bin_of = equal_mass_bins(confidence)
    assert set(np.bincount(bin_of)) == {66, 67}
    assert len(np.bincount(bin_of)) == NUM_BINS
    for lower in range(NUM_BINS - 1):
        assert confidence[bin_of == lower].max() <= confidence[bin_of == lower + 1].min()
    assert set(equal_mass_bins(np.full(9, 0.5))) == {0}
    assert set(np.bincount(equal_mass_bins(np.full(35, 0.5)))) == {11, 12}


def test_a_sure_mistake_costs_what_its_logit_says():
    """In single precision the probability of a logit of 25 is 1, and the loss of the opposite would be that of 1e-38:
    87 nats.
    """
    found = calibrated(
        Outputs(np.zeros((1, 0), np.float32), np.array([[25.0]], np.float32)), Calibration.uncalibrated(1)
    )
    assert of_action_units(found.action_units, np.zeros((1, 1)))["nll"] == pytest.approx(25.0, rel=1e-4)


def test_an_impossible_truth_costs_a_finite_loss():
    assert of_action_units(np.array([1.0, 0.0]), np.array([0.0, 1.0]))["nll"] == pytest.approx(87.3, abs=0.1)


def calibrated_case(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions that come true exactly as often as they say."""
    generator = np.random.default_rng(seed)
    probability = generator.beta(2, 3, size)
    return probability, (generator.random(size) < probability).astype(float)


@pytest.mark.parametrize("seed", range(6))
def test_a_perfectly_calibrated_model_may_have_no_calibration_error(seed):
    """Its measured error is never 0, since noise only adds distance: the interval must reach 0 all the same."""
    figures = of_action_units(*calibrated_case(600, seed))
    assert figures["ece"] > 0.02
    assert figures["intervals"]["ece"][0] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_a_badly_calibrated_model_has_an_error_for_certain(seed):
    probability, target = calibrated_case(600, seed)
    figures = of_action_units(np.minimum(probability + 0.2, 1.0), target)
    low, high = figures["intervals"]["ece"]
    assert 0.05 < low <= 0.2 <= high < 0.3


@pytest.mark.slow
def test_intervals_contain_the_truth_about_as_often_as_they_say():
    """Of 60 perfectly calibrated and 60 slightly wrong models; too few to tell 95 % from 97 %, enough to find 80 %."""
    contains_nothing, contains_slope = 0, 0
    generator = np.random.default_rng(0)
    large = generator.beta(2, 3, 300_000)
    gap = np.abs(large - (0.5 + 0.6 * (large - 0.5)))
    truth = np.mean([gap[equal_mass_bins(large) == i].mean() for i in range(NUM_BINS)])
    for _ in range(60):
        probability = generator.beta(2, 3, 300)
        hits = (generator.random(300) < probability).astype(float)
        contains_nothing += of_action_units(probability, hits, resamples=200)["intervals"]["ece"][0] == 0.0
        hits = (generator.random(300) < 0.5 + 0.6 * (probability - 0.5)).astype(float)
        low, high = of_action_units(probability, hits, resamples=200)["intervals"]["ece"]
        contains_slope += low <= truth <= high
    assert contains_nothing >= 54
    assert contains_slope >= 54


def test_intervals_contain_the_estimate_and_shrink_with_more_images():
    widths = []
    for size in (100, 1000, 10_000):
        figures = of_action_units(*calibrated_case(size, 1), resamples=300)
        for name in ("nll", "brier", "ece"):
            low, high = figures["intervals"][name]
            assert low <= figures[name] <= high
        widths.append([high - low for low, high in figures["intervals"].values()])
    for small, large in pairwise(widths):
        assert all(many < 0.6 * few for few, many in zip(small, large, strict=True))


def test_intervals_are_over_images_not_over_elements():
    """Ten action units that are always the same say no more than one: the interval must not shrink."""
    probability, target = calibrated_case(200, 2)
    one = of_action_units(probability, target)
    ten = of_action_units(np.repeat(probability[:, None], 10, axis=1), np.repeat(target[:, None], 10, axis=1))
    assert ten["nll"] == pytest.approx(one["nll"])
    assert ten["intervals"]["nll"] == pytest.approx(one["intervals"]["nll"])


def test_one_image_has_figures_without_spread():
    figures = of_action_units(np.array([0.8]), np.array([1.0]))
    assert figures["ece"] == pytest.approx(0.2)
    assert figures["intervals"]["ece"] == pytest.approx([0.2, 0.2])
    assert figures["intervals"]["nll"] == pytest.approx([-math.log(0.8)] * 2)


def test_figures_are_plain_and_the_same_again():
    found, targets = random_case(3)
    once, again = (reliability_figures(found, targets, resamples=50) for _ in range(2))
    assert json.dumps(once, allow_nan=False) == json.dumps(again, allow_nan=False)


# Risk and coverage


def test_risk_coverage_by_hand():
    emotion_probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.55, 0.45], [1.0, 0.0]])
    # By falling confidence: 0.9 right, 0.7 wrong, 0.6 right, 0.55 wrong; the last image's emotion is unknown.
    found = risk_coverage(emotion_probabilities, np.array([0, 1, 1, 1, -1]))
    assert [point["coverage"] for point in found["curve"]] == [0.25, 0.5, 0.75, 1.0]
    assert [point["risk"] for point in found["curve"]] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert [point["confidence"] for point in found["curve"]] == [0.9, 0.7, 0.6, 0.55]
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_images_of_equal_confidence_are_as_wrong_as_they_are_on_average():
    probabilities, emotion = np.array([[0.9, 0.1]] * 2 + [[0.8, 0.2]] * 2), np.array([0, 0, 0, 1])
    expected = [0, 0, 0.5 / 3, 1 / 4]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        found = risk_coverage(probabilities[order], emotion[order])
        assert [point["risk"] for point in found["curve"]] == pytest.approx(expected)


def test_the_curve_ends_at_the_error_of_all_and_has_a_hundred_points_at_most():
    found, targets = random_case(5, 700)
    curve = risk_coverage(found.emotion, targets.emotion)
    known = targets.emotion >= 0
    errors = found.emotion[known].argmax(axis=1) != targets.emotion[known]
    assert len(curve["curve"]) == 100
    assert curve["curve"][-1]["coverage"] == 1.0
    assert curve["curve"][-1]["risk"] == pytest.approx(errors.mean())
    # Sorted by confidence, mistakes come late: better than at random, which is the error of all.
    assert curve["aurc"] < errors.mean()


def test_no_known_emotion_has_no_curve():
    assert risk_coverage(np.full((2, 2), 0.5), np.array([-1, -1])) is None
    assert risk_coverage(np.zeros((2, 0)), np.array([0, 0])) is None
