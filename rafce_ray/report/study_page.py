"""A study's page: which trial won and what is known of it, then how the sweep came to it; the template says how it looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from rafce_ray import __version__
from rafce_ray.figure_text import UNDEFINED, interval, number, percent
from rafce_ray.figures import FIGURES
from rafce_ray.report import study_tables as tables
from rafce_ray.report.page import number_html, patch_lines, template_environment
from rafce_ray.report.study_cost import cost, unit
from rafce_ray.report.study_curves import (
    ACTION_UNIT,
    EMOTION,
    Rung,
    both_figures,
    group_rungs,
    learning_curves,
    pareto_chart,
    rung_charts,
)
from rafce_ray.report.study_data import StudyData, gather_study
from rafce_ray.report.study_plots import parallel_coordinates, score_by_value
from rafce_ray.storage import Location
from rafce_ray.study.importance import parameter_importance
from rafce_ray.study.trials import Trial, direction
from rafce_ray.study.verdict import sentences
from rafce_ray.study.watch import STATES, roughly
from rafce_ray.study_folder import StudyFolder

REPORT_FILE = "report.html"
SHOWN_TRIALS = 6
"""Trials that are named where many could be."""


def write_study_report(study: StudyFolder, metric: str) -> Location:
    """Write a study's report and return where it is: ``report.html`` in the study's folder, replaced if it is there.

    ``metric``: the study's. A study that has not ended gets a page of what is there.

    Raises:
        UsageError: there is no study here.
    """
    place = study.location / REPORT_FILE
    place.write_bytes(render_study(gather_study(study, metric)).encode())
    return place


def render_study(data: StudyData) -> str:
    """The whole page. Its one script sorts the table of trials; nothing is fetched from anywhere."""
    said = [] if data.verdict is None else sentences(data.verdict)
    of = unit((*data.trials, *data.finalists))
    rungs = group_rungs(data.rungs, data.metric)
    front = _front(data)
    template = _environment().get_template("study.html.j2")
    page = template.render(
        data=data,
        name=data.settings.get("name", data.study.location.name),
        lead=said[:2] or [_provisional(data)],
        said=said[2:],
        chips=list(_chips(data)),
        tiles=list(_tiles(data)),
        alerts=list(_alerts(data)),
        commands=list(_commands(data)),
        changes=tables.change_rows(data),
        finalists=tables.finalists_table(data),
        unjudged=tables.unjudged_finalists(data),
        test={"said": [] if data.on_test is None else data.on_test.sentences(), "rows": tables.test_rows(data)},
        figures=[(name, FIGURES[name].title) for name in tables.shown_figures(data)],
        rows=tables.trial_rows(data),
        state=tables.state,
        charts=_charts(data, rungs, front),
        importance=parameter_importance(data.trials, data.metric, data.values),
        rungs=rungs,
        front=front,
        both_figures=both_figures,
        both_titles=[FIGURES[name].title for name in (EMOTION, ACTION_UNIT)],
        unit=of,
        costs=list(tables.cost_rows(data, of)),
        sweep_cost=cost(data.trials, of),
        findings=[(one, trials, patch_lines(one.patch)) for one, trials in data.findings],
        provenance=list(tables.provenance_rows(data)),
        undefined=UNDEFINED,
        better="higher" if direction(data.metric) > 0 else "lower",
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return str(page)


@cache
def _environment() -> Environment:
    return template_environment(named=_named, roughly=roughly)


def _charts(data: StudyData, rungs: Sequence[Rung], front: Sequence[Trial]) -> dict[str, Any]:
    return {
        "parallel": parallel_coordinates(data.field),
        "values": list(score_by_value(data.field)),
        "rungs": list(rung_charts(rungs)),
        "curves": learning_curves(data.field),
        "pareto": pareto_chart(data.field, front),
    }


def _named(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - SHOWN_TRIALS
    return ", ".join(names[:SHOWN_TRIALS]) + (f" and {more} more" if more > 0 else "")


def _provisional(data: StudyData) -> str:
    """Who leads, as long as nothing was judged."""
    if not data.ranked:
        return "No trial has a score yet."
    best, base = data.ranked[0], data.base
    lead = f"So far {best.name} leads with {data.metric} {number(best.score)} on validation"
    if base is not None and base.score is not None and base.name != best.name and best.score is not None:
        gain = direction(data.metric) * (best.score - base.score)
        lead += f", {number(gain)} better than the base ({base.name}, {number(base.score)})"
    elif base is not None and base.name == best.name:
        lead += ": it is the base configuration"
    return (
        f"{lead}. The best of many trials is partly the luckiest: nothing has been trained again with other seeds yet."
    )


def _chips(data: StudyData) -> Iterator[str]:
    planned = data.settings.get("num_trials")
    of_planned = f" of {planned}" if planned else ""
    yield f"{len(data.trials)}{of_planned} trials"
    if "search" in data.settings:
        yield f"search: {data.settings['search']}"
    yield f"scheduler: {(data.settings.get('scheduler') or {}).get('type', 'none')}"
    yield f"metric: {data.metric}, {'higher' if direction(data.metric) > 0 else 'lower'} is better"


def _tiles(data: StudyData) -> Iterator[dict[str, Any]]:
    """The few numbers that are read first."""
    verdict, winner = data.verdict, data.winner
    if verdict is not None and (won := verdict.finalist(verdict.winner)) is not None:
        bounds = interval([won.low, won.high], 3)
        yield {
            "label": f"{data.metric} of {verdict.winner}",
            "value": number_html(won.mean),
            "notes": [f"95\u00a0% interval: {bounds}", f"in the sweep: {number(won.sweep_score)}"],
        }
        if verdict.winner != verdict.base:
            luck = "more than luck" if verdict.gain.is_real else "no more than luck would explain"
            bounds = interval([verdict.gain.low, verdict.gain.high], 3)
            yield {
                "label": "Against the base",
                "value": Markup('<data value="{}">{}</data>').format(
                    verdict.gain.value, f"{verdict.gain.value:+.3f}".replace("-", "\N{MINUS SIGN}")
                ),
                "notes": [f"95\u00a0% interval: {bounds}", luck],
            }
    elif winner is not None:
        yield {
            "label": f"{data.metric} of {winner.name}",
            "value": number_html(winner.score),
            "notes": ["on validation, one training", f"at epoch {winner.best_epoch}"],
        }
    if data.trials:
        spent = cost(data.trials, unit(data.trials))
        share = percent(spent.epochs / spent.max_epochs, 0)
        yield {
            "label": "Epochs trained",
            "value": Markup("{:,}").format(spent.epochs),
            "notes": [f"of {spent.max_epochs:,} that these trials could have had ({share})"],
        }
        counts = Counter(trial.status for trial in data.trials)
        order = [*(one for one in STATES if counts[one]), *(one for one in counts if one not in STATES)]
        yield {
            "label": "Trials",
            "value": Markup("{:,}").format(len(data.trials)),
            "notes": [", ".join(f"{counts[status]} {tables.state(status)}" for status in order)],
        }


def _alerts(data: StudyData) -> Iterator[tuple[str, str]]:
    """What a reader must know before any figure: level and sentence."""
    for trial in tables.broken(data):
        reason = f": {trial.reason.rstrip('.')}" if trial.reason else ""
        where = f" after epoch {trial.epochs}" if trial.epochs else " before its first epoch ended"
        yield "warning", f"{trial.name} {tables.state(trial.status)}{where}{reason}."
    fingerprints = {record.get("data_fingerprint") for record in data.provenances.values()}
    if len(fingerprints) > 1:
        yield (
            "serious",
            f"The trials were not trained on the same data: there are {len(fingerprints)} fingerprints. Their scores cannot be compared.",
        )
    if data.verdict is None:
        planned = data.settings.get("num_trials")
        ended = sum(trial.status not in ("waiting", "interrupted") for trial in data.trials)
        of_planned = f"{ended} of {planned} trials" if planned else f"{ended} trials"
        yield "info", f"The study has not ended: {of_planned} have. The page shows what is there."


def _commands(data: StudyData) -> Iterator[tuple[str, str]]:
    """What to do next, each with its command."""
    here = data.study.location
    if (here / "best").exists():
        yield "The winner's bundle on photographs:", f"rafce predict --bundle {(here / 'best').command} PHOTO.jpg"
    if (here / "best.yaml").exists():
        yield (
            "The winner's configuration, trained again or on more data:",
            f"rafce train --config {(here / 'best.yaml').command}",
        )
    if data.verdict is None:
        yield "The study goes on from where it is:", f"rafce tune --config {(here / 'study.yaml').command}"
    elif data.winner is not None:
        run = data.verdict.finalist(data.winner.name)
        name = next(iter(run.runs.values()), data.winner.name) if run is not None else data.winner.name
        yield "All about one of the winner's runs:", f"rafce report {data.study.trial(name).location.command}"


def _front(data: StudyData) -> list[Trial]:
    """The Pareto front, by the emotion figure: trials for which no other is as good in both tasks and better in one."""
    drawn = [(trial, point) for trial in data.trials if (point := both_figures(trial)) is not None]
    front = [
        (trial, (x, y))
        for trial, (x, y) in drawn
        if not any(u >= x and v >= y and (u, v) != (x, y) for _, (u, v) in drawn)
    ]
    return [trial for trial, _ in sorted(front, key=lambda one: one[1], reverse=True)]
