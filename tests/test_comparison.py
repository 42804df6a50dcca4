"""Models compared on the same images and configurations over seeds: what pairing adds, what must not be paired, how
luck adds up.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student_t

from rafce_ray.base.errors import UsageError
from rafce_ray.base.figures import WITH_INTERVAL
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, make_taxonomy
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs
from rafce_ray.metrics.comparison import (
    NO_SPREAD,
    OverSeeds,
    Spread,
    comparable_figures,
    difference,
    difference_of_means,
    f1_of,
    mean_draws,
    mean_half_width,
    pooled_spread,
    same_images,
    score,
)
from rafce_ray.metrics.counts import Tasks, evaluate_probabilities

TAXONOMY = make_taxonomy(tuple(list(RAFCE_EMOTIONS)[:4]), (1, 12))
CALIBRATION = Calibration(1.5, (0.4, 0.6))


def make_split(seed: int, size: int = 300, emotion_signal: float = 1.0, au_signal: float = 1.0) -> SplitOutputs:
    """A model's outputs on the same ``size`` images, whose targets do not depend on the seed of its outputs."""
    of_images, of_model = np.random.default_rng(0), np.random.default_rng([seed, 1])
    emotion = of_images.integers(0, 4, size)
    emotion[of_images.random(size) < 0.05] = -1
    action_units = (of_images.random((size, 2)) < 0.4).astype(np.float32)
    action_units[of_images.random((size, 2)) < 0.1] = np.nan
    # What is hard about an image is hard for every model.
    hard = of_images.normal(size=(size, 6))
    noise = 0.8 * hard + 0.6 * of_model.normal(size=(size, 6))
    emotion_logits = noise[:, :4] + emotion_signal * np.eye(4)[np.maximum(emotion, 0)]
    au_logits = noise[:, 4:] + au_signal * (2 * np.nan_to_num(action_units) - 1)
    outputs = Outputs(emotion_logits.astype(np.float32), au_logits.astype(np.float32))
    return SplitOutputs([f"{i:04d}.jpg" for i in range(size)], emotion, action_units, outputs)


def reordered(split: SplitOutputs, order: np.ndarray) -> SplitOutputs:
    return SplitOutputs(
        [split.names[i] for i in order],
        split.emotion[order],
        split.action_units[order],
        Outputs(split.outputs.emotion[order], split.outputs.action_units[order]),
    )


@pytest.fixture(scope="module")
def scored():
    """Three models: two alike, of which the first has a hundredth more signal, and one that is clearly better."""
    return [score(make_split(*one), TAXONOMY, CALIBRATION) for one in ((1, 300, 1.01, 1.01), (2,), (3, 300, 2.0, 2.0))]


def test_figures_and_intervals_are_those_of_the_metrics(scored):
    split = make_split(2)
    exponentials = np.exp(split.outputs.emotion.astype(np.float64) / 1.5)
    emotion = exponentials / exponentials.sum(axis=1, keepdims=True)
    action_units = 1 / (1 + np.exp(-split.outputs.action_units.astype(np.float64)))
    figures = evaluate_probabilities(Tasks(emotion, action_units), split, TAXONOMY, (0.4, 0.6))
    found = scored[1]
    for name in WITH_INTERVAL:
        assert found.figures[name] == pytest.approx(figures[name])
        assert found.interval(name) == pytest.approx(figures["intervals"][name])
    for entry in figures["per_class"]:
        assert found.figures[f1_of(entry["emotion"])] == pytest.approx(entry["f1"])
        assert found.interval(f1_of(entry["emotion"])) == pytest.approx(entry["f1_interval"])
    for entry in figures["per_au"]:
        assert found.figures[f1_of(entry["action_unit"])] == pytest.approx(entry["f1"])
        assert found.interval(f1_of(entry["action_unit"])) == pytest.approx(entry["f1_interval"])


def test_equal_models_differ_by_exactly_nothing():
    split = make_split(1)
    one, other = (score(split, TAXONOMY, CALIBRATION, resamples=50) for _ in range(2))
    for figure in one.figures:
        found = difference(one, other, figure)
        assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
        assert not found.is_real


