"""The judge of the comparison with other tools, by hand and against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
from peers.judge import (
    Answers,
    Truth,
    differences,
    faces_found,
    figures,
    fitted_threshold,
    intervals,
    judge,
    mean_of,
    ordered_pairs,
)
from sklearn.metrics import roc_auc_score

NAN = float("nan")

# Two people to fit on, three held out; each smiles once.
TRUTH = Truth(
    smiling=np.array([True, False] * 5),
    train=np.array([True] * 4 + [False] * 6),
    person=np.array(["a", "a", "b", "b", "c", "c", "d", "d", "e", "e"]),
)
# Its smiles are shy: above 0.3 on train. Of the held-out people it sees no face in d's smile, and calls e's calm face
# sad with more happiness than calm.
ANSWERS = Answers(
    num_faces=np.array([1, 1, 1, 2, 1, 1, 0, 1, 1, 1]),
    happy=np.array([0.9, 0.1, 0.4, 0.2, 0.45, 0.05, NAN, 0.1, 0.8, 0.3]),
    neutral=np.array([0.1, 0.9, 0.6, 0.8, 0.55, 0.95, NAN, 0.9, 0.2, 0.2]),
    first=np.array(["happy", "neutral", "neutral", "neutral", "neutral", "neutral", "", "neutral", "happy", "sad"]),
)


def test_the_threshold_is_the_middle_of_the_best():
    smiling = np.array([True, False, True, False])
    assert fitted_threshold(np.array([0.9, 0.1, 0.4, 0.2]), smiling) == pytest.approx(0.3)
    # 0.3 and 0.8 are wrong once each, 0.55 twice. Of two, the upper one; what has no score does not count.
    assert fitted_threshold(np.array([0.9, 0.2, 0.4, 0.7, NAN]), np.append(smiling, True)) == pytest.approx(0.8)
    # All right for every threshold between 0.4 and 0.6: the only candidate there is halfway.
    assert fitted_threshold(np.array([0.6, 0.4, 0.7, 0.2]), smiling) == pytest.approx(0.5)
    # Scores that say nothing: always neutral is as good as always smiling.
    assert fitted_threshold(np.array([0.5, 0.5]), np.array([True, False])) in (-np.inf, np.inf)


def test_a_tool_is_judged_as_by_hand():
    judged = judge(ANSWERS, TRUTH)
    assert judged.score == "happy"
    assert judged.threshold == pytest.approx(0.3)
    assert judged.own.tolist() == [0, 1, 0, 1, 1, 0]
    assert judged.first.tolist() == [0, 1, 0, 1, 1, 0]
    # e's calm face lies on the threshold, not above it.
    assert judged.fitted.tolist() == [1, 1, 0, 1, 1, 1]
    # c's smile (0.45) and e's (0.8) are above all three calm faces; d's was not found.
    assert judged.pairs.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1]]
    assert figures(judged) == pytest.approx({"own": 3 / 6, "first": 3 / 6, "fitted": 5 / 6, "auc": 6 / 9})


def test_the_first_answer_is_right_only_by_its_name():
    sad = replace(ANSWERS, first=np.where(ANSWERS.first == "neutral", "sad", ANSWERS.first))
    assert figures(judge(sad, TRUTH))["first"] == pytest.approx(1 / 6)
    assert figures(judge(sad, TRUTH))["own"] == pytest.approx(3 / 6)


def test_a_face_that_is_missing_in_train_does_not_move_the_threshold():
    missing = replace(
        ANSWERS,
        num_faces=np.array([0, *ANSWERS.num_faces[1:]]),
        happy=np.array([NAN, *ANSWERS.happy[1:]]),
        neutral=np.array([NAN, *ANSWERS.neutral[1:]]),
    )
    assert judge(missing, TRUTH).threshold == pytest.approx(0.3)


def test_the_score_is_the_one_that_orders_train_better():
    # Happiness alone is the wrong way round on b.
    shy = replace(ANSWERS, happy=np.array([0.9, 0.1, 0.4, 0.45, *ANSWERS.happy[4:]]))
    judged = judge(shy, TRUTH)
    assert judged.score == "happy - neutral"
    assert judged.threshold == pytest.approx((-0.2 - 0.35) / 2)


def test_auc_is_scikit_learns():
    random = np.random.default_rng(0)
    scores, smiling = random.random(60).round(1), random.random(60) > 0.5
    assert ordered_pairs(scores, smiling).mean() == pytest.approx(roc_auc_score(smiling, scores))


def test_of_several_models_the_figures_are_means():
    other = judge(replace(ANSWERS, num_faces=np.where(ANSWERS.num_faces == 0, 1, ANSWERS.num_faces)), TRUTH)
    perfect = replace(other, own=np.ones(6), first=np.ones(6), fitted=np.ones(6), pairs=np.ones((3, 3)))
    both = mean_of([judge(ANSWERS, TRUTH), perfect])
    assert figures(both) == pytest.approx({"own": 0.75, "first": 0.75, "fitted": 11 / 12, "auc": 15 / 18})


def test_intervals_are_of_people():
    judged = judge(ANSWERS, TRUTH)
    # A resample may hold one person three times: d alone is half right, c and e are wholly right.
    assert intervals(judged, TRUTH)["fitted"] == [0.5, 1.0]
    same = differences(judged, judged, TRUTH)
    assert all(one == {"value": 0.0, "low": 0.0, "high": 0.0} for one in same.values())
    # One that is wrong where the other is right, and right where it is wrong, for every person alike.
    right, wrong = replace(judged, fitted=np.ones(6)), replace(judged, fitted=np.array([1.0, 0.0] * 3))
    assert differences(right, wrong, TRUTH)["fitted"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


def test_shares_of_faces_found():
    assert faces_found(ANSWERS.num_faces) == pytest.approx({"one": 0.8, "none": 0.1, "several": 0.1})
