"""Population-based training: what a trial takes over, what a kill in the middle leaves, and that a schedule tells how weights came about."""

import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from rafce_ray.checkpoint import list_checkpoints, newest_valid, save_checkpoint
from rafce_ray.config import config_hash, flatten, load_config
from rafce_ray.errors import RafceError, UsageError
from rafce_ray.replay import plan_replay
from rafce_ray.run_folder import RunFolder
from rafce_ray.session import Job
from rafce_ray.storage import Location
from rafce_ray.study.adoption import Adoption, adopt, complete_adoption, read_schedule, write_offer
from rafce_ray.study.config import build_study
from rafce_ray.study.proposals import propose
from rafce_ray.study.space import Choice, Integers, Stepped, Uniform
from rafce_ray.study.trials import TrialPlan, read_plan, read_trials
from rafce_ray.study_folder import StudyFolder
from rafce_ray.taxonomy import RAFCE_EMOTIONS, make_taxonomy

TAXONOMY = make_taxonomy(tuple(list(RAFCE_EMOTIONS)[:2]), (1, 12))


def add_trial(study: StudyFolder, name: str, number: int, lr: float, scores: list[float]) -> RunFolder:
    """A trial's folder as training would leave it after some epochs: every epoch's checkpoint is there."""
    config = load_config(
        overrides=[f"optim.lr={lr}", "model.dropout=0.3", f"run.name={name}", f"run.storage={study.trials}"]
    )
    folder = study.trial(name)
    values = {"optim.lr": lr, "model.dropout": 0.3} if number else {}
    plan = TrialPlan(name, number, "sweep", values, config_hash(config), 1, 0)
    job = Job(config, "store", TAXONOMY, folder.place, {"config": config.model_dump(mode="json"), "seed": 0})
    plan.write(study, job)
    folder.start(config, job.provenance, {"num_images": 8})
    folder.write_metrics([record(name, epoch, score) for epoch, score in enumerate(scores, 1)])
    for epoch, score in enumerate(scores, 1):
        save_checkpoint(
            folder.checkpoints,
            epoch=epoch,
            step=0,
            score=score,
            state={"of": name},
            save_bundle=partial_bundle(f"{name} {epoch}"),
        )
    return folder


def record(name: str, epoch: int, score: float) -> dict:
    return {"epoch": epoch, "trained_by": name, "validation": {"score": score}, "elapsed_s": float(epoch)}


def partial_bundle(weights: str):
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text(weights)

    return save


def weights_of(folder: RunFolder) -> dict[int, str]:
    """The weights in each checkpoint of a trial."""
    found, invalid = list_checkpoints(folder.checkpoints)
    assert not invalid
    return {one.epoch: (one.location / "bundle" / "model.safetensors").read_bytes().decode() for one in found}


@pytest.fixture
def study(tmp_path) -> StudyFolder:
    """The donor's best epoch is its second, and it has gone on after the third; the taker was at its second."""
    study = StudyFolder(str(tmp_path / "study"))
    add_trial(study, "trial_0000", 0, 0.001, [0.2, 0.2])
    add_trial(study, "trial_0001", 1, 0.002, [0.3, 0.5, 0.4])
    add_trial(study, "trial_0002", 2, 0.5, [0.1, 0.05])
    return study


def offer_of(study: StudyFolder, name: str, epoch: int, into: Path) -> Path:
    into.mkdir(exist_ok=True)
    values = {key: flatten(study.trial(name).config())[key] for key in ("optim.lr", "model.dropout")}
    assert write_offer(study.trial(name), epoch, values, into)
    return into


def adoption_of(study: StudyFolder, name: str, donor: str, epoch: int, lr: float, *, id: str = "a1") -> Adoption:
    config = study.trial(name).config()
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": lr})})
    values = {"optim.lr": lr, "model.dropout": 0.3}
    return Adoption(id, donor, epoch, values, config_hash(config), ["optim.lr 0.003 -> 0.0024"])


