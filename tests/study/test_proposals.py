import math
import sys

import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.config import flatten
from rafce_ray.study.config import build_study
from rafce_ray.study.space import MAX_COMBINATIONS, STARTUP_TRIALS, Observed, planned_trials, propose


def study_of(space, **others):
    return build_study({"name": "s", "space": space, "base": {"recipe": "demo"}, **others})


def all_proposals(study, count=100):
    return [propose(study, number) for number in range(count)]


GRID = {
    "optim.lr": {"grid": [1e-4, 1e-3]},
    "loss.au_start_epoch": {"grid": [0, 2]},
    "loss.au_ramp_epochs": {"grid": [0, 3], "when": {"loss.au_start_epoch": [2]}},
}
CONDITIONAL = {
    "optim.lr": {"loguniform": [1e-5, 1e-1]},
    "data.augmentation": {"choice": ["none", "light", "strong"]},
    "loss.au_start_epoch": {"randint": [0, 2]},
    "loss.au_ramp_epochs": {"quniform": [0, 4, 2], "when": {"loss.au_start_epoch": [1, 2]}},
}


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_the_base_is_always_the_first_trial(search):
    assert propose(study_of(GRID, search=search, num_trials=4), 0) == {}


def test_a_grid_by_hand():
    study = study_of(GRID, search="grid")
    lr, start, ramp = GRID
    # The base (demo: lr 1e-3, start 0) is trial 0 and not run twice; the ramp is absent where it does not apply.
    assert all_proposals(study, 8) == [
        {},
        {lr: 1e-4, start: 0},
        {lr: 1e-4, start: 2, ramp: 0},
        {lr: 1e-4, start: 2, ramp: 3},
        {lr: 1e-3, start: 2, ramp: 0},
        {lr: 1e-3, start: 2, ramp: 3},
        None,
        None,
    ]
    assert planned_trials(study) == 6


def test_num_trials_counts_the_base_and_cuts_a_grid():
    study = study_of(GRID, search="grid", num_trials=3)
    assert planned_trials(study) == 3
    assert all_proposals(study, 4) == [*all_proposals(study_of(GRID, search="grid"), 3), None]


def test_random_proposals_depend_on_seed_and_number_alone():
    study = study_of(CONDITIONAL, num_trials=20)
    assert propose(study, 7) == all_proposals(study, 20)[7]
    assert propose(study_of(CONDITIONAL, num_trials=9), 7, [Observed(3, {}, 0.5)]) == propose(study, 7)
    assert propose(study_of(CONDITIONAL, num_trials=20, seed=1), 7) != propose(study, 7)
    assert planned_trials(study) == 20
    assert propose(study, 20) is None


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_finite_space_is_searched_once_each_until_nothing_is_left(search):
    study = study_of(GRID, search=search, num_trials=50)
    found = all_proposals(study, 50)
    if search == "optuna":
        found, history = [], []
        for number in range(50):
            found.append(propose(study, number, history))
            if found[-1] is not None:
                history.append(Observed(number, found[-1], score=float(number % 3)))
    expected = all_proposals(study_of(GRID, search="grid"), 6)
    assert found[6:] == [None] * 44
    assert sorted(map(str, found[:6])) == sorted(map(str, expected))
    assert planned_trials(study) == 6


def test_a_large_finite_space_is_counted_no_further_than_needed():
    space = {
        "optim.batch_size": {"randint": [2, 60_000]},
        "optim.patience": {"randint": [1, 60_000]},
    }
    study = study_of(space, num_trials=30)
    assert planned_trials(study) == 30 < MAX_COMBINATIONS
    values = all_proposals(study, 30)
    assert len({str(one) for one in values}) == 30


def test_values_are_what_a_run_holds():
    study = study_of(
        {"data.action_units": {"choice": [["AU12", 6], "auto"]}, "loss.au_weight": {"grid": [1, 2]}},
        search="grid",
        metric="macro_f1",
    )
    for values in all_proposals(study, planned_trials(study)):
        held = flatten(study.config_of(values))
        assert {key: held[key] for key in values} == values
    assert {"data.action_units": [12, 6], "loss.au_weight": 2} in all_proposals(study, 9)
    assert planned_trials(study) == 5


