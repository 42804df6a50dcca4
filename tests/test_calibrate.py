"""Calibration fitted on validation: against known truths, independent references, brute force and hand-computed
cases.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, softmax
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from rafce_ray.config import load_config
from rafce_ray.metrics.calibration import (
    FOLDS,
    MIN_POSITIVES,
    Calibration,
    Outputs,
    calibrated,
    choose_thresholds,
    choose_trust_limit,
    cross_fitted,
    fit_calibration,
    reliability_figures,
)

pytestmark = pytest.mark.numeric

NAN = math.nan


@dataclass(frozen=True)
class Targets:
    emotion: np.ndarray
    action_units: np.ndarray


def nothing(num_images: int, width: int = 0) -> np.ndarray:
    return np.zeros((num_images, width), dtype=np.float32)


def of_emotions(logits: np.ndarray, emotion: np.ndarray) -> tuple[Outputs, Targets]:
    return Outputs(logits.astype(np.float32), nothing(len(logits))), Targets(emotion, nothing(len(logits)))


def of_action_units(logits: np.ndarray, action_units: np.ndarray) -> tuple[Outputs, Targets]:
    emotion = np.full(len(logits), -1)
    return Outputs(nothing(len(logits)), logits.astype(np.float32)), Targets(emotion, action_units)


def drawn_emotions(generator: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    """Classes drawn with the probabilities that the logits mean: for these, a temperature of 1 is right."""
    cumulated = softmax(logits, axis=1).cumsum(axis=1)
    return (generator.random((len(logits), 1)) > cumulated).sum(axis=1).clip(max=logits.shape[1] - 1)


def both_nlls(outputs: Outputs, targets: Targets, calibration: Calibration) -> dict[str, tuple[float, float]]:
    """Log loss before and after calibration of each task."""
    raw = reliability_figures(calibrated(outputs, Calibration.uncalibrated(len(calibration.au_thresholds))), targets)
    found = reliability_figures(calibrated(outputs, calibration), targets)
    return {task: (raw[task]["nll"], found[task]["nll"]) for task in raw if raw[task] is not None}


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=2.0, size=(5000, 6))
    emotion = drawn_emotions(generator, logits)
    calibration, _ = fit_calibration(*of_emotions(logits * temperature, emotion))
    assert calibration.temperature == pytest.approx(temperature, rel=0.05)


def test_temperature_is_that_of_least_penalised_log_loss():
    generator = np.random.default_rng(1)
    logits, emotion = generator.normal(scale=3.0, size=(80, 4)).astype(np.float32), generator.integers(0, 4, 80)
    found, _ = fit_calibration(*of_emotions(logits, emotion))

    def cost(temperature: float) -> float:
        probability = softmax(logits.astype(np.float64) / temperature, axis=1)
        return -np.log(probability[np.arange(80), emotion]).sum() + math.log(temperature) ** 2 / 2

    grid = np.exp(np.linspace(-4, 4, 4001))
    best = grid[np.argmin([cost(one) for one in grid])]
    assert found.temperature == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_images", [1, 3, 40, 400])
def test_log_loss_is_never_higher_than_before_on_the_fitted_split(seed, num_images):
    """Noise, and few images: nothing to learn must not make it worse."""
    generator = np.random.default_rng(seed)
    emotion = generator.integers(-1, 5, num_images)
    action_units = generator.integers(0, 2, (num_images, 4)).astype(np.float32)
    action_units[generator.random(action_units.shape) < 0.2] = NAN
    logits = [generator.normal(scale=10.0 ** generator.uniform(-1, 1.5), size=(num_images, size)) for size in (5, 4)]
    outputs, targets = Outputs(*(one.astype(np.float32) for one in logits)), Targets(emotion, action_units)
    calibration, _ = fit_calibration(outputs, targets)
    for before, after in both_nlls(outputs, targets, calibration).values():
        assert after <= before + 1e-9


def test_nothing_known_leaves_everything_as_it_is():
    outputs = Outputs(np.ones((3, 4), np.float32), np.ones((3, 2), np.float32))
    calibration, _ = fit_calibration(outputs, Targets(np.full(3, -1), np.full((3, 2), NAN)))
    assert calibration == Calibration(1.0, (0.5, 0.5), (1.0, 1.0), (0.0, 0.0))
    assert "-0.0" not in repr(calibration)


def test_without_validation_data_the_positive_weight_is_undone_exactly():
    outputs, targets = of_action_units(np.ones((3, 3)), np.full((3, 3), NAN))
    calibration, _ = fit_calibration(outputs, targets, pos_weights=np.array([10.0, 1.0, 0.5]))
    assert calibration.au_shifts == (pytest.approx(-math.log(10), abs=1e-15), 0.0, pytest.approx(math.log(2)))
    assert calibration.au_slopes == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("told", [True, False])
def test_the_shift_of_a_positive_weight_is_found(told):
    """A loss with positive weight w is least at odds w times too high: logits log(w) too high.

    With enough data also untold.
    """
    generator = np.random.default_rng(2)
    true_logits = generator.normal(-1.5, 1.5, size=(4000, 2))
    action_units = (generator.random((4000, 2)) < expit(true_logits)).astype(np.float32)
    weights = np.array([10.0, 3.0])
    outputs, targets = of_action_units(true_logits + np.log(weights), action_units)
    calibration, _ = fit_calibration(outputs, targets, pos_weights=weights if told else None)
    np.testing.assert_allclose(calibration.au_shifts, -np.log(weights), atol=0.15 if told else 0.3)
    np.testing.assert_allclose(calibration.au_slopes, 1.0, atol=0.1)
    before, after = both_nlls(outputs, targets, calibration)["action_units"]
    assert after < before - 0.05
    ideal = -np.log(np.where(action_units == 1, expit(true_logits), expit(-true_logits))).mean()
    assert after == pytest.approx(ideal, abs=2e-3)


def test_slope_and_shift_equal_logistic_regression_where_data_are_plenty():
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(20_000, 1)).astype(np.float32)
    target = (generator.random((20_000, 1)) < expit(0.6 * logits - 0.8)).astype(np.float32)
    calibration, _ = fit_calibration(*of_action_units(logits, target))
    reference = LogisticRegression(C=np.inf, tol=1e-8).fit(logits.astype(np.float64), target[:, 0])
    assert calibration.au_slopes[0] == pytest.approx(reference.coef_[0, 0], abs=5e-3)
    assert calibration.au_shifts[0] == pytest.approx(reference.intercept_[0], abs=5e-3)


@pytest.mark.parametrize("case", ["few", "all positive", "all negative", "huge"])
def test_slope_and_shift_are_those_of_least_penalised_log_loss(case):
    generator = np.random.default_rng(4)
    logits = generator.normal(scale=1e4 if case == "huge" else 2.0, size=(25, 1)).astype(np.float32)
    target = (generator.random((25, 1)) < 0.4).astype(np.float32)
    if case.startswith("all"):
        target[:] = case == "all positive"
    target[:3] = NAN
    known = ~np.isnan(target[:, 0])
    scores, positive = logits[known, 0].astype(np.float64), target[known, 0] == 1
    calibration, _ = fit_calibration(*of_action_units(logits, target), pos_weights=np.array([4.0]))
    found = np.array([math.log(calibration.au_slopes[0]), calibration.au_shifts[0]])

    def nll(log_slope: float, shift: float) -> float:
        scaled = np.exp(log_slope) * scores + shift
        return float(np.logaddexp(0, np.where(positive, -scaled, scaled)).sum())

    def pooled(one: np.ndarray) -> float:
        return nll(one[0], -one[1] * math.log(4.0)) + one[0] ** 2 / 2 + ((one[1] - 1) / 0.5) ** 2 / 2

    # What all action units have in common, here of one, and around it its own.
    log_slope, share = least(pooled, [[0.0, 1.0], [-3.0, 1.0], [0.0, 0.0]]).x
    centre = np.array([log_slope, -share * math.log(4.0)])

    def own(one: np.ndarray) -> float:
        return nll(*one) + (((one - centre) / 0.25) ** 2).sum() / 2

    assert np.isfinite(found).all()
    assert own(found) <= least(own, [found, centre, [-3.0, 0.0]]).fun * (1 + 1e-4) + 1e-4
    if case == "all positive":
        assert found[1] > -math.log(4.0)
    if case == "all negative":
        assert found[1] < -math.log(4.0)


def least(cost, starts: list):
    """The least of what a search without gradients finds."""
    options = {"xatol": 1e-9, "fatol": 1e-12}
    tries = [
        minimize(cost, one, method="Nelder-Mead", bounds=[(-3, 3), (None, None)], options=options) for one in starts
    ]
    return min(tries, key=lambda one: one.fun)


def test_rare_action_units_follow_the_others():
    """All logits are three times too high; of the last action unit only five elements are known."""
    generator = np.random.default_rng(10)
    true_logits = generator.normal(-1, 1.5, size=(600, 5))
    action_units = (generator.random((600, 5)) < expit(true_logits)).astype(np.float32)
    action_units[5:, 4] = NAN
    calibration, _ = fit_calibration(*of_action_units(3 * true_logits, action_units))
    np.testing.assert_allclose(calibration.au_slopes, 1 / 3, rtol=0.3)
    assert calibration.au_slopes[4] == pytest.approx(np.mean(calibration.au_slopes[:4]), rel=0.1)
    assert calibration.au_shifts[4] == pytest.approx(0.0, abs=0.1)


def test_a_positive_weight_that_was_not_learnt_is_not_undone():
    """A network that still predicts the base rates: all action units together show that nothing is to be taken off."""
    generator = np.random.default_rng(11)
    rates = np.array([0.1, 0.2, 0.3])
    action_units = (generator.random((200, 3)) < rates).astype(np.float32)
    logits = np.broadcast_to(np.log(rates / (1 - rates)), (200, 3))
    outputs, targets = of_action_units(logits, action_units)
    calibration, _ = fit_calibration(outputs, targets, pos_weights=(1 - rates) / rates)
    found = calibrated(outputs, calibration).action_units[0]
    np.testing.assert_allclose(found, action_units.mean(axis=0), atol=0.05)


def test_huge_logits_have_a_finite_temperature_that_helps():
    generator = np.random.default_rng(5)
    emotion = generator.integers(0, 3, 200)
    logits = np.eye(3)[np.where(generator.random(200) < 0.8, emotion, (emotion + 1) % 3)] * 30
    outputs, targets = of_emotions(logits, emotion)
    calibration, _ = fit_calibration(outputs, targets)
    before, after = both_nlls(outputs, targets, calibration)["emotion"]
    # Right with probability 0.8: at the best temperature the class that is said has about that probability.
    assert calibrated(outputs, calibration).emotion.max() == pytest.approx(0.8, abs=0.06)
    assert after < 0.7 < before


# Thresholds


def f1_at(probability: np.ndarray, target: np.ndarray, threshold: float) -> float:
    """2 tp / (2 tp + fp + fn) over known elements."""
    present, tp = probability >= threshold, int(((probability >= threshold) & (target == 1)).sum())
    wrong = int((present & (target == 0)).sum()) + int((~present & (target == 1)).sum())
    return 2 * tp / (2 * tp + wrong) if tp else 0.0


def repeated(values: list[float], times: int) -> np.ndarray:
    return np.repeat(np.array(values, dtype=np.float64), times)[:, None]


def test_a_threshold_lies_midway_between_probabilities():
    """30 positives at 0.8 and 0.6, negatives at 0.7 and 0.2: at 0.4 tp 30, fp 15: F1 60 / 75; at 0.75 tp 15: F1 30 /
    45.
    """
    probability, target = repeated([0.8, 0.7, 0.6, 0.2], 15), repeated([1, 0, 1, 0], 15)
    thresholds, remark = choose_thresholds(probability, target)
    assert thresholds == (pytest.approx(0.4),)
    assert remark is None
    assert f1_at(probability[:, 0], target[:, 0], thresholds[0]) == pytest.approx(60 / 75)


def test_among_equal_thresholds_the_one_nearest_to_a_half_is_taken():
    """Saying present of the best 30 or of all 120 gives the same F1: 2 * 20 / (30 + 30) and 2 * 30 / (60 + 30)."""
    probability = np.concatenate([np.full(20, 0.9), np.full(10, 0.9), np.full(10, 0.3), np.full(20, 0.3)])[:, None]
    target = np.concatenate([np.ones(20), np.zeros(10), np.ones(10), np.zeros(20)])[:, None]
    assert f1_at(probability[:, 0], target[:, 0], 0.6) == f1_at(probability[:, 0], target[:, 0], 0.1) == 2 / 3
    assert choose_thresholds(probability, target)[0] == (pytest.approx(0.6),)


def test_unknown_elements_choose_nothing():
    probability, target = repeated([0.8, 0.7, 0.6, 0.2], 15), repeated([1, 0, 1, 0], 15)
    more = np.concatenate([probability, repeated([0.65, 0.1], 500)])
    unknown = np.concatenate([target, np.full((1000, 1), NAN)])
    assert choose_thresholds(more, unknown) == choose_thresholds(probability, target)


def random_thresholds_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """300 images of 4 AUs with ties and unknown elements; the last two have under 30 positives."""
    generator = np.random.default_rng(seed)
    action_units = (generator.random((300, 4)) < [0.4, 0.2, 0.05, 0.02]).astype(np.float64)
    probability = expit(generator.normal(size=(300, 4)) + 2 * action_units - 1).round(2)
    action_units[generator.random((300, 4)) < 0.1] = NAN
    return probability.astype(np.float32).astype(np.float64), action_units


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_are_the_best_of_all_possible_ones(seed):
    probability, action_units = random_thresholds_case(seed)
    positives = (action_units == 1).sum(axis=0)
    assert (positives >= MIN_POSITIVES).tolist() == [True, True, False, False]
    thresholds, remark = choose_thresholds(probability, action_units)
    for column in (0, 1):
        candidates = np.linspace(0, 1, 401)
        best = max(f1_at(probability[:, column], action_units[:, column], one) for one in candidates)
        assert f1_at(probability[:, column], action_units[:, column], thresholds[column]) == pytest.approx(best)
    # The others share the threshold of the highest mean F1 of all four; between two hundredths nothing changes.
    assert thresholds[2] == thresholds[3]
    grid = np.arange(1, 200) / 200
    means = np.array(
        [np.mean([f1_at(*one, cut) for one in zip(probability.T, action_units.T, strict=True)]) for cut in grid]
    )
    shared = np.mean([f1_at(*one, thresholds[2]) for one in zip(probability.T, action_units.T, strict=True)])
    assert shared == pytest.approx(means.max())
    equal = grid[means >= means.max() - 1e-12]
    assert abs(thresholds[2] - 0.5) <= np.abs(equal - 0.5).min() + 1e-12
    assert (
        remark == f"2 of 4 action units have under 30 validation positives and share the threshold {thresholds[2]:.3f}"
    )


def test_an_action_unit_of_few_positives_takes_the_shared_threshold_and_one_more_positive_its_own():
    generator = np.random.default_rng(6)
    strong = np.concatenate([np.full(100, 0.3), np.full(100, 0.1)])
    target = np.concatenate([np.ones(100), np.zeros(100)])
    probability = np.stack([strong, generator.permutation(np.linspace(0.5, 0.9, 200))], axis=1)
    for positives, has_own in ((MIN_POSITIVES - 1, False), (MIN_POSITIVES, True)):
        rare = np.zeros(200)
        rare[np.argsort(-probability[:, 1])[:positives]] = 1
        thresholds, remark = choose_thresholds(probability, np.stack([target, rare], axis=1))
        assert thresholds[0] == pytest.approx(0.2)
        assert (remark is None) is has_own
        separates = f1_at(probability[:, 1], rare, thresholds[1]) == 1.0
        assert separates is has_own


def test_no_positive_at_all_leaves_a_half():
    assert choose_thresholds(np.full((5, 2), 0.3), np.zeros((5, 2)))[0] == (0.5, 0.5)
    assert choose_thresholds(np.full((5, 2), 0.3), np.full((5, 2), NAN))[0] == (0.5, 0.5)
    assert choose_thresholds(np.zeros((5, 0)), np.zeros((5, 0))) == ((), None)


def test_an_action_unit_without_positives_does_not_move_the_shared_threshold():
    probability, action_units = random_thresholds_case(0)
    alone, _ = choose_thresholds(probability[:, :3], action_units[:, :3])
    action_units[:, 3] = np.where(np.isnan(action_units[:, 3]), NAN, 0.0)
    together, _ = choose_thresholds(probability, action_units)
    assert together[:3] == alone
    assert together[3] == alone[2]


def test_all_positive_says_present_of_all():
    probability = np.linspace(0.2, 0.9, 40)[:, None]
    thresholds, _ = choose_thresholds(probability, np.ones((40, 1)))
    assert thresholds == (pytest.approx(0.1),)


def test_thresholds_hold_for_the_probabilities_that_they_were_chosen_on():
    """Written down and read back, they decide as they did: F1 through the bundle's own reader is the best that there
    is.
    """
    generator = np.random.default_rng(7)
    action_units = (generator.random((400, 3)) < 0.3).astype(np.float32)
    outputs, targets = of_action_units(generator.normal(size=(400, 3)) + action_units, action_units)
    calibration, _ = fit_calibration(outputs, targets)
    found = calibrated(outputs, calibration).action_units
    for column, threshold in enumerate(calibration.au_thresholds):
        best = max(f1_at(found[:, column], action_units[:, column], one) for one in found[:, column])
        assert f1_at(found[:, column], action_units[:, column], threshold) == pytest.approx(best)


# The limit of trust


def confident(confidences: list[float], right: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Two-class probabilities of which the first is said, and labels by which it is right or not."""
    first = np.array(confidences, dtype=np.float64)
    return np.stack([first, 1 - first], axis=1), 1 - np.array(right)