def test_a_trial_takes_over_the_donors_weights_and_epochs_with_new_values(study, tmp_path):
    offer = offer_of(study, "trial_0001", 3, tmp_path / "offer")
    donor, taker = study.trial("trial_0001"), study.trial("trial_0002")
    donor.write_metrics([*donor.metrics(), record("trial_0001", 4, 0.9)])
    adopt(study, "trial_0002", adoption_of(study, "trial_0002", "trial_0001", 3, 0.0024), offer)
    assert weights_of(taker) == {2: "trial_0001 2", 3: "trial_0001 3"}, "the best and the newest"
    assert [(one["epoch"], one["trained_by"]) for one in taker.metrics()] == [(one, "trial_0001") for one in (1, 2, 3)]
    plan, job = read_plan(taker)
    assert plan.values == {"optim.lr": 0.0024, "model.dropout": 0.3}
    assert job.config.optim.lr == taker.config().optim.lr == 0.0024
    assert plan.config_hash == config_hash(taker.config()) == taker.provenance()["config_hash"]
    assert (job.run_dir, job.config.run.name) == (taker.place, "trial_0002")
    assert taker.audit() == {"num_images": 8}
    (event,) = [one for one in taker.events() if one["event"] == "adopted"]
    assert (event["donor"], event["epoch"]) == ("trial_0001", 3)
    assert event["before"] == {"optim.lr": 0.5, "model.dropout": 0.3}
    assert event["after"] == {"optim.lr": 0.0024, "model.dropout": 0.3}
    assert event["message"] == (
        "takes over weights and epochs of trial_0001 after epoch 3; optim.lr 0.5 -> 0.0024; "
        "kept within the domain: optim.lr 0.003 -> 0.0024"
    )
    assert read_schedule(taker) == [
        {"epoch": 0, "trial": "trial_0001", "values": {"optim.lr": 0.002, "model.dropout": 0.3}, "from": None},
        {"epoch": 3, "trial": "trial_0002", "values": plan.values, "from": "trial_0001"},
    ]
    assert {path.name for path in taker.location.local.iterdir() if path.name.startswith(("adoption", "."))} == set()
    assert weights_of(donor) == {1: "trial_0001 1", 2: "trial_0001 2", 3: "trial_0001 3"}


def test_an_adoption_is_made_once_however_often_the_trial_starts(study, tmp_path):
    offer = offer_of(study, "trial_0001", 3, tmp_path / "offer")
    adoption, taker = adoption_of(study, "trial_0002", "trial_0001", 3, 0.0024), study.trial("trial_0002")
    adopt(study, "trial_0002", adoption, offer)
    taker.write_metrics([*taker.metrics(), record("trial_0002", 4, 0.6)])
    adopt(study, "trial_0002", adoption, offer)
    assert [one["trained_by"] for one in taker.metrics()] == ["trial_0001"] * 3 + ["trial_0002"]
    assert sum(one["event"] == "adopted" for one in taker.events()) == 1
    # Another adoption of the same donor and epoch is another one.
    adopt(study, "trial_0002", replace(adoption, id="a2"), offer)
    assert len(taker.metrics()) == 3


def test_a_schedule_tells_the_whole_way_of_the_weights(study, tmp_path):
    first = offer_of(study, "trial_0001", 3, tmp_path / "first")
    adopt(study, "trial_0002", adoption_of(study, "trial_0002", "trial_0001", 3, 0.0024), first)
    second = offer_of(study, "trial_0002", 3, tmp_path / "second")
    adopt(study, "trial_0000", adoption_of(study, "trial_0000", "trial_0002", 3, 0.004, id="a2"), second)
    lines = read_schedule(study.trial("trial_0000"))
    assert [(line["epoch"], line["trial"], line["values"]["optim.lr"], line["from"]) for line in lines] == [
        (0, "trial_0001", 0.002, None),
        (3, "trial_0002", 0.0024, "trial_0001"),
        (3, "trial_0000", 0.004, "trial_0002"),
    ]


class Killed(BaseException):
    """The process ends here."""