def lived(study, objective, count):
    """The history of a study whose trials score what the objective says of their full values."""
    history = []
    for number in range(count):
        values = propose(study, number, history)
        history.append(Observed(number, values, objective({**study.base_values, **values})))
    return history


def planted(values):
    """Best, 1.0, at learning rate 1e-2, augmentation strong and a curriculum of 2 and 4 epochs."""
    return (
        1.0
        - 0.3 * abs(math.log10(values["optim.lr"]) + 2)
        - 0.2 * (values["data.augmentation"] != "strong")
        - 0.1 * (2 - values["loss.au_start_epoch"])
        - 0.05 * (4 - values["loss.au_ramp_epochs"])
    )


@pytest.mark.slow
def test_optuna_finds_a_planted_optimum_better_than_random():
    def mean_of_best(search):
        best = []
        for seed in range(3):
            study = study_of(CONDITIONAL, search=search, num_trials=40, seed=seed)
            best.append(max(one.score for one in lived(study, planted, 40)))
        return sum(best) / len(best)

    by_tpe, at_random = mean_of_best("optuna"), mean_of_best("random")
    assert by_tpe > at_random + 0.05
    assert by_tpe > 0.9


def test_optuna_minimises_a_metric_that_is_better_when_lower():
    study = study_of(CONDITIONAL, search="optuna", num_trials=40, metric="loss")
    history = lived(study, lambda values: -planted(values), 40)
    late = sum(one.score for one in history[30:]) / 10
    early = sum(one.score for one in history[1 : STARTUP_TRIALS + 1]) / STARTUP_TRIALS
    assert late < early - 0.3


def test_optuna_is_a_function_of_the_history_in_any_order():
    study = study_of(CONDITIONAL, search="optuna", num_trials=40)
    history = lived(study, planted, 20)
    again = propose(study, 20, list(reversed(history)))
    assert propose(study, 20, history) == again
    changed = [Observed(one.number, one.values, -one.score) for one in history]
    assert propose(study, 20, changed) != again
    assert propose(study_of(CONDITIONAL, search="optuna", num_trials=40, seed=1), 20, history) != again


def test_optuna_proposals_are_plain_and_leave_out_keys_that_do_not_apply():
    study = study_of(CONDITIONAL, search="optuna", num_trials=40)
    for one in lived(study, planted, 30)[1:]:
        assert ("loss.au_ramp_epochs" in one.values) == (one.values["loss.au_start_epoch"] > 0)
        assert type(one.values["loss.au_start_epoch"]) is int
        assert type(one.values["optim.lr"]) is float
        assert study.config_of(one.values)


def test_optuna_stays_away_from_what_is_being_tried():
    study = study_of({"optim.lr": {"loguniform": [1e-5, 1e-1]}}, search="optuna", num_trials=100)
    history = lived(study, lambda values: -abs(math.log10(values["optim.lr"]) + 2), 12)
    free = [math.log10(propose(study, number, history)["optim.lr"]) for number in range(60, 90)]
    place = sorted(free)[15]
    running = [Observed(number, {"optim.lr": 10**place * 1.01**number}, None) for number in range(12, 15)]
    crowded = [math.log10(propose(study, number, [*history, *running])["optim.lr"]) for number in range(60, 90)]
    assert sum(abs(one - place) < 0.5 for one in free) > 20
    assert sum(abs(one - place) < 0.5 for one in crowded) < 10


def test_a_base_outside_the_domain_does_not_disturb_optuna():
    study = study_of({"optim.lr": {"loguniform": [1e-2, 1e-1]}}, search="optuna", num_trials=20)
    history = lived(study, lambda values: values["optim.lr"], 15)
    assert all(1e-2 <= one.values["optim.lr"] <= 1e-1 for one in history[1:])


def test_optuna_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    study = study_of(CONDITIONAL, search="optuna", num_trials=4)
    with pytest.raises(UsageError, match="pip install optuna"):
        propose(study, 1)
