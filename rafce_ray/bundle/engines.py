"""Engines that run a bundle's network: torch, OpenVINO or ONNX Runtime behind one interface.

``build_engine`` chooses one and compares it with torch. The other engines run the network as a :class:`Graph`, together
with its preprocessing, which this module converts for them.
"""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from rafce_ray.base.errors import UsageError
from rafce_ray.base.hardware import has_fast_bf16
from rafce_ray.bundle.bundle import Bundle, canary_of
from rafce_ray.bundle.canary import draw_images, largest_difference, raw_outputs
from rafce_ray.faces.preprocess import Preprocessing, resize_and_normalise, to_unit
from rafce_ray.metrics.calibration import Outputs
from rafce_ray.model.network import Architecture, MultiTaskModel

if TYPE_CHECKING:
    import openvino

Precision = Literal["fp32", "bf16"]

EngineChoice = Literal["auto", "torch", "openvino", "onnxruntime"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]

MAX_DIFFERENCE = 1e-3
"""Largest difference from torch that a probability may have."""

FASTEST_FIRST = ("openvino", "onnxruntime")

PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}
"""What an engine needs besides torch; the packages next to onnxruntime convert the network for it."""

NUM_SEEDED = 4
SEED = 5

INPUT = "images"
OUTPUTS = ("emotion", "action_units")
"""Names of the graph's input and outputs; an output that the model does not have is left out."""

ONNX_OPSET = 18
CPU = torch.device("cpu")

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Runs a network; may be called from any thread, by one at a time.

    What it answers for a face does not depend on the other faces of the batch (1e-6). ``name`` is that of the
    configuration: torch, openvino or onnxruntime. ``precision`` and ``device``: how and where it computes.
    """

    name: str
    precision: Precision
    device: torch.device

    def outputs(self, images: NDArray[np.uint8] | Tensor) -> Outputs:
        """Raw outputs of (B, S, S, 3) uint8 RGB faces, S the bundle's ``stored_px``; ValueError for anything else."""


class TorchEngine:
    """torch in fp32 on a CPU or GPU; the bundle's model is moved to ``device``.

    ``threads``: torch's threads on a CPU, in the whole process; None leaves them as they are.
    """

    name = "torch"
    precision: Precision = "fp32"

    def __init__(self, bundle: Bundle, device: torch.device = CPU, threads: int | None = None) -> None:
        self.device = device
        self._model = bundle.model.to(device).eval()
        self._preprocessing = bundle.preprocessing
        self._threads = threads

    def outputs(self, images: NDArray[np.uint8] | Tensor) -> Outputs:
        """Raw outputs of (B, S, S, 3) uint8 RGB faces; see :class:`Engine`."""
        # OpenMP keeps the number per calling thread, so it cannot be set once when the engine is built.
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        return raw_outputs(self._model, images, self._preprocessing, self.device)


class OpenVinoEngine:
    """An exported graph on a CPU by OpenVINO.

    ``model`` is a converted graph or its .xml file. The attribute ``precision`` is the processor's, not the requested
    one.
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
        """Raw outputs of (B, S, S, 3) uint8 RGB faces; see :class:`Engine`."""
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
        """Raw outputs of (B, S, S, 3) uint8 RGB faces; see :class:`Engine`."""
        faces = checked_faces(images, self._stored_px)
        values = self._session.run(self._names, {INPUT: faces})
        return named_outputs(dict(zip(self._names, values, strict=True)), len(faces))


def checked_faces(images: NDArray[np.uint8] | Tensor, stored_px: int) -> NDArray[np.uint8]:
    """(B, S, S, 3) uint8 RGB faces in plain memory layout; ValueError for another dtype or shape."""
    faces = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if faces.dtype != np.uint8 or faces.ndim != 4 or faces.shape[1:] != (stored_px, stored_px, 3):
        raise ValueError(
            f"found {faces.dtype} images of shape {faces.shape}; expected uint8 (B, {stored_px}, {stored_px}, 3)"
        )
    return np.ascontiguousarray(faces)


def named_outputs(found: Mapping[str, NDArray[np.float32]], num_faces: int) -> Outputs:
    """A graph's outputs (B, E) and (B, A) float32 by name, as raw outputs; a task that is missing has no columns."""
    none = np.zeros((num_faces, 0), np.float32)
    return Outputs(found.get("emotion", none), found.get("action_units", none))


def build_engine(
    bundle: Bundle,
    choice: EngineChoice = "auto",
    device: torch.device = CPU,
    threads: int | None = None,
    precision: PrecisionChoice = "auto",
) -> tuple[Engine, tuple[str, ...]]:
    """The engine for a bundle, and remarks on why it is not the requested one or computes in another precision.

    ``auto`` is torch on a GPU, else the first of ``FASTEST_FIRST`` that is installed, else torch. Any engine but torch
    is compared with torch on a CPU, and torch answers where a probability differs by more than ``MAX_DIFFERENCE``.
    ``threads`` are those of one forward pass on a CPU; None leaves them to the engine. ``precision`` bf16, which only
    OpenVINO has, must pass the same comparison, else fp32 is used; ``auto`` tries it where the processor supports it.

    Raises:
        UsageError: the requested engine is not installed.
    """
    name = _choose(choice, device)
    engine, remarks = (None, []) if name == "torch" else _checked_engine(name, bundle, threads, precision)
    engine = engine or TorchEngine(bundle, device, threads)
    if precision == "bf16" and engine.precision != "bf16":
        remarks.append(f"engine_precision: bf16 was asked for; {engine.name} computes in {engine.precision} here.")
    return engine, tuple(remarks)


