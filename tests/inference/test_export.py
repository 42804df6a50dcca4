"""``rafce export``: what is written is read by the runtime alone and answers as torch does."""

import json
from hashlib import sha256

import numpy as np
import pytest
import torch

from rafce_ray.base.errors import GateError
from rafce_ray.bundle import export
from rafce_ray.bundle.canary import draw_images
from rafce_ray.bundle.engines import TorchEngine, to_openvino
from rafce_ray.bundle.export import export_bundle
from rafce_ray.cli.export import main

pytestmark = pytest.mark.numeric


def read_openvino(folder, images):
    import openvino

    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({"images": images})
    return found["emotion"], found["action_units"]


def read_onnx(folder, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["emotion", "action_units"], {"images": images})


def read_torch_export(folder, images):
    return [values.numpy() for values in torch.export.load(folder / "model.pt2").module()(torch.from_numpy(images))]


@pytest.mark.parametrize(
    ("file_format", "read"),
    [
        ("openvino", read_openvino),
        pytest.param("onnx", read_onnx, marks=pytest.mark.slow),
        pytest.param("torch-export", read_torch_export, marks=pytest.mark.slow),
    ],
)
def test_what_is_written_answers_as_torch_does(file_format, read, bundle, tmp_path, capsys):
    out = tmp_path / "below" / "exported"
    assert main(["--bundle", bundle.path, "--format", file_format, "--out", str(out)]) == 0
    for size in (1, 3):
        images = draw_images(40, size, seed=7)
        expected = TorchEngine(bundle).outputs(images)
        for found, wanted in zip(read(out, images), (expected.emotion, expected.action_units), strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-4)
    described = json.loads((out / "export.json").read_text())
    assert described["format"] == file_format
    assert described["bundle"] == {"path": bundle.path, "weights_sha256": bundle.weights_sha256}
    assert described["files"] == {
        path.name: sha256(path.read_bytes()).hexdigest() for path in out.iterdir() if path.name != "export.json"
    }
    assert described["inputs"][0]["shape"] == ["batch", 40, 40, 3]
    assert [entry["shape"] for entry in described["outputs"]] == [["batch", 3], ["batch", 2]]
    assert [entry["label"] for entry in described["taxonomy"]["emotions"]] == list(bundle.taxonomy.emotions)
    assert described["calibration"]["temperature"] == 1.5
    assert described["preprocessing"]["image_px"] == 32
    assert 0 <= described["largest_difference"] < 1e-4
    assert [path.name for path in out.parent.iterdir()] == ["exported"]
    assert "off torch by at most" in capsys.readouterr().err


def test_a_folder_that_is_there_is_never_overwritten(bundle, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main(["--bundle", bundle.path, "--format", "openvino", "--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine").read_text() == "precious"
    assert "nothing is overwritten" in capsys.readouterr().err


def test_a_graph_that_answers_otherwise_is_not_kept(bundle, other_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "to_openvino", lambda _: to_openvino(other_bundle))
    with pytest.raises(GateError, match=r"off torch by [\d.]+ in a probability; at most 0\.001 is allowed"):
        export_bundle(bundle, "openvino", tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        export, "missing_packages", lambda packages: [name for name in packages if name == "onnxscript"]
    )
    assert main(["--bundle", bundle.path, "--format", "onnx", "--out", str(tmp_path / "exported")]) == 2
    assert "pip install onnxscript" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
