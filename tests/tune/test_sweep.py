"""Which trials a study hands out, in which order, after which kind of end, until when; what stays on disk.

Trials are written as training leaves them.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray import cloudpickle

from rafce_ray.base.errors import GateError, RafceError
from rafce_ray.config import CARRIED_OUT_BY, config_hash, flatten
from rafce_ray.data.loader import Readings, prepare
from rafce_ray.run.checkpoint import list_checkpoints, save_checkpoint
from rafce_ray.study.config import StudyConfig, build_study
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.plan import Shares
from rafce_ray.study.space import Domain, Observed, planned_trials, propose
from rafce_ray.study.trials import Training, read_plan, read_trials
from rafce_ray.train.worker import read_trial_job
from rafce_ray.tune import launch, trials
from rafce_ray.tune.launch import read_elapsed, sweep, ways_of_reading
from rafce_ray.tune.scheduler import Control, Course, build_scheduler
from rafce_ray.tune.sweep import Sweep, start_trial

SHARES = Shares(workers=1, cpus=2.0, gpus=0.5, at_once=2, fitting=2)


@pytest.fixture(scope="module")
def prepared(drawn_faces, store_dir):
    return prepare(build(drawn_faces, store_dir).base_config.data)


def build(drawn_faces: Path, store_dir: Path, **values) -> StudyConfig:
    plain = {
        "name": "study",
        "base": {
            "data": {"root": str(drawn_faces), "store_dir": str(store_dir)},
            "model": {"backbone": "mobilenet_v3_small", "weights": "none", "image_px": 32},
            "optim": {"epochs": 4, "warmup_epochs": 0},
        },
        "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "data.augmentation": {"choice": ["light", "strong"]}},
        "num_trials": 5,
        "scheduler": {"type": "asha", "grace_period": 1, "reduction_factor": 2},
        "keep": 2,
    }
    return build_study(plain | values)


class Bench:
    """A study's folder, and what starts of the command and training do to it."""

    def __init__(self, place: Path, study: StudyConfig, prepared) -> None:
        self.study, self.folder, self.prepared = study, StudyFolder(str(place)), prepared

    def start(self) -> Sweep:
        course = Course(self.folder, self.study.metric, 4, Control())
        readings = Readings(lambda data: self.prepared)
        return Sweep(self.study, self.folder, SHARES, readings, build_scheduler(self.study, course))

    def train(self, name: str, *scores: float, status: str | None = None) -> None:
        """Epochs with these scores, higher is better; each has its checkpoint.

        ``status``: how the trial ended by itself.
        """
        folder, sign = self.folder.trial(name), self.study.direction
        records = []
        for epoch, score in enumerate(scores, start=1):
            best = max(scores[:epoch])
            records.append(
                {
                    "epoch": epoch,
                    "validation": {self.study.metric: sign * score},
                    "best_score": best,
                    "elapsed_s": epoch,
                }
            )
            save_checkpoint(
                folder.checkpoints, epoch=epoch, step=0, score=score, state={}, save_bundle=lambda place: save(place)
            )
        folder.write_metrics(records)
        if status is not None:
            save(folder.bundle.local)
            folder.write_result({"status": status})

    def kept(self) -> dict[str, list[int]]:
        """Epochs of the checkpoints of the trials that have any."""
        found = {
            name: [one.epoch for one in list_checkpoints(self.folder.trial(name).checkpoints)[0]]
            for name in self.folder.trial_names()
        }
        return {name: epochs for name, epochs in found.items() if epochs}

    def bundles(self) -> list[str]:
        return [name for name in self.folder.trial_names() if self.folder.trial(name).bundle.exists()]


def save(place: Path) -> None:
    place.mkdir(parents=True)
    torch.save({"weight": torch.zeros(3)}, place / "model.pt")


@pytest.fixture
def bench(drawn_faces, store_dir, prepared, tmp_path) -> Bench:
    return Bench(tmp_path, build(drawn_faces, store_dir), prepared)