def test_a_real_difference_is_found_and_its_sign_is_right(scored):
    for figure in ("accuracy", "macro_f1", "au_f1_mean", "au_ap_mean", "score"):
        found = difference(scored[2], scored[1], figure)
        assert found.is_real, figure
        assert 0 < found.low < found.value < found.high
        back = difference(scored[1], scored[2], figure)
        assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
        assert back.is_real


def test_noise_is_called_noise(scored):
    for figure in ("accuracy", "macro_f1", "au_f1_mean", "score"):
        assert not difference(scored[0], scored[1], figure).is_real


def test_pairing_narrows_the_interval(scored):
    """Against the spread of the difference of independent draws, computed here without the paired code."""
    for figure in ("accuracy", "au_f1_mean"):
        found = difference(scored[0], scored[1], figure)
        order = np.random.default_rng(0).permutation(len(scored[0].draws[figure]))
        unpaired = np.percentile(scored[0].draws[figure][order] - scored[1].draws[figure], [2.5, 97.5])
        assert found.high - found.low < 0.85 * (unpaired[1] - unpaired[0])


def test_the_interval_of_accuracy_is_that_of_the_paired_outcomes():
    """Independent of any bootstrap: the mean of -1, 0, 1 per image has a standard error."""
    one, other = make_split(1), make_split(2)
    known = one.emotion >= 0
    right = [(split.outputs.emotion.argmax(axis=1) == split.emotion)[known].astype(float) for split in (one, other)]
    per_image = right[0] - right[1]
    half = 1.96 * per_image.std() / math.sqrt(known.sum())
    found = difference(*(score(split, TAXONOMY, CALIBRATION) for split in (one, other)), "accuracy")
    assert found.value == pytest.approx(per_image.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.12)


def test_a_class_that_does_not_occur_has_an_undefined_difference():
    split = make_split(1)
    split = replace(split, emotion=np.where(split.emotion == 3, -1, split.emotion))
    one = score(split, TAXONOMY, CALIBRATION, resamples=20)
    found = difference(one, one, f1_of(TAXONOMY.emotions[3]))
    assert math.isnan(found.value)
    assert math.isnan(found.low)
    assert not found.is_real


def test_rows_are_matched_by_name():
    one, other = make_split(1), make_split(2)
    shuffled = reordered(other, np.random.default_rng(1).permutation(300))
    first, aligned = same_images([one, shuffled])
    assert first is one
    assert aligned.names == one.names
    np.testing.assert_array_equal(aligned.emotion, other.emotion)
    np.testing.assert_array_equal(aligned.action_units, other.action_units)
    np.testing.assert_array_equal(aligned.outputs.emotion, other.outputs.emotion)
    np.testing.assert_array_equal(aligned.outputs.action_units, other.outputs.action_units)


def test_other_images_are_refused():
    one = make_split(1)
    fewer = reordered(one, np.arange(299))
    with pytest.raises(
        UsageError, match=r"299 images, the first on 300: 1 of the first's are not among them \(0299.jpg\)"
    ):
        same_images([one, fewer])
    with pytest.raises(
        UsageError, match=r"0 of the first's are not among them, 1 are not among the first's \(0299.jpg\)"
    ):
        same_images([fewer, one])
    renamed = replace(one, names=["other.jpg", *one.names[1:]])
    with pytest.raises(UsageError, match=r"\(0000.jpg\), 1 are not among the first's \(other.jpg\)"):
        same_images([one, renamed])


def test_other_emotions_are_refused_but_not_of_a_model_that_tells_none():
    one = make_split(1)
    emotion = one.emotion.copy()
    emotion[7] = (emotion[7] + 1) % 4
    changed = replace(one, emotion=emotion)
    with pytest.raises(UsageError, match=r"another emotion label for 0007.jpg"):
        same_images([one, changed])
    silent = replace(changed, outputs=Outputs(np.zeros((300, 0), np.float32), one.outputs.action_units))
    assert same_images([one, silent])[1].names == one.names


