"""``rafce evaluate``: measure a bundle on a labelled split."""

from __future__ import annotations

import argparse

from rafce_ray.base.console import print_json, say, warn
from rafce_ray.cli.arguments import BUNDLE_HELP, DEVICE_HELP, JSON_HELP, SPLITS, add_data_overrides, command, positive


@command
def main(argv: list[str]) -> int:
    """``rafce evaluate``."""
    arguments = _parser().parse_intermixed_args(argv)
    from rafce_ray.base.console import console
    from rafce_ray.base.hardware import choose_device
    from rafce_ray.base.storage import locate
    from rafce_ray.bundle.bundle import load_bundle
    from rafce_ray.bundle.evaluate import EVALUATION_BATCH, data_config_for, evaluate_bundle, open_for_bundle, render

    device = choose_device(arguments.device)
    bundle = load_bundle(arguments.bundle)
    data = data_config_for(bundle, arguments.overrides)
    say(f"Evaluating {bundle.path} on the {arguments.split} split of {data.root}, on {device}.")
    dataset = open_for_bundle(bundle, data)
    if arguments.split == "train" and dataset.fingerprint == bundle.provenance.get("data_fingerprint"):
        warn("the model was trained on these images: the figures overstate how well it generalizes.")
    batch_size = arguments.batch_size or EVALUATION_BATCH
    figures = evaluate_bundle(bundle, dataset, arguments.split, batch_size=batch_size, device=device)
    for table in render(figures):
        console.print(table)
    say(
        f"{figures['num_images']:,} images measured ({figures['emotion_known']:,} with an emotion, "
        f"{figures['au_known']:,} known AU labels); intervals are bootstrap percentiles over images. Next: rafce "
        f"predict --bundle {locate(arguments.bundle).command} PHOTO..."
    )
    if arguments.json:
        source = {"bundle": bundle.path, "weights_sha256": bundle.weights_sha256, "data_root": data.root}
        print_json(figures | source | {"data_fingerprint": dataset.fingerprint})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce evaluate",
        description="Measure a model on labelled faces: F1, accuracy, calibration, with confidence intervals.",
    )
    parser.add_argument("--bundle", required=True, help=BUNDLE_HELP)
    parser.add_argument("--split", choices=SPLITS, default="test", help="split to measure on (default test)")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images per forward pass (default 128)")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    add_data_overrides(parser, "other data than the model was trained on")
    return parser