def upper_bound(errors: int, answered: int) -> float:
    return binomtest(errors, answered, alternative="less").proportion_ci(0.95, method="exact").high


def test_the_limit_of_trust_by_hand():
    """40 right at 0.9, then 10 of 20 wrong at 0.8, then 100 right at 0.7: the bounds are scipy's Clopper-Pearson
    ones.
    """
    probability, emotion = confident([0.9] * 40 + [0.8] * 20 + [0.7] * 100, [1] * 40 + [0, 1] * 10 + [1] * 100)
    bounds = {0.9: upper_bound(0, 40), 0.8: upper_bound(10, 60), 0.7: upper_bound(10, 160)}
    assert bounds[0.9] < bounds[0.7] < 0.11 < bounds[0.8] < 0.27
    assert choose_trust_limit(probability, emotion, 0.28) == (0.7, None)
    assert choose_trust_limit(probability, emotion, 0.11) == (0.7, None)
    assert choose_trust_limit(probability, emotion, bounds[0.7] + 1e-9) == (0.7, None)
    assert choose_trust_limit(probability, emotion, bounds[0.7] - 1e-9) == (0.9, None)
    assert choose_trust_limit(probability, emotion, bounds[0.9] + 1e-9) == (0.9, None)
    limit, remark = choose_trust_limit(probability, emotion, bounds[0.9] - 1e-9)
    assert limit == 1.0
    assert f"the lowest bound that validation supports is {bounds[0.9]:.3f}" in remark


