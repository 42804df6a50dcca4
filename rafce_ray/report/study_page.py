"""A study's page: its cost, its data, and the sections, rows and words of the page; the template lays them out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from rafce_ray.base.console import warn
from rafce_ray.base.errors import LEVELS, DamagedFile, UsageError
from rafce_ray.base.figures import FIGURES
from rafce_ray.base.storage import Location
from rafce_ray.config import Config, differences, flatten, parse_yaml
from rafce_ray.doctor.evidence import Diagnosis
from rafce_ray.doctor.rules import examine_study, found_in
from rafce_ray.metrics.comparison import Difference
from rafce_ray.metrics.text import UNDEFINED
from rafce_ray.report.page import REPORT_FILE, template_environment
from rafce_ray.report.study_plots import (
    ACTION_UNIT,
    EMOTION,
    Emphasis,
    Field,
    both_figures,
    emphasise,
    group_rungs,
    learning_curves,
    parallel_coordinates,
    pareto_chart,
    roles_of,
    rung_charts,
    score_by_value,
)
from rafce_ray.study.finalists import Finalist, Verdict, sentences
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.importance import parameter_importance
from rafce_ray.study.on_test import OnTest
from rafce_ray.study.trials import RungEntry, Trial, best_first, read_rungs, read_trials
from rafce_ray.study.watch import STATES, plain

SAVING = ("stopped_by_scheduler", "stopped_early")
"""Statuses whose remaining epochs count as saved. Those of failed trials are lost, others may still be trained."""


@dataclass(frozen=True)
class Cost:
    """What some trials cost. ``seconds`` and ``seconds_saved``: of one CPU core or one GPU, as :func:`unit` says.

    ``epochs_saved``: epochs not trained because of early stopping; ``seconds_saved``: those at each trial's own mean
    seconds an epoch. ``num_unmeasured``: trials stopped before their first epoch, whose ``seconds_saved`` are unknown
    and left out.
    """

    num_trials: int
    epochs: int
    max_epochs: int
    seconds: float
    epochs_saved: int
    seconds_saved: float
    num_unmeasured: int

    @property
    def share_saved(self) -> float | None:
        """Seconds saved of all that would have been spent; None where nothing was spent."""
        whole = self.seconds + self.seconds_saved
        return self.seconds_saved / whole if whole else None


def unit(trials: Iterable[Trial]) -> str:
    """``GPU`` where any trial has a share of one, else ``CPU``."""
    return "GPU" if any(trial.plan.gpus > 0 for trial in trials) else "CPU"


def compute_seconds(trial: Trial, of: str) -> float:
    """Seconds of training times the trial's CPU cores or GPUs."""
    return trial.seconds * (trial.plan.gpus if of == "GPU" else trial.plan.cpus)


def cost(trials: Sequence[Trial], of: str) -> Cost:
    """What these trials cost in seconds ``of`` one ``CPU`` core or ``GPU``."""
    stopped = [trial for trial in trials if trial.status in SAVING]
    saved = {trial.name: trial.max_epochs - trial.epochs for trial in stopped}
    measured = [trial for trial in stopped if trial.epochs]
    return Cost(
        num_trials=len(trials),
        epochs=sum(trial.epochs for trial in trials),
        max_epochs=sum(trial.max_epochs for trial in trials),
        seconds=sum(compute_seconds(trial, of) for trial in trials),
        epochs_saved=sum(saved.values()),
        seconds_saved=sum(saved[trial.name] * compute_seconds(trial, of) / trial.epochs for trial in measured),
        num_unmeasured=len(stopped) - len(measured),
    )


STUDY_SETTINGS, FINALISTS, TEST = "study.yaml", "finalists.json", "test.json"


