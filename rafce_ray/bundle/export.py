"""A bundle's network as a file for other runtimes, compared with torch after it was written."""

from __future__ import annotations

import copy
import hashlib
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from rafce_ray.base.console import pretty_json
from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.bundle.bundle import Bundle, taxonomy_to_plain
from rafce_ray.bundle.canary import largest_difference
from rafce_ray.bundle.engines import (
    MAX_DIFFERENCE,
    OnnxRuntimeEngine,
    OpenVinoEngine,
    check_inputs,
    missing_packages,
    named_outputs,
)
from rafce_ray.faces.preprocess import Preprocessing, resize_and_normalise, to_unit
from rafce_ray.metrics.calibration import Outputs
from rafce_ray.model.network import Architecture, MultiTaskModel

if TYPE_CHECKING:
    import openvino

INPUT = "images"
"""Name of the graph's input."""

OUTPUTS = ("emotion", "action_units")
"""Names of the graph's outputs; one that the model does not have is left out."""

ONNX_OPSET = 18


class Graph(nn.Module):
    """Preprocessing and network as one module; only outputs that the model has."""

    resize: Tensor | None

    def __init__(self, model: MultiTaskModel, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        stored_px = preprocessing.stored_px
        self.register_buffer("resize", resize_matrix(preprocessing))
        self.normalisation = Preprocessing(stored_px, stored_px, preprocessing.mean, preprocessing.std)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of (B, S, S, 3) uint8 faces, emotion first."""
        inputs = resize_and_normalise(to_unit(images), self.normalisation)
        if self.resize is not None:
            # After the normalisation, not before as in preprocess: it is the same, since each row of the matrix sums to 1, and
            # OpenVINO fuses what follows a product of matrices wrongly.
            inputs = self.resize @ inputs @ self.resize.T
        return tuple(values for values in self.model(inputs) if values is not None)


def resize_matrix(preprocessing: Preprocessing) -> Tensor | None:
    """R (P, S) with ``R @ image @ R.T`` the preprocessing's antialiased resize of a channel (S, S); None where nothing is resized.

    Other runtimes lack torch's antialiased interpolation, which is linear and works on rows and columns by themselves.
    """
    stored_px, image_px = preprocessing.stored_px, preprocessing.image_px
    if stored_px == image_px:
        return None
    rows = torch.eye(stored_px)[None, None]
    resized = functional.interpolate(
        rows, size=(image_px, stored_px), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0, 0]


def output_names(architecture: Architecture) -> tuple[str, ...]:
    """The graph's outputs in order."""
    tasks = (("emotion", architecture.num_emotions), ("action_units", architecture.num_action_units))
    return tuple(name for name, num_outputs in tasks if num_outputs)


def export_program(bundle: Bundle) -> ExportedProgram:
    """The graph as torch's exported program, for any batch."""
    with torch.no_grad(), _quiet():
        return torch.export.export(_graph(bundle), (_example(bundle),), dynamic_shapes={INPUT: {0: Dim("batch")}})


def to_onnx(bundle: Bundle) -> bytes:
    """The graph as an ONNX file's content. ModuleNotFoundError where onnx or onnxscript is not installed."""
    program, names = export_program(bundle), output_names(bundle.architecture)
    with _quiet():
        converted = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=list(names), opset_version=ONNX_OPSET, verbose=False
        )
    assert converted is not None
    content: bytes = converted.model_proto.SerializeToString()
    return content