def kill_at(monkeypatch, step: int) -> None:
    """End the process before its ``step``-th change of the disk."""
    steps = count()

    def guarded(inner):
        def change(*arguments, **named):
            if next(steps) == step:
                raise Killed
            return inner(*arguments, **named)

        return change

    for owner, name in [
        (Location, "write_bytes"),
        (Location, "upload"),
        (Location, "delete"),
        (RunFolder, "add_event"),
    ]:
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))


OLD = (0.5, ["trial_0002"] * 2, {1: "trial_0002 1", 2: "trial_0002 2"}, 0, 0)
NEW = (0.0024, ["trial_0001"] * 3, {2: "trial_0001 2", 3: "trial_0001 3"}, 1, 2)


def state_of(study: StudyFolder) -> tuple:
    """Value, who trained which epoch, weights, number of adoptions on record, lines of the schedule."""
    taker = study.trial("trial_0002")
    plan, _ = read_plan(taker)
    assert taker.config().optim.lr == plan.values["optim.lr"]
    assert newest_valid(taker.checkpoints)[0].epoch == len(taker.metrics())
    adopted = sum(one["event"] == "adopted" for one in taker.events())
    trained_by = [one["trained_by"] for one in taker.metrics()]
    return plan.values["optim.lr"], trained_by, weights_of(taker), adopted, len(read_schedule(taker))


@pytest.mark.parametrize("then", ["another driver", "the same driver"])
def test_a_kill_between_any_two_writes_leaves_a_trial_that_goes_on(study, tmp_path, then):
    offer = offer_of(study, "trial_0001", 3, tmp_path / "offer")
    adoption = adoption_of(study, "trial_0002", "trial_0001", 3, 0.0024)
    seen = []
    for step in count():
        copy = StudyFolder(str(tmp_path / f"killed_at_{step}"))
        shutil.copytree(study.location.local, copy.location.local)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step)
            try:
                adopt(copy, "trial_0002", adoption, offer)
                break
            except Killed:
                pass
        # The plan can be read at once, as `rafce trials` would.
        assert {one.name for one in read_trials(copy, "score")} == {"trial_0000", "trial_0001", "trial_0002"}
        if then == "another driver":
            complete_adoption(copy, "trial_0002")
        else:
            adopt(copy, "trial_0002", adoption, offer)
        seen.append(state_of(copy))
        assert seen[-1] == NEW or (then == "another driver" and seen[-1] == OLD)
        assert not (copy.trial("trial_0002").location / "adoption").exists()
        # What is trained from here on is not taken back by a later start.
        taker = copy.trial("trial_0002")
        taker.write_metrics([*taker.metrics(), record("trial_0002", 4, 0.6)])
        complete_adoption(copy, "trial_0002")
        assert taker.metrics()[-1]["trained_by"] == "trial_0002"
        assert taker.metrics()[-1]["epoch"] == 4
    assert len(seen) > 8
    assert seen[-1] == NEW
    if then == "another driver":
        assert seen[0] == OLD
        assert seen == sorted(seen, key=lambda one: one == NEW), "once it is decided, it is carried out"


def test_another_trials_offer_is_refused_and_nothing_changes(study, tmp_path):
    offer = offer_of(study, "trial_0000", 2, tmp_path / "offer")
    with pytest.raises(RafceError, match="should take over trial_0001 after epoch 3, but was handed trial_0000"):
        adopt(study, "trial_0002", adoption_of(study, "trial_0002", "trial_0001", 3, 0.0024), offer)
    assert state_of(study) == OLD


def test_values_that_are_not_those_of_the_hash_are_refused(study, tmp_path):
    offer = offer_of(study, "trial_0001", 3, tmp_path / "offer")
    adoption = replace(adoption_of(study, "trial_0002", "trial_0001", 3, 0.0024), config_hash="00000000")
    with pytest.raises(RafceError, match="would not train what was sampled"):
        adopt(study, "trial_0002", adoption, offer)
    assert state_of(study) == OLD