def hand_out(sweep: Sweep) -> list[str]:
    return [plan.name for plan in iter(sweep.next, None)]


def test_a_fresh_study_hands_out_the_base_and_then_what_is_proposed(bench):
    sweep = bench.start()
    assert (sweep.num_left, sweep.num_ended) == (0, 0)
    plans = list(iter(sweep.next, None))
    assert [plan.name for plan in plans] == [f"trial_{number:04d}" for number in range(5)]
    base = bench.study.base_config
    assert (plans[0].values, plans[0].config_hash) == ({}, config_hash(base))
    assert [plan.values for plan in plans] == [propose(bench.study, number) for number in range(5)]
    assert len({plan.config_hash for plan in plans}) == 5
    for plan in plans:
        folder = bench.folder.trial(plan.name)
        trained, expected = flatten(folder.config()), flatten(base) | plan.values
        wrong = {key for key in expected if trained[key] != expected[key] and key not in CARRIED_OUT_BY}
        assert wrong == set()
        assert (trained["run.name"], trained["run.storage"]) == (plan.name, str(bench.folder.trials))
        found, job = read_plan(folder)
        assert (found, job.config) == (plan, folder.config())
        assert (plan.role, plan.cpus, plan.gpus) == ("sweep", 2.0, 0.5)
        assert folder.provenance()["config_hash"] == plan.config_hash
        assert folder.provenance()["data_fingerprint"] == bench.prepared.fingerprint
        assert folder.audit()["splits"]


def test_a_sweep_can_be_pickled_as_ray_tune_does_with_its_searcher(bench):
    sweep = bench.start()
    first = sweep.next()
    copy = cloudpickle.loads(cloudpickle.dumps(sweep))
    assert first.name == "trial_0000"
    assert copy.next().number == 1


def test_an_adaptive_search_is_told_what_earlier_trials_scored(drawn_faces, store_dir, prepared, tmp_path):
    study = build(drawn_faces, store_dir, search="optuna", num_trials=13, scheduler={"type": "none"})
    bench = Bench(tmp_path, study, prepared)
    sweep = bench.start()
    observed = []
    for number in range(12):
        plan = sweep.next()
        score = round(1 - abs(plan.values.get("optim.lr", 1e-3) - 3e-3), 6)
        bench.train(plan.name, score, status="finished")
        sweep.ended(plan.name)
        observed.append(Observed(number, plan.values, score))
    expected = propose(study, 12, observed)
    assert expected != propose(study, 12, [])
    # The last one is proposed by a new start, which reads the folders.
    assert bench.start().next().values == expected == sweep.next().values


def test_a_second_start_hands_out_what_was_left_and_never_what_has_ended(bench):
    sweep = bench.start()
    for name in [sweep.next().name for _ in range(4)][:3]:
        bench.train(name, 0.5, status="finished" if name == "trial_0000" else None)
    bench.folder.trial("trial_0002").write_result({"status": "failed", "reason": "no disk"})
    final = Training("final_0000_seed1", 0, "trial_0000", bench.study.base_config, {})
    start_trial(bench.folder, final, SHARES, bench.prepared, "finalist")
    again = bench.start()
    assert (again.num_ended, again.num_left) == (2, 2)
    assert hand_out(again) == ["trial_0001", "trial_0003", "trial_0004"]
    assert bench.start().num_ended == 2


def test_a_trial_whose_folder_was_deleted_is_made_anew(bench):
    assert hand_out(bench.start())
    before = read_plan(bench.folder.trial("trial_0002"))
    for name in bench.folder.trial_names():
        bench.train(name, 0.5, status="finished")
    bench.folder.trial("trial_0002").location.delete()
    again = bench.start()
    assert (again.num_ended, again.num_left) == (4, 0)
    assert hand_out(again) == ["trial_0002"]
    assert read_plan(bench.folder.trial("trial_0002")) == before


