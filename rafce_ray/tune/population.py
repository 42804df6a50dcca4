"""Population-based training (Jaderberg et al. 2017) by Ray's scheduler: all trials train side by side, the worst go on from the best.

Nothing of Ray's is needed to go on after a kill: a trial's folder holds its present values and weights. Which trials are compared follows
from when they report, so a second run of the same study differs.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from rafce_ray.config import config_hash, flatten
from rafce_ray.console import say
from rafce_ray.storage import Location
from rafce_ray.study.adoption import Adoption, complete_adoption
from rafce_ray.study.config import StudyConfig
from rafce_ray.study.space import Space, Uniform
from rafce_ray.study.trials import TrialPlan, read_plan
from rafce_ray.tune.scheduler import Concluding, Course

WAITING, STARTING, RUNNING = "PAUSED", "PENDING", "RUNNING"
"""Ray's names of a trial's states."""


class Population(Concluding, PopulationBasedTraining):  # type: ignore[misc]
    """Ray's asynchronous exchange between trials, compared by the score of their last epoch: weights are what is handed over.

    Trial 0 gives but never takes, so that the base configuration stays in the study to compare with. No trial is stopped.
    """

    def __init__(self, study: StudyConfig, course: Course) -> None:
        settings = study.scheduler
        generator = np.random.default_rng([study.seed, 2])
        super().__init__(
            time_attr="epoch",
            metric="score",
            mode="max",
            perturbation_interval=settings.perturbation_interval,
            hyperparam_mutations={"values": mutations(study.space, generator)},
            quantile_fraction=settings.quantile_fraction,
            resample_probability=settings.resample_probability,
            # A trial's schedule.jsonl tells more.
            log_config=False,
        )
        self.course = course
        self._study, self._interval = study, settings.perturbation_interval
        self._random_state = random.Random(study.seed).getstate()
        self._plans: dict[str, TrialPlan] = {}
        self._at_once, self._ahead = 1, 0
        for name in course.study.trial_names():
            complete_adoption(course.study, name)

    def judge(self, name: str, epoch: int, score: float | None) -> str | None:
        """No trial is stopped."""
        return None

    def gather(self, plans: Sequence[TrialPlan], at_once: int, ahead: int) -> None:
        """Know the trials that are to run, and how many at a time.

        ``ahead``: trials requested beyond that, where the cluster bounds what runs: each takes over the process of one that pauses.
        """
        self._plans, self._at_once, self._ahead = {plan.name: plan for plan in plans}, at_once, ahead
        if any(self.course.study.trial(plan.name).metrics() for plan in plans):
            say("going on with the weights and values that each trial has now; PBT starts its comparisons anew")

    @property
    def param_space(self) -> dict[str, Any]:
        """Ray's list of trials, by name."""
        return {"trial": tune.grid_search(list(self._plans))}

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Give a new trial its values; one that failed and is added again keeps what it has."""
        name = str(trial.config["trial"])
        if "values" not in trial.config:
            found = read_plan(self.course.study.trial(name))
            assert found is not None
            trained = flatten(found[1].config)
            trial.config |= {
                "config_hash": self._plans[name].config_hash,
                "exchange_every": self._interval,
                "values": {key: trained[key] for key in self._study.space},
            }
            # A waiting trial starts when it is chosen, a pending one as soon as it fits.
            trial.set_status(WAITING)
        super().on_trial_add(controller, trial)
        epochs = len(self.course.study.trial(name).metrics())
        state = self._trial_state[trial]
        state.last_train_time, state.last_perturbation_time = epochs, epochs - epochs % self._interval

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Exchange where it is time to."""
        decision = super().on_trial_result(controller, trial, result)
        if decision == TrialScheduler.STOP:
            return decision
        if "epoch" not in result or result.get("done") or int(result["epoch"]) >= self.course.last_epoch:
            return decision
        if result["score"] is None and int(result["epoch"]) % self._interval == 0:
            message = f"the {self.course.metric} is undefined after epoch {result['epoch']}: no exchange"
            self.course.study.trial(str(trial.config["trial"])).add_event("warning", message=message)
        # Ray leaves trials out whose score is NaN.
        result = result | {"score": math.nan if result["score"] is None else result["score"]}
        decision = str(PopulationBasedTraining.on_trial_result(self, controller, trial, result))
        self._drop_offers(controller)
        return decision

    def choose_trial_to_run(self, controller: Any) -> Any:
        """The trial with the fewest epochs, within the limit."""
        trials = controller.get_trials()
        starting = [trial for trial in trials if trial.status == STARTING]
        waiting = [trial for trial in trials if trial.status == WAITING]
        busy = len(starting) + sum(trial.status == RUNNING for trial in trials)
        if busy < self._at_once and waiting:
            # Places are free: what starts already needs no more help.
            candidates = waiting
        else:
            candidates = starting + (waiting if busy < self._at_once + self._ahead else [])
        return min(candidates, key=lambda trial: self._trial_state[trial].last_train_time, default=None)

    def _quantiles(self) -> tuple[list[Any], list[Any]]:
        """Ray's quantiles without takers that no giver is better than; the base's place in the lower one goes to the next worse trial."""
        lower, upper = super()._quantiles()
        scores = {trial: state.last_score for trial, state in self._trial_state.items()}
        known = [trial for trial, score in scores.items() if _is_known(score) and not trial.is_finished()]
        takers = sorted(
            (one for one in known if not self._is_base(one) and one not in upper), key=lambda one: scores[one]
        )
        return [one for one in takers[: len(lower)] if scores[one] < scores[upper[0]]], upper

    def _is_base(self, trial: Any) -> bool:
        return self._plans[str(trial.config["trial"])].is_base

    def _checkpoint_or_exploit(self, trial: Any, controller: Any, upper: list[Any], lower: list[Any]) -> None:
        with self._own_random():
            super()._checkpoint_or_exploit(trial, controller, upper, lower)

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Ray draws from Python's one generator, which here has the study's seed and is put back afterwards."""
        before = random.getstate()
        random.setstate(self._random_state)
        try:
            yield
        finally:
            self._random_state = random.getstate()
            random.setstate(before)

    def _get_new_config(self, trial: Any, donor: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ray's perturbation of the donor's values, kept within their domains, for the trial itself."""
        config, operations = super()._get_new_config(trial, donor)
        values, clipped = within(self._study.space, config["values"])
        adoption = Adoption(
            id=uuid.uuid4().hex[:12],
            donor=str(donor.config["trial"]),
            epoch=int(self._trial_state[donor].last_result["epoch"]),
            values=values,
            config_hash=config_hash(self._study.config_of(values)),
            clipped=clipped,
        )
        name = str(trial.config["trial"])
        scores = [self._study.direction * self._trial_state[one].last_score for one in (trial, donor)]
        say(
            f"{name} ({self.course.metric} {scores[0]:.4f}) takes over {adoption.donor} ({scores[1]:.4f}) after epoch {adoption.epoch}"
        )
        changed = {
            "trial": name,
            "values": values,
            "config_hash": adoption.config_hash,
            "adoption": asdict(adoption),
        }
        return config | changed, operations

    def _drop_offers(self, controller: Any) -> None:
        """Delete the offers that no trial starts from and nobody can take any more: Ray's own limit counts some twice."""
        trials = controller.get_trials()
        states = [self._trial_state[trial] for trial in trials]
        wanted = {path_of(trial.checkpoint) for trial in trials} | {path_of(state.last_checkpoint) for state in states}
        for trial in trials:
            manager = trial.run_metadata.checkpoint_manager
            registered = {path_of(result.checkpoint): result.checkpoint for result in manager._checkpoint_results}
            for path in registered.keys() - wanted:
                checkpoint = registered[path]
                checkpoint.filesystem.delete_dir(checkpoint.path)
            manager._checkpoint_results = [
                result for result in manager._checkpoint_results if path_of(result.checkpoint) in wanted
            ]