def test_an_altered_checkpoint_is_not_offered_and_what_lay_there_before_is_not_taken(study, tmp_path):
    offer = offer_of(study, "trial_0001", 3, tmp_path / "offer")
    older = offer_of(study, "trial_0000", 2, tmp_path / "older")
    name = "epoch_0001_step_00000"
    shutil.copytree(older / "checkpoints" / name, offer / "checkpoints" / name)
    adopt(study, "trial_0002", adoption_of(study, "trial_0002", "trial_0001", 3, 0.0024), offer)
    assert state_of(study) == NEW
    donor = study.trial("trial_0001")
    (donor.checkpoints / "epoch_0003_step_00000" / "bundle" / "model.safetensors").write_bytes(b"altered")
    assert not write_offer(donor, 3, {}, tmp_path)
    assert "the checkpoint of epoch 3 is missing or altered" in donor.events()[-1]["message"]


def test_the_replay_of_a_trial_that_adopted_is_refused_with_what_to_do(study, tmp_path):
    offer = offer_of(study, "trial_0001", 3, tmp_path / "offer")
    adopt(study, "trial_0002", adoption_of(study, "trial_0002", "trial_0001", 3, 0.0024), offer)
    with pytest.raises(
        UsageError, match=r"took over the weights of trial_0001 after epoch 3.*schedule\.jsonl.*train --config"
    ):
        plan_replay(study.trial("trial_0002"))


# The scheduler


class Trial:
    """What the scheduler sees of one of Ray's trials."""

    def __init__(self, name: str, status: str, epochs: int, score: float | None) -> None:
        self.config = {"trial": name, "values": {"optim.lr": 0.001, "model.dropout": 0.3}}
        self.status, self.epochs, self.score = status, epochs, score

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")


class Controller:
    def __init__(self, trials: list[Trial]) -> None:
        self.trials, self.stopped = trials, []

    def get_trials(self) -> list[Trial]:
        return self.trials

    def stop_trial(self, trial: Trial) -> None:
        self.stopped.append(trial.config["trial"])


def population_of(tmp_path, trials: list[Trial], *, at_once: int = 2, ahead: int = 0):
    """A population that has heard from these trials."""
    from ray.tune.schedulers.pbt import _PBTTrialState

    from rafce_ray.tune.population import Population
    from rafce_ray.tune.scheduler import Control, Course

    study = build_study(
        {
            "name": "pbt",
            "base": {"data": {"root": "PATH"}, "optim": {"epochs": 9}},
            "space": {"optim.lr": {"loguniform": [0.0009, 0.0011]}, "model.dropout": {"uniform": [0.1, 0.9]}},
            "num_trials": len(trials),
            "scheduler": {"type": "pbt", "perturbation_interval": 3, "resample_probability": 0.0},
        }
    )
    population = Population(study, Course(StudyFolder(str(tmp_path / "empty")), "score", 9, Control()))
    plans = [TrialPlan(one.config["trial"], number, "sweep", {}, "", 1, 0) for number, one in enumerate(trials)]
    population.gather(plans, at_once, ahead)
    for trial in trials:
        trial.experiment_tag = ""
        state = population._trial_state[trial] = _PBTTrialState(trial)
        state.last_score, state.last_train_time, state.last_result = trial.score, trial.epochs, {"epoch": trial.epochs}
    return population


@pytest.mark.parametrize(
    ("scores", "lower", "upper"),
    [
        # The base is worst: the next worse takes over.
        ([0.1, 0.2, 0.3, 0.4], ["t1"], ["t3"]),
        ([0.3, 0.2, 0.1, 0.4], ["t2"], ["t3"]),
        # The base gives.
        ([0.9, 0.2, 0.1, 0.4], ["t2"], ["t0"]),
        # Nobody is better.
        ([0.2, 0.2, 0.2, 0.2], [], ["t3"]),
        # One has no score.
        ([0.9, float("nan"), 0.1, 0.4], ["t2"], ["t0"]),
        ([0.9, None, None, None], [], []),
    ],
)
def test_the_worst_take_from_the_best_but_the_base_never_takes(tmp_path, scores, lower, upper):
    trials = [Trial(f"t{number}", "RUNNING", 3, score) for number, score in enumerate(scores)]
    found = population_of(tmp_path, trials)._quantiles()
    assert [[one.config["trial"] for one in part] for part in found] == [lower, upper]


