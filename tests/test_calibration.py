"""From logits to probabilities and decisions: the record's rules, its one reader, and the mark of an unsure emotion."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.bundle import Bundle, load_bundle, save_bundle
from rafce_ray.bundle.model import Predictor
from rafce_ray.faces.preprocess import Preprocessing
from rafce_ray.metrics.calibration import Calibration, Outputs, calibrated
from rafce_ray.model.network import Architecture, build_model


def outputs(emotion: list, action_units: list) -> Outputs:
    return Outputs(np.array(emotion, dtype=np.float32), np.array(action_units, dtype=np.float32))


def test_hand_computed_probabilities():
    given = outputs([[2 * math.log(3), 0.0]], [[1.0, 1.0]])
    found = calibrated(given, Calibration(2.0, (0.5, 0.5), (2.0, 1.0), (-2.0, math.log(4) - 1)))
    np.testing.assert_allclose(found.emotion, [[0.75, 0.25]], rtol=1e-6)
    # sigmoid(2 * 1 - 2) = 1/2 and sigmoid(1 + log 4 - 1) = 4/5.
    np.testing.assert_allclose(found.action_units, [[0.5, 0.8]], rtol=1e-6)


def test_uncalibrated_leaves_the_networks_probabilities():
    given = outputs([[1.0, 2.0, 3.0]], [[-1.0, 0.0]])
    found = calibrated(given, Calibration.uncalibrated(2))
    np.testing.assert_allclose(found.emotion, torch.softmax(torch.tensor([[1.0, 2.0, 3.0]]).double(), 1), rtol=1e-12)
    np.testing.assert_allclose(found.action_units, torch.sigmoid(torch.tensor([[-1.0, 0.0]]).double()), rtol=1e-12)


def test_huge_logits_give_probabilities_that_still_tell_how_sure():
    found = calibrated(outputs([[1e30, 0.0], [30.0, 0.0]], [[1e30], [30.0]]), Calibration.uncalibrated(1))
    assert np.isfinite(found.emotion).all()
    np.testing.assert_array_equal(found.emotion[0], [1.0, 0.0])
    assert found.action_units[0, 0] == 1.0
    # In single precision both would be 1 already.
    assert 1 - found.action_units[1, 0] == pytest.approx(math.exp(-30), rel=0.01)
    assert found.emotion[1, 1] == pytest.approx(math.exp(-30), rel=1e-6)


def test_a_task_that_is_not_predicted_stays_empty():
    found = calibrated(outputs([[], []], [[0.0], [0.0]]), Calibration(1.7, (0.5,)))
    assert found.emotion.shape == (2, 0)
    found = calibrated(Outputs(np.zeros((2, 3), np.float32), np.zeros((2, 0), np.float32)), Calibration(1.7, ()))
    assert found.action_units.shape == (2, 0)


def test_batches_are_joined_in_order():
    joined = Outputs.concatenate([outputs([[1.0], [2.0]], [[], []]), outputs([[3.0]], [[]])])
    assert joined.emotion.tolist() == [[1.0], [2.0], [3.0]]
    assert joined.action_units.shape == (3, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"au_thresholds": (1.1,)}, "au_thresholds"),
        ({"au_thresholds": (math.nan,)}, "au_thresholds"),
        ({"au_thresholds": (0.5,), "au_slopes": (-1.0,)}, "au_slopes"),
        ({"au_thresholds": (0.5,), "au_shifts": (math.inf,)}, "au_shifts"),
        ({"au_thresholds": (0.5, 0.5), "au_shifts": (0.0,)}, "1 au_shifts for 2 au_thresholds"),
        ({"unsure_below": 1.5}, "unsure_below"),
    ],
)
def test_what_is_no_calibration_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Calibration(**arguments)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    torch.manual_seed(0)
    architecture = Architecture("mobilenet_v3_small", 32, 3, 2)
    model = build_model(architecture)
    with torch.no_grad():
        for head in (model.emotion_head, model.au_head):
            for parameter in head.parameters():
                parameter.normal_(std=0.5)
    path: Path = tmp_path_factory.mktemp("bundles") / "bundle"
    save_bundle(
        path,
        model=model,
        architecture=architecture,
        taxonomy=make_taxonomy(("a", "b", "c"), (1, 12)),
        preprocessing=Preprocessing(40, 32),
        calibration=Calibration(1.3, (0.5, 0.5)),
        metrics={},
        provenance={},
    )
    return load_bundle(path)


def test_an_emotion_is_unsure_below_the_limit_and_sure_at_it(bundle):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)

    def unsure(limit: float | None) -> list[bool]:
        limited = replace(bundle, calibration=replace(bundle.calibration, unsure_below=limit))
        return [one.emotion.unsure for one in Predictor(limited).predict(images)]

    confidence = Predictor(bundle).probabilities(images).emotion.max(axis=1)
    assert unsure(None) == [False] * 3
    for row, limit in enumerate(confidence.tolist()):
        assert unsure(limit)[row] is False
        assert unsure(float(np.nextafter(limit, 1.0)))[row] is True
    assert unsure(1.0) == [True] * 3
    assert unsure(0.0) == [False] * 3


def test_an_action_unit_is_active_at_its_threshold_and_not_below(bundle):
    images = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 3)).astype(np.uint8)
    probability = Predictor(bundle).probabilities(images).action_units[0]
    at = (float(probability[0]), float(np.nextafter(probability[1], 1.0)))
    limited = replace(bundle, calibration=replace(bundle.calibration, au_thresholds=at))
    assert [unit.active for unit in Predictor(limited).predict(images)[0].action_units] == [True, False]
