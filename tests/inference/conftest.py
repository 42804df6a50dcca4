"""Bundles of untrained networks that answer differently to different images, as trained ones do."""

from collections.abc import Callable

import pytest
import torch

from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.bundle import Bundle, load_bundle, save_bundle
from rafce_ray.bundle.canary import draw_images
from rafce_ray.faces.preprocess import Preprocessing, preprocess
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.model.backbones import normalisation_of
from rafce_ray.model.network import Architecture, MultiTaskModel, build_model

MakeBundle = Callable[..., Bundle]


def awake(model: MultiTaskModel, preprocessing: Preprocessing) -> None:
    """Batch statistics of real inputs, and heads scaled so that logits vary by 2 between images that were not among
    them.
    """
    seen, new = (
        preprocess(torch.from_numpy(draw_images(preprocessing.stored_px, 64, seed)), preprocessing) for seed in (3, 13)
    )
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
            layer.reset_running_stats()
    with torch.no_grad():
        model.train()(seen)
        logits = model.eval()(new)
        if model.emotion_head is not None:
            model.emotion_head.flat.weight.mul_(2 / logits.emotion.std(0).mean())
        if model.au_head is not None:
            model.au_head.weight.mul_(2 / logits.action_units.std(0).mean())


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """A bundle of a backbone with three emotions and two action units; ``emotions`` and ``action_units`` leave a task
    out.
    """

    def make(
        backbone: str = "mobilenet_v3_small",
        *,
        px: tuple[int, int] = (40, 32),
        seed: int = 0,
        emotions: bool = True,
        action_units: bool = True,
        **options: object,
    ) -> Bundle:
        names = ("happily surprised", "calm", "sadly angry") if emotions else ()
        taxonomy = make_taxonomy(names, (1, 12) if action_units else ())
        architecture = Architecture(
            backbone,
            px[1],
            len(names),
            taxonomy.num_action_units,
            components=((3, 0), None, (4, 5)),
            num_basic=6,
            **options,
        )
        preprocessing = Preprocessing(*px, *normalisation_of(backbone))
        torch.manual_seed(seed)
        model = build_model(architecture)
        awake(model, preprocessing)
        path = tmp_path_factory.mktemp("bundles") / "bundle"
        save_bundle(
            path,
            model=model,
            architecture=architecture,
            taxonomy=taxonomy,
            preprocessing=preprocessing,
            calibration=Calibration(1.5, (0.5,) * taxonomy.num_action_units),
            metrics={},
            provenance={},
        )
        return load_bundle(path)

    return make


@pytest.fixture(scope="session")
def bundle(make_bundle: MakeBundle) -> Bundle:
    return make_bundle()


@pytest.fixture(scope="session")
def other_bundle(make_bundle: MakeBundle) -> Bundle:
    """Of the same shape, with other weights."""
    return make_bundle(seed=1)
