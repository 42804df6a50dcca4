"""The ``rafce`` console script: dispatches ``rafce VERB ...`` to the verb's module."""

from __future__ import annotations

import importlib
import sys

from rafce_ray import __version__

VERBS = {
    "data": ("rafce_ray.data.__main__", "audit labelled faces, split them, draw demo faces"),
    "train": ("rafce_ray.train", "train a model on Ray Train"),
    "tune": ("rafce_ray.tune.command", "search configurations on Ray Tune, and believe the result"),
    "evaluate": ("rafce_ray.evaluate", "measure a bundle on a split"),
    "doctor": ("rafce_ray.doctor.command", "say what is wrong with a run or a study, why, and what to run next"),
    "compare": ("rafce_ray.compare", "runs side by side, with paired intervals"),
    "replay": ("rafce_ray.replay", "train a run again: the same figures, or what differs"),
    "report": ("rafce_ray.report.command", "everything a run or a study left behind as one HTML page"),
    "ablate": ("rafce_ray.ablate", "the seed's changes alone and together, measured over several seeds"),
    "trials": ("rafce_ray.study.listing", "the trials of a study, listed by status and sorted"),
    "bundle": ("rafce_ray.registry.command", "versions of bundles: which one is live, why, and the one before"),
    "export": ("rafce_ray.inference.export", "a bundle's network for ONNX Runtime, OpenVINO or torch.export"),
    "monitor": (
        "rafce_ray.monitoring.command",
        "write a compose file, dashboards and alerts for Prometheus and Grafana",
    ),
    "serve": ("rafce_ray.serve.command", "answer photographs by HTTP, on Ray Serve"),
    "predict": ("rafce_ray.predict", "read emotions and action units from image files"),
}
"""Verb -> module with ``main(argv) -> exit code``, and what it is for."""


def main(argv: list[str] | None = None) -> int:
    """Dispatch to the verb's module; exit code 2 for a verb that does not exist."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"rafce_ray {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"rafce: unknown verb {verb!r}\n{_usage()}", file=sys.stderr)
        return 2
    exit_code: int = importlib.import_module(VERBS[verb][0]).main(rest)
    return exit_code


def _usage() -> str:
    lines = [f"  {verb:<9} {purpose}" for verb, (_, purpose) in VERBS.items()]
    return "\n".join(
        [
            "usage: rafce VERB [...]",
            "",
            *lines,
            "",
            "rafce VERB --help says more.",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
