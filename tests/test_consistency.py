"""How emotion and action units of a face fit together, by hand."""

import math

import numpy as np
import pytest

from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, Taxonomy, make_taxonomy
from rafce_ray.metrics.consistency import Association, basic_emotion_probabilities, consistency_of, estimate_association

NAN = math.nan


def test_association_is_smoothed_towards_the_prevalence():
    emotion = np.array([0, 0, 0, 0, 1, -1])
    action_units = np.array([[1, NAN], [1, NAN], [1, NAN], [NAN, NAN], [0, NAN], [0, NAN]], dtype=np.float32)
    found = estimate_association(emotion, action_units, 3)
    # Overall: 3 of 5 known, (3 + 1) / (5 + 2); class 0: 3 of 3 known, (3 + 10 p) / (3 + 10); class 1: 0 of 1; class 2:
    # none.
    p = 4 / 7
    assert found.overall == (pytest.approx(p), None)
    assert [row[0] for row in found.given_emotion] == pytest.approx([(3 + 10 * p) / 13, 10 * p / 11, p])
    assert [row[1] for row in found.given_emotion] == [None] * 3


def test_a_large_class_speaks_for_itself():
    emotion = np.repeat([0, 1], 5000)
    action_units = np.concatenate([np.ones(5000), np.zeros(5000)])[:, None]
    found = estimate_association(emotion, action_units, 2)
    assert [row[0] for row in found.given_emotion] == pytest.approx([1.0, 0.0], abs=2e-3)
    assert 0.0 < found.given_emotion[1][0] < found.given_emotion[0][0] < 1.0


ASSOCIATION = Association(
    given_emotion=((0.9, 0.04, 0.05, None), (0.5, 0.5, 0.5, None)), overall=(0.5, 0.5, 0.06, None)
)


def test_score_and_contradictions_by_hand():
    # AU 0 absent though 90 % have it, AU 1 present though 4 % have it, AU 2 present though 5 % have it, AU 3 is not
    # known of.
    found = consistency_of(ASSOCIATION, 0, np.array([False, True, True, True]))
    assert found.score == pytest.approx((0.1 / 0.9 * 0.04 / 0.96 * 0.05 / 0.95) ** (1 / 3))
    # AU 2 is rare everywhere (6 %): its presence says nothing against this emotion.
    assert found.contradicting == (0, 1)


def test_the_most_usual_states_score_1_and_contradict_nothing():
    found = consistency_of(ASSOCIATION, 0, np.array([True, False, False, False]))
    assert found.score == pytest.approx(1.0)
    assert found.contradicting == ()
    even = consistency_of(ASSOCIATION, 1, np.array([True, True, True, True]))
    assert even.score == pytest.approx(1.0)
    assert even.contradicting == ()


def test_scores_of_what_was_estimated_are_above_0():
    """Smoothing keeps every probability off 0 and 1, so that no state is impossible."""
    emotion = np.zeros(100_000, dtype=np.int64)
    association = estimate_association(emotion, np.ones((100_000, 1)), 1)
    found = consistency_of(association, 0, np.array([False]))
    assert 0.0 < found.score < 1e-3


def test_nothing_known_has_no_consistency():
    nothing = Association(given_emotion=((None, None),), overall=(None, None))
    assert consistency_of(nothing, 0, np.array([True, False])) is None


def test_an_association_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="2 action units beside 1"):
        Association(given_emotion=((0.5, 0.5),), overall=(0.5,))
    for impossible in (-0.1, 0.0, 1.0, 1.5, NAN):
        with pytest.raises(ValueError, match=r"Input should be (greater|less) than"):
            Association(given_emotion=((impossible,),), overall=(0.5,))


def test_basic_emotions_by_hand():
    taxonomy = make_taxonomy(("happily surprised", "sadly angry", "happily sad"), ())
    assert taxonomy.basic_emotions == ("surprised", "happy", "sad", "angry")
    found = basic_emotion_probabilities(np.array([[0.5, 0.2, 0.3]]), taxonomy)
    np.testing.assert_allclose(found, [[0.5, 0.8, 0.5, 0.2]])


def test_basic_emotions_of_rafce_sum_to_2():
    emotion = np.random.default_rng(0).dirichlet(np.ones(14), 20)
    found = basic_emotion_probabilities(emotion, make_taxonomy(tuple(RAFCE_EMOTIONS), ()))
    assert found.shape == (20, 6)
    np.testing.assert_allclose(found.sum(axis=1), 2.0)


def test_classes_without_components_have_no_basic_emotions():
    emotion = np.array([[0.7, 0.3]])
    assert basic_emotion_probabilities(emotion, make_taxonomy(("calm", "smiling"), ())).shape == (1, 0)
    mixed = Taxonomy(("calm", "happily sad"), (None, ("happy", "sad")), ())
    np.testing.assert_allclose(basic_emotion_probabilities(emotion, mixed), [[0.3, 0.3]])
    assert basic_emotion_probabilities(np.zeros((2, 0)), make_taxonomy((), (1,))).shape == (2, 0)