def test_images_of_one_confidence_are_trusted_together_or_not_at_all():
    """Of 60 images at 0.8 the 30 wrong ones come last: the first 30 alone would be within the limit."""
    probability, emotion = confident([0.9] * 60 + [0.8] * 60, [1] * 60 + [1] * 30 + [0] * 30)
    assert choose_trust_limit(probability, emotion, 0.1) == (0.9, None)
    order = np.random.default_rng(0).permutation(120)
    assert choose_trust_limit(probability[order], emotion[order], 0.1) == (0.9, None)


@pytest.mark.parametrize("seed", range(5))
def test_the_limit_of_trust_equals_a_search_over_every_confidence(seed):
    generator = np.random.default_rng(seed)
    first = generator.uniform(0.5, 1, 150).round(2)
    probability, emotion = confident(first.tolist(), (generator.random(150) < first).astype(int).tolist())
    emotion[:20] = -1
    allowed = []
    for limit in np.unique(first[20:]):
        trusted = (first >= limit) & (emotion >= 0)
        errors = int((trusted & (emotion == 1)).sum())
        if upper_bound(errors, int(trusted.sum())) <= 0.25:
            allowed.append(limit)
    limit, remark = choose_trust_limit(probability, emotion, 0.25)
    assert limit == (min(allowed) if allowed else 1.0)
    assert (remark is None) is bool(allowed)


