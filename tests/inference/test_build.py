"""Which engine runs a bundle: the fastest that is installed, and torch wherever another one does not answer as it
does.
"""

import re

import numpy as np
import pytest
import torch

from rafce_ray.base.errors import UsageError
from rafce_ray.base.hardware import has_fast_bf16
from rafce_ray.bundle import engines
from rafce_ray.bundle.canary import draw_images
from rafce_ray.bundle.engines import TorchEngine, build_engine, check_inputs, missing_packages, to_openvino

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")


def without(monkeypatch, *absent: str) -> None:
    """As if these packages were not installed."""
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name in absent else object())


def test_auto_on_a_cpu_is_openvino(bundle):
    engine, remarks = build_engine(bundle, "auto", CPU, 1, "fp32")
    assert (engine.name, engine.precision, remarks) == ("openvino", "fp32", ())


@pytest.mark.slow
def test_auto_is_onnxruntime_where_there_is_no_openvino(bundle, monkeypatch):
    without(monkeypatch, "openvino")
    engine, remarks = build_engine(bundle, threads=1)
    assert (engine.name, remarks) == ("onnxruntime", ())


@pytest.mark.parametrize("third", ["onnxruntime", "onnxscript"])
def test_auto_is_torch_where_nothing_else_is_installed(bundle, monkeypatch, third):
    without(monkeypatch, "openvino", third)
    engine, remarks = build_engine(bundle)
    assert (engine.name, remarks) == ("torch", ())


def test_auto_on_a_gpu_is_torch():
    assert engines._choose("auto", torch.device("cuda")) == "torch"
    assert engines._choose("openvino", torch.device("cuda")) == "openvino"


def test_an_engine_that_is_asked_for_and_not_installed(bundle, monkeypatch):
    without(monkeypatch, "onnx")
    with pytest.raises(UsageError, match=r"found onnxruntime, but onnx is not installed\. .*pip install onnx,"):
        build_engine(bundle, "onnxruntime")


def test_missing_packages_are_found():
    assert missing_packages(("torch", "no_such_package_of_anybody")) == ["no_such_package_of_anybody"]


def test_an_engine_that_answers_otherwise_is_not_used(bundle, other_bundle, monkeypatch):
    monkeypatch.setattr(engines, "to_openvino", lambda _: to_openvino(other_bundle))
    engine, remarks = build_engine(bundle, "openvino", CPU, 1, "fp32")
    assert engine.name == "torch"
    figure = re.match(r"openvino in fp32 is off torch by (\S+) in a probability; at most 0.001 is allowed", remarks[0])
    images, expected = check_inputs(bundle)
    found = TorchEngine(other_bundle).outputs(images)
    assert float(figure[1]) == pytest.approx(engines.largest_difference(found, expected, bundle.calibration), rel=0.1)
    assert remarks[1:] == ("engine: torch answers instead of openvino.",)
    np.testing.assert_array_equal(engine.outputs(images).emotion, expected.emotion)


def test_a_converter_that_fails(bundle, monkeypatch):
    def fails(_: object) -> None:
        raise RuntimeError("no rule for this operation\nand more")

    monkeypatch.setattr(engines, "to_openvino", fails)
    engine, remarks = build_engine(bundle, threads=1)
    assert engine.name == "torch"
    assert remarks[0] == "openvino cannot run this model (RuntimeError: no rule for this operation)."


def test_bf16_is_used_or_told(bundle):
    engine, remarks = build_engine(bundle, "openvino", CPU, 1, "bf16")
    assert engine.name == "openvino"
    assert engine.precision == "bf16" or "bf16 was asked for; openvino computes in fp32 here" in remarks[-1]
    if not has_fast_bf16(CPU):
        assert engine.precision == "fp32"
    engine, remarks = build_engine(bundle, "torch", CPU, 1, "bf16")
    assert remarks == ("engine_precision: bf16 was asked for; torch computes in fp32 here.",)


def test_the_check_sees_the_canary_and_more(bundle):
    images, expected = check_inputs(bundle)
    np.testing.assert_array_equal(images[:4], bundle.canary.images)
    assert len(images) == 4 + engines.NUM_SEEDED
    assert not np.array_equal(images[:4], images[4:8])
    np.testing.assert_allclose(expected.emotion[:4], bundle.canary.outputs.emotion, atol=1e-5)
    assert draw_images(40, 1, seed=engines.SEED).shape == (1, 40, 40, 3)