def test_a_kill_while_a_trial_was_being_written_down_leaves_no_gap(bench):
    sweep = bench.start()
    plans = [sweep.next() for _ in range(2)]
    (bench.folder.trial("trial_0001").location / "config.yaml").delete()
    again = bench.start()
    assert (again.num_left, again.next(), again.next()) == (1, *plans)


def test_what_should_have_been_stopped_is_stopped_by_the_next_start(bench):
    """trial_0001 was told to stop and killed before it did; trial_0002's epoch was not judged yet and is below the
    cutoff 0.55.
    """
    sweep = bench.start()
    names = [sweep.next().name for _ in range(4)]
    bench.train(names[0], 0.6, status="finished")
    for name, *scores in ((names[1], 0.5), (names[2], 0.3), (names[3], 0.9)):
        bench.train(name, *scores)
    told = [
        {
            "trial": names[0],
            "bracket": 0,
            "milestone": 1.0,
            "epoch": 1,
            "score": 0.6,
            "cutoff": None,
            "action": "continue",
        },
        {"trial": names[1], "bracket": 0, "milestone": 1.0, "epoch": 1, "score": 0.5, "cutoff": 0.6, "action": "stop"},
    ]
    rungs = bench.folder.location / "rungs.jsonl"
    rungs.write_bytes("".join(json.dumps(line) + "\n" for line in told).encode())
    again = bench.start()
    assert (again.num_ended, again.num_left) == (3, 1)
    results = {name: bench.folder.trial(name).result() for name in names}
    assert [results[name]["status"] for name in names[1:3]] == ["stopped_by_scheduler"] * 2
    assert results[names[1]]["reason"] == "below the cutoff of the rung at epoch 1"
    assert results[names[2]]["reason"] == "below the cutoff of the rung at epoch 1: 0.3000 < 0.5500"
    assert results[names[3]] is None
    assert [json.loads(line)["trial"] for line in rungs.read_bytes().splitlines()] == names
    assert hand_out(again) == [names[3], "trial_0004"]


@pytest.mark.parametrize("metric", ["score", "loss"])
def test_the_best_and_the_base_keep_their_models_and_the_others_their_figures(
    metric, drawn_faces, store_dir, prepared, tmp_path
):
    bench = Bench(tmp_path, build(drawn_faces, store_dir, metric=metric, scheduler={"type": "none"}), prepared)
    sweep = bench.start()
    after = []
    courses = ((0.1, 0.3, 0.2), (0.5, 0.4), (0.2, 0.6), (0.4,), (0.3, 0.55, 0.5))
    for scores in courses:
        name = sweep.next().name
        bench.train(name, *scores, status="finished")
        sweep.ended(name)
        after.append((bench.kept(), bench.bundles()))
    assert after[1] == ({"trial_0000": [2], "trial_0001": [1]}, ["trial_0000", "trial_0001"])
    assert after[2][0] == after[3][0] == {"trial_0000": [2], "trial_0001": [1], "trial_0002": [2]}
    assert after[4][0] == {"trial_0000": [2], "trial_0002": [2], "trial_0004": [2]}, "0.6 and 0.55, and the base"
    assert after[4][1] == ["trial_0000", "trial_0002", "trial_0004"]
    for number, scores in enumerate(courses):
        folder = bench.folder.trial(f"trial_{number:04d}")
        assert len(folder.metrics()) == len(scores)
        assert folder.result()["status"] == "finished"


def test_a_start_frees_what_the_one_before_it_could_not(bench):
    """Killed between a trial's result and the deletions: the first start has three ended trials beyond the best two and
    the base.
    """
    sweep = bench.start()
    for score in (0.1, 0.5, 0.7, 0.6):
        bench.train(sweep.next().name, score, status="finished")
    bench.start()
    assert list(bench.kept()) == ["trial_0000", "trial_0002", "trial_0003"]


