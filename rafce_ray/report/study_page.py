"""A study's page: its cost, its data, and the sections, rows and words of the page; the template lays them out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from markupsafe import Markup

from rafce_ray import __version__
from rafce_ray.base.console import warn
from rafce_ray.base.errors import LEVELS, DamagedFile, UsageError
from rafce_ray.base.figures import FIGURES
from rafce_ray.base.storage import Location
from rafce_ray.config import Config, differences, flatten, parse_yaml
from rafce_ray.doctor.evidence import Diagnosis
from rafce_ray.doctor.rules import examine_study
from rafce_ray.metrics.comparison import Difference
from rafce_ray.metrics.text import UNDEFINED, interval, number, percent
from rafce_ray.report.page import REPORT_FILE, number_html, patch_lines, template_environment
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
from rafce_ray.study.finalists import Verdict, sentences
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


def by_status(trials: Sequence[Trial], of: str) -> dict[str, Cost]:
    """The cost of the trials of each status, in order of first occurrence."""
    statuses = dict.fromkeys(trial.status for trial in trials)
    return {status: cost([trial for trial in trials if trial.status == status], of) for status in statuses}


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
    found: dict[str, dict[str, Diagnosis]] = {}
    for trial in examine_study(study):
        for diagnosis in trial.diagnoses:
            found.setdefault(diagnosis.code, {}).setdefault(trial.evidence.name, diagnosis)
    order = {name: place for place, name in enumerate(ranked)}
    findings = []
    for by_trial in found.values():
        names = sorted(by_trial, key=lambda name: (order.get(name, len(order)), name))
        # min takes the first among equals.
        shown = min(names, key=lambda name: LEVELS.index(by_trial[name].level))
        findings.append((by_trial[shown], (shown, *(name for name in names if name != shown))))
    return sorted(findings, key=lambda one: (LEVELS.index(one[0].level), -len(one[1])))


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
    page = (
        template_environment()
        .get_template("study.html.j2")
        .render(
            data=data,
            name=data.settings.get("name", data.study.location.name),
            lead=said[:2] or [_provisional(data)],
            said=said[2:],
            chips=list(_chips(data)),
            tiles=list(_tiles(data)),
            alerts=list(_alerts(data)),
            commands=list(_commands(data)),
            changes=change_rows(data),
            finalists=finalists_table(data),
            unjudged=unjudged_finalists(data),
            test={"said": [] if data.on_test is None else data.on_test.sentences(), "rows": test_rows(data)},
            figures=[(name, FIGURES[name].title) for name in shown_figures(data)],
            rows=trial_rows(data),
            state=state,
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
            both_figures=both_figures,
            both_titles=[FIGURES[name].title for name in (EMOTION, ACTION_UNIT)],
            unit=of,
            costs=list(cost_rows(data, of)),
            sweep_cost=cost(data.trials, of),
            findings=[(one, trials, patch_lines(one.patch)) for one, trials in data.findings],
            provenance=list(provenance_rows(data)),
            undefined=UNDEFINED,
            better="higher" if FIGURES[data.metric].direction > 0 else "lower",
            version=__version__,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    return str(page)


def _provisional(data: StudyData) -> str:
    """The leading trial before there is a verdict."""
    if not data.ranked:
        return "No trial has a score yet."
    best, base = data.ranked[0], data.base
    lead = f"So far {best.name} leads with {data.metric} {number(best.score)} on validation"
    if base is not None and base.name == best.name:
        lead += ": it is the base configuration"
    elif base is not None and base.score is not None and best.score is not None:
        gain = FIGURES[data.metric].direction * (best.score - base.score)
        lead += f", {number(gain)} better than the base ({base.name}, {number(base.score)})"
    luck = "The best of many trials is partly the luckiest: nothing has been trained again with other seeds yet."
    return f"{lead}. {luck}"


def _chips(data: StudyData) -> Iterator[str]:
    planned = data.settings.get("num_trials")
    of_planned = f" of {planned}" if planned else ""
    yield f"{len(data.trials)}{of_planned} trials"
    if "search" in data.settings:
        yield f"search: {data.settings['search']}"
    yield f"scheduler: {(data.settings.get('scheduler') or {}).get('type', 'none')}"
    yield f"metric: {data.metric}, {'higher' if FIGURES[data.metric].direction > 0 else 'lower'} is better"


def _tiles(data: StudyData) -> Iterator[dict[str, Any]]:
    """The few numbers that are read first."""
    verdict, winner = data.verdict, data.winner
    if verdict is not None and (won := verdict.finalist(verdict.winner)) is not None:
        within = f"95\u00a0% interval: {interval([won.low, won.high], 3)}"
        notes = [within, f"in the sweep: {number(won.sweep_score)}"]
        yield _tile(f"{data.metric} of {verdict.winner}", number_html(won.mean), *notes)
        if verdict.winner != verdict.base:
            gain = verdict.gain
            luck = "more than luck" if gain.is_real else "no more than luck would explain"
            signed = f"{gain.value:+.3f}".replace("-", "\N{MINUS SIGN}")
            value = Markup('<data value="{}">{}</data>').format(gain.value, signed)
            yield _tile("Against the base", value, f"95\u00a0% interval: {interval([gain.low, gain.high], 3)}", luck)
    elif winner is not None:
        notes = ["on validation, one training", f"at epoch {winner.best_epoch}"]
        yield _tile(f"{data.metric} of {winner.name}", number_html(winner.score), *notes)
    if data.trials:
        spent = cost(data.trials, unit(data.trials))
        share = percent(spent.epochs / spent.max_epochs, 0)
        of_all = f"of {spent.max_epochs:,} that these trials could have had ({share})"
        yield _tile("Epochs trained", Markup("{:,}").format(spent.epochs), of_all)
        counts = Counter(trial.status for trial in data.trials)
        order = [*(one for one in STATES if counts[one]), *(one for one in counts if one not in STATES)]
        states = ", ".join(f"{counts[status]} {state(status)}" for status in order)
        yield _tile("Trials", Markup("{:,}").format(len(data.trials)), states)


def _tile(label: str, value: Markup, *notes: str) -> dict[str, Any]:
    return {"label": label, "value": value, "notes": list(notes)}


def _alerts(data: StudyData) -> Iterator[tuple[str, str]]:
    """What a reader must know before any figure: level and sentence."""
    for trial in broken(data):
        reason = f": {trial.reason.rstrip('.')}" if trial.reason else ""
        where = f" after epoch {trial.epochs}" if trial.epochs else " before its first epoch ended"
        yield "warning", f"{trial.name} {state(trial.status)}{where}{reason}."
    fingerprints = {record.get("data_fingerprint") for record in data.provenances.values()}
    if len(fingerprints) > 1:
        differ = f"The trials were not trained on the same data: there are {len(fingerprints)} fingerprints."
        yield "serious", f"{differ} Their scores cannot be compared."
    if data.verdict is None:
        planned = data.settings.get("num_trials")
        ended = sum(trial.status not in ("waiting", "interrupted") for trial in data.trials)
        of_planned = f"{ended} of {planned} trials" if planned else f"{ended} trials"
        yield "info", f"The study has not ended: {of_planned} have. The page shows what is there."


def _commands(data: StudyData) -> Iterator[tuple[str, str]]:
    """What to do next, each with its command."""
    here = data.study.location
    bundle, best = here / "best", here / "best.yaml"
    if bundle.exists():
        yield "The winner's bundle on photographs:", f"rafce predict --bundle {bundle.command} PHOTO.jpg"
    if best.exists():
        title = "The winner's configuration, trained again or on more data:"
        yield title, f"rafce train --config {best.command}"
    if data.verdict is None:
        yield "The study goes on from where it is:", f"rafce tune --config {(here / STUDY_SETTINGS).command}"
    elif data.winner is not None:
        run = data.verdict.finalist(data.winner.name)
        name = next(iter(run.runs.values()), data.winner.name) if run is not None else data.winner.name
        yield "All about one of the winner's runs:", f"rafce report {data.study.trial(name).location.command}"


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

NOT_RETRAINED = 5
"""Trials in the finalists' table of a sweep that trained none again."""