@dataclass(frozen=True)
class StudyData:
    """A study as its page shows it. ``trials`` are the sweep's, ``finalists`` their repetitions with other seeds.

    ``configs``: of every trial, by name. ``settings``: study.yaml, ``settings_text`` its text. ``provenances``: of
    every trial that has one. ``findings``: the doctor's, each with the trials that have it, the trial shown first.
    """

    study: StudyFolder
    metric: str
    settings_text: str
    trials: tuple[Trial, ...]
    finalists: tuple[Trial, ...]
    configs: dict[str, Config]
    rungs: tuple[RungEntry, ...]
    verdict: Verdict | None
    on_test: OnTest | None
    findings: tuple[tuple[Diagnosis, tuple[str, ...]], ...]
    provenances: dict[str, dict[str, Any]]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """study.yaml; empty where there is none."""
        return dict(parse_yaml(self.settings_text) or {})

    @cached_property
    def ranked(self) -> list[Trial]:
        """The sweep's trials that have a score, the best first."""
        return best_first(self.trials, self.metric)

    @cached_property
    def base(self) -> Trial | None:
        """The base configuration's trial; None before it was started."""
        return next((trial for trial in self.trials if trial.plan.is_base), None)

    @cached_property
    def winner(self) -> Trial | None:
        """The finalists' winner or, before there is one, the best of the sweep."""
        if self.verdict is None:
            return self.ranked[0] if self.ranked else None
        return next((trial for trial in self.trials if trial.name == self.verdict.winner), None)

    @cached_property
    def keys(self) -> list[str]:
        """Keys that were sampled, in the order of the space."""
        space = [str(key) for key in self.settings.get("space") or {}]
        return list(dict.fromkeys([*space, *(key for trial in self.trials for key in trial.plan.values)]))

    @cached_property
    def values(self) -> dict[str, dict[str, Any]]:
        """What each trial was trained with, by sampled key; keys that do not apply to it are absent.

        The base has its own of all keys.
        """
        values = {trial.name: dict(trial.plan.values) for trial in self.trials}
        if self.base is not None:
            own = flatten(self.configs[self.base.name])
            conditions = {key: self._domain(key).get("when", {}) for key in self.keys}
            values[self.base.name] = {
                key: own[key]
                for key, condition in conditions.items()
                if all(own[other] in wanted for other, wanted in condition.items())
            }
        return values

    @property
    def choices(self) -> dict[str, list[Any]]:
        """Every sampled key, with the values that it chose from where the space lists them."""
        domains = {key: self._domain(key) for key in self.keys}
        return {key: list(domain.get("choice") or domain.get("grid") or ()) for key, domain in domains.items()}

    def _domain(self, key: str) -> dict[str, Any]:
        """A key's domain as study.yaml writes it; empty where the space has none."""
        domain = (self.settings.get("space") or {}).get(key)
        return domain if isinstance(domain, dict) else {}

    @cached_property
    def emphasised(self) -> list[Emphasis]:
        """Trials that stand out in every chart."""
        return emphasise(self.ranked, self.winner, self.base, judged=self.verdict is not None)

    @property
    def field(self) -> Field:
        """The sweep as its charts show it."""
        return Field(self.trials, self.emphasised, self.choices, self.values, self.metric)

    def changes(self, trial: Trial) -> dict[str, tuple[Any, Any]]:
        """Keys in which a trial's configuration differs from the base's: the base's value and its own."""
        return {} if self.base is None else differences(self.configs[self.base.name], self.configs[trial.name])


def is_study(study: StudyFolder) -> bool:
    """Whether this is the folder of a study of ``rafce tune``, not of an ablation."""
    return (study.location / STUDY_SETTINGS).exists()


def gather_study(study: StudyFolder, metric: str) -> StudyData:
    """Everything for the page. ``metric``: the study's.

    Raises:
        UsageError: there is no study here.
    """
    if not is_study(study):
        raise UsageError(
            f"{study.location}: is no study of rafce tune: there is no {STUDY_SETTINGS} in it. Give the folder that "
            "the sweep printed."
        )
    found = read_trials(study, metric)
    folders = {trial.name: study.trial(trial.name) for trial in found}
    sweep = tuple(trial for trial in found if trial.plan.role == "sweep")
    return StudyData(
        study=study,
        metric=metric,
        settings_text=(study.location / STUDY_SETTINGS).read_bytes().decode(),
        trials=sweep,
        finalists=tuple(trial for trial in found if trial.plan.role == "finalist"),
        configs={name: folder.config() for name, folder in folders.items()},
        rungs=tuple(read_rungs(study)),
        verdict=None if (verdict := _record(study, FINALISTS)) is None else Verdict.from_json(verdict),
        on_test=None if (on_test := _record(study, TEST)) is None else OnTest.from_json(on_test),
        findings=tuple(_findings(study, [trial.name for trial in best_first(sweep, metric)])),
        provenances={
            name: folder.provenance()
            for name, folder in folders.items()
            if (folder.location / "provenance.json").exists()
        },
    )


def _record(study: StudyFolder, name: str) -> dict[str, Any] | None:
    """A file of the study; None, with a warning if it is damaged. The rest of the page does not need it."""
    try:
        return (study.location / name).read_record("The study's command then writes it again.")
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        warn(str(error))
        return None


def _findings(study: StudyFolder, ranked: Sequence[str]) -> list[tuple[Diagnosis, tuple[str, ...]]]:
    """Each code once with its trials, by level, then by number of trials; shown is the best trial of the top level."""
    findings = []
    for by_trial in found_in(examine_study(study)).values():
        found = sorted(by_trial, key=lambda one: _place(one[0].evidence.name, ranked))
        # min takes the first among equals.
        shown = min(found, key=lambda one: LEVELS.index(one[1].level))
        names = dict.fromkeys(trial.evidence.name for trial, _ in (shown, *found))
        findings.append((shown[1], tuple(names)))
    return sorted(findings, key=lambda one: (LEVELS.index(one[0].level), -len(one[1])))


