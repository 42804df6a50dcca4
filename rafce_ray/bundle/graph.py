"""A bundle's network as one graph, from uint8 faces to logits, that other runtimes read.

Input ``images`` (B, S, S, 3) uint8 RGB of ``stored_px`` a side, any B; outputs ``emotion`` (B, E) and ``action_units`` (B, A)
float32 logits, each only where the model has that task.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from rafce_ray.bundle.bundle import Bundle
from rafce_ray.faces.preprocess import Preprocessing, resize_and_normalise, to_unit
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
