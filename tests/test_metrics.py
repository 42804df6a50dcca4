"""Figures against hand-computed numbers and scikit-learn; counts that add up."""

import json
import math
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)

from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, SEED18, Taxonomy, make_taxonomy
from rafce_ray.metrics.counts import (
    Counts,
    Ranking,
    Tasks,
    component_overlap,
    count_batch,
    count_probabilities,
    evaluate_probabilities,
    percentile_interval,
    resample_weights,
    summarise,
)
from rafce_ray.model.network import Logits

RAFCE = make_taxonomy(tuple(RAFCE_EMOTIONS), SEED18)
THREE = make_taxonomy(("happily surprised", "happily disgusted", "sadly fearful"), (1, 12))


@dataclass(frozen=True)
class Targets:
    emotion: np.ndarray
    action_units: np.ndarray


@dataclass(frozen=True)
class Case:
    emotion_logits: torch.Tensor
    au_logits: torch.Tensor
    targets: Targets

    @property
    def logits(self) -> Logits:
        return Logits(self.emotion_logits, self.au_logits)

    @property
    def emotion_probabilities(self) -> np.ndarray:
        return torch.softmax(self.emotion_logits, 1).numpy()

    @property
    def au_probabilities(self) -> np.ndarray:
        return torch.sigmoid(self.au_logits).numpy()


def random_case(seed: int, size: int = 300, unknown: float = 0.1) -> Case:
    generator = np.random.default_rng(seed)
    # Uneven classes, one that never occurs (13), and an AU without positives (45).
    emotion = generator.choice(13, size=size, p=generator.dirichlet(np.ones(13)))
    emotion[generator.random(size) < unknown] = -1
    action_units = (generator.random((size, 18)) < generator.uniform(0.05, 0.6, 18)).astype(np.float64)
    action_units[:, SEED18.index(45)] = 0
    action_units[generator.random((size, 18)) < unknown] = np.nan
    signal = np.eye(14)[np.maximum(emotion, 0)]
    emotion_logits = generator.normal(size=(size, 14)) + 1.5 * signal
    au_logits = generator.normal(size=(size, 18)) + np.nan_to_num(action_units)
    return Case(
        torch.from_numpy(emotion_logits).float(), torch.from_numpy(au_logits).float(), Targets(emotion, action_units)
    )


def count(case: Case) -> Counts:
    return count_batch(case.logits, torch.from_numpy(case.targets.emotion), torch.from_numpy(case.targets.action_units))