def test_figures_that_mean_the_same_for_both():
    both, emotions = TAXONOMY, make_taxonomy(TAXONOMY.emotions, ())
    of_emotions = {name for name in WITH_INTERVAL if not name.startswith("au_")} - {"score"}
    assert set(comparable_figures(both, both)) == {*WITH_INTERVAL, *map(f1_of, (*both.emotions, "AU1", "AU12"))}
    assert set(comparable_figures(both, emotions)) == of_emotions | set(map(f1_of, both.emotions))
    assert "score" in comparable_figures(emotions, emotions)
    other_units = make_taxonomy(TAXONOMY.emotions, (1, 2))
    assert set(comparable_figures(both, other_units)) == of_emotions | set(map(f1_of, both.emotions))
    units = make_taxonomy((), (1, 12))
    assert set(comparable_figures(both, units)) == {"au_f1_mean", "au_ap_mean", f1_of("AU1"), f1_of("AU12")}
    assert comparable_figures(emotions, units) == []


NOISE = np.random.default_rng(0).normal(size=1000)


def test_the_deviation_over_seeds_is_pooled_over_configurations_whose_seeds_differ():
    """Variances 0.0001 (2 degrees of freedom) and 0.0003 (1): pooled (2 * 0.0001 + 0.0003) / 3."""
    configurations = [
        OverSeeds((0.49, 0.50, 0.51)),
        OverSeeds((0.60, 0.60 + math.sqrt(0.0006))),
        OverSeeds((0.7, 0.7, 0.7)),
        OverSeeds((math.nan, 0.2)),
    ]
    spread = pooled_spread(configurations)
    assert spread.freedom == 3
    assert spread.deviation == pytest.approx(math.sqrt(0.0005 / 3))
    assert configurations[0].mean == pytest.approx(0.50)
    # Student's t with 3 degrees of freedom: 3.182.
    assert mean_half_width(configurations[0], spread) == pytest.approx(
        3.18245 * math.sqrt(0.0005 / 3) / math.sqrt(3), rel=1e-5
    )
    assert math.isnan(mean_half_width(OverSeeds((math.nan,)), spread))


def test_seeds_and_images_add_up():
    spread, draws = Spread(0.01, 2), 0.6 + 0.05 * NOISE
    one = OverSeeds((0.60, 0.62), draws)
    assert mean_half_width(one, spread) == pytest.approx(student_t.ppf(0.975, 2) * math.sqrt(0.01**2 / 2 + draws.var()))
    assert mean_half_width(one, NO_SPREAD) == pytest.approx(1.959964 * draws.std(), rel=1e-5)


def test_a_difference_allows_for_the_images_that_both_do_not_share():
    spread = Spread(0.01, 2)
    over_seeds = student_t.ppf(0.975, 2) * 0.01
    value, half_width = difference_of_means(OverSeeds((0.60, 0.62)), OverSeeds((0.50, 0.52)), spread)
    assert (value, half_width) == pytest.approx((0.10, over_seeds))
    one, other = OverSeeds((0.60, 0.62), 0.6 + 0.05 * NOISE), OverSeeds((0.50, 0.52), 0.5 - 0.05 * NOISE)
    _, half_width = difference_of_means(one, other, spread)
    assert half_width == pytest.approx(student_t.ppf(0.975, 2) * math.sqrt(0.01**2 + 0.01 * NOISE.var()))
    # What both share, image by image, is no noise of their difference.
    shared = 0.5 + 0.05 * NOISE
    _, half_width = difference_of_means(OverSeeds((0.60, 0.62), shared), OverSeeds((0.50, 0.52), shared), spread)
    assert half_width == pytest.approx(over_seeds)


def test_one_seed_tells_nothing_of_seeds():
    spread = pooled_spread([OverSeeds((0.5,)), OverSeeds((0.9,))])
    value, half_width = difference_of_means(OverSeeds((0.9,)), OverSeeds((0.5,)), spread)
    assert value == pytest.approx(0.4)
    assert math.isnan(half_width)
    assert all(math.isnan(part) for part in difference_of_means(OverSeeds((math.nan,)), OverSeeds((0.5,)), spread))


def test_resamples_are_averaged_where_every_seed_has_them():
    one, other = np.array([1.0, 3.0]), np.array([2.0, 5.0])
    assert mean_draws([one, other]).tolist() == [1.5, 4.0]
    assert mean_draws([one, None]) is None
    assert mean_draws([]) is None
