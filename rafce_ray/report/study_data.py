"""All that a study's page shows, gathered from its folder, and what the study cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rafce_ray.base.console import warn
from rafce_ray.base.errors import LEVELS, DamagedFile, UsageError
from rafce_ray.config import Config, differences, flatten, parse_yaml
from rafce_ray.doctor.evidence import Diagnosis
from rafce_ray.doctor.rules import examine_study
from rafce_ray.report.study_plots import Emphasis, Field, emphasise
from rafce_ray.study.finalists import Verdict
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.on_test import OnTest
from rafce_ray.study.trials import RungEntry, Trial, best_first, read_rungs, read_trials

SAVING = ("stopped_by_scheduler", "stopped_early")
"""Statuses whose epochs not trained were saved; those of a trial that diverged or failed were lost, others may still come."""


@dataclass(frozen=True)
class Cost:
    """What some trials cost. ``seconds`` and ``seconds_saved``: of one CPU core or one GPU, as :func:`unit` says.

    ``epochs_saved``: epochs not trained because of early stopping; ``seconds_saved``: those at each trial's own mean seconds an
    epoch. ``num_unmeasured``: trials stopped before their first epoch, whose ``seconds_saved`` nobody knows: they are left out.
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
    """The cost of the trials of each status, in the order in which statuses are met."""
    statuses = dict.fromkeys(trial.status for trial in trials)
    return {status: cost([trial for trial in trials if trial.status == status], of) for status in statuses}


STUDY_SETTINGS, FINALISTS, TEST = "study.yaml", "finalists.json", "test.json"


@dataclass(frozen=True)
class StudyData:
    """A study as its page shows it. ``trials`` are the sweep's, ``finalists`` their repetitions with other seeds.

    ``configs``: of every trial, by name. ``settings``: study.yaml, ``settings_text`` as it is written. ``provenances``: of every
    trial that has one. ``findings``: the doctor's over all trials, each with the trials that have it; it is told as of the first of
    them, the best ranked.
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
        """What each trial was trained with, by sampled key; keys that do not apply to it are absent. The base has its own of all keys."""
        values = {trial.name: dict(trial.plan.values) for trial in self.trials}
        if self.base is not None:
            own = flatten(self.configs[self.base.name])
            values[self.base.name] = {key: own[key] for key in self.keys if self._applies(key, own)}
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

    def _applies(self, key: str, own: Mapping[str, Any]) -> bool:
        """Whether a key is searched where a configuration has these values."""
        return all(own[other] in wanted for other, wanted in self._domain(key).get("when", {}).items())

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
        if self.base is None:
            return {}
        return differences(self.configs[self.base.name], self.configs[trial.name])


def is_study(study: StudyFolder) -> bool:
    """Whether this is the folder of a study of ``rafce tune``; an ablation's is none."""
    return (study.location / STUDY_SETTINGS).exists()


def gather_study(study: StudyFolder, metric: str) -> StudyData:
    """Everything for the page. ``metric``: the study's.

    Raises:
        UsageError: there is no study here.
    """
    if not is_study(study):
        raise UsageError(
            f"{study.location}: is no study of rafce tune: there is no {STUDY_SETTINGS} in it. Give the folder that the sweep printed."
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
    """A file of the study; None, with a warning, where it cannot be read: the rest of the page does without."""
    try:
        return (study.location / name).read_record("The study's command then writes it again.")
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        warn(str(error))
        return None


def _findings(study: StudyFolder, ranked: Sequence[str]) -> list[tuple[Diagnosis, tuple[str, ...]]]:
    """Each code once with its trials, gravest first and then by the number of trials; told as of the best trial at its gravest."""
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