def check_inputs(bundle: Bundle) -> tuple[NDArray[np.uint8], Outputs]:
    """Images (N, S, S, 3) uint8 RGB to compare engines on, the canary's and some others, and torch's raw outputs."""
    images = np.concatenate([canary_of(bundle).images, draw_images(bundle.preprocessing.stored_px, NUM_SEEDED, SEED)])
    return images, TorchEngine(bundle, CPU).outputs(images)


def _choose(choice: EngineChoice, device: torch.device) -> str:
    if choice == "torch" or (choice == "auto" and device.type != "cpu"):
        return "torch"
    if choice == "auto":
        return next((name for name in FASTEST_FIRST if not missing_packages(PACKAGES[name])), "torch")
    missing = missing_packages(PACKAGES[choice])
    if missing:
        raise UsageError(
            f"engine: found {choice}, but {', '.join(missing)} is not installed. Install it with "
            f"pip install {' '.join(missing)}, or set engine to torch or auto."
        )
    return choice


def missing_packages(packages: tuple[str, ...]) -> list[str]:
    """The packages that are not installed."""
    return [package for package in packages if find_spec(package) is None]


def _checked_engine(
    name: str, bundle: Bundle, threads: int | None, precision: PrecisionChoice
) -> tuple[Engine | None, list[str]]:
    """The engine in the first precision that agrees with torch, None without one; and remarks on what failed."""
    remarks: list[str] = []
    images, expected = check_inputs(bundle)
    try:
        compile_for = _COMPILERS[name](bundle, threads)
        bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(CPU))
        precisions: tuple[Precision, ...] = ("bf16", "fp32") if bf16 and name == "openvino" else ("fp32",)
        for wanted in precisions:
            engine = compile_for(wanted)
            difference = largest_difference(engine.outputs(images), expected, bundle.calibration)
            if difference <= MAX_DIFFERENCE:
                log.info("%s (%s) differs from torch by at most %.2g", name, engine.precision, difference)
                return engine, remarks
            remarks.append(
                f"{name} in {engine.precision} is off torch by {difference:.2g} in a probability; at most "
                f"{MAX_DIFFERENCE:g} is allowed."
            )
    # Converters and runtimes raise errors of any type; the service then goes on with torch.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        remarks.append(f"{name} cannot run this model ({type(error).__name__}: {reason}).")
    remarks.append(f"engine: torch answers instead of {name}.")
    return None, remarks


def _openvino(bundle: Bundle, threads: int | None) -> Callable[[Precision], Engine]:
    model, px = to_openvino(bundle), bundle.preprocessing.stored_px
    return lambda precision: OpenVinoEngine(model, stored_px=px, threads=threads, precision=precision)


def _onnxruntime(bundle: Bundle, threads: int | None) -> Callable[[Precision], Engine]:
    content, px = to_onnx(bundle), bundle.preprocessing.stored_px
    return lambda _: OnnxRuntimeEngine(content, stored_px=px, threads=threads)


_COMPILERS = {"openvino": _openvino, "onnxruntime": _onnxruntime}


class Graph(nn.Module):
    """Preprocessing and network as one module that returns only the outputs that the model has."""

    resize: Tensor | None

    def __init__(self, model: MultiTaskModel, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        stored_px = preprocessing.stored_px
        self.register_buffer("resize", resize_matrix(preprocessing))
        self.normalisation = Preprocessing(stored_px, stored_px, preprocessing.mean, preprocessing.std)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of (B, S, S, 3) uint8 RGB faces: (B, E), then (B, A), each if the model has it."""
        inputs = resize_and_normalise(to_unit(images), self.normalisation)
        if self.resize is not None:
            # preprocess resizes before it normalises. The result is the same, since each row of the matrix sums to 1,
            # and OpenVINO fuses operations after a matrix product wrongly.
            inputs = self.resize @ inputs @ self.resize.T
        return tuple(values for values in self.model(inputs) if values is not None)


def resize_matrix(preprocessing: Preprocessing) -> Tensor | None:
    """R (P, S) float32 so that ``R @ image @ R.T`` is the antialiased resize of a channel (S, S); None without one.

    Other runtimes lack torch's antialiased interpolation, which is linear and separable in rows and columns.
    """
    stored_px, image_px = preprocessing.stored_px, preprocessing.image_px
    if stored_px == image_px:
        return None
    size = (image_px, stored_px)
    identity = torch.eye(stored_px)[None, None]
    return functional.interpolate(identity, size=size, mode="bilinear", align_corners=False, antialias=True)[0, 0]


def output_names(architecture: Architecture) -> tuple[str, ...]:
    """The names of the graph's outputs in order."""
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
    """Exporters warn of their own deprecations, which a user cannot change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