def test_a_trial_that_ended_without_a_score_keeps_no_model(bench):
    sweep = bench.start()
    names = [sweep.next().name for _ in range(3)]
    bench.train(names[0], 0.5, status="finished")
    bench.train(names[1], 0.4, 0.4)
    folder = bench.folder.trial(names[1])
    folder.write_metrics([{**record, "validation": {"score": None}} for record in folder.metrics()])
    folder.write_result({"status": "stopped_by_scheduler", "reason": "undefined"})
    bench.train(names[2], 0.3)
    sweep.ended(names[1])
    assert bench.kept() == {names[0]: [1], names[2]: [1]}


def test_of_failed_trials_the_last_ones_keep_what_a_retry_goes_on_from(bench):
    sweep = bench.start()
    names = [sweep.next().name for _ in range(5)]
    bench.train(names[0], 0.5, status="finished")
    for name in names[1:4]:
        bench.train(name, 0.4, status="failed")
        sweep.ended(name)
    bench.train(names[4], 0.2, 0.3)
    assert bench.kept() == {names[0]: [1], names[2]: [1], names[3]: [1], names[4]: [1, 2]}


def test_a_trial_that_would_not_train_what_was_sampled_is_refused(bench):
    sweep = bench.start()
    sweep.next()
    plan = sweep.next()
    asked = {"trial": plan.name, "config_hash": plan.config_hash}
    assert flatten(read_trial_job(asked, bench.folder).config)["optim.lr"] == plan.values["optim.lr"]
    file = bench.folder.trials / plan.name / "trial.json"
    record = json.loads(file.read_bytes())
    record["job"]["config"]["optim"]["lr"] = 0.005
    file.write_bytes(json.dumps(record).encode())
    with pytest.raises(RafceError) as caught:
        read_trial_job(asked, bench.folder)
    assert f"(optim.lr {plan.values['optim.lr']!r} sampled, 0.005 there)" in str(caught.value)
    assert f"expected {plan.config_hash}" in str(caught.value)
    # A key that was not sampled changes the hash.
    record["job"]["config"]["optim"] |= {"lr": plan.values["optim.lr"], "batch_size": 7}
    file.write_bytes(json.dumps(record).encode())
    with pytest.raises(RafceError, match=rf"trial trial_0001 .* expected {plan.config_hash}\. Its trial\.json"):
        read_trial_job(asked, bench.folder)
    # So does another plan than the one that Ray was given.
    with pytest.raises(RafceError, match="does not hold the configuration 00000000 that was sampled"):
        read_trial_job(asked | {"config_hash": "00000000"}, bench.folder)


def test_the_table_is_what_the_folders_say(bench):
    sweep = bench.start()
    names = [sweep.next().name for _ in range(4)]
    bench.train(names[0], 0.2, 0.4, status="finished")
    sweep.ended(names[0])
    bench.train(names[1], 0.1)
    bench.folder.trial(names[2]).write_result({"status": "failed", "reason": "no disk"})
    sweep.write_table()
    rows = [json.loads(line) for line in (bench.folder.location / "trials.jsonl").read_bytes().splitlines()]
    assert rows == [trial.row for trial in read_trials(bench.folder, "score")]
    assert [row["status"] for row in rows] == ["finished", "interrupted", "failed", "waiting"]
    assert [row["score"] for row in rows] == [0.4, 0.1, None, None]
    assert rows[3]["optim.lr"] == propose(bench.study, 3)["optim.lr"]


def test_values_that_do_not_go_together_are_left_out_and_the_numbers_go_on(
    drawn_faces, store_dir, prepared, tmp_path, capsys
):
    """A frozen trunk without weights is refused; the check before a study starts, which would say so, is passed by."""
    study = build(drawn_faces, store_dir, num_trials=4, scheduler={"type": "none"})
    base = study.base.model_copy(update={"model": {"backbone": "mobilenet_v3_small", "weights": "DEFAULT"}})
    space = {
        "model.freeze_backbone": Domain("grid", (True, False)),
        "model.weights": Domain("grid", ("none", "DEFAULT")),
    }
    bench = Bench(tmp_path, study.model_copy(update={"base": base, "space": space, "search": "grid"}), prepared)
    assert planned_trials(bench.study) == 4
    assert hand_out(bench.start()) == ["trial_0000", "trial_0002", "trial_0003"]
    said = capsys.readouterr().err
    assert "warning: trial 1 is left out" in said
    assert "model.freeze_backbone=true with" in said
    assert hand_out(bench.start()) == ["trial_0000", "trial_0002", "trial_0003"]


