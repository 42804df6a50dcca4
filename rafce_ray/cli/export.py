"""``rafce export``: export a model for ONNX Runtime, OpenVINO or torch.export."""

from __future__ import annotations

import argparse

from rafce_ray.base.console import say
from rafce_ray.cli.arguments import BUNDLE_HELP, command, local_path

FORMATS = ("onnx", "openvino", "torch-export")


@command
def main(argv: list[str]) -> int:
    """``rafce export``; exit code 3 where what was written does not answer as torch does."""
    arguments = _parser().parse_args(argv)
    from rafce_ray.bundle.bundle import load_bundle
    from rafce_ray.bundle.export import DESCRIPTION, export_bundle

    bundle = load_bundle(arguments.bundle)
    difference = export_bundle(bundle, arguments.format, arguments.out)
    say(
        f"{arguments.out}: {bundle.architecture.backbone} of {bundle.path} as {arguments.format}, any batch of uint8 "
        f"faces of {bundle.preprocessing.stored_px} px; off torch by at most {difference:.2g} in a probability. "
        f"{DESCRIPTION} tells its inputs, outputs, classes and calibration."
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce export",
        description="Export a model to ONNX, OpenVINO or torch.export, preprocessing included, and compare the "
        "exported model with PyTorch. Exit code 3: they differ.",
    )
    parser.add_argument("--bundle", required=True, help=BUNDLE_HELP)
    parser.add_argument("--format", required=True, choices=FORMATS, help="format to export to")
    parser.add_argument("--out", required=True, type=local_path, metavar="FOLDER", help="new folder to write")
    return parser
