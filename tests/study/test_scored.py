"""Log losses among the figures, and one yardstick for runs that read labels differently."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, make_taxonomy
from rafce_ray.bundle.evaluate import evaluate_outputs
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs
from rafce_ray.study.finalists import TaggedOutputs, on_labels_of_first, score_with_losses

TAXONOMY = make_taxonomy(tuple(list(RAFCE_EMOTIONS)[:4]), (1, 12))
CALIBRATION = Calibration(1.5, (0.4, 0.6))


@pytest.fixture(scope="module")
def split():
    generator = np.random.default_rng(0)
    emotion = generator.integers(-1, 4, 200)
    action_units = (generator.random((200, 2)) < 0.4).astype(np.float32)
    action_units[generator.random((200, 2)) < 0.1] = np.nan
    outputs = Outputs(
        generator.normal(size=(200, 4)).astype(np.float32), generator.normal(size=(200, 2)).astype(np.float32)
    )
    return SplitOutputs([f"{i:04d}.jpg" for i in range(200)], emotion, action_units, outputs)


def test_losses_are_those_of_an_evaluation(split):
    found = score_with_losses(split, TAXONOMY, CALIBRATION)
    expected = evaluate_outputs(split, TAXONOMY, CALIBRATION)
    for name in ("emotion_loss", "au_loss", "loss", "accuracy", "score"):
        assert found.figures[name] == pytest.approx(expected[name])
    known = split.emotion >= 0
    log_p = log_softmax(split.outputs.emotion[known].astype(float) / 1.5, axis=1)
    assert found.figures["emotion_loss"] == pytest.approx(
        log_loss(split.emotion[known], np.exp(log_p), labels=range(4))
    )


def test_resamples_of_a_loss_spread_as_the_standard_error_says_and_go_with_those_of_accuracy(split):
    found = score_with_losses(split, TAXONOMY, CALIBRATION)
    known = split.emotion >= 0
    log_p = log_softmax(split.outputs.emotion[known].astype(float) / 1.5, axis=1)
    each = -log_p[np.arange(known.sum()), split.emotion[known]]
    assert found.draws["emotion_loss"].std() == pytest.approx(each.std() / np.sqrt(known.sum()), rel=0.12)
    right = log_p.argmax(axis=1) == split.emotion[known]
    of_images = np.corrcoef(each, right)[0, 1]
    assert np.corrcoef(found.draws["emotion_loss"], found.draws["accuracy"])[0, 1] == pytest.approx(of_images, abs=0.1)


def test_a_task_that_is_not_told_has_no_loss(split):
    silent = replace(split, outputs=Outputs(split.outputs.emotion, np.zeros((200, 0), np.float32)))
    silent = replace(silent, action_units=np.zeros((200, 0), np.float32))
    found = score_with_losses(silent, make_taxonomy(TAXONOMY.emotions, ()), Calibration(1.5), resamples=10)
    assert np.isnan(found.figures["au_loss"])
    assert found.figures["loss"] == found.figures["emotion_loss"]


def test_runs_are_measured_by_the_labels_of_the_first_and_that_is_said(split):
    negative = replace(split, action_units=np.nan_to_num(split.action_units))
    backwards = SplitOutputs(
        negative.names[::-1],
        negative.emotion[::-1],
        negative.action_units[::-1],
        Outputs(negative.outputs.emotion[::-1], negative.outputs.action_units[::-1]),
    )
    runs = [TaggedOutputs("base", split, TAXONOMY), TaggedOutputs("other", backwards, TAXONOMY)]
    found = on_labels_of_first(runs)
    assert found.is_relabelled == [False, True]
    assert found.remarks == ["other reads other AU labels than base: it is measured by the latter's."]
    np.testing.assert_array_equal(found.splits[1].action_units, split.action_units)
    np.testing.assert_array_equal(found.splits[1].outputs.action_units, split.outputs.action_units)
    assert on_labels_of_first(runs[:1]).remarks == []


def test_other_action_units_are_told(split):
    other = TaggedOutputs("other", split, make_taxonomy(TAXONOMY.emotions, (2, 4)))
    found = on_labels_of_first([TaggedOutputs("base", split, TAXONOMY), other])
    assert found.is_relabelled == [False, False]
    assert "other has other action units than base" in found.remarks[0]