def test_an_error_that_cannot_be_kept_is_said():
    probability, emotion = confident([0.9] * 5, [0] * 5)
    limit, remark = choose_trust_limit(probability, emotion, 0.5)
    assert limit == 1.0
    assert "every emotion is marked unsure" in remark
    assert "is 1.000" in remark
    limit, remark = choose_trust_limit(probability, np.full(5, -1), 0.5)
    assert limit == 1.0
    assert "is unknown" in remark


def test_the_limit_is_fitted_where_it_is_asked_for():
    generator = np.random.default_rng(8)
    logits = generator.normal(scale=2.0, size=(500, 3))
    outputs, targets = of_emotions(logits, drawn_emotions(generator, logits))
    assert fit_calibration(outputs, targets)[0].unsure_below is None
    calibration, _ = fit_calibration(outputs, targets, max_error=0.2)
    found = calibrated(outputs, calibration).emotion
    sure = found.max(axis=1) >= calibration.unsure_below
    wrong = found.argmax(axis=1) != targets.emotion
    assert 0 < sure.sum() < 500
    assert upper_bound(int((sure & wrong).sum()), int(sure.sum())) <= 0.2
    assert fit_calibration(*of_action_units(logits, np.zeros((500, 3))), max_error=0.2)[0].unsure_below is None