def test_data_are_prepared_once_for_each_way_of_reading(drawn_faces, store_dir):
    asked = []
    readings = Readings(lambda data: asked.append(data) or len(asked))
    study = build(
        drawn_faces,
        store_dir,
        metric="accuracy",
        space={
            "data.null_policy": {"choice": ["mask", "negative"]},
            "data.min_train_positives": {"choice": [5, 50]},
            "data.augmentation": {"choice": ["light", "strong"]},
            "optim.lr": {"loguniform": [1e-4, 1e-2]},
        },
    )
    base = study.base_config.data
    readings.prepare_all(ways_of_reading(study))
    ways = {(one.null_policy, one.min_train_positives) for one in asked}
    assert ways == {(policy, least) for policy in ("mask", "negative") for least in (5, 50)}
    assert len(asked) == 4
    assert {one.evaluation_null_policy for one in asked} == {base.null_policy}
    for number in range(5):
        data = study.config_of(propose(study, number)).data
        assert asked[readings.of(data) - 1].null_policy == data.null_policy
    assert len(asked) == 4


def test_data_that_may_not_be_trained_on_are_named_by_how_they_were_read(drawn_faces, store_dir):
    def refuse(data):
        if data.null_policy == "negative":
            raise GateError("no positives")

    study = build(drawn_faces, store_dir, space={"data.null_policy": {"choice": ["mask", "negative"]}}, num_trials=2)
    with pytest.raises(GateError, match=r'with \{"data\.null_policy": "negative"\}: no positives'):
        Readings(refuse).prepare_all(ways_of_reading(study))


def test_a_study_out_of_time_ends_its_sweep_and_goes_on_with_more(bench, until, monkeypatch, capsys):
    """The command's sweep, with a fake in the place of Ray Tune that trains what is handed out.

    The second trial takes 20 s of its clock.
    """
    trained: list[tuple[str, int]] = []
    now = [0.0]
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def run_on_tune(plans, scheduler, settings, ended):
        control = scheduler.course.control
        while control.stop is None and (plan := next(plans, None)) is not None:
            before = len(bench.folder.trial(plan.name).metrics())
            out_of_time = plan.name == "trial_0001" and before == 0
            if out_of_time:
                bench.train(plan.name, 0.5)
                now[0] += 20.0
                until(lambda: control.stop is not None, lambda: "the budget does not end the sweep")
            else:
                bench.train(plan.name, *[0.5] * 4, status="finished")
                ended(plan.name)
            trained.append((plan.name, before))

    monkeypatch.setattr(trials, "run_on_tune", run_on_tune)

    def start(budget_s: float) -> str:
        study = bench.study.model_copy(update={"time_budget_s": budget_s})
        sweep(study, bench.folder, SHARES, Readings(lambda data: bench.prepared))
        return capsys.readouterr().err

    assert "the time budget of 10 s is spent; with a higher one the same command goes on" in start(10.0)
    assert trained == [("trial_0000", 0), ("trial_0001", 0)]
    statuses = [one.status for one in read_trials(bench.folder, bench.study.metric)]
    assert statuses == ["finished", "interrupted"]
    assert read_elapsed(bench.folder) == 20.0

    assert "the time budget of 10 s is spent: no further trial of the sweep is started" in start(10.0)
    assert len(trained) == 2

    assert "going on: 1 trials have ended, 1 go on from their newest checkpoint" in start(600.0)
    assert trained[2:] == [("trial_0001", 1), *((f"trial_{number:04d}", 0) for number in (2, 3, 4))]
    assert [one.status for one in read_trials(bench.folder, bench.study.metric)] == ["finished"] * 5
