"""What runs a bundle's network: torch, OpenVINO or ONNX Runtime behind one interface."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rafce_ray.bundle.bundle import Bundle
from rafce_ray.bundle.forward import raw_outputs
from rafce_ray.bundle.graph import INPUT, OUTPUTS
from rafce_ray.metrics.calibration import Outputs

if TYPE_CHECKING:
    import openvino

Precision = Literal["fp32", "bf16"]

CPU = torch.device("cpu")


class Engine(Protocol):
    """Runs a network: ``name`` (torch, openvino or onnxruntime), and the ``device`` on which it computes.

    An engine may be called from any thread, by one at a time. What it says of a face does not depend on its batch-mates (1e-6).
    """

    @property
    def name(self) -> str:
        """As the configuration names it."""

    @property
    def precision(self) -> Precision:
        """Numbers it computes with."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def outputs(self, images: NDArray[np.uint8] | Tensor) -> Outputs:
        """Raw outputs of (B, S, S, 3) uint8 RGB faces of the bundle's ``stored_px`` a side. ValueError: another dtype or shape."""


class TorchEngine:
    """torch in fp32 on a CPU or GPU; the bundle's model is moved to ``device``.

    ``threads`` (None: as they are) are those of torch in the whole process, on CPUs.
    """

    name = "torch"
    precision: Precision = "fp32"

    def __init__(self, bundle: Bundle, device: torch.device = CPU, threads: int | None = None) -> None:
        self.device = device
        self._model = bundle.model.to(device).eval()
        self._preprocessing = bundle.preprocessing
        self._threads = threads

    def outputs(self, images: NDArray[np.uint8] | Tensor) -> Outputs:
        """See :class:`Engine`."""
        # OpenMP keeps the number by calling thread, so that it cannot be set once by whoever builds the engine.
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        return raw_outputs(self._model, images, self._preprocessing, self.device)


class OpenVinoEngine:
    """An exported graph on a CPU by OpenVINO.

    ``model`` is a converted graph or the .xml file of one. ``precision`` becomes what the processor really computes with.
    """

    name = "openvino"
    device = CPU

    def __init__(
        self, model: openvino.Model | Path, *, stored_px: int, threads: int | None = None, precision: Precision = "fp32"
    ) -> None:
        import openvino
        from openvino import properties

        wanted = {
            properties.hint.inference_precision(): openvino.Type.bf16 if precision == "bf16" else openvino.Type.f32,
            properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
            properties.num_streams(): 1,
            # Pinned, the threads of every process on the machine would sit on the same first cores.
            properties.hint.enable_cpu_pinning(): False,
        }
        if threads is not None:
            wanted[properties.inference_num_threads()] = threads
        core = openvino.Core()
        compiled = core.compile_model(str(model) if isinstance(model, Path) else model, "CPU", wanted)
        used = compiled.get_property(properties.hint.inference_precision())
        self.precision: Precision = "bf16" if used == openvino.Type.bf16 else "fp32"
        self._request = compiled.create_infer_request()
        # Compiling may give an output further names.
        self._names = [name for name in OUTPUTS if any(name in output.names for output in compiled.outputs)]
        self._stored_px = stored_px
        self._lock = threading.Lock()

    def outputs(self, images: NDArray[np.uint8] | Tensor) -> Outputs:
        """See :class:`Engine`."""
        faces = checked_faces(images, self._stored_px)
        with self._lock:
            self._request.infer([faces], share_inputs=True)
            # The request's memory is written again by the next batch.
            found = {name: self._request.get_tensor(name).data.copy() for name in self._names}
        return named_outputs(found, len(faces))


class OnnxRuntimeEngine:
    """An exported graph on a CPU by ONNX Runtime; ``model`` is an ONNX file's content, or its path."""

    name = "onnxruntime"
    precision: Precision = "fp32"
    device = CPU

    def __init__(self, model: bytes | Path, *, stored_px: int, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that wait in a busy loop would take the cores from decoding.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source = str(model) if isinstance(model, Path) else model
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]
        self._stored_px = stored_px

    def outputs(self, images: NDArray[np.uint8] | Tensor) -> Outputs:
        """See :class:`Engine`."""
        faces = checked_faces(images, self._stored_px)
        values = self._session.run(self._names, {INPUT: faces})
        return named_outputs(dict(zip(self._names, values, strict=True)), len(faces))


def checked_faces(images: NDArray[np.uint8] | Tensor, stored_px: int) -> NDArray[np.uint8]:
    """(B, S, S, 3) uint8 in plain memory layout. ValueError where they are something else."""
    faces = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if faces.dtype != np.uint8 or faces.ndim != 4 or faces.shape[1:] != (stored_px, stored_px, 3):
        raise ValueError(
            f"found {faces.dtype} images of shape {faces.shape}; expected uint8 (B, {stored_px}, {stored_px}, 3)"
        )
    return np.ascontiguousarray(faces)


def named_outputs(found: Mapping[str, NDArray[np.float32]], num_faces: int) -> Outputs:
    """A graph's outputs by name; a task that is left out has no columns."""
    none = np.zeros((num_faces, 0), np.float32)
    return Outputs(found.get("emotion", none), found.get("action_units", none))
