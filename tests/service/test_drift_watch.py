"""The sliding window of one model's faces: what its PSI is, when it is known, and what the log says of it."""

import logging
import math

import pytest

from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.model import ActionUnitPrediction, EmotionPrediction, Prediction
from rafce_ray.metrics.drift import Bins, DriftReference, Light, psi
from rafce_ray.service.live import WINDOW_FACES, DriftWatch

TAXONOMY = make_taxonomy(("glad", "sad"), (12,))
REFERENCE = DriftReference(
    num_images=1000,
    emotions=(500, 500),
    action_units=(200,),
    confidence=Bins((0.5,), (100, 900)),
    brightness=Bins((100.0,), (500, 500)),
    contrast=Bins((50.0,), (500, 500)),
)


LIGHT = Light(120, 20)


def face(label: int, *, active: bool = False, probability: float = 0.9) -> Prediction:
    emotion = EmotionPrediction(TAXONOMY.emotions[label], label, probability, False, (), ())
    return Prediction(emotion, (ActionUnitPrediction("AU12", "", 0.5, 0.5, active),), None)


def feed(watch: DriftWatch, num_glad: int, num_sad: int, light: Light = LIGHT) -> None:
    """Faces of both classes, every second one bright and one with contrast, one in five with AU12."""
    for number in range(num_glad + num_sad):
        own = Light(light.brightness if number % 2 else 80, light.contrast if number % 2 else 60)
        watch.add(face(int(number >= num_glad), active=number % 5 == 0, probability=0.4 + (number % 10 > 0)), own)


@pytest.fixture
def watch() -> DriftWatch:
    return DriftWatch(REFERENCE, TAXONOMY, "7")


def test_unknown_until_there_are_enough_faces(watch):
    assert set(watch.psi) == {"emotion", "confidence", "brightness", "contrast", "AU12"}
    feed(watch, 75, 74)
    assert (watch.num_faces, all(math.isnan(value) for value in watch.psi.values())) == (100, True)
    assert watch.min_faces == dict.fromkeys(watch.psi, 200)
    feed(watch, 26, 25)
    assert watch.num_faces == 200
    assert watch.psi["emotion"] == pytest.approx(0, abs=1e-3)


def test_faces_like_validations_have_none(watch):
    for _ in range(4):
        feed(watch, 25, 25)
    assert max(watch.psi.values()) < 0.001


def test_it_is_the_psi_of_what_was_counted(watch):
    feed(watch, 300, 100)
    assert watch.psi["emotion"] == psi((500, 500), (300, 100))
    assert watch.psi["AU12"] == psi((800, 200), (320, 80))
    assert watch.psi["confidence"] == psi((100, 900), (40, 360))
    assert watch.psi["brightness"] == watch.psi["contrast"] == psi((500, 500), (200, 200))


def test_light_alone_may_drift(watch):
    feed(watch, 100, 100, Light(20, 20))
    assert watch.psi["brightness"] == psi((500, 500), (200, 0))
    assert watch.psi["emotion"] == pytest.approx(0, abs=1e-3)


def test_old_faces_leave_the_window(watch):
    feed(watch, 300, 0)
    assert watch.psi["emotion"] > 1
    for _ in range(WINDOW_FACES // 50):
        feed(watch, 25, 25)
    assert watch.num_faces == WINDOW_FACES
    assert watch.psi["emotion"] == psi((500, 500), (WINDOW_FACES // 2, WINDOW_FACES // 2))


def test_the_log_tells_once_when_it_drifts_and_once_when_it_returns(watch, caplog):
    caplog.set_level(logging.INFO)
    feed(watch, 200, 0)
    feed(watch, 200, 0)
    (told,) = caplog.records
    assert (told.levelname, "drift of emotion" in told.getMessage()) == ("WARNING", True)
    assert told.fields == {
        "statistic": "emotion",
        "psi": round(psi((500, 500), (200, 0)), 4),
        "faces": 200,
        "model": "7",
    }
    caplog.clear()
    # 400 glad and so many sad ones: below 0.25, but not below 0.2, is no news in either direction.
    while not watch.psi["emotion"] < 0.25:
        feed(watch, 0, 50)
    assert watch.psi["emotion"] > 0.2
    assert not caplog.records
    while not watch.psi["emotion"] < 0.2:
        feed(watch, 0, 50)
    (told,) = caplog.records
    assert told.getMessage().startswith("drift of emotion has returned")
    assert told.fields["psi"] < 0.2


def test_without_a_reference_nothing_is_known_and_that_is_said():
    watch = DriftWatch(None, TAXONOMY, "7")
    feed(watch, 300, 0)
    assert (watch.psi, watch.num_faces, watch.num_reference_images) == ({}, 0, 0)
    assert "Train it again" in watch.remark


def test_a_reference_of_few_images_tells_what_it_can():
    few = Bins((1.0, *range(2, 10)), (10,) * 10)
    reference = DriftReference(100, (50, 50), (20,), Bins((0.5,), (10, 90)), few, Bins((50.0,), (50, 50)))
    watch = DriftWatch(reference, TAXONOMY, "7")
    feed(watch, 300, 0)
    assert math.isnan(watch.psi["brightness"])
    assert watch.psi["emotion"] > 0.25
    assert watch.min_faces == {"emotion": 200, "confidence": 200, "brightness": None, "contrast": 200, "AU12": 200}
    assert watch.remark.startswith("Drift of brightness is unknown: the reference's 100 images")
    assert DriftWatch(REFERENCE, TAXONOMY, "7").remark is None


def test_a_model_without_one_of_the_tasks():
    taxonomy = make_taxonomy((), (12,))
    reference = DriftReference(1000, (), (200,), None, REFERENCE.brightness, REFERENCE.contrast)
    watch = DriftWatch(reference, taxonomy, "7")
    for number in range(200):
        watch.add(Prediction(None, face(0, active=number < 100).action_units, None), Light(120, 60))
    assert list(watch.psi) == ["brightness", "contrast", "AU12"]
    assert watch.psi["AU12"] == psi((800, 200), (100, 100))
