"""Rows of a study page's tables: what differs, all trials, finalists, cost, where it came from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rafce_ray.comparison import Difference
from rafce_ray.figure_text import UNDEFINED
from rafce_ray.figures import FIGURES
from rafce_ray.report.study_cost import Cost, by_status, cost
from rafce_ray.report.study_curves import ACTION_UNIT, EMOTION
from rafce_ray.report.study_data import StudyData
from rafce_ray.report.study_plots import roles_of
from rafce_ray.study.trials import Trial, best_first
from rafce_ray.study.verdict import Finalist
from rafce_ray.study.watch import STATES, plain

SHOWN = ("accuracy", EMOTION, ACTION_UNIT, "loss")
"""Figures beside the score."""

NOT_RETRAINED = 5
"""Trials in the finalists' table of a sweep that trained none again."""

BROKEN = ("failed", "diverged")


def state(status: str) -> str:
    """A trial's status for people; one without an end may be in training or interrupted, which its folder cannot tell."""
    return STATES.get(status, "not ended")


def trial_rows(data: StudyData) -> list[dict[str, Any]]:
    """Every trial of the sweep, the best first, then those without a score by number."""
    ranked = {trial.name for trial in data.ranked}
    ordered = [*data.ranked, *(trial for trial in data.trials if trial.name not in ranked)]
    return [_trial_row(data, trial) for trial in ordered]


def _trial_row(data: StudyData, trial: Trial) -> dict[str, Any]:
    own = data.values[trial.name]
    base = {} if data.base is None else data.values[data.base.name]
    return {
        "trial": trial,
        "roles": roles_of(trial, data.winner, data.base, judged=data.verdict is not None),
        "state": state(trial.status),
        "is_broken": trial.status in BROKEN,
        "figures": [trial.figures.get(name) for name in shown_figures(data)],
        "values": [
            {
                "text": plain(own[key]) if key in own else UNDEFINED,
                "number": own[key] if isinstance(own.get(key), int | float) else None,
                "as_base": key in own and base.get(key) == own[key] and trial.plan.number != 0,
            }
            for key in data.keys
        ],
    }


def shown_figures(data: StudyData) -> list[str]:
    """Figures beside the metric that any trial has."""
    return [
        name
        for name in SHOWN
        if name != data.metric and any(trial.figures.get(name) is not None for trial in data.trials)
    ]


def change_rows(data: StudyData) -> list[tuple[str, str, str]]:
    """Keys in which the winner differs from the base: key, the base's value, the winner's."""
    if data.winner is None:
        return []
    changes = data.changes(data.winner)
    return [(key, plain(base), plain(own)) for key, (base, own) in changes.items() if key != "run.seed"]


def finalists_table(data: StudyData) -> dict[str, Any] | None:
    """The verdict's rows and the seeds of its columns; intervals and scores also as places between the lowest and the highest of all."""
    if data.verdict is None:
        return None
    shown = data.verdict.ranked if data.verdict.retrained else data.verdict.ranked[:NOT_RETRAINED]
    seeds = sorted({seed for one in shown for seed in (*one.scores, *one.missing)})
    numbers = [value for one in shown for value in (*one.scores.values(), one.low, one.high) if math.isfinite(value)]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    width = (high - low) or 1.0

    def places(one: Finalist) -> list[float | None]:
        return [(value - low) / width if math.isfinite(value) else None for value in (one.mean, one.low, one.high)]

    rows = [_finalist_row(data, one, seeds) | {"at": places(one)} for one in shown]
    return {"seeds": seeds, "low": low, "high": high, "rows": rows}


def _finalist_row(data: StudyData, one: Finalist, seeds: Sequence[int]) -> dict[str, Any]:
    verdict = data.verdict
    assert verdict is not None
    roles = ["winner"] * (one.trial == verdict.winner) + ["base"] * (one.trial == verdict.base)
    return {
        "name": one.trial,
        "roles": roles,
        "scores": [(one.scores.get(seed), one.missing.get(seed)) for seed in seeds],
        "mean": _finite(one.mean),
        "bounds": [_finite(one.low), _finite(one.high)],
        "sweep_score": _finite(one.sweep_score),
    }


def test_rows(data: StudyData) -> list[dict[str, Any]]:
    """Figures of the winner and of the base on the test split, and their differences as they are."""
    found = data.on_test
    if found is None:
        return []
    rows = []
    for name, own in found.figures[found.winner].items():
        base = found.figures.get(found.base, {}).get(name) if found.base != found.winner else None
        if not math.isfinite(own.mean):
            continue
        difference = found.differences.get(name)
        rows.append(
            {
                "name": FIGURES[name].title + (" (lower is better)" if FIGURES[name].direction < 0 else ""),
                "winner": own.mean,
                "winner_bounds": [own.low, own.high],
                "base": None if base is None else _finite(base.mean),
                "base_bounds": None if base is None else [base.low, base.high],
                "difference": None if difference is None else _finite(difference.value),
                "bounds": None if difference is None else [difference.low, difference.high],
                "verdict": None if difference is None else _verdict(name, difference),
            }
        )
    return rows


def _verdict(name: str, difference: Difference) -> str | None:
    if not math.isfinite(difference.low):
        return None
    if not difference.is_real:
        return "within noise"
    return "better" if difference.value * FIGURES[name].direction > 0 else "worse"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def cost_rows(data: StudyData, of: str) -> Iterator[tuple[str, str, Cost]]:
    """Of the sweep and of its finalists the cost by status and in all, then of both: part, status, cost."""
    for part, trials in (("sweep", data.trials), ("finalists", data.finalists)):
        if trials:
            yield from ((part, state(status), one) for status, one in by_status(trials, of).items())
            yield part, "all", cost(trials, of)
    if data.finalists:
        yield "study", "all", cost([*data.trials, *data.finalists], of)


def broken(data: StudyData) -> list[Trial]:
    """Trials and finalists that failed or diverged."""
    return [trial for trial in (*data.trials, *data.finalists) if trial.status in BROKEN]


def unjudged_finalists(data: StudyData) -> list[Trial]:
    """Finalists' runs of a study that has no verdict yet, the best first."""
    if data.verdict is not None:
        return []
    scored = best_first(data.finalists, data.metric)
    return [*scored, *(trial for trial in data.finalists if trial not in scored)]


def provenance_rows(data: StudyData) -> Iterator[tuple[str, str]]:
    """Where the study's figures come from; several values where trials differ."""
    yield "study folder", str(data.study.location)
    yield "trials on record", f"{len(data.trials)} of the sweep, {len(data.finalists)} of finalists"
    records = list(data.provenances.values())
    yield "data fingerprint", _all(record.get("data_fingerprint") for record in records)
    software = dict.fromkeys(name for record in records for name in record.get("software", {}))
    for name in software:
        yield name, _all(record.get("software", {}).get(name) for record in records)


def _all(values: Iterator[Any]) -> str:
    return ", ".join(dict.fromkeys(UNDEFINED if value is None else str(value) for value in values)) or UNDEFINED