def to_openvino(bundle: Bundle) -> openvino.Model:
    """The graph as an OpenVINO model. ModuleNotFoundError where openvino is not installed."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    px = bundle.preprocessing.stored_px
    with torch.no_grad(), _quiet():
        # A trace takes a tenth of the time of an exported program, and a server converts while it answers requests.
        traced = torch.jit.trace(_graph(bundle), _example(bundle), check_trace=False)  # type: ignore[no-untyped-call]
        # openvino.convert_model does the same, but reports to its makers over the network without asking.
        frontend = FrontEndManager().load_by_framework("pytorch")
        # The frontend does not keep its decoder alive.
        decoder = TorchScriptPythonDecoder(traced)
        model = frontend.convert(frontend.load(decoder, True))
    model.inputs[0].set_names({INPUT})
    for output, name in zip(model.outputs, output_names(bundle.architecture), strict=True):
        output.set_names({name})
    model.reshape([-1, px, px, 3])
    return model


def _graph(bundle: Bundle) -> Graph:
    model = bundle.model
    if next(model.parameters()).device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    return Graph(model, bundle.preprocessing).eval()


def _example(bundle: Bundle) -> Tensor:
    """Two images: a batch of one would be taken for a constant."""
    px = bundle.preprocessing.stored_px
    return torch.zeros(2, px, px, 3, dtype=torch.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own deprecations, about which nobody can do anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


DESCRIPTION = "export.json"

Runner = Callable[[NDArray[np.uint8]], Outputs]


def export_bundle(bundle: Bundle, file_format: str, out: Path) -> float:
    """Write the graph and its description into the new folder ``out``, which appears whole or not at all.

    ``file_format``: one of ``FORMATS``. Returns the largest difference from torch in a probability, found with what was written.

    Raises:
        UsageError: the folder exists, or a package is missing.
        GateError: a probability is further off than ``MAX_DIFFERENCE``; nothing is left.
    """
    if out.exists():
        raise UsageError(f"--out: {out} exists already, and nothing is overwritten. Choose another folder.")
    write, packages = FORMATS[file_format]
    missing = missing_packages(packages)
    if missing:
        raise UsageError(
            f"--format {file_format}: {', '.join(missing)} is not installed. Install it with pip install {' '.join(missing)}."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        beside.mkdir()
        run = write(bundle, beside)
        images, expected = check_inputs(bundle)
        difference = largest_difference(run(images), expected, bundle.calibration)
        if not difference <= MAX_DIFFERENCE:
            raise GateError(
                f"{file_format}: the exported graph is off torch by {difference:.2g} in a probability; at most {MAX_DIFFERENCE:g} is "
                "allowed, so it was not kept. Choose another format."
            )
        description = _describe(bundle, file_format, beside, difference)
        (beside / DESCRIPTION).write_bytes(pretty_json(description))
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return difference


def _write_onnx(bundle: Bundle, folder: Path) -> Runner:
    path = folder / "model.onnx"
    path.write_bytes(to_onnx(bundle))
    return OnnxRuntimeEngine(path, stored_px=bundle.preprocessing.stored_px).outputs


def _write_openvino(bundle: Bundle, folder: Path) -> Runner:
    import openvino

    path = folder / "model.xml"
    openvino.save_model(to_openvino(bundle), path, compress_to_fp16=False)
    return OpenVinoEngine(path, stored_px=bundle.preprocessing.stored_px).outputs


def _write_torch_export(bundle: Bundle, folder: Path) -> Runner:
    path = folder / "model.pt2"
    torch.export.save(export_program(bundle), path)
    module, names = torch.export.load(path).module(), output_names(bundle.architecture)

    def run(images: NDArray[np.uint8]) -> Outputs:
        with torch.inference_mode():
            values = module(torch.from_numpy(images))
        return named_outputs({name: value.numpy() for name, value in zip(names, values, strict=True)}, len(images))

    return run


FORMATS: dict[str, tuple[Callable[[Bundle, Path], Runner], tuple[str, ...]]] = {
    "onnx": (_write_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": (_write_openvino, ("openvino",)),
    "torch-export": (_write_torch_export, ()),
}
"""Format -> what writes it and reads it back, and the packages that it needs beside torch."""


def _describe(bundle: Bundle, file_format: str, folder: Path, difference: float) -> dict[str, Any]:
    """All that whoever runs the graph has to know; its raw outputs become probabilities by ``calibration``."""
    px, taxonomy = bundle.preprocessing.stored_px, bundle.taxonomy
    sizes = {"emotion": taxonomy.num_emotions, "action_units": taxonomy.num_action_units}
    packages = ("rafce_ray", "torch", *FORMATS[file_format][1])
    return {
        "format": file_format,
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
        "bundle": {"path": bundle.path, "weights_sha256": bundle.weights_sha256},
        "inputs": [
            {"name": INPUT, "type": "uint8", "shape": ["batch", px, px, 3], "content": "aligned RGB faces, 0 to 255"}
        ],
        "outputs": [
            {"name": name, "type": "float32", "shape": ["batch", sizes[name]], "content": "logits, not yet calibrated"}
            for name in output_names(bundle.architecture)
        ],
        "taxonomy": taxonomy_to_plain(taxonomy),
        "calibration": asdict(bundle.calibration),
        "preprocessing": {**asdict(bundle.preprocessing), "in_graph": True},
        "largest_difference": difference,
        "versions": {package: version(package) for package in packages},
    }
