"""``rafce doctor``: what is wrong with a run or a study, why, and the next run that mends it.

Rules live in ``doctor.rules`` and the modules that it names. ``examine`` judges an ended run, ``examine_live`` one in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rafce_ray.config import write_yaml
from rafce_ray.console import LEVEL_STYLES, console, print_json, run_main, say
from rafce_ray.doctor.diagnosis import Cause, Diagnosis
from rafce_ray.doctor.evidence import Evidence
from rafce_ray.doctor.rules import Trial, best_trial, examine_run, examine_study
from rafce_ray.errors import LEVELS, Level, UsageError
from rafce_ray.run_folder import RunFolder
from rafce_ray.study_folder import StudyFolder

SHOWN_TRIALS = 5
"""Trials that are listed under a finding; the others are counted."""


def print_diagnoses(diagnoses: Sequence[Diagnosis]) -> None:
    """Tell findings at the terminal; levels and verdicts are words, colour only repeats them. Commands stay on one line."""
    for number, diagnosis in enumerate(diagnoses, start=1):
        heading = Text.assemble(
            "\n", (f"{number}. {diagnosis.level}", LEVEL_STYLES[diagnosis.level]), f": {diagnosis.code}"
        )
        parts: list[RenderableType] = [heading, _indented(diagnosis.message)]
        if diagnosis.causes:
            parts += [_indented("causes, in the order to look at them", above=1), _cause_table(diagnosis.causes)]
        parts.append(_indented(Text.assemble(("advice: ", "bold"), diagnosis.remedy), above=1))
        if diagnosis.patch:
            parts += [_indented("changes of the configuration", above=1), _indented(_yaml(diagnosis.patch), by=6)]
        for part in parts:
            console.print(part, soft_wrap=False)
        if diagnosis.command:
            say(f"\n   {diagnosis.command}")


def _indented(text: str | Text, *, by: int = 3, above: int = 0) -> RenderableType:
    return Padding(Text(text) if isinstance(text, str) else text, (above, 0, 0, by))


def _cause_table(causes: Sequence[Cause]) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for cause in causes:
        style = "bold" if cause.verdict in ("confirmed", "possible") else ""
        table.add_row(Text(cause.verdict, style), Text.assemble((cause.text, style), "\n", (cause.evidence, "dim")))
    return Padding(table, (0, 0, 0, 6))


def _yaml(patch: dict[str, Any]) -> str:
    """A patch as the sections of a configuration file."""
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in patch.items():
        section, _, key = dotted.partition(".")
        nested.setdefault(section, {})[key] = value
    return write_yaml(nested, default_flow_style=None, width=1000).rstrip()


def _print_study(trials: Sequence[Trial]) -> None:
    """Findings by code with their trials, then the details of the best trial and of what is serious elsewhere."""
    by_code: dict[str, list[tuple[Trial, Diagnosis]]] = {}
    for trial in trials:
        for diagnosis in trial.diagnoses:
            by_code.setdefault(diagnosis.code, []).append((trial, diagnosis))
    for found in sorted(by_code.values(), key=lambda found: LEVELS.index(_gravest(found))):
        level = _gravest(found)
        console.print(
            Text.assemble(
                (f"\n{level}", LEVEL_STYLES[level]), f": {found[0][1].code}, {len(found)} of {len(trials)} trials"
            ),
            soft_wrap=False,
        )
        if level == "info":
            continue
        for trial, diagnosis in found[:SHOWN_TRIALS]:
            line = Text(f"   {trial.evidence.name}: {diagnosis.message}")
            console.print(line, soft_wrap=False, no_wrap=True, overflow="ellipsis")
        if len(found) > SHOWN_TRIALS:
            console.print(f"   and {len(found) - SHOWN_TRIALS} more trials")
    for heading, diagnoses in _details(trials, by_code):
        console.print(Text(f"\n{heading}", "bold"), soft_wrap=False)
        print_diagnoses(diagnoses)


def _details(
    trials: Sequence[Trial], by_code: dict[str, list[tuple[Trial, Diagnosis]]]
) -> Iterator[tuple[str, list[Diagnosis]]]:
    best = best_trial(trials)
    shown: set[str] = set()
    if best is not None and best.diagnoses:
        shown = {diagnosis.code for diagnosis in best.diagnoses}
        yield f"The best trial, {best.evidence.name}:", best.diagnoses
    for code, found in by_code.items():
        serious = [(trial, diagnosis) for trial, diagnosis in found if diagnosis.level == "serious"]
        if serious and code not in shown:
            trial, diagnosis = serious[0]
            yield f"{code}, as in {trial.evidence.name}:", [diagnosis]


def _gravest(found: Sequence[tuple[Trial, Diagnosis]]) -> Level:
    return min((diagnosis.level for _, diagnosis in found), key=LEVELS.index)


def _main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    folder, study = RunFolder(arguments.place), StudyFolder(arguments.place)
    baseline = None if arguments.baseline is None else _baseline(arguments.baseline)
    if folder.exists():
        _doctor_run(folder, baseline, json=arguments.json)
    elif names := study.trial_names():
        say(f"Examining {len(names)} trials of {study.location}.")
        trials = examine_study(study, baseline)
        _print_study(trials)
        running = [trial.evidence.name for trial in trials if not trial.evidence.ended]
        say("")
        say(
            f"{_counts([diagnosis for trial in trials for diagnosis in trial.diagnoses])} in {len(trials)} trials"
            f"{f', {len(running)} of which have not ended' if running else ''}; all of one trial: rafce doctor {(study.trials / 'NAME').command}"
        )
        if arguments.json:
            told = {trial.evidence.name: [one.to_json() for one in trial.diagnoses] for trial in trials}
            print_json({"study": str(study.location), "trials": told})
    else:
        folder.location.check_reachable()
        raise UsageError(
            f"{folder.location} is neither a run (it has no config.yaml) nor a study (it has no trials). Give the folder that training "
            "printed, such as runs/NAME."
        )
    return 0


def _doctor_run(folder: RunFolder, baseline: Evidence | None, *, json: bool) -> None:
    num_epochs, result = len(folder.metrics()), folder.result()
    state = "in training" if result is None else str(result["status"]).replace("_", " ")
    say(f"Examining the run {folder.location}: {num_epochs} epochs, {state}.")
    diagnoses = examine_run(folder, baseline)
    print_diagnoses(diagnoses)
    say("")
    if diagnoses:
        say(
            f"{_counts(diagnoses)}. Change one thing at a time, beginning with the first, and ask again of the new run."
        )
    elif num_epochs:
        say("Nothing to remark.")
    else:
        say("No epoch has ended yet: there is nothing to examine.")
    if json:
        print_json({"run": str(folder.location), "diagnoses": [one.to_json() for one in diagnoses]})


def _counts(diagnoses: Sequence[Diagnosis]) -> str:
    levels = [diagnosis.level for diagnosis in diagnoses]
    counted = ", ".join(f"{levels.count(level)} {level}" for level in LEVELS if level in levels)
    return f"{len(levels)} finding{'' if len(levels) == 1 else 's'}{f' ({counted})' if counted else ''}"


def _baseline(place: str) -> Evidence:
    folder = RunFolder(place)
    if not folder.exists() or folder.outputs("validation") is None:
        raise UsageError(
            f"--baseline {place}: is no run that has ended (config.yaml or outputs_validation.parquet is missing). Give the folder of a finished run."
        )
    return Evidence.of_run(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce doctor",
        description="Say what is wrong with a run or a study, why, and what to run next. Works on a run that is still in training too.",
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
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    return parser


def main(argv: list[str] | None = None) -> int:
    """``rafce doctor``; exit code 0 whatever is found, 2 where there is neither a run nor a study."""
    return run_main(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
