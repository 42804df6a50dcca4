"""Prints the diagnoses of a run or of all trials of a study on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rafce_ray.base.console import LEVEL_STYLES, console, say
from rafce_ray.base.errors import LEVELS, Level
from rafce_ray.config import write_yaml
from rafce_ray.doctor.diagnosis import Cause, Diagnosis
from rafce_ray.doctor.rules import Trial, best_trial

SHOWN_TRIALS = 5
"""Trials that are listed under a finding; the others are counted."""


def print_diagnoses(diagnoses: Sequence[Diagnosis]) -> None:
    """Print findings at the terminal; levels and verdicts are words, colour only repeats them. Commands stay on one line."""
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


def print_study(trials: Sequence[Trial]) -> None:
    """Print findings by code with their trials, then the details of the best trial and of what is serious elsewhere."""
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
