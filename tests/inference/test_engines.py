"""Engines: every one of them gives torch's answers, whoever shares the batch."""

import threading

import numpy as np
import pytest
import torch

from rafce_ray.bundle.canary import draw_images, largest_difference
from rafce_ray.bundle.engines import Engine, OnnxRuntimeEngine, OpenVinoEngine, TorchEngine, to_onnx, to_openvino
from rafce_ray.bundle.model import Predictor
from rafce_ray.metrics.calibration import Outputs, calibrated

pytestmark = pytest.mark.numeric

FULL = {"au_attention": True, "compositional_head": True}

FAMILIES = [
    ("resnet18", (32, 32), {}),
    ("resnet50", (40, 32), FULL),
    ("convnext_tiny", (40, 32), {"au_attention": True}),
    ("efficientnet_b0", (32, 32), {"compositional_head": True}),
    ("efficientnet_lite0", (40, 32), {"au_attention": True}),
    ("mobilenet_v2", (32, 32), {"num_stages": 7, "pool_grid": 2, "mirror_average": True}),
    ("mobilenet_v3_small", (32, 64), FULL),
    ("timm/mobilenetv3_small_050", (40, 32), FULL),
    ("timm/test_vit", (40, 64), {"au_attention": True}),
    ("timm/swin_tiny_patch4_window7_224", (40, 64), {"au_attention": True}),
    ("vit_b_16", (40, 32), FULL),
]


def compiled(name: str, bundle) -> Engine:
    px = bundle.preprocessing.stored_px
    if name == "torch":
        return TorchEngine(bundle, threads=1)
    if name == "openvino":
        return OpenVinoEngine(to_openvino(bundle), stored_px=px, threads=1)
    return OnnxRuntimeEngine(to_onnx(bundle), stored_px=px, threads=1)


@pytest.fixture(scope="module")
def engines(bundle) -> dict[str, Engine]:
    return {name: compiled(name, bundle) for name in ("torch", "openvino")}


def check_engine(engine: Engine, bundle, tolerance: float = 1e-5, among_others: float = 1e-6) -> None:
    """Against torch, and in batches of 1 to 12 against itself; largest differences of a probability."""
    images = draw_images(bundle.preprocessing.stored_px, 12, seed=4)
    expected = TorchEngine(bundle).outputs(images)
    together = engine.outputs(images)
    assert together.emotion.dtype == together.action_units.dtype == np.float32
    assert largest_difference(together, expected, bundle.calibration) <= tolerance
    for size in (1, 2, 5):
        parts = [engine.outputs(images[start : start + size]) for start in range(0, len(images), size)]
        assert largest_difference(Outputs.concatenate(parts), together, bundle.calibration) <= among_others
    strangers = np.concatenate([images[:1], np.full((6, *images.shape[1:]), 255, np.uint8)])
    alone = engine.outputs(images[:1])
    among = engine.outputs(strangers)
    first = Outputs(among.emotion[:1], among.action_units[:1])
    assert largest_difference(first, alone, bundle.calibration) <= among_others


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_parity(name, engines, bundle):
    probabilities = calibrated(engines[name].outputs(draw_images(40, 12, seed=4)), bundle.calibration)
    assert probabilities.emotion.std(axis=0).min() > 0.05, "the network must tell the images apart"
    # torch's kernels differ with the size of the batch, and a network that was never trained makes more of it than
    # others.
    check_engine(engines[name], bundle, among_others=5e-6 if name == "torch" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "px", "options"), FAMILIES)
def test_parity_of_every_family(backbone, px, options, make_bundle):
    bundle = make_bundle(backbone, px=px, **options)
    for name in ("openvino", "onnxruntime"):
        engine = compiled(name, bundle)
        # Untrained inverted residuals with ReLU6 round by 2e-5: torch itself differs so much between fp32 and fp64.
        check_engine(engine, bundle, tolerance=5e-5 if backbone in ("mobilenet_v2", "efficientnet_lite0") else 1e-5)
        with pytest.raises(ValueError, match="expected"):
            engine.outputs(np.zeros((1, px[0] + 1, px[0] + 1, 3), np.uint8))


@pytest.mark.parametrize("task", ["emotions", "action_units"])
def test_a_single_task(task, make_bundle):
    bundle = make_bundle(**{task: False})
    found = compiled("openvino", bundle).outputs(draw_images(40, 2))
    missing = found.emotion if task == "emotions" else found.action_units
    assert missing.shape == (2, 0)
    assert largest_difference(found, TorchEngine(bundle).outputs(draw_images(40, 2)), bundle.calibration) <= 1e-5


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_what_is_no_batch_of_faces(name, engines):
    for images in (
        np.zeros((1, 40, 40, 3), np.float32),
        np.zeros((40, 40, 3), np.uint8),
        np.zeros((1, 32, 32, 3), np.uint8),
        np.zeros((1, 3, 40, 40), np.uint8),
    ):
        with pytest.raises(ValueError, match="expected"):
            engines[name].outputs(images)


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_images_may_lie_in_memory_as_they_like(name, engines):
    images = draw_images(40, 4, seed=2)
    expected = engines[name].outputs(images)
    strided = np.repeat(images, 2, axis=2)[:, :, ::2]
    frozen = images.copy()
    frozen.setflags(write=False)
    for same in (strided, frozen, torch.from_numpy(images)):
        np.testing.assert_array_equal(engines[name].outputs(same).emotion, expected.emotion)


def test_an_answer_stays_when_the_next_batch_comes(engines):
    first = engines["openvino"].outputs(draw_images(40, 3, seed=2))
    kept = first.emotion.copy()
    engines["openvino"].outputs(draw_images(40, 3, seed=9))
    np.testing.assert_array_equal(first.emotion, kept)


def test_called_from_several_threads(engines):
    images = draw_images(40, 8, seed=2)
    expected = engines["openvino"].outputs(images).emotion
    wrong = []

    def ask(row: int) -> None:
        for _ in range(10):
            if not np.array_equal(engines["openvino"].outputs(images[row : row + 1]).emotion[0], expected[row]):
                wrong.append(row)

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_torch_gets_its_threads_in_whichever_thread_calls(bundle):
    engine = TorchEngine(bundle, threads=2)
    found = []

    def ask() -> None:
        torch.set_num_threads(1)
        engine.outputs(draw_images(40, 1))
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert found == [2]


def test_a_predictor_takes_an_engine(engines, bundle):
    images = draw_images(40, 3, seed=6)
    ours, plain = Predictor(bundle, engine=engines["openvino"]), Predictor(bundle)
    assert (ours.engine.name, plain.engine.name, ours.device.type) == ("openvino", "torch", "cpu")
    assert ours.engine.precision == "fp32"
    np.testing.assert_allclose(ours.probabilities(images).emotion, plain.probabilities(images).emotion, atol=1e-5)
    assert [one.emotion.label for one in ours.predict(images)] == [one.emotion.label for one in plain.predict(images)]
