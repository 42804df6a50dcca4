"""All rules of the doctor, run on a run in training, an ended one or a study; and their findings at the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rafce_ray.base.console import LEVEL_STYLES, console, progress_bar, say, warn
from rafce_ray.base.errors import LEVELS, DamagedFile
from rafce_ray.base.figures import FIGURES
from rafce_ray.config import Config, nested, write_yaml
from rafce_ray.doctor.action_units import action_units_not_read, au_f1_zero, task_balance
from rafce_ray.doctor.evidence import Cause, Diagnosis, Evidence, figure
from rafce_ray.doctor.figures import (
    action_units_below_floor,
    against_baseline,
    at_majority_floor,
    classes_never_found,
    emotion_only_runs,
    improvement_within_noise,
    miscalibrated,
    with_baseline,
)
from rafce_ray.doctor.training import (
    batch_of_all_images,
    diverged,
    learning_rate_too_high,
    learning_rate_too_low,
    overfitting,
    train_longer,
    underfitting,
    validation_falling,
)
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.folder import StudyFolder

if TYPE_CHECKING:
    from rafce_ray.run.state import Training

Rule = Callable[[Evidence], list[Diagnosis]]

LIVE_RULES: tuple[Rule, ...] = (
    diverged,
    au_f1_zero,
    overfitting,
    validation_falling,
    learning_rate_too_high,
    task_balance,
)
"""Rules that apply while a run trains: they read epoch records and targets only, and cost almost no time."""

RULES: tuple[Rule, ...] = (
    *LIVE_RULES,
    action_units_not_read,
    batch_of_all_images,
    learning_rate_too_low,
    underfitting,
    at_majority_floor,
    classes_never_found,
    action_units_below_floor,
    miscalibrated,
    against_baseline,
    train_longer,
    improvement_within_noise,
)
"""Every rule; among findings of one level, those of earlier rules come first."""


def examine(evidence: Evidence) -> list[Diagnosis]:
    """Findings of every rule, gravest first."""
    return _run(RULES, evidence)


def examine_live(
    config: Config, targets: dict[str, Any] | None, audit: dict[str, Any] | None, records: list[dict[str, Any]]
) -> list[Diagnosis]:
    """Findings of the rules for a run in training, gravest first; ``records`` are its epochs so far, the newest last.

    A finding is repeated after every epoch that shows it: report each ``code`` once.
    """
    return _run(LIVE_RULES, Evidence.of_training(config, targets, audit, records))


def report_findings(training: Training, records: list[dict[str, Any]]) -> None:
    """Warn of what the rules find in the epochs so far, each finding once in a run's life."""
    folder = training.folder
    told = {event.get("code") for event in folder.events() if event["event"] == "finding"}
    for diagnosis in examine_live(training.config, training.targets, training.audit, records):
        if diagnosis.level != "info" and diagnosis.code not in told:
            message = f"epoch {records[-1]['epoch']}: {diagnosis.headline} (rafce doctor {folder.location.command})"
            folder.add_event("finding", code=diagnosis.code, level=diagnosis.level, message=message)


def examine_run(folder: RunFolder, baseline: Evidence | None = None) -> list[Diagnosis]:
    """All findings of a run, compared with ``baseline`` or else with the nearest emotion-only run next to it."""
    evidence = Evidence.of_run(folder, baseline)
    if baseline is None:
        around = folder.location.parent
        siblings = (RunFolder(str(around / info.base_name)) for info in around.list())
        evidence = with_baseline(evidence, emotion_only_runs(siblings))
    return examine(evidence)


@dataclass(frozen=True)
class Trial:
    """A study's trial, and what was found of it."""

    evidence: Evidence
    diagnoses: list[Diagnosis]


def examine_study(study: StudyFolder, baseline: Evidence | None = None) -> list[Trial]:
    """All findings of every trial that was started, compared with ``baseline`` or the study's own emotion-only trials.

    A trial whose files cannot be read is left out with a warning.
    """
    folders = [study.trial(name) for name in study.trial_names()]
    candidates = [] if baseline is not None else emotion_only_runs(folders)
    trials = []
    with progress_bar("examining trials", len(folders)) as advance:
        for folder in folders:
            advance(1)
            try:
                evidence = Evidence.of_run(folder, baseline)
            except DamagedFile as error:
                warn(f"trial {folder.location.name} is left out. {error}")
                continue
            evidence = evidence if baseline is not None else with_baseline(evidence, candidates)
            trials.append(Trial(evidence, examine(evidence)))
    return trials


