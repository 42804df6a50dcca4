"""The epoch loop without Ray: what it learns, writes down, survives."""

import json
import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import mobilenet_v3_small

from rafce_ray.base.console import to_json
from rafce_ray.base.errors import GateError, RafceError
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.config import load_config
from rafce_ray.data.loader import open_dataset, prepare, tally
from rafce_ray.run import state
from rafce_ray.run.checkpoint import TRAINER_STATE, list_checkpoints
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.loop import fit
from rafce_ray.run.state import Job, LocalSession

pytestmark = pytest.mark.numeric


def make_job(overrides: list[str], run_dir: Path) -> Job:
    config = load_config(overrides=overrides)
    prepared = prepare(config.data)
    return Job(config, str(prepared.store), prepared.taxonomy, str(run_dir), {"data_fingerprint": prepared.fingerprint})


def run(overrides: list[str], run_dir: Path, session: LocalSession | None = None) -> dict:
    return fit(make_job(overrides, run_dir), session or LocalSession())


def last_weights(result: dict) -> str:
    """sha256 of the weights after the last epoch, which need not be the best one's."""
    newest = list_checkpoints(RunFolder(result["run_dir"]).checkpoints)[0][-1]
    assert (newest.epoch, newest.step) == (result["epochs"], 0)
    return sha256((newest.location.local / "bundle" / "model.safetensors").read_bytes()).hexdigest()


class Interrupted(Exception):
    """Stands for the end of the process."""