# Cross-fitting


def noise_case(num_images: int, seed: int) -> tuple[Outputs, Targets]:
    generator = np.random.default_rng(seed)
    outputs = Outputs(*(generator.normal(scale=2, size=(num_images, 3)).astype(np.float32) for _ in range(2)))
    action_units = (generator.random((num_images, 3)) < 0.3).astype(np.float32)
    return outputs, Targets(generator.integers(0, 3, num_images), action_units)


def test_cross_fitted_figures_come_from_the_other_folds():
    """An image with a label of its own moves every calibration but the one that it is measured with."""
    outputs, targets = noise_case(100, 0)
    figures = cross_fitted(outputs, targets, seed=3)
    assert figures["folds"] == FOLDS
    raw = reliability_figures(calibrated(outputs, Calibration.uncalibrated(3)), targets)
    assert figures["before"]["emotion"] == raw["emotion"]
    fold_of = np.random.default_rng([3, 2]).permutation(np.arange(100) % FOLDS)
    losses = []
    for fold in range(FOLDS):
        inside, outside = fold_of == fold, fold_of != fold
        calibration, _ = fit_calibration(
            Outputs(outputs.emotion[outside], outputs.action_units[outside]),
            Targets(targets.emotion[outside], targets.action_units[outside]),
        )
        found = calibrated(Outputs(outputs.emotion[inside], outputs.action_units[inside]), calibration).emotion
        losses += (-np.log(found[np.arange(inside.sum()), targets.emotion[inside]])).tolist()
    assert len(losses) == 100
    assert figures["after"]["emotion"]["nll"] == pytest.approx(np.mean(losses))