def test_new_values_stay_within_their_domains_and_what_was_clipped_is_said(tmp_path):
    trials = [Trial("t0", "RUNNING", 3, 0.9), Trial("t1", "RUNNING", 3, 0.1)]
    population = population_of(tmp_path, trials)
    config, _ = population._get_new_config(trials[1], trials[0])
    # Times 1.2 or 0.8 of 0.001 is always outside.
    lr, dropout = config["values"]["optim.lr"], config["values"]["model.dropout"]
    assert lr in (0.0009, 0.0011)
    assert round(dropout / 0.3, 9) in (0.8, 1.2)
    clipped = config["adoption"]["clipped"]
    assert clipped == [f"optim.lr {0.0012 if lr == 0.0011 else 0.0008:g} -> {lr:g}"]
    assert (config["trial"], config["adoption"]["donor"], config["adoption"]["epoch"]) == ("t1", "t0", 3)
    assert (
        config["config_hash"]
        == config["adoption"]["config_hash"]
        == config_hash(
            load_config(
                overrides=[
                    "data.root=PATH",
                    "optim.epochs=9",
                    "optim.monitor=score",
                    f"optim.lr={lr!r}",
                    f"model.dropout={dropout!r}",
                ]
            )
        )
    )
    assert trials[0].config["trial"] == "t0"


def test_lists_are_moved_along_and_ranges_drawn_from_the_studys_own_domains():
    from rafce_ray.tune.population import mutations, within

    space = {
        "data.augmentation": Choice("choice", ("none", "light")),
        "optim.lr": Uniform(1e-4, 1e-2, True),
        "loss.au_weight": Stepped(0.0, 1.0, 0.5),
        "x": Integers(1, 3),
    }
    found = mutations(space, np.random.default_rng(0))
    assert (found["data.augmentation"], found["loss.au_weight"], found["x"]) == (
        ["none", "light"],
        [0.0, 0.5, 1.0],
        [1, 2, 3],
    )
    drawn = [found["optim.lr"]() for _ in range(100)]
    assert len(set(drawn)) == 100
    assert 1e-4 <= min(drawn) < max(drawn) <= 1e-2
    again = mutations(space, np.random.default_rng(0))["optim.lr"]
    assert [again() for _ in range(100)] == drawn
    values = {"optim.lr": 0.012, "data.augmentation": "light", "loss.au_weight": 1.0}
    assert within(space, values) == (values | {"optim.lr": 0.01}, ["optim.lr 0.012 -> 0.01"])


def test_the_trial_with_the_fewest_epochs_runs_next_and_no_more_than_fit(tmp_path):
    def chosen(*statuses: tuple[str, int], ahead: int) -> str | None:
        trials = [Trial(f"t{number}", status, epochs, None) for number, (status, epochs) in enumerate(statuses)]
        found = population_of(tmp_path, trials, ahead=ahead).choose_trial_to_run(Controller(trials))
        return None if found is None else found.config["trial"]

    start = ("PENDING", 0), ("PAUSED", 0), ("PAUSED", 0)
    assert chosen(*start, ahead=0) == "t1", "two may run"
    running = ("RUNNING", 3), ("RUNNING", 0), ("PAUSED", 3), ("PAUSED", 0)
    assert chosen(*running, ahead=0) is None
    assert chosen(*running, ahead=1) == "t3", "requested ahead of time"
    # One has just paused: the one that waits for its place has fewer epochs.
    assert chosen(("RUNNING", 0), ("PENDING", 0), ("PAUSED", 3), ahead=1) == "t1"


def test_when_the_command_stops_trials_that_wait_are_stopped_too(tmp_path):
    trials = [Trial("t0", "RUNNING", 3, 0.1), Trial("t1", "PAUSED", 3, 0.1), Trial("t2", "PENDING", 0, None)]
    population, controller = population_of(tmp_path, trials), Controller(trials)
    population.course.control.stop = "interrupted"
    assert population.on_trial_result(controller, trials[0], {"epoch": 4, "score": 0.2}) == "STOP"
    assert controller.stopped == ["t1", "t2"]