class DyingSession(LocalSession):
    """Ends the loop after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    def alive(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Interrupted


@pytest.fixture(scope="module")
def undisturbed(trained_run):
    return trained_run[1]


def test_a_batch_of_more_images_than_there_are_is_told_before_the_first_step(tiny_overrides, tmp_path):
    with pytest.raises(Interrupted):
        run([*tiny_overrides, "optim.batch_size=512"], tmp_path / "run", DyingSession(1))
    (event,) = [one for one in RunFolder(str(tmp_path / "run")).events() if one["event"] == "warning"]
    assert event["message"].startswith("optim.batch_size=512 is more than the ")
    assert event["message"].endswith(" train images: every epoch is one step with all of them.")


def test_a_run_leaves_what_it_promises(undisturbed):
    folder = RunFolder(undisturbed["run_dir"])
    records = folder.metrics()
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert math.isfinite(record["train"]["emotion_loss"])
        assert record["train"]["au_loss"] > 0
        assert record["gap"]["accuracy"] == pytest.approx(
            record["train_natural"]["accuracy"] - record["validation"]["accuracy"]
        )
    scores = [record["validation"]["macro_f1"] for record in records]
    assert undisturbed["best_epoch"] == 1 + int(np.argmax(scores))
    assert folder.result()["weights_sha256"] == undisturbed["weights_sha256"]
    found, invalid = list_checkpoints(folder.checkpoints)
    assert invalid == []
    assert len(found) <= 4
    bundle = load_bundle(undisturbed["bundle"])
    assert bundle.weights_sha256 == undisturbed["weights_sha256"]
    assert bundle.metrics["accuracy"] == undisturbed["metrics"]["accuracy"]
    assert "started" in [event["event"] for event in folder.events()]


# 160 drawn images have 95 in train: 6 steps an epoch, then 1 validation and 1 gap batch call alive().
@pytest.mark.parametrize("steps", [3, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (1, 9, 12, 16))])
def test_an_interrupted_run_ends_with_the_same_weights_and_figures_bit_for_bit(
    steps, undisturbed, tiny_overrides, tmp_path
):
    overrides = [*tiny_overrides, "run.checkpoint_every_steps=2"]
    with pytest.raises(Interrupted):
        run(overrides, tmp_path / "run", DyingSession(steps))
    resumed = run(overrides, tmp_path / "run")
    assert last_weights(resumed) == last_weights(undisturbed)
    assert to_json(resumed["metrics"]) == to_json(undisturbed["metrics"])
    timings = ("images_per_s", "data_wait", "elapsed_s")
    plain = [
        [
            {key: value for key, value in record.items() if key not in timings}
            for record in RunFolder(one["run_dir"]).metrics()
        ]
        for one in (resumed, undisturbed)
    ]
    assert to_json(plain[0]) == to_json(plain[1])


def test_every_epoch_is_on_record_as_having_used_each_train_image_once(undisturbed, tiny_overrides):
    config = load_config(overrides=tiny_overrides)
    prepared = prepare(config.data)
    train = open_dataset(prepared.store_uri, prepared.taxonomy, "mask", "mask").indices("train")
    number, checksum = tally(train).tolist()
    assert number == 95
    for record in RunFolder(undisturbed["run_dir"]).metrics():
        assert record["images"] == {"used": 95, "checksum": f"{checksum % 2**64:016x}"}
        assert record["num_workers"] == 1


@pytest.mark.parametrize("reported", [False, True])
def test_auto_is_what_the_processor_reports_and_bf16_trains_nearly_as_fp32(
    reported, tiny_overrides, tmp_path, monkeypatch
):
    """The rounding of bf16 is 0.4 %; it is emulated where the processor lacks it."""
    flags = {"amx_bf16": False, "avx512_bf16": reported}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "any"} | flags)
    run([*tiny_overrides, "run.precision=auto", "optim.epochs=1", "optim.warmup_epochs=0"], tmp_path / "run")
    folder = RunFolder(str(tmp_path / "run"))
    (started,) = [event for event in folder.events() if event["event"] == "started"]
    assert started["precision"] == ("bf16" if reported else "fp32")
    (record,) = folder.metrics()
    run([*tiny_overrides, "optim.epochs=1", "optim.warmup_epochs=0"], tmp_path / "fp32")
    (exact,) = RunFolder(str(tmp_path / "fp32")).metrics()
    for name in ("emotion_loss", "au_loss"):
        assert record["train"][name] == pytest.approx(exact["train"][name], rel=2e-2 if reported else 1e-9)


def test_an_epoch_that_did_not_use_its_images_is_refused(tiny_overrides, tmp_path):
    """A checkpoint that says of one image that it was used when another was."""
    overrides = [*tiny_overrides, "run.checkpoint_every_steps=2", "optim.epochs=1", "optim.warmup_epochs=0"]
    with pytest.raises(Interrupted):
        run(overrides, tmp_path / "run", DyingSession(5))
    newest = list_checkpoints(RunFolder(str(tmp_path / "run")).checkpoints)[0][-1]
    assert (newest.epoch, newest.step) == (0, 4)
    file = newest.location.local / TRAINER_STATE
    state = torch.load(file, weights_only=True)
    one, other = tally(np.array([3])), tally(np.array([4]))
    state["progress"]["images_used"][1] += int(other[1] - one[1])
    torch.save(state, file)
    manifest = newest.location.local / "manifest.json"
    record = json.loads(manifest.read_text())
    record["sha256"][TRAINER_STATE] = sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(record))
    with pytest.raises(RafceError, match=r"epoch 1 used 95 images where 95 were drawn, or not each as often as drawn"):
        run(overrides, tmp_path / "run")
    assert RunFolder(str(tmp_path / "run")).metrics() == []


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["optim.ema_decay=0.9"], ["optim.optimizer=sgd", "loss.task_weighting=uncertainty"]])
def test_averaged_weights_and_learned_task_weights_survive_an_interruption_too(extra, tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "run.checkpoint_every_steps=2", "optim.epochs=2", *extra]
    undisturbed = run(overrides, tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        run(overrides, tmp_path / "run", DyingSession(9))
    assert last_weights(run(overrides, tmp_path / "run")) == last_weights(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["truncate", "alter", "delete"])
def test_a_broken_newest_checkpoint_is_named_and_the_one_before_is_used(harm, undisturbed, tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "run.checkpoint_every_steps=2"]
    with pytest.raises(Interrupted):
        run(overrides, tmp_path / "run", DyingSession(13))
    folder = RunFolder(str(tmp_path / "run"))
    newest = list_checkpoints(folder.checkpoints)[0][-1]
    weights = newest.location.local / "bundle" / "model.safetensors"
    if harm == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif harm == "alter":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01"[:1])
    else:
        weights.unlink()
    resumed = run(overrides, tmp_path / "run")
    assert last_weights(resumed) == last_weights(undisturbed)
    assert newest.name in [
        event.get("checkpoint") for event in folder.events() if event["event"] == "invalid_checkpoint"
    ]


@pytest.mark.slow
def test_training_stops_when_patience_is_spent(tiny_overrides, tmp_path):
    result = run([*tiny_overrides, "optim.epochs=9", "optim.patience=2", "optim.lr=1e-12"], tmp_path / "run")
    assert result["status"] == "stopped_early"
    assert result["epochs"] - result["best_epoch"] == 2


@pytest.mark.slow
def test_a_diverged_run_says_so_and_keeps_its_best(tiny_overrides, tmp_path):
    wild = [
        "optim.optimizer=sgd",
        "optim.lr=10",
        "optim.weight_decay=1",
        "optim.grad_clip=0",
        "optim.warmup_epochs=2",
        "optim.epochs=30",
    ]
    result = run([*tiny_overrides, *wild], tmp_path / "run")
    assert result["status"] == "diverged"
    assert result["bundle"] is None or load_bundle(result["bundle"]).weights_sha256 == result["weights_sha256"]


@pytest.mark.parametrize(("task", "absent"), [("emotions", "accuracy"), ("action_units", "au_f1_mean")])
def test_one_task_alone_trains(task, absent, tiny_overrides, tmp_path):
    result = run([*tiny_overrides, f"data.{task}=none", "optim.epochs=1"], tmp_path / "run")
    bundle = load_bundle(result["bundle"])
    assert (bundle.taxonomy.num_emotions == 0) == (task == "emotions")
    assert (bundle.taxonomy.num_action_units == 0) == (task == "action_units")
    value = result["metrics"].get(absent)
    assert value is None or math.isnan(value)


@pytest.mark.slow
def test_the_curriculum_keeps_the_au_loss_out_at_first(tiny_overrides, tmp_path):
    overrides = [
        *tiny_overrides,
        "optim.epochs=4",
        "loss.au_start_epoch=1",
        "loss.au_ramp_epochs=2",
        "loss.au_weight=0.8",
    ]
    run(overrides, tmp_path / "run")
    assert [record["au_weight"] for record in RunFolder(str(tmp_path / "run")).metrics()] == pytest.approx(
        [0, 0.4, 0.8, 0.8]
    )


@pytest.mark.slow
def test_with_reading_disabled_au_f1_is_exactly_what_the_seed_saw(tiny_overrides, tmp_path, monkeypatch):
    """The seed's parser turned every AU target of the train split to zero."""

    def seeds_dataset(*arguments):
        dataset = open_dataset(*arguments)
        action_units = dataset.targets.action_units.copy()
        action_units[dataset.indices("train")] = 0.0
        return replace(dataset, targets=replace(dataset.targets, action_units=action_units))

    monkeypatch.setattr(state, "open_dataset", seeds_dataset)
    run(tiny_overrides, tmp_path / "run")
    last = RunFolder(str(tmp_path / "run")).metrics()[-1]
    assert f"{last['validation']['au_f1_mean']:.4f}" == "0.0000"
    assert last["train"]["au_loss"] < 0.05 < 1.0 < last["train"]["emotion_loss"]


