"""The population stability index against figures by hand, and the reference that it is told against."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.faces.decode import decode_face
from rafce_ray.metrics.calibration import Probabilities, SplitOutputs, calibrated
from rafce_ray.metrics.drift import Bins, DriftReference, Light, binned, build_reference, faces_needed, light_of, psi


def test_two_bins_by_hand():
    # Shares 30.5 / 41 and 10.5 / 41, exchanged: twice 20 / 41 of ln(30.5 / 10.5) = 1.0663514.
    assert psi((30, 10), (10, 30)) == pytest.approx(1.0403428, abs=1e-6)


def test_an_empty_bin_counts_as_half_a_face():
    # Shares 0.9 and 0.1, exchanged: twice 0.8 ln 9.
    assert psi((4, 0), (0, 4)) == pytest.approx(1.6 * 2.1972246, abs=1e-6)


def test_equal_counts_have_none_and_it_is_the_same_both_ways_and_never_below_0():
    draw = np.random.default_rng(0)
    for _ in range(100):
        one, other = draw.integers(0, 50, (2, 8)).tolist()
        assert psi(one, one) == 0
        assert psi(one, other) == pytest.approx(psi(other, one), rel=1e-12)
        assert psi(one, other) >= 0


def test_the_convention_is_for_shifts_of_this_size():
    """Of two even bins, 11 points of a share moved are a large change, 5 are none worth a look."""
    even = (500_000, 500_000)
    assert psi(even, (390_000, 610_000)) == pytest.approx(0.22 * np.log(0.61 / 0.39) / 2, abs=1e-3)
    assert psi(even, (450_000, 550_000)) < 0.1
    assert psi(even, (250_000, 750_000)) > 0.25


def test_where_nothing_changes_chance_gives_what_is_expected_of_it():
    draw, shares = np.random.default_rng(1), [0.1] * 10
    found = [psi(draw.multinomial(931, shares).tolist(), draw.multinomial(400, shares).tolist()) for _ in range(400)]
    assert np.mean(found) == pytest.approx(9 * (1 / 931 + 1 / 400), rel=0.1)


@pytest.mark.parametrize(
    ("reference", "needed"),
    [
        # 0.05 / 13 - 1 / 931 = 0.00277204 = 1 / 360.7
        ((931, *[0] * 13), 361),
        # 0.05 / 9 - 1 / 931 = 0.00448144 = 1 / 223.1
        ((931, *[0] * 9), 224),
        ((900, 31), 200),
        # 13 / 250 alone is more than 0.05.
        ((250, *[0] * 13), None),
        ((931,), None),
        ((0, 0), None),
    ],
)
def test_faces_that_it_takes(reference, needed):
    assert faces_needed(reference) == needed


def test_with_so_many_faces_chance_stays_half_of_a_moderate_change():
    for bins in (2, 10, 14):
        needed = faces_needed((931, *[0] * (bins - 1)))
        assert (bins - 1) * (1 / 931 + 1 / needed) <= 0.05


def test_bins_hold_a_tenth_each():
    bins = binned(np.arange(100.0))
    assert bins.counts == (10,) * 10
    assert bins.edges == pytest.approx(np.arange(9.9, 95, 9.9))
    assert [bins.place(value) for value in (-5.0, 9.8, 9.95, 1000.0)] == [0, 0, 1, 9]


def test_values_that_are_all_the_same_leave_two_bins():
    bins = binned(np.full(7, 0.25))
    assert (bins.edges, bins.counts) == ((0.25,), (0, 7))
    assert (bins.place(0.25), bins.place(0.24)) == (1, 0)


def test_light_by_hand():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert light_of(red) == Light(76.0, 0.0)  # 0.299 of 255
    halves = np.zeros((4, 4, 3), np.uint8)
    halves[:2] = 255
    assert light_of(halves) == Light(127.5, 127.5)


def three_faces(**changes) -> DriftReference | None:
    found = Probabilities(
        np.array([[0.7, 0.3], [0.2, 0.8], [0.1, 0.9]]), np.array([[0.5, 0.1], [0.6, 0.2], [0.4, 0.3]])
    )
    for name, value in changes.items():
        getattr(found, name)[0, 0] = value
    return build_reference(found, (0.5, 0.25), [Light(10, 1), Light(20, 2), Light(30, 3)])


def test_a_reference_counts_what_was_answered():
    reference = three_faces()
    assert (reference.num_images, reference.emotions, reference.action_units) == (3, (1, 2), (2, 1))
    assert reference.confidence == binned(np.array([0.7, 0.8, 0.9]))
    assert reference.brightness == binned(np.array([10.0, 20.0, 30.0]))
    counts = reference.counts(("AU1", "AU12"))
    assert list(counts) == ["emotion", "confidence", "brightness", "contrast", "AU1", "AU12"]
    assert (counts["emotion"], counts["AU1"], counts["AU12"]) == ((1, 2), (1, 2), (2, 1))


def test_there_is_no_reference_of_what_is_no_number():
    assert three_faces(emotion=np.nan) is None
    assert three_faces(action_units=np.inf) is None


def test_a_model_without_emotions_has_a_reference_without_them():
    reference = build_reference(Probabilities(np.zeros((2, 0)), np.array([[0.9], [0.1]])), (0.5,), [Light(1, 1)] * 2)
    assert list(reference.counts(("AU4",))) == ["brightness", "contrast", "AU4"]
    assert reference.counts(("AU4",))["AU4"] == (1, 1)


EVEN = Bins((0.5,), (2, 2))
PARTS = {
    "num_images": 4,
    "emotions": (1, 3),
    "action_units": (0, 4),
    "confidence": EVEN,
    "brightness": EVEN,
    "contrast": EVEN,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"emotions": (1, 2)}, "emotion"),
        ({"emotions": (-1, 5)}, "emotion"),
        ({"action_units": (5,)}, "action_units"),
        ({"confidence": None}, "confidence"),
        ({"num_images": 0}, "num_images"),
        ({"brightness": Bins((0.5,), (1, 2))}, "brightness"),
    ],
)
def test_counts_that_do_not_fit_are_refused(change, reason):
    DriftReference(**PARTS)
    with pytest.raises(ValueError, match=reason):
        DriftReference(**PARTS | change)


@pytest.mark.parametrize(
    ("edges", "counts"), [((), (1,)), ((1.0, 1.0), (1, 1, 1)), ((float("nan"),), (1, 1)), ((1.0,), (1,))]
)
def test_bins_that_are_none_are_refused(edges, counts):
    with pytest.raises(ValueError, match="expected"):
        Bins(edges, counts)


def test_the_end_of_a_run_keeps_validations_reference(trained_run, drawn_faces):
    run, returned = trained_run
    bundle = load_bundle(returned["bundle"])
    reference, outputs = (
        bundle.drift_reference,
        SplitOutputs.from_parquet((run / "outputs_validation.parquet").read_bytes()),
    )
    found = calibrated(outputs.outputs, bundle.calibration)
    assert reference.num_images == len(outputs.names) > 10
    predicted = found.emotion.argmax(axis=1).tolist()
    assert reference.emotions == tuple(predicted.count(label) for label in range(bundle.taxonomy.num_emotions))
    for column, threshold in enumerate(bundle.calibration.au_thresholds):
        assert reference.action_units[column] == (found.action_units[:, column] >= threshold).sum()
    # Pillow's grey of the files themselves, instead of OpenCV's of the store.
    greys = [
        grey_of(next((drawn_faces / "aligned").glob(f"{Path(name).stem}*")), bundle.preprocessing.stored_px)
        for name in outputs.names
    ]
    brightness = np.quantile([grey.mean() for grey in greys], np.arange(1, 10) / 10)
    contrast = np.quantile([grey.std() for grey in greys], np.arange(1, 10) / 10)
    np.testing.assert_allclose(reference.brightness.edges, brightness, atol=1)
    np.testing.assert_allclose(reference.contrast.edges, contrast, atol=1)


def grey_of(file: Path, px: int) -> np.ndarray:
    face = Image.fromarray(decode_face(file.read_bytes(), px))
    return np.asarray(face.convert("L"), np.float64)
