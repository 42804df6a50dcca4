"""The commands: ``rafce VERB ...`` runs ``rafce_ray.cli.VERB``, which reads the arguments, calls the library and
prints.

Nothing imports this package but the ``rafce`` script and ``__main__`` modules. Its modules import the library inside of
functions, after the arguments have been checked: a usage is printed at once, without torch or ray.
"""

from __future__ import annotations

import importlib
import sys

from rafce_ray import __version__

VERBS = {
    "data": "audit labelled faces, split them, align, download or draw them",
    "train": "train a model on Ray Train",
    "tune": "tune hyperparameters on Ray Tune",
    "evaluate": "measure a model on a labelled split",
    "doctor": "diagnose a run and suggest the next one",
    "compare": "compare runs on the same images, with confidence intervals",
    "replay": "train a run again and check that its figures are reproduced",
    "report": "write a report of a run or a study as one HTML page",
    "ablate": "run an ablation: eight training changes, alone and combined",
    "trials": "list the trials of a study",
    "bundle": "manage model versions: add, promote, roll back",
    "export": "export a model for ONNX Runtime, OpenVINO or torch.export",
    "monitor": "monitor a cluster with Prometheus and Grafana",
    "serve": "serve a model over HTTP on Ray Serve",
    "predict": "predict emotions and action units from image files",
}
"""Verb -> what it does. ``rafce_ray.cli.VERB`` has ``main(argv) -> exit code``."""


def main(argv: list[str] | None = None) -> int:
    """Run a verb; exit code 2 for one that does not exist."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"rafce_ray {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        from rafce_ray.cli.arguments import unknown_verb

        print(f"rafce: {unknown_verb(verb, VERBS)}\n{_usage()}", file=sys.stderr)
        return 2
    exit_code: int = importlib.import_module(f"rafce_ray.cli.{verb}").main(rest)
    return exit_code


def _usage() -> str:
    lines = [f"  {verb:<9} {purpose}" for verb, purpose in VERBS.items()]
    return "\n".join(["usage: rafce VERB [...]", "", *lines, "", "For the options of a verb: rafce VERB --help"])