def test_no_validation_images_is_a_refusal(tiny_overrides, tmp_path):
    job = make_job(tiny_overrides, tmp_path / "run")
    dataset = open_dataset(job.store, job.taxonomy, "mask")
    split = np.where(dataset.targets.split == 1, -1, dataset.targets.split).astype(np.int8)
    without = replace(dataset, targets=replace(dataset.targets, split=split))
    with pytest.raises(GateError, match="validation split has no images"):
        state.choose_splits(without, job.config)


def test_rows_with_null_labels_may_be_left_out_of_training_only(tiny_overrides, tmp_path):
    job = make_job(tiny_overrides, tmp_path / "run")
    dataset = open_dataset(job.store, job.taxonomy, "mask")
    all_rows = state.choose_splits(dataset, job.config)
    dropped = state.choose_splits(dataset, load_config(overrides=[*tiny_overrides, "data.drop_null_rows=true"]))
    null = dataset.targets.null_row
    assert null[all_rows.train].any()
    assert set(dropped.train) == {row for row in all_rows.train if not null[row]}
    assert np.array_equal(dropped.validation, all_rows.validation)


@pytest.mark.parametrize(
    ("monitor", "task", "expected"),
    [
        ("macro_f1", "emotions", "au_f1_mean"),
        ("au_f1_mean", "action_units", "macro_f1"),
        ("score", "emotions", "score"),
    ],
)
def test_the_monitor_follows_the_tasks_that_are_trained_and_says_so(monitor, task, expected, tiny_overrides, tmp_path):
    job = make_job([*tiny_overrides, f"data.{task}=none", f"optim.monitor={monitor}"], tmp_path / "run")
    dataset = open_dataset(job.store, job.taxonomy, "mask")
    name, remark = state.resolve_monitor(job.config, dataset)
    assert name == expected
    assert (remark is not None) == (expected != monitor)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["model.au_attention=true"],
        ["model.compositional_head=true", "loss.votes_weight=0.5"],
        ["model.au_attention=true", "loss.au_stop_gradient=true", "loss.au_weight=0.1"],
        ["loss.imbalance=class_weights"],
        ["loss.imbalance=logit_adjustment"],
        ["loss.imbalance=oversampling"],
        ["loss.au_loss=asymmetric", "loss.pos_weight_cap=10"],
        ["loss.task_weighting=uncertainty", "data.null_policy=negative"],
        [
            "data.augmentation=strong",
            "data.drop_null_rows=true",
            "data.action_units=auto",
            "data.min_train_positives=10",
        ],
        ["optim.ema_decay=0.99", "optim.optimizer=sgd", "optim.schedule=constant", "optim.warmup_epochs=0"],
        ["run.precision=bf16", "run.channels_last=false", "optim.grad_clip=0", "optim.monitor=loss"],
    ],
    ids=lambda options: options[0],
)
def test_every_option_trains_and_gives_a_bundle(options, tiny_overrides, tmp_path):
    result = run([*tiny_overrides, "optim.epochs=2", *options], tmp_path / "run")
    assert result["status"] == "finished"
    records = RunFolder(result["run_dir"]).metrics()
    assert all(math.isfinite(record["train"]["loss"]) for record in records)
    assert load_bundle(result["bundle"]).weights_sha256 == result["weights_sha256"]


@pytest.mark.slow
def test_a_frozen_trunk_stays_as_it_was_and_the_heads_learn(tiny_overrides, tmp_path):
    save_file(mobilenet_v3_small().state_dict(), tmp_path / "weights.safetensors")
    weights = f"model.weights={tmp_path / 'weights.safetensors'}"
    overrides = [*tiny_overrides, "model.freeze_backbone=true", weights, "optim.epochs=1"]
    before = state.Training(make_job(overrides, tmp_path / "never"), LocalSession()).model.state_dict()
    after = load_bundle(run(overrides, tmp_path / "run")["bundle"]).model.state_dict()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert not any(name.startswith("trunk.") for name in changed)