BROKEN = ("failed", "diverged")


def state(status: str) -> str:
    """A trial's status for people; without an end it may be in training or interrupted: its folder is the same."""
    return STATES.get(status, "not ended")


def trial_rows(data: StudyData) -> list[dict[str, Any]]:
    """Every trial of the sweep, the best first, then those without a score by number."""
    ranked = {trial.name for trial in data.ranked}
    ordered = [*data.ranked, *(trial for trial in data.trials if trial.name not in ranked)]
    base = {} if data.base is None else data.values[data.base.name]

    def cell(trial: Trial, key: str) -> dict[str, Any]:
        own = data.values[trial.name]
        return {
            "text": plain(own[key]) if key in own else UNDEFINED,
            "number": own[key] if isinstance(own.get(key), int | float) else None,
            "as_base": key in own and base.get(key) == own[key] and trial.plan.number != 0,
        }

    return [
        {
            "trial": trial,
            "roles": roles_of(trial, data.winner, data.base, judged=data.verdict is not None),
            "state": state(trial.status),
            "is_broken": trial.status in BROKEN,
            "figures": [trial.figures.get(name) for name in shown_figures(data)],
            "values": [cell(trial, key) for key in data.keys],
        }
        for trial in ordered
    ]


def shown_figures(data: StudyData) -> list[str]:
    """Figures besides the metric that any trial has."""
    known = {name for trial in data.trials for name, value in trial.figures.items() if value is not None}
    return [name for name in SHOWN if name != data.metric and name in known]