def _place(name: str, ranked: Sequence[str]) -> tuple[int, str]:
    return ranked.index(name) if name in ranked else len(ranked), name


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
    scored = {trial.name for trial in (*data.ranked, *best_first(data.finalists, data.metric))}
    statuses = Counter(trial.status for trial in data.trials)
    return (
        template_environment()
        .get_template("study.html.j2")
        .render(
            data=data,
            name=data.settings.get("name", data.study.location.name),
            here=data.study.location,
            planned=data.settings.get("num_trials"),
            direction=FIGURES[data.metric].direction,
            better="higher" if FIGURES[data.metric].direction > 0 else "lower",
            lead=said[:2],
            said=said[2:],
            statuses=[(state(one), statuses[one]) for one in dict.fromkeys([*STATES, *statuses]) if statuses[one]],
            changes=None if data.winner is None else data.changes(data.winner),
            rows=[*data.ranked, *(trial for trial in data.trials if trial.name not in scored)],
            finalists=[
                *best_first(data.finalists, data.metric),
                *(trial for trial in data.finalists if trial.name not in scored),
            ],
            shown_figures=shown_figures(data),
            charts={
                "parallel": parallel_coordinates(data.field),
                "values": list(score_by_value(data.field)),
                "rungs": list(rung_charts(rungs)),
                "curves": learning_curves(data.field),
                "pareto": pareto_chart(data.field, front),
            },
            importance=parameter_importance(data.trials, data.metric, data.values),
            rungs=rungs,
            front=front,
            unit=of,
            costs=list(cost_rows(data, of)),
            spent=cost(data.trials, unit(data.trials)),
            sweep_cost=cost(data.trials, of),
            software={
                name: _all(one.get("software", {}).get(name) for one in data.provenances.values())
                for record in data.provenances.values()
                for name in record.get("software", {})
            },
            both_figures=both_figures,
            both_titles=[FIGURES[name].title for name in (EMOTION, ACTION_UNIT)],
            plain=plain,
            roles_of=roles_of,
            state=state,
            ends_of=_ends,
            seeds_of=lambda shown: sorted({seed for one in shown for seed in (*one.scores, *one.missing)}),
            verdict_of=_verdict,
            all_of=_all,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def _front(data: StudyData) -> list[Trial]:
    """The Pareto front, by the emotion figure: trials for which no other is as good in both tasks and better in one."""
    points = {trial.name: point for trial in data.trials if (point := both_figures(trial)) is not None}
    front = {
        name: (x, y)
        for name, (x, y) in points.items()
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points.values())
    }
    on_front = [trial for trial in data.trials if trial.name in front]
    return sorted(on_front, key=lambda trial: front[trial.name], reverse=True)


SHOWN = ("accuracy", EMOTION, ACTION_UNIT, "loss")
"""Figures shown with the score."""


def state(status: str) -> str:
    """A trial's status for people; without an end it may be in training or interrupted: its folder is the same."""
    return STATES.get(status, "not ended")


def shown_figures(data: StudyData) -> list[str]:
    """Figures besides the metric that any trial has."""
    known = {name for trial in data.trials for name, value in trial.figures.items() if value is not None}
    return [name for name in SHOWN if name != data.metric and name in known]


def _ends(finalists: Sequence[Finalist]) -> tuple[float, float]:
    """The least and the largest of scores and ends of intervals, between which the finalists' scale runs."""
    numbers = [
        value for one in finalists for value in (*one.scores.values(), one.low, one.high) if math.isfinite(value)
    ]
    return (min(numbers), max(numbers)) if numbers else (0.0, 1.0)


def _verdict(name: str, difference: Difference | None) -> str | None:
    if difference is None or not math.isfinite(difference.low):
        return None
    if not difference.is_real:
        return "within noise"
    return "better" if difference.value * FIGURES[name].direction > 0 else "worse"


def cost_rows(data: StudyData, of: str) -> Iterator[tuple[str, str, Cost]]:
    """Of the sweep and of its finalists the cost by status and in all, then of both: part, status, cost."""
    for part, trials in (("sweep", data.trials), ("finalists", data.finalists)):
        if trials:
            for status in dict.fromkeys(trial.status for trial in trials):
                yield part, state(status), cost([trial for trial in trials if trial.status == status], of)
            yield part, "all", cost(trials, of)
    if data.finalists:
        yield "study", "all", cost([*data.trials, *data.finalists], of)


def _all(values: Iterable[Any]) -> str:
    """The distinct values, for what should be one."""
    return ", ".join(dict.fromkeys(UNDEFINED if value is None else str(value) for value in values)) or UNDEFINED