def test_cross_fitted_figures_do_not_flatter():
    """Where there is nothing to learn, thresholds tuned on the images that they are measured on look better than they
    are.
    """
    gains, honest = [], []
    for seed in range(5):
        outputs, targets = noise_case(150, seed)
        calibration, _ = fit_calibration(outputs, targets)
        found = calibrated(outputs, calibration)
        tuned = np.mean(
            [
                f1_at(found.action_units[:, i], targets.action_units[:, i], calibration.au_thresholds[i])
                for i in range(3)
            ]
        )
        figures = cross_fitted(outputs, targets, seed=seed)
        gains.append(tuned)
        honest.append(figures["au_f1_mean_after"])
        in_sample = reliability_figures(found, targets)
        for task in ("emotion", "action_units"):
            assert figures["after"][task]["nll"] > in_sample[task]["nll"]
    assert np.mean(honest) < np.mean(gains) - 0.01


@pytest.mark.parametrize("num_images", [1, 2, 4, 6])
def test_a_handful_of_images_is_cross_fitted_too(num_images):
    outputs, targets = noise_case(num_images, 1)
    figures = cross_fitted(outputs, targets)
    assert math.isfinite(figures["after"]["emotion"]["nll"])
    assert math.isfinite(figures["after"]["action_units"]["nll"])