# With training


@pytest.fixture(scope="module")
def population(drawn_faces, store_dir, tmp_path_factory, ray_cluster_of_tests):
    """Five trials, four at a time, so that they pause; one learns nothing. Exchanged after every epoch, compared by the loss."""
    from rafce_ray.tune.command import tune

    plain = {
        "name": "pbt",
        "storage": str(tmp_path_factory.mktemp("studies")),
        "base": {
            "data": {"root": str(drawn_faces), "store_dir": str(store_dir)},
            "model": {"backbone": "mobilenet_v3_small", "image_px": 32},
            "optim": {
                "epochs": 4,
                "lr": 1e-3,
                "batch_size": 16,
                "gap_images": 32,
                "schedule": "constant",
                "warmup_epochs": 0,
            },
            "run": {"use_gpu": False},
        },
        "space": {"optim.lr": {"choice": [1e-9, 1e-3, 1.5e-3, 2e-3, 3e-3]}},
        "num_trials": 5,
        "metric": "loss",
        "scheduler": {"type": "pbt", "perturbation_interval": 1},
        "finalists": {"k": 0},
    }
    study = build_study(plain)
    assert tune(study) is not None
    return study, StudyFolder(str(Path(study.storage) / study.name))


@pytest.mark.ray
def test_the_trial_that_learns_nothing_takes_over_and_all_train_every_epoch_once(population):
    study, folder = population
    trials = read_trials(folder, "loss")
    assert [one.status for one in trials] == ["finished"] * 5
    for one in trials:
        assert [epoch for epoch, _ in one.curve] == [1, 2, 3, 4]
        ended = [event["event"] for event in folder.trial(one.name).events()].count("finished")
        assert ended == 1
    hopeless = next(f"trial_{n:04d}" for n in range(1, 5) if propose(study, n)["optim.lr"] == 1e-9)
    adopted = [one for one in folder.trial(hopeless).events() if one["event"] == "adopted"]
    assert adopted
    assert adopted[0]["before"] == {"optim.lr": 1e-9}
    assert read_schedule(folder.trial(hopeless))[-1]["from"] == adopted[-1]["donor"] != hopeless
    assert not any(one["event"] == "adopted" for one in folder.trial("trial_0000").events())
    assert not list((folder.location.local / "ray").rglob("checkpoint_*")), "what was exchanged is not kept"


@pytest.mark.ray
def test_a_plain_loop_along_the_schedule_gives_the_same_weights(population, tmp_path):
    """The same values after the same epochs, in one folder, without Ray and without any exchange."""
    from rafce_ray.engine import fit
    from rafce_ray.session import LocalSession

    _, folder = population
    taker = next(one for one in read_trials(folder, "loss") if read_schedule(folder.trial(one.name)))
    schedule, (_, job) = read_schedule(folder.trial(taker.name)), read_plan(folder.trial(taker.name))
    plain = RunFolder(str(tmp_path / "plain"))
    for line, until in zip(schedule, [*(later["epoch"] for later in schedule[1:]), 4], strict=True):
        optim = job.config.optim.model_copy(update={"lr": line["values"]["optim.lr"], "epochs": until})
        config = job.config.model_copy(update={"optim": optim})
        result = fit(replace(job, config=config, run_dir=plain.place), LocalSession())
    assert [one["validation"] for one in plain.metrics()] == [
        one["validation"] for one in folder.trial(taker.name).metrics()
    ]
    assert result["weights_sha256"] == folder.trial(taker.name).result()["weights_sha256"]


@pytest.mark.ray
def test_a_finished_population_is_not_trained_again(population, capsys):
    from rafce_ray.tune.command import tune

    study, folder = population
    before = {name: folder.trial(name).stamp("result.json") for name in folder.trial_names()}
    tune(study)
    assert {name: folder.trial(name).stamp("result.json") for name in folder.trial_names()} == before
    assert "all 5 trials have ended" in capsys.readouterr().err