def mutations(space: Space, generator: np.random.Generator) -> dict[str, Any]:
    """What Ray draws new values from: a list is moved along by one, a range is multiplied by 0.8 or 1.2; or either is drawn anew."""
    return {
        key: list(domain.values()) if domain.is_finite else partial(domain.sample, generator)
        for key, domain in space.items()
    }


def within(space: Space, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values kept within the ends of their ranges, and what was said of each that lay outside."""
    kept, clipped = dict(values), []
    for key, value in values.items():
        domain = space[key]
        if isinstance(domain, Uniform):
            kept[key] = min(max(value, domain.low), domain.high)
        if kept[key] != value:
            clipped.append(f"{key} {value:.6g} -> {kept[key]:.6g}")
    return kept, clipped


def drop_all_offers(ray_folder: Location) -> None:
    """Delete what trials offered each other, of this start and of earlier ones: a killed driver leaves it."""
    for start in _folders(ray_folder):
        for trial in _folders(start):
            for offer in _folders(trial):
                if offer.name.startswith("checkpoint_"):
                    offer.delete()


def _folders(place: Location) -> list[Location]:
    return [one for info in place.list() if (one := place / info.base_name).is_dir()]


def path_of(checkpoint: Any) -> str | None:
    """Where Ray keeps a checkpoint; None for none, or for one that is being written."""
    return getattr(checkpoint, "path", None)


def _is_known(score: float | None) -> bool:
    return score is not None and not math.isnan(score)