def test_cross_fitting_undoes_positive_weights():
    generator = np.random.default_rng(9)
    true_logits = generator.normal(-1.5, 1.5, size=(300, 2))
    action_units = (generator.random((300, 2)) < expit(true_logits)).astype(np.float32)
    outputs, targets = of_action_units(true_logits + math.log(10), action_units)
    figures = cross_fitted(outputs, targets, pos_weights=np.array([10.0, 10.0]))
    assert figures["after"]["action_units"]["nll"] < figures["before"]["action_units"]["nll"] - 0.2
    assert figures["before"]["emotion"] is figures["after"]["emotion"] is None
    known = action_units == 1
    half = np.mean([f1_score(known[:, i], expit(outputs.action_units[:, i]) >= 0.5) for i in range(2)])
    assert figures["au_f1_mean_before"] == pytest.approx(half)


# On images that it was not fitted on


@pytest.mark.slow
def test_calibration_lowers_the_log_loss_of_held_out_drawn_faces(drawn_faces, store_dir, tmp_path):
    """Trained with positive weights, calibrated on validation, measured on the test split, which took no part in
    either.
    """
    from rafce_ray.bundle.bundle import load_bundle
    from rafce_ray.bundle.evaluate import evaluate_bundle
    from rafce_ray.data.loader import open_dataset, prepare
    from rafce_ray.run.loop import fit
    from rafce_ray.run.state import Job, LocalSession

    config = load_config(
        overrides=[
            f"data.root={drawn_faces}",
            f"data.store_dir={store_dir}",
            "model.backbone=mobilenet_v3_small",
            "model.weights=none",
            "model.image_px=32",
            "optim.epochs=25",
            "optim.batch_size=16",
            "optim.lr=1e-3",
            "optim.gap_images=32",
            "loss.pos_weight_cap=10",
        ]
    )
    prepared = prepare(config.data)
    result = fit(Job(config, prepared.store_uri, prepared.taxonomy, str(tmp_path / "run"), {}), LocalSession())
    bundle = load_bundle(result["bundle"])
    dataset = open_dataset(prepared.store, prepared.taxonomy, config.data.null_policy)
    reliability = evaluate_bundle(bundle, dataset, "test")["reliability"]
    total = {
        when: reliability[when]["emotion"]["nll"] + reliability[when]["action_units"]["nll"]
        for when in ("before", "after")
    }
    assert total["after"] < total["before"]
    assert reliability["after"]["action_units"]["nll"] < reliability["before"]["action_units"]["nll"]
    assert reliability["after"]["action_units"]["ece"] < reliability["before"]["action_units"]["ece"]
    # Calibrated again with the temperature of 1, the emotions of the same bundle are what they were before.
    plain = replace(bundle, calibration=replace(bundle.calibration, temperature=1.0))
    again = evaluate_bundle(plain, dataset, "test")["reliability"]["after"]["emotion"]["nll"]
    assert again == pytest.approx(reliability["before"]["emotion"]["nll"])
