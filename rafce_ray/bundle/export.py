"""Writes a bundle's network as a file for other runtimes, and compares that file with torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rafce_ray.base.console import pretty_json
from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.base.storage import new_folder
from rafce_ray.bundle.bundle import Bundle, taxonomy_to_plain
from rafce_ray.bundle.canary import largest_difference
from rafce_ray.bundle.engines import (
    INPUT,
    MAX_DIFFERENCE,
    OnnxRuntimeEngine,
    OpenVinoEngine,
    check_inputs,
    export_program,
    missing_packages,
    named_outputs,
    output_names,
    to_onnx,
    to_openvino,
)
from rafce_ray.metrics.calibration import Outputs

DESCRIPTION = "export.json"

Runner = Callable[[NDArray[np.uint8]], Outputs]


def export_bundle(bundle: Bundle, file_format: str, out: Path) -> float:
    """Write the graph and its description into the new folder ``out``, which appears whole or not at all.

    ``file_format``: one of ``FORMATS``. Returns the largest difference from torch in a probability, measured with the
    written file.

    Raises:
        UsageError: the folder exists, or a package is missing.
        GateError: a probability differs by more than ``MAX_DIFFERENCE``; nothing is left.
    """
    if out.exists():
        raise UsageError(f"--out: {out} exists already, and nothing is overwritten. Choose another folder.")
    write, packages = FORMATS[file_format]
    missing = missing_packages(packages)
    if missing:
        raise UsageError(
            f"--format {file_format}: {', '.join(missing)} is not installed. Install it with pip install "
            f"{' '.join(missing)}."
        )
    with new_folder(out) as scratch:
        run = write(bundle, scratch)
        images, expected = check_inputs(bundle)
        difference = largest_difference(run(images), expected, bundle.calibration)
        if not difference <= MAX_DIFFERENCE:
            raise GateError(
                f"{file_format}: the exported graph is off torch by {difference:.2g} in a probability; at most "
                f"{MAX_DIFFERENCE:g} is allowed, so it was not kept. Choose another format."
            )
        (scratch / DESCRIPTION).write_bytes(pretty_json(_describe(bundle, file_format, scratch, difference)))
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
"""Format -> what writes it and reads it back, and the packages that it needs besides torch."""


def _describe(bundle: Bundle, file_format: str, folder: Path, difference: float) -> dict[str, Any]:
    """All that a user of the graph needs; ``calibration`` turns its raw outputs into probabilities."""
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
