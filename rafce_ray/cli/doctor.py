"""``rafce doctor``: diagnose a run or a study and suggest the next run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rafce_ray.base.console import print_json, say
from rafce_ray.base.errors import LEVELS, UsageError
from rafce_ray.cli.arguments import JSON_HELP, command

if TYPE_CHECKING:
    from rafce_ray.doctor.evidence import Diagnosis, Evidence
    from rafce_ray.run.folder import RunFolder


@command
def main(argv: list[str]) -> int:
    """``rafce doctor``; exit code 0 whatever is found, 2 where there is neither a run nor a study."""
    arguments = _parser().parse_args(argv)
    from rafce_ray.doctor.rules import examine_study, print_study
    from rafce_ray.run.folder import RunFolder
    from rafce_ray.study.folder import StudyFolder

    folder, study = RunFolder(arguments.place), StudyFolder(arguments.place)
    baseline = None if arguments.baseline is None else _baseline(arguments.baseline)
    if folder.exists():
        _doctor_run(folder, baseline, json=arguments.json)
    elif names := study.trial_names():
        say(f"Examining {len(names)} trials of {study.location}.")
        trials = examine_study(study, baseline)
        print_study(trials)
        running = [trial.evidence.name for trial in trials if not trial.evidence.ended]
        say("")
        say(
            f"{_counts([diagnosis for trial in trials for diagnosis in trial.diagnoses])} in {len(trials)} trials"
            f"{f', {len(running)} of which have not ended' if running else ''}; all of one trial: rafce doctor "
            f"{(study.trials / 'NAME').command}"
        )
        if arguments.json:
            told = {trial.evidence.name: [one.to_json() for one in trial.diagnoses] for trial in trials}
            print_json({"study": str(study.location), "trials": told})
    else:
        folder.location.check_reachable()
        raise UsageError(
            f"{folder.location} is neither a run (it has no config.yaml) nor a study (it has no trials). Give the "
            "folder that training printed, such as runs/NAME."
        )
    return 0


def _doctor_run(folder: RunFolder, baseline: Evidence | None, *, json: bool) -> None:
    from rafce_ray.doctor.rules import examine_run, print_diagnoses

    num_epochs, result = len(folder.metrics()), folder.result()
    state = "in training" if result is None else str(result["status"]).replace("_", " ")
    say(f"Examining the run {folder.location}: {num_epochs} epochs, {state}.")
    diagnoses = examine_run(folder, baseline)
    print_diagnoses(diagnoses)
    say("")
    if diagnoses:
        say(f"{_counts(diagnoses)}. Fix the first finding, train again, and run rafce doctor on the new run.")
    elif num_epochs:
        say("No findings.")
    else:
        say("No epoch has ended yet: there is nothing to examine.")
    if json:
        print_json({"run": str(folder.location), "diagnoses": [one.to_json() for one in diagnoses]})


def _counts(diagnoses: Sequence[Diagnosis]) -> str:
    levels = [diagnosis.level for diagnosis in diagnoses]
    counted = ", ".join(f"{levels.count(level)} {level}" for level in LEVELS if level in levels)
    return f"{len(levels)} finding{'' if len(levels) == 1 else 's'}{f' ({counted})' if counted else ''}"


def _baseline(place: str) -> Evidence:
    from rafce_ray.doctor.evidence import Evidence
    from rafce_ray.run.folder import RunFolder

    folder = RunFolder(place)
    if not folder.exists() or folder.outputs("validation") is None:
        raise UsageError(
            f"--baseline {place}: is no run that has ended (config.yaml or outputs_validation.parquet is missing). "
            "Give the folder of a finished run."
        )
    return Evidence.of_run(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce doctor",
        description="Diagnose a run or a study: what is wrong, why, and which run to try next. Also works while the "
        "run is training.",
        epilog="Example: rafce doctor runs/NAME",
    )
    parser.add_argument(
        "place", metavar="RUN_OR_STUDY", help="folder of a run, or of a study with trials/; a path or URI"
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="run to compare with (default: the nearest emotion-only run of the same data and budget)",
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser
