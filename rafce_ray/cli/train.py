"""``rafce train``: train a model on Ray Train."""

from __future__ import annotations

import argparse
import math
from typing import Any

from rafce_ray.base.console import print_json, say, warn
from rafce_ray.cli.arguments import add_configuration, command, require_data_root


@command
def main(argv: list[str]) -> int:
    """``rafce train``; exit code 1 where training diverged."""
    arguments = _parser().parse_intermixed_args(argv)
    from rafce_ray.config import load_config, to_yaml

    config = load_config(arguments.config, arguments.overrides, recipe=arguments.recipe)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0
    require_data_root(config)
    from rafce_ray.base.storage import locate
    from rafce_ray.train.launch import launch, named

    config = named(config)
    say(
        f"training {config.model.backbone} at {config.model.image_px} px on {config.data.root} for up to "
        f"{config.optim.epochs} epochs with {config.run.workers_shown}; "
        f"results go to {(locate(config.run.storage) / str(config.run.name)).shown}"
    )
    result = launch(config, resume=arguments.resume)
    _summarise(result)
    if arguments.json:
        print_json(result)
    return 1 if result["status"] == "diverged" else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce train",
        description="Train a model for compound emotions and action units on Ray Train. If training was interrupted, "
        "the same command resumes it from the newest valid checkpoint.",
        epilog="Example: rafce train --recipe demo data.root=demo/faces optim.epochs=5",
    )
    add_configuration(parser, "configuration keys; they override the file")
    parser.add_argument(
        "--resume", action="store_true", help="continue a finished run, for example with a higher optim.epochs"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and stop")
    return parser


def _summarise(result: dict[str, Any]) -> None:
    from rafce_ray.base.storage import locate
    from rafce_ray.run.watch import duration

    metrics = result["metrics"]
    figures = ", ".join(
        f"{name} {metrics[name]:.4f}"
        for name in ("accuracy", "macro_f1", "au_f1_mean")
        if _is_number(metrics.get(name))
    )
    took, run_dir = duration(result["elapsed_s"]), locate(result["run_dir"]).command
    if result["status"] == "diverged":
        warn(
            f"diverged after {result['epochs']} epochs: a loss was not finite. For why, and the next configuration: "
            f"rafce doctor {run_dir}"
        )
    if result["bundle"] is None:
        return
    say(
        f"{result['status'].replace('_', ' ')} after {result['epochs']} epochs in {took}; best epoch "
        f"{result['best_epoch']} on validation: {figures}"
    )
    say(_calibrated(metrics))
    bundle, report = locate(result["bundle"]).command, (locate(result["run_dir"]) / "report.html").command
    say(
        f"made {bundle} and {report}; next: rafce doctor {run_dir}   or: rafce evaluate --bundle {bundle}   or: rafce "
        f"predict --bundle {bundle} PHOTO..."
    )


def _calibrated(metrics: dict[str, Any]) -> str:
    """What calibration did, on images that it was not fitted on."""
    held_out = metrics.get("cross_fitted")
    if held_out is None:
        return "not calibrated: probabilities are the network's own, thresholds 0.5"
    before, after = held_out["before"], held_out["after"]
    changes = [
        f"{name} {before[task]['ece']:.3f} -> {after[task]['ece']:.3f}"
        for task, name in (("emotion", "calibration error of emotions"), ("action_units", "of action units"))
        if before[task] is not None
    ]
    if _is_number(held_out["au_f1_mean_before"]):
        changes.append(
            f"AU-F1 {held_out['au_f1_mean_before']:.4f} at 0.5 -> {held_out['au_f1_mean_after']:.4f} at tuned "
            "thresholds"
        )
    return f"calibrated on validation (cross-fitted): {', '.join(changes)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