def found_in(trials: Sequence[Trial]) -> dict[str, list[tuple[Trial, Diagnosis]]]:
    """Findings by code, each with its trials, the gravest codes first."""
    by_code: dict[str, list[tuple[Trial, Diagnosis]]] = {}
    for trial in trials:
        for diagnosis in trial.diagnoses:
            by_code.setdefault(diagnosis.code, []).append((trial, diagnosis))
    return dict(sorted(by_code.items(), key=lambda item: min(_gravity(one) for _, one in item[1])))


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The ended trial with the best monitored figure, or macro-F1 over supported classes if monitors differ."""
    ended = [trial for trial in trials if trial.evidence.metrics]
    monitors = {trial.evidence.monitor for trial in ended}
    monitor = monitors.pop() if len(monitors) == 1 else "macro_f1_supported"

    def merit(trial: Trial) -> float:
        value = FIGURES[monitor].direction * figure(trial.evidence.metrics, monitor)
        return value if math.isfinite(value) else -math.inf

    return max(ended, key=merit, default=None)


def _run(rules: Sequence[Rule], evidence: Evidence) -> list[Diagnosis]:
    return sorted((found for rule in rules for found in rule(evidence)), key=_gravity)


def _gravity(diagnosis: Diagnosis) -> int:
    return LEVELS.index(diagnosis.level)


SHOWN_TRIALS = 5
"""Trials that are listed under a finding; the others are counted."""


def print_diagnoses(diagnoses: Sequence[Diagnosis]) -> None:
    """Print findings at the terminal; levels and verdicts are words, colour only repeats them.

    Commands stay on one line.
    """
    for number, diagnosis in enumerate(diagnoses, start=1):
        level = (f"{number}. {diagnosis.level}", LEVEL_STYLES[diagnosis.level])
        parts: list[RenderableType] = [Text.assemble("\n", level, f": {diagnosis.code}"), _indented(diagnosis.message)]
        if diagnosis.causes:
            parts += [_indented("causes, in the order to look at them", above=1), _cause_table(diagnosis.causes)]
        parts.append(_indented(Text.assemble(("advice: ", "bold"), diagnosis.remedy), above=1))
        if diagnosis.patch:
            shown = write_yaml(nested(diagnosis.patch), default_flow_style=None, width=1000).rstrip()
            parts += [_indented("changes of the configuration", above=1), _indented(shown, by=6)]
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


def print_study(trials: Sequence[Trial]) -> None:
    """Print findings by code with their trials, then the details of the best trial and of what is serious elsewhere."""
    by_code = found_in(trials)
    for code, found in by_code.items():
        level = min((one for _, one in found), key=_gravity).level
        trials_with_it = f": {code}, {len(found)} of {len(trials)} trials"
        console.print(Text.assemble((f"\n{level}", LEVEL_STYLES[level]), trials_with_it), soft_wrap=False)
        if level == "info":
            continue
        for trial, diagnosis in found[:SHOWN_TRIALS]:
            line = Text(f"   {trial.evidence.name}: {diagnosis.message}")
            console.print(line, soft_wrap=False, no_wrap=True, overflow="ellipsis")
        if len(found) > SHOWN_TRIALS:
            console.print(f"   and {len(found) - SHOWN_TRIALS} more trials")
    best = best_trial(trials)
    shown = [] if best is None else best.diagnoses
    details = [] if best is None or not shown else [(f"The best trial, {best.evidence.name}:", shown)]
    told = {one.code for one in shown}
    for code, found in by_code.items():
        serious = [(trial, one) for trial, one in found if one.level == "serious" and code not in told]
        details += [(f"{code}, as in {trial.evidence.name}:", [one]) for trial, one in serious[:1]]
    for heading, diagnoses in details:
        console.print(Text(f"\n{heading}", "bold"), soft_wrap=False)
        print_diagnoses(diagnoses)