def test_hand_computed_figures():
    # Classes 0 0 0 1 1 2 ?; predicted 0 0 1 1 0 1 2.
    emotion = torch.tensor([0, 0, 0, 1, 1, 2, -1])
    predicted = [0, 0, 1, 1, 0, 1, 2]
    logits = torch.full((7, 3), 0.0)
    logits[range(7), predicted] = math.log(2.0)  # probabilities 1/2 for the predicted class, 1/4 for the others
    # AU1: known 1 1 0 0 ? 0 1, said yes yes yes no yes no no; AU12: never present.
    nan = math.nan
    action_units = torch.tensor([[1, 0], [1, 0], [0, 0], [0, nan], [nan, 0], [0, 0], [1, 0]])
    au_logits = torch.tensor([[1.0, -1], [1, 1], [1, -1], [-1, 1], [1, -1], [-1, -1], [-1, -1]])
    summary = summarise(count_batch(Logits(logits, au_logits), emotion, action_units), THREE, min_support=2)

    assert summary["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert summary["accuracy"] == pytest.approx(3 / 6)
    # F1: class 0 2*2/(3+3) = 2/3, class 1 2*1/(2+3) = 2/5, class 2 0.
    assert summary["macro_f1"] == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert summary["macro_f1_supported"] == pytest.approx((2 / 3 + 2 / 5) / 2)
    assert summary["uar"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert summary["uar_supported"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert summary["majority_accuracy"] == pytest.approx(3 / 6)
    # Classes 0 and 1 share "happy": the two mistakes between them are half right, the third shares nothing.
    assert summary["component_accuracy"] == pytest.approx((3 + 2 * 0.5) / 6)
    assert summary["component_both"] == pytest.approx(3 / 6)
    # AU1: tp 2, fp 1, fn 1, tn 2.
    one, twelve = summary["per_au"]
    assert one == {
        "action_unit": "AU1",
        "name": "Inner brow raiser",
        "support": 3,
        "known": 6,
        "predicted": 3,
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "floor": pytest.approx(2 * 0.5 / 1.5),
    }
    assert math.isnan(twelve["f1"])
    assert math.isnan(twelve["floor"])
    assert (twelve["support"], twelve["known"], twelve["predicted"]) == (0, 6, 1)
    assert summary["au_f1_mean"] == pytest.approx(2 / 3)
    assert summary["au_floor_mean"] == pytest.approx(2 / 3)
    assert summary["score"] == pytest.approx((summary["macro_f1_supported"] + 2 / 3) / 2)
    # Three images at probability 1/2, three at 1/4.
    assert summary["emotion_loss"] == pytest.approx((3 * math.log(2) + 3 * math.log(4)) / 6)
    right, wrong = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert summary["au_loss"] == pytest.approx((4 * right + 2 * wrong + 5 * right + 1 * wrong) / 12)
    assert summary["loss"] == pytest.approx(summary["emotion_loss"] + summary["au_loss"])
    assert (summary["emotion_known"], summary["au_known"]) == (6, 12)


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learn(seed: int):
    case = random_case(seed)
    summary = summarise(count(case), RAFCE)
    known = case.targets.emotion >= 0
    true, predicted = case.targets.emotion[known], case.emotion_logits.numpy().argmax(1)[known]
    present = np.unique(true)
    assert summary["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert summary["macro_f1"] == pytest.approx(f1_score(true, predicted, labels=present, average="macro"))
    recalls = precision_recall_fscore_support(true, predicted, labels=present)[1]
    assert summary["uar"] == pytest.approx(recalls.mean())
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert summary["uar"] == pytest.approx(balanced_accuracy_score(true, predicted))
    supported = [label for label in present if (true == label).sum() >= 10]
    assert summary["macro_f1_supported"] == pytest.approx(f1_score(true, predicted, labels=supported, average="macro"))
    precision, recall, f1, support = precision_recall_fscore_support(
        true, predicted, labels=range(14), zero_division=np.nan
    )
    for label, entry in enumerate(summary["per_class"]):
        assert entry["support"] == support[label]
        if support[label]:
            assert entry["f1"] == pytest.approx(f1[label])
            assert entry["recall"] == pytest.approx(recall[label])
        else:
            assert math.isnan(entry["f1"])
            assert math.isnan(entry["recall"])
        assert entry["precision"] == pytest.approx(precision[label], nan_ok=True)
    assert summary["emotion_loss"] == pytest.approx(
        log_loss(true, torch.softmax(case.emotion_logits.double(), 1).numpy()[known], labels=range(14))
    )
    f1_of_aus = []
    for i, entry in enumerate(summary["per_au"]):
        told = ~np.isnan(case.targets.action_units[:, i])
        labels, said = case.targets.action_units[told, i] == 1, case.au_logits.numpy()[told, i] >= 0
        assert (entry["support"], entry["known"], entry["predicted"]) == (labels.sum(), told.sum(), said.sum())
        if labels.any():
            assert entry["f1"] == pytest.approx(f1_score(labels, said))
            assert entry["floor"] == pytest.approx(f1_score(labels, np.ones_like(labels)))
            f1_of_aus.append(entry["f1"])
        else:
            assert entry["action_unit"] == "AU45"
            assert math.isnan(entry["f1"])
            assert math.isnan(entry["floor"])
    assert summary["au_f1_mean"] == pytest.approx(np.mean(f1_of_aus))


def test_counts_of_parts_add_up_to_counts_of_the_whole():
    case = random_case(7)
    parts = [
        count_batch(
            Logits(case.emotion_logits[rows], case.au_logits[rows]),
            torch.from_numpy(case.targets.emotion[rows]),
            torch.from_numpy(case.targets.action_units[rows]),
        )
        for rows in (slice(0, 100), slice(100, 101), slice(101, 300))
    ]
    total = Counts.zero(RAFCE)
    for part in parts:
        total += part
    reduced = Counts.from_vector(sum(part.to_vector() for part in parts), RAFCE)  # type: ignore[arg-type]
    whole = count(case)
    for field in fields(Counts):
        for merged in (total, reduced):
            np.testing.assert_allclose(getattr(merged, field.name), getattr(whole, field.name), rtol=1e-12)
    assert reduced.confusion.dtype == np.int64
    assert summarise(reduced, RAFCE)["macro_f1"] == summarise(whole, RAFCE)["macro_f1"]


def test_a_vector_of_another_taxonomy_is_refused():
    with pytest.raises(ValueError, match="do not hold the counts of 3 emotions"):
        Counts.from_vector(Counts.zero(RAFCE).to_vector(), THREE)


def test_probabilities_give_the_counts_of_their_logits():
    case = random_case(3)
    from_logits = count(case)
    from_probabilities = count_probabilities(Tasks(case.emotion_probabilities, case.au_probabilities), case.targets)
    for field in fields(Counts):
        np.testing.assert_allclose(getattr(from_probabilities, field.name), getattr(from_logits, field.name), rtol=1e-5)


def test_thresholds_per_action_unit_and_at_the_threshold_means_present():
    probabilities = np.array([[0.5, 0.5], [0.4, 0.5]])
    targets = np.ones((2, 2))
    found, known = Tasks(np.zeros((2, 0)), probabilities), Tasks(np.full(2, -1), targets)
    counts = count_probabilities(found, known, thresholds=[0.4, 0.6])
    assert counts.au_tp.tolist() == [2, 0]
    assert counts.au_fn.tolist() == [0, 2]
    assert count_probabilities(found, known).au_tp.tolist() == [1, 2]


def test_a_task_that_is_not_there_is_nan_and_the_other_is_not():
    case = random_case(1)
    emotions_only = Taxonomy(RAFCE.emotions, RAFCE.components, ())
    counts = count_batch(Logits(case.emotion_logits, None), torch.from_numpy(case.targets.emotion), torch.zeros(300, 0))
    summary = summarise(counts, emotions_only)
    assert math.isnan(summary["au_f1_mean"])
    assert math.isnan(summary["au_loss"])
    assert summary["per_au"] == []
    assert summary["loss"] == summary["emotion_loss"]
    assert summary["score"] == summary["macro_f1_supported"]

    aus_only = Taxonomy((), (), SEED18)
    counts = count_batch(
        Logits(None, case.au_logits), torch.full((300,), -1), torch.from_numpy(case.targets.action_units)
    )
    summary = summarise(counts, aus_only)
    assert math.isnan(summary["accuracy"])
    assert math.isnan(summary["majority_accuracy"])
    assert summary["score"] == summary["au_f1_mean"]
    assert summary["confusion"] == []


def test_nothing_known_gives_nan_everywhere():
    summary = summarise(Counts.zero(RAFCE), RAFCE)
    scalars = {key: value for key, value in summary.items() if isinstance(value, float)}
    assert all(math.isnan(value) for value in scalars.values()), scalars


def test_outputs_that_are_not_finite_have_no_figures():
    case = random_case(2)
    case.emotion_logits[5, 0] = math.nan
    summary = summarise(count(case), RAFCE)
    assert math.isnan(summary["loss"])
    assert math.isnan(summary["macro_f1"])
    assert math.isfinite(summary["au_f1_mean"])


def test_values_are_plain_and_survive_json():
    case = random_case(4)
    found = Tasks(case.emotion_probabilities, case.au_probabilities)
    result = evaluate_probabilities(found, case.targets, RAFCE, resamples=20)

    def check(value: object) -> None:
        assert type(value) in (float, int, str, list, dict), type(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    check(result)
    assert json.loads(json.dumps(result)).keys() == result.keys()


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="emotion label 3 for 3 classes"):
        count_probabilities(Tasks(np.full((1, 3), 1 / 3), np.zeros((1, 0))), Tasks(np.array([3]), np.zeros((1, 0))))
    with pytest.raises(ValueError, match="other than 0, 1 and NaN"):
        count_probabilities(Tasks(np.zeros((1, 0)), np.full((1, 1), 0.5)), Tasks(np.array([-1]), np.array([[0.5]])))


def test_component_overlap_of_rafce():
    overlap = component_overlap(RAFCE)
    assert np.diag(overlap).tolist() == [1.0] * 14
    np.testing.assert_array_equal(overlap, overlap.T)
    assert overlap[0, 1] == 0.5  # happily surprised, happily disgusted
    assert overlap[0, 2] == 0.0  # happily surprised, sadly fearful
    own_words = make_taxonomy(("smiling", "neutral"), ())
    assert np.isnan(component_overlap(own_words)).all()


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_scikit_learn_with_ties_and_weights(seed: int):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 20, 200) / 20
    targets = (generator.random(200) < 0.3).astype(float)
    targets[generator.random(200) < 0.2] = np.nan
    known = ~np.isnan(targets)
    weights = next(resample_weights(200, 10, seed))
    ranking = Ranking.of(scores, targets)
    np.testing.assert_allclose(
        ranking.average_precision(weights),
        [average_precision_score(targets[known], scores[known], sample_weight=row[known]) for row in weights],
        rtol=1e-6,
    )
    assert np.isnan(Ranking.of(scores, np.zeros(200)).average_precision(weights)).all()
    assert np.isnan(Ranking.of(scores, np.full(200, np.nan)).average_precision(weights)).all()


def test_resample_weights_draw_as_many_images_as_there_are():
    weights = np.concatenate(list(resample_weights(50, 400, seed=1)))
    assert weights.shape == (400, 50)
    assert (weights.sum(axis=1) == 50).all()
    # Every image is drawn once on average, with the variance 1 - 1/N of a binomial.
    assert weights.mean() == 1.0
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.05)
    np.testing.assert_array_equal(weights, np.concatenate(list(resample_weights(50, 400, seed=1))))


def test_interval_of_accuracy_is_the_binomial_one():
    generator = np.random.default_rng(0)
    emotion = generator.integers(0, 3, 900)
    right = generator.random(900) < 0.6
    predicted = np.where(right, emotion, (emotion + 1) % 3)
    result = evaluate_probabilities(
        Tasks(np.eye(3)[predicted], np.full((900, 2), 0.5)), Targets(emotion, np.full((900, 2), np.nan)), THREE
    )
    low, high = result["intervals"]["accuracy"]
    half = 1.96 * math.sqrt(0.6 * 0.4 / 900)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert low < result["accuracy"] < high
    assert result["intervals"]["au_f1_mean"] == pytest.approx([math.nan] * 2, nan_ok=True)


def test_bootstrap_figures_equal_those_of_the_drawn_images():
    case = random_case(11, size=60)
    (weights,) = resample_weights(60, 1, seed=0)
    drawn = np.repeat(np.arange(60), weights[0].astype(int))
    once = evaluate_probabilities(
        Tasks(case.emotion_probabilities, case.au_probabilities), case.targets, RAFCE, resamples=1, seed=0
    )
    by_hand = evaluate_probabilities(
        Tasks(case.emotion_probabilities[drawn], case.au_probabilities[drawn]),
        Targets(case.targets.emotion[drawn], case.targets.action_units[drawn]),
        RAFCE,
        resamples=1,
    )
    for name in ("accuracy", "macro_f1", "uar", "component_accuracy", "au_f1_mean", "au_ap_mean"):
        assert once["intervals"][name] == pytest.approx([by_hand[name]] * 2, rel=1e-5), name


def test_evaluation_carries_ap_and_thresholds_and_is_deterministic():
    case = random_case(5)
    arguments = (Tasks(case.emotion_probabilities, case.au_probabilities), case.targets, RAFCE)
    thresholds = np.linspace(0.3, 0.7, 18).tolist()
    result = evaluate_probabilities(*arguments, thresholds, resamples=50, seed=3)
    for i, entry in enumerate(result["per_au"]):
        known = ~np.isnan(case.targets.action_units[:, i])
        truth = case.targets.action_units[known, i]
        if truth.any():
            assert entry["ap"] == pytest.approx(average_precision_score(truth, case.au_probabilities[known, i]))
            assert entry["f1"] == pytest.approx(f1_score(truth, case.au_probabilities[known, i] >= thresholds[i]))
            assert entry["f1_interval"][0] <= entry["f1"] <= entry["f1_interval"][1]
        else:
            assert math.isnan(entry["ap"])
            assert all(math.isnan(end) for end in entry["f1_interval"])
        assert entry["threshold"] == thresholds[i]
    again = evaluate_probabilities(*arguments, thresholds, resamples=50, seed=3)
    assert json.dumps(result) == json.dumps(again)
    assert result["num_images"] == 300


def test_no_images_give_nan():
    targets = Targets(np.zeros(0, dtype=np.int64), np.zeros((0, 2)))
    result = evaluate_probabilities(Tasks(np.zeros((0, 3)), np.zeros((0, 2))), targets, THREE, resamples=5)
    assert math.isnan(result["accuracy"])
    assert all(math.isnan(end) for end in result["intervals"]["score"])


def test_action_units_alone_have_figures_and_intervals():
    taxonomy = make_taxonomy((), (1, 12))
    probabilities = np.array([[0.9, 0.2], [0.8, 0.6], [0.1, 0.7], [0.2, 0.1]])
    truth = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, np.nan], [0.0, 0.0]])
    targets = Targets(np.full(4, -1, dtype=np.int64), truth)
    result = evaluate_probabilities(Tasks(np.zeros((4, 0)), probabilities), targets, taxonomy, resamples=20)
    assert result["au_f1_mean"] == 1.0
    assert math.isnan(result["accuracy"])
    assert result["per_class"] == []
    assert all(0 <= end <= 1 for end in result["intervals"]["au_f1_mean"])


def test_percentile_interval():
    assert percentile_interval(np.arange(0, 1001) / 1000) == pytest.approx([0.025, 0.975])
    assert percentile_interval(np.array([np.nan, 0.5])) == [0.5, 0.5]
