"""Which engine runs a bundle: what was asked for or the fastest that is installed, if it answers as torch does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rafce_ray.base.errors import UsageError
from rafce_ray.base.hardware import has_fast_bf16
from rafce_ray.bundle.bundle import Bundle, canary_of
from rafce_ray.bundle.canary import draw_images, largest_difference
from rafce_ray.bundle.engines import CPU, Engine, OnnxRuntimeEngine, OpenVinoEngine, Precision, TorchEngine
from rafce_ray.bundle.graph import to_onnx, to_openvino
from rafce_ray.metrics.calibration import Outputs

EngineChoice = Literal["auto", "torch", "openvino", "onnxruntime"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]

MAX_DIFFERENCE = 1e-3
"""Largest difference from torch that a probability may have."""

FASTEST_FIRST = ("openvino", "onnxruntime")

PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}
"""What an engine needs beside torch, onnxruntime to convert the network."""

NUM_SEEDED = 4
SEED = 5

log = logging.getLogger(__name__)


def build_engine(
    bundle: Bundle,
    choice: EngineChoice = "auto",
    device: torch.device = CPU,
    threads: int | None = None,
    precision: PrecisionChoice = "auto",
) -> tuple[Engine, tuple[str, ...]]:
    """The engine for a bundle, and what there is to be said of it: why it is not, or does not compute as, was asked for.

    ``auto`` is torch on a GPU, else the first of ``FASTEST_FIRST`` that is installed, else torch. Any other than torch is compared with
    torch on a CPU, and torch answers where a probability is further off than ``MAX_DIFFERENCE``. ``threads`` (None: as the engine likes)
    are those of one forward pass on a CPU. ``precision`` bf16, which only OpenVINO has, is held to the same difference, else fp32;
    ``auto`` tries it where the processor has it.

    Raises:
        UsageError: the engine that was asked for is not installed.
    """
    name = _choose(choice, device)
    engine: Engine | None = None
    remarks: list[str] = []
    if name != "torch":
        engine, remarks = _checked_engine(name, bundle, threads, precision)
    if engine is None:
        engine = TorchEngine(bundle, device, threads)
    if precision == "bf16" and engine.precision != "bf16":
        remarks.append(f"engine_precision: bf16 was asked for; {engine.name} computes in {engine.precision} here.")
    return engine, tuple(remarks)


def check_inputs(bundle: Bundle) -> tuple[NDArray[np.uint8], Outputs]:
    """What an engine is checked with: the canary's images and some others, and torch's answers on a CPU."""
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
    """Those of them that are not installed."""
    return [package for package in packages if find_spec(package) is None]


def _checked_engine(
    name: str, bundle: Bundle, threads: int | None, precision: PrecisionChoice
) -> tuple[Engine | None, list[str]]:
    """The engine in the first precision in which it answers as torch does, None where there is none; and what went wrong."""
    remarks: list[str] = []
    images, expected = check_inputs(bundle)
    try:
        compile_for = _COMPILERS[name](bundle, threads)
        for wanted in _precisions(name, precision):
            engine = compile_for(wanted)
            difference = largest_difference(engine.outputs(images), expected, bundle.calibration)
            if difference <= MAX_DIFFERENCE:
                log.info("%s (%s) differs from torch by at most %.2g", name, engine.precision, difference)
                return engine, remarks
            remarks.append(
                f"{name} in {engine.precision} is off torch by {difference:.2g} in a probability; at most {MAX_DIFFERENCE:g} is allowed."
            )
    # Converters and runtimes raise whatever they like; the service goes on with torch and says so.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        remarks.append(f"{name} cannot run this model ({type(error).__name__}: {reason}).")
    remarks.append(f"engine: torch answers instead of {name}.")
    return None, remarks


def _precisions(name: str, precision: PrecisionChoice) -> tuple[Precision, ...]:
    bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(CPU))
    return ("bf16", "fp32") if bf16 and name == "openvino" else ("fp32",)


def _openvino(bundle: Bundle, threads: int | None) -> Callable[[Precision], Engine]:
    model, px = to_openvino(bundle), bundle.preprocessing.stored_px
    return lambda precision: OpenVinoEngine(model, stored_px=px, threads=threads, precision=precision)


def _onnxruntime(bundle: Bundle, threads: int | None) -> Callable[[Precision], Engine]:
    content, px = to_onnx(bundle), bundle.preprocessing.stored_px
    return lambda _: OnnxRuntimeEngine(content, stored_px=px, threads=threads)


_COMPILERS = {"openvino": _openvino, "onnxruntime": _onnxruntime}
