"""The graph that other runtimes get: the same preprocessing and network as torch's own path."""

import numpy as np
import pytest
import torch

from rafce_ray.bundle.canary import draw_images, raw_outputs
from rafce_ray.bundle.engines import Graph, output_names, resize_matrix
from rafce_ray.faces.preprocess import Preprocessing, resize_and_normalise, to_unit

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(("stored_px", "image_px"), [(100, 32), (32, 100), (41, 40)])
def test_the_matrix_resizes_as_preprocessing_does(stored_px, image_px):
    plain = Preprocessing(stored_px, image_px, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    noise = np.random.default_rng(0).integers(0, 256, (2, stored_px, stored_px, 3), dtype=np.uint8)
    unit = to_unit(torch.from_numpy(noise))
    matrix = resize_matrix(plain)
    assert matrix.shape == (image_px, stored_px)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(image_px))
    torch.testing.assert_close(matrix @ unit @ matrix.T, resize_and_normalise(unit, plain), rtol=0, atol=1e-6)


def test_nothing_is_resized_where_the_sizes_are_the_same():
    assert resize_matrix(Preprocessing(32, 32)) is None


def test_the_graph_answers_as_the_forward_pass(bundle):
    images = draw_images(bundle.preprocessing.stored_px, 5, seed=8)
    expected = raw_outputs(bundle.model, images, bundle.preprocessing, torch.device("cpu"))
    with torch.inference_mode():
        emotion, action_units = Graph(bundle.model, bundle.preprocessing).eval()(torch.from_numpy(images))
    assert expected.emotion.std() > 0.5
    np.testing.assert_allclose(emotion.numpy(), expected.emotion, atol=1e-4)
    np.testing.assert_allclose(action_units.numpy(), expected.action_units, atol=1e-4)


def test_a_missing_task_has_no_output(make_bundle):
    assert output_names(make_bundle(action_units=False).architecture) == ("emotion",)
    assert output_names(make_bundle(emotions=False).architecture) == ("action_units",)