def change_rows(data: StudyData) -> list[tuple[str, str, str]]:
    """Keys in which the winner differs from the base: key, the base's value, the winner's."""
    if data.winner is None:
        return []
    changes = data.changes(data.winner)
    return [(key, plain(base), plain(own)) for key, (base, own) in changes.items() if key != "run.seed"]


def finalists_table(data: StudyData) -> dict[str, Any] | None:
    """The verdict's rows and the seeds of its columns; scores and intervals also as places in [0, 1] of their range."""
    verdict = data.verdict
    if verdict is None:
        return None
    shown = verdict.ranked if verdict.retrained else verdict.ranked[:NOT_RETRAINED]
    seeds = sorted({seed for one in shown for seed in (*one.scores, *one.missing)})
    numbers = [value for one in shown for value in (*one.scores.values(), one.low, one.high) if math.isfinite(value)]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    width = (high - low) or 1.0
    rows = [
        {
            "name": one.trial,
            "roles": ["winner"] * (one.trial == verdict.winner) + ["base"] * (one.trial == verdict.base),
            "scores": [(one.scores.get(seed), one.missing.get(seed)) for seed in seeds],
            "mean": _finite(one.mean),
            "bounds": [_finite(one.low), _finite(one.high)],
            "sweep_score": _finite(one.sweep_score),
            "at": [_finite((value - low) / width) for value in (one.mean, one.low, one.high)],
        }
        for one in shown
    ]
    return {"seeds": seeds, "low": low, "high": high, "rows": rows}


def test_rows(data: StudyData) -> list[dict[str, Any]]:
    """Figures of the winner and of the base on the test split, and their differences."""
    found = data.on_test
    if found is None:
        return []
    rows = []
    for name, own in found.figures[found.winner].items():
        base = found.figures.get(found.base, {}).get(name) if found.base != found.winner else None
        if not math.isfinite(own.mean):
            continue
        difference = found.differences.get(name)
        row = {
            "name": FIGURES[name].title + (" (lower is better)" if FIGURES[name].direction < 0 else ""),
            "winner": own.mean,
            "winner_bounds": [own.low, own.high],
        }
        row |= dict.fromkeys(("base", "base_bounds", "difference", "bounds", "verdict"))
        if base is not None:
            row |= {"base": _finite(base.mean), "base_bounds": [base.low, base.high]}
        if difference is not None:
            row |= {"difference": _finite(difference.value), "bounds": [difference.low, difference.high]}
            row["verdict"] = _verdict(name, difference)
        rows.append(row)
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
    """The provenance of the study's figures; several values where trials differ."""
    yield "study folder", str(data.study.location)
    yield "trials on record", f"{len(data.trials)} of the sweep, {len(data.finalists)} of finalists"
    records = list(data.provenances.values())
    yield "data fingerprint", _all(record.get("data_fingerprint") for record in records)
    software = dict.fromkeys(name for record in records for name in record.get("software", {}))
    for name in software:
        yield name, _all(record.get("software", {}).get(name) for record in records)


def _all(values: Iterator[Any]) -> str:
    return ", ".join(dict.fromkeys(UNDEFINED if value is None else str(value) for value in values)) or UNDEFINED
