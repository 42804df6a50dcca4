"""A run trained again: the same figures, or what differs; and the original is left alone."""

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.base.hardware import describe_software
from rafce_ray.cli.replay import main
from rafce_ray.config import config_hash, load_config, to_yaml
from rafce_ray.data.loader import prepare
from rafce_ray.run.compare import (
    MISSING,
    Circumstance,
    circumstances_of,
    compare_circumstances,
    compare_figures,
)
from rafce_ray.run.folder import RunFolder, open_finished
from rafce_ray.run.replay import plan_replay
from rafce_ray.study.trials import conclude
from rafce_ray.train import launch as driver
from rafce_ray.train.launch import named

pytestmark = pytest.mark.numeric

EPOCH = {
    "epoch": 1,
    "lr": 0.001,
    "train": {"loss": 2.5, "grad_norm": 4.0},
    "images_per_s": 70.0,
    "data_wait": 0.1,
    "elapsed_s": 3.0,
    "validation": {
        "accuracy": 0.5,
        "au_f1_mean": None,
        "confusion": [[3, 1], [0, 200]],
        "per_class": [{"emotion": "sadly angry", "f1": 0.25}],
        "per_au": [{"action_unit": "AU12", "f1": 0.75}],
    },
}
RESULT = {
    "status": "finished",
    "best_epoch": 1,
    "run_dir": "/a",
    "bundle": "/a/bundle",
    "weights_sha256": "aa",
    "elapsed_s": 3,
}


def changed(record: dict, path: str, value: object) -> dict:
    """A deep copy with the value at ``a/b/0/c`` replaced."""
    copy = json.loads(json.dumps(record))
    *parents, last = path.split("/")
    inner = copy
    for part in parents:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    inner[int(last) if isinstance(inner, list) else last] = value
    return copy


def test_equal_records_are_equal_whatever_their_timings_and_places():
    again = EPOCH | {"images_per_s": 7.0, "data_wait": 0.9, "elapsed_s": 300.0}
    result = RESULT | {"run_dir": "/b", "bundle": "/b/bundle", "weights_sha256": "bb", "elapsed_s": 1}
    found = compare_figures({1: EPOCH, None: RESULT}, {1: again, None: result}, 0.0)
    assert found.equal
    assert found.largest.size == 0.0
    # epoch, lr, loss, grad_norm, accuracy, au_f1_mean, 4 of the confusion, name and F1 of a class and an AU; status,
    # best epoch.
    assert found.num_figures == 14 + 2


@pytest.mark.parametrize(
    ("path", "value", "figure", "size"),
    [
        ("validation/accuracy", 0.501, "validation/accuracy", 0.001),
        ("train/grad_norm", 5.0, "train/grad_norm", 1 / 5),
        ("validation/confusion/1/1", 199, "validation/confusion/1/1", 1 / 200),
        ("validation/per_class/0/f1", 0.5, "validation/per_class/sadly angry/f1", 0.25),
        ("validation/per_au/0/f1", 0.5, "validation/per_au/AU12/f1", 0.25),
        ("validation/au_f1_mean", 0.0, "validation/au_f1_mean", math.inf),
        ("validation/accuracy", None, "validation/accuracy", math.inf),
    ],
)
def test_a_figure_that_differs_is_named_with_its_size(path, value, figure, size):
    found = compare_figures({1: EPOCH}, {1: changed(EPOCH, path, value)}, 1e-6)
    assert not found.equal
    (one,) = found.beyond
    assert (one.epoch, one.figure) == (1, figure)
    assert one.size == pytest.approx(size)
    assert one == found.largest


def test_the_tolerance_decides():
    again = {1: changed(EPOCH, "validation/accuracy", 0.5 + 5e-7)}
    assert compare_figures({1: EPOCH}, again, 1e-6).equal
    assert not compare_figures({1: EPOCH}, again, 1e-7).equal
    assert compare_figures({1: EPOCH}, again, 1e-6).largest.figure == "validation/accuracy"


def test_differences_come_by_epoch_with_the_finished_model_last():
    second = changed(EPOCH, "epoch", 2)
    original = {1: EPOCH, 2: second, None: RESULT}
    again = {
        1: EPOCH,
        2: changed(second, "validation/accuracy", 0.4),
        None: RESULT | {"status": "diverged", "best_epoch": 2},
    }
    found = compare_figures(original, again, 1e-6)
    assert [(one.epoch, one.figure) for one in found.beyond] == [
        (2, "validation/accuracy"),
        (None, "status"),
        (None, "best_epoch"),
    ]
    assert str(found.beyond[0]) == "validation/accuracy in epoch 2: 0.5 in the original, 0.4 in the replay"
    assert str(found.beyond[1]).startswith("status of the finished model: finished in the original")


def test_missing_epochs_and_figures_are_differences_and_new_figures_are_told():
    second = changed(EPOCH, "epoch", 2)
    found = compare_figures({1: EPOCH, 2: second}, {1: EPOCH}, 1.0)
    assert [(one.epoch, one.original, one.replay) for one in found.beyond] == [(2, "there", MISSING)]
    fewer = json.loads(json.dumps(EPOCH))
    del fewer["train"]["grad_norm"]
    found = compare_figures({1: EPOCH}, {1: fewer}, 1.0)
    assert [(one.figure, one.replay) for one in found.beyond] == [("train/grad_norm", MISSING)]
    found = compare_figures({1: fewer}, {1: EPOCH}, 0.0)
    assert found.equal
    assert found.only_in_replay == ("train/grad_norm",)


COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("what", "original", "now", "verdict"),
    [
        ("torch", "2.10", "2.10", "same"),
        ("torch", "2.10", "2.11", "differs"),
        ("threads", None, "2", "unknown"),
        ("git commit", COMMIT, COMMIT, "same"),
        ("git commit", COMMIT, COMMIT[::-1], "differs"),
        ("git commit", f"{COMMIT}-dirty", f"{COMMIT}-dirty", "unknown"),
        ("git commit", "not a git checkout", "not a git checkout", "unknown"),
    ],
)
def test_circumstances_are_the_same_differ_or_are_unknown(what, original, now, verdict):
    assert Circumstance(what, original, now).verdict == verdict


@pytest.fixture
def faces(drawn_faces, tmp_path) -> Path:
    """Faces of a test's own, which it may change."""
    return Path(shutil.copytree(drawn_faces, tmp_path / "faces"))


def pretend_run(place: Path, tiny_overrides: list[str], *extra: str, threads: int = 1) -> RunFolder:
    """A folder that says that a run was trained; nothing was."""
    config = load_config(overrides=[*tiny_overrides, f"run.storage={place.parent}", f"run.name={place.name}", *extra])
    prepared = prepare(config.data)
    folder = RunFolder(str(place))
    provenance = {
        "config": config.model_dump(mode="json"),
        "config_hash": config_hash(config),
        "data_fingerprint": prepared.fingerprint,
        "seed": config.run.seed,
        "software": describe_software(),
    }
    folder.start(config, provenance, prepared.audit.to_json())
    hardware = {"device": "cpu", "name": "some processor", "threads": threads}
    folder.add_event("started", message="", precision="fp32", hardware=hardware)
    folder.write_metrics([EPOCH])
    folder.write_result(RESULT)
    folder.add_event("finished")
    return folder


def test_what_is_no_finished_run_is_refused_with_the_remedy(tiny_overrides, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is no run: it has no config.yaml" in capsys.readouterr().err
    folder = pretend_run(tmp_path / "study" / "trials" / "one", tiny_overrides)
    assert main([str(tmp_path / "study")]) == 2
    assert f"name one of its trials, such as {tmp_path}/study/trials/one" in capsys.readouterr().err
    (folder.location / "result.json").delete()
    with pytest.raises(UsageError, match=r"has not finished: it has no result\.json"):
        open_finished(folder.place)


def test_circumstances_of_a_run_that_was_resumed_and_extended(tiny_overrides, tmp_path):
    folder = pretend_run(tmp_path / "run", tiny_overrides, threads=2)
    found = circumstances_of(folder)
    assert (found["device"], found["processor"], found["threads"]) == ("cpu", "some processor", "2")
    assert (found["precision"], found["workers"], found["seed"]) == ("fp32", "1", "0")
    assert found["trained"] == "in one go"
    assert {one.verdict for one in compare_circumstances(found, found) if one.what != "git commit"} == {"same"}
    folder.add_event("started", precision="fp32", hardware={"device": "cpu", "name": "another", "threads": 4})
    again = circumstances_of(folder)
    assert (again["processor"], again["threads"]) == ("some processor then another", "2 then 4")
    assert again["trained"] == "extended after its end"


def test_a_run_whose_workers_came_and_went_is_replayed_by_as_many_as_there_were_at_most(tiny_overrides, tmp_path):
    folder = pretend_run(tmp_path / "run", tiny_overrides, "run.num_workers=[1, 4]")
    (folder.location / "events.jsonl").delete()
    for num_workers in (2, 1, 3, 2):
        folder.add_event("started", precision="fp32", num_workers=num_workers)
    assert circumstances_of(folder)["workers"] == "2 then 1 then 3"
    plan = plan_replay(folder)
    assert plan.config.run.num_workers == 3
    assert [(one.original, one.replay, one.verdict) for one in plan.before if one.what == "workers"] == [
        ("2 then 1 then 3", "3", "differs")
    ]


def test_circumstances_that_nobody_wrote_down_are_unknown(tiny_overrides, tmp_path):
    folder = pretend_run(tmp_path / "run", tiny_overrides)
    (folder.location / "events.jsonl").delete()
    assert circumstances_of(folder)["threads"] is None


def test_a_replay_has_the_configuration_that_trained_and_a_place_beside(tiny_overrides, tmp_path):
    folder = pretend_run(tmp_path / "run", tiny_overrides, "optim.epochs=2", threads=3)
    plan = plan_replay(folder)
    assert plan.trained == folder.config()
    assert plan.edited == {}
    assert not plan.data_changed
    run = plan.config.run
    assert (run.storage, run.name) == (str(tmp_path), "run-replay")
    assert (run.cpus_per_worker, run.use_gpu, run.precision, run.num_workers) == (3, False, "fp32", 1)
    same = plan.config.model_copy(update={"run": plan.trained.run})
    assert same == plan.trained


def test_the_names_of_a_replay_and_of_a_run_without_one_are_as_long_as_file_systems_take_them(tiny_overrides, tmp_path):
    folder = pretend_run(tmp_path / ("x" * 255), tiny_overrides)
    assert len(plan_replay(folder).config.run.name) <= 255
    config = load_config(overrides=[f"data.root={'x' * 250}"])
    name = named(config).run.name
    assert len(name) == 255
    assert name.endswith(f"x-resnet50-{config_hash(config)}")


def test_names_that_are_taken_are_counted_up_and_an_interrupted_replay_goes_on(tiny_overrides, tmp_path):
    folder = pretend_run(tmp_path / "run", tiny_overrides)
    first = pretend_run(tmp_path / "run-replay", tiny_overrides)
    assert plan_replay(folder).config.run.name == "run-replay-2"
    (first.location / "result.json").delete()
    assert plan_replay(folder).config.run.name == "run-replay"


def test_the_replay_of_a_trial_is_no_trial(tiny_overrides, tmp_path):
    folder = pretend_run(tmp_path / "study" / "trials" / "one", tiny_overrides)
    run = plan_replay(folder).config.run
    assert (run.storage, run.name) == (str(tmp_path / "study" / "replays"), "one-replay")


def test_only_the_place_of_the_data_may_be_set(tiny_overrides, tmp_path, store_dir):
    folder = pretend_run(tmp_path / "run", tiny_overrides)
    with pytest.raises(UsageError, match="a replay trains what was trained"):
        plan_replay(folder, ["optim.lr=1"])
    moved = shutil.copytree(
        load_config(overrides=tiny_overrides).data.root, tmp_path / "moved", copy_function=shutil.copy2
    )
    plan = plan_replay(folder, [f"data.root={moved}"])
    assert plan.config.data.root == str(moved)
    assert not plan.data_changed


def test_data_that_are_gone_are_asked_for(tiny_overrides, faces, tmp_path):
    folder = pretend_run(tmp_path / "run", [*tiny_overrides, f"data.root={faces}"])
    shutil.rmtree(faces)
    with pytest.raises(UsageError, match=r"are not at .*/faces any more .* add data.root=PATH"):
        plan_replay(folder)


def test_changed_data_are_told_before_training_with_what_changed(tiny_overrides, faces, tmp_path, capsys):
    pretend_run(tmp_path / "run", [*tiny_overrides, f"data.root={faces}"])
    labels = faces / "RAFCE_AUlabel.txt"
    lines = labels.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.endswith("null"))
    lines[first] = f"{lines[first].split()[0]} null"
    labels.write_text("\n".join(lines))
    before = set(tmp_path.iterdir())
    assert main([str(tmp_path / "run"), "--json"]) == 3
    said = capsys.readouterr()
    assert "have changed since it was trained" in said.err
    assert "num_null" in said.err
    assert "starting Ray" not in said.err
    record = json.loads(said.out)
    assert record["replay"] is None
    verdicts = {one["what"]: one["verdict"] for one in record["circumstances"]}
    assert verdicts["data fingerprint"] == "differs"
    assert verdicts["torch"] == verdicts["seed"] == verdicts["configuration"] == "same"
    assert set(tmp_path.iterdir()) == before


def test_an_edited_configuration_is_found_out(tiny_overrides, tmp_path):
    folder = pretend_run(tmp_path / "run", tiny_overrides)
    config = folder.config()
    edited = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.01})})
    (folder.location / "config.yaml").write_bytes(to_yaml(edited).encode())
    plan = plan_replay(folder)
    assert plan.edited == {"optim.lr": (0.001, 0.01)}
    assert plan.config.optim.lr == 0.001


def test_a_smaller_machine_is_said_and_used(tiny_overrides, tmp_path, monkeypatch, capsys):
    """Training itself is left out: what it would be started with is looked at."""
    folder = pretend_run(tmp_path / "run", tiny_overrides, threads=64)
    plan = plan_replay(folder)
    plan = replace(
        plan, config=plan.config.model_copy(update={"run": plan.config.run.model_copy(update={"use_gpu": True})})
    )
    started = []

    @contextmanager
    def small_cluster(*_):
        yield 2.0, 0.0

    monkeypatch.setattr(driver, "ray_cluster", small_cluster)
    monkeypatch.setattr(driver, "launch", started.append)
    assert driver.train_again(plan).location.name == "run-replay"
    assert (started[0].run.cpus_per_worker, started[0].run.use_gpu) == (2, False)
    said = capsys.readouterr().err
    assert "the original had 64 threads a worker, here are 2" in said
    assert "training on the CPU" in said


# With training


@pytest.fixture(scope="module")
def overrides(tiny_overrides, tmp_path_factory) -> list[str]:
    storage = tmp_path_factory.mktemp("runs")
    return [*tiny_overrides, "optim.epochs=2", f"run.storage={storage}", "run.name=original", "run.cpus_per_worker=1"]


@pytest.fixture(scope="module")
def original(overrides, ray_cluster_of_tests) -> RunFolder:
    from rafce_ray.train.launch import launch

    return RunFolder(launch(load_config(overrides=overrides))["run_dir"])


def contents(folder: Path) -> dict[str, str]:
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.ray
def test_a_run_is_replayed_to_the_same_figures_and_weights(original, capsys):
    before = contents(original.location.local)
    assert main([original.place, "--json"]) == 0
    said = capsys.readouterr()
    record = json.loads(said.out.splitlines()[-1])
    assert record["equal"] is True
    assert record["tolerance"] == 1e-6
    assert record["largest"]["size"] <= 1e-6
    assert record["num_figures"] > 500
    assert record["same_weights"] is True
    assert record["replay"] == f"{original.location}-replay"
    assert "equal within 1e-06" in said.err
    assert "the weights are the same, bit for bit" in said.err
    again = RunFolder(record["replay"])
    assert [one["epoch"] for one in again.metrics()] == [1, 2]
    assert json.loads((again.location / "replay.json").read_bytes()) == record
    verdicts = {one["what"]: one["verdict"] for one in record["circumstances"]}
    assert verdicts.pop("git commit") in ("same", "unknown")
    assert set(verdicts.values()) == {"same"}
    assert contents(original.location.local) == before


@pytest.mark.ray
def test_altered_records_and_an_edited_configuration_are_told(original, tmp_path, capsys):
    """The edit is told and not trained; the epoch and the figure that were altered are named."""
    doctored = RunFolder(str(shutil.copytree(original.location.local, tmp_path / "doctored")))
    records = doctored.metrics()
    records[1]["validation"]["accuracy"] += 0.01
    doctored.write_metrics(records)
    config = doctored.config()
    edited = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.01})})
    (doctored.location / "config.yaml").write_bytes(to_yaml(edited).encode())
    assert main([doctored.place, "--json"]) == 3
    said = capsys.readouterr()
    assert "config.yaml was edited after training: optim.lr is 0.01 in it, 0.001 was trained with" in said.err
    assert "The first: validation/accuracy in epoch 2: " in said.err
    assert "the original's records were altered" in said.err
    record = json.loads(said.out.splitlines()[-1])
    assert record["edited"] == {"optim.lr": [0.001, 0.01]}
    assert [(one["epoch"], one["figure"]) for one in record["beyond"]] == [(2, "validation/accuracy")]
    assert record["beyond"][0]["size"] == pytest.approx(0.01)


@pytest.mark.ray
def test_a_trial_trained_in_one_process_is_replayed_to_the_same_figures(
    overrides, tmp_path, ray_cluster_of_tests, capsys
):
    from rafce_ray.run.loop import fit
    from rafce_ray.run.state import Job, LocalSession

    trials = tmp_path / "study" / "trials"
    folder = pretend_run(trials / "first", overrides)
    for name in ("events.jsonl", "metrics.jsonl", "result.json"):
        (folder.location / name).delete()
    config = folder.config()
    prepared = prepare(config.data)
    fit(Job(config, prepared.store_uri, prepared.taxonomy, folder.place, folder.provenance()), LocalSession())
    assert main([folder.place]) == 0
    assert "equal within 1e-06" in capsys.readouterr().err
    assert [path.name for path in trials.iterdir()] == ["first"]
    assert RunFolder(str(tmp_path / "study" / "replays" / "first-replay")).result() is not None


def test_a_trial_is_found_by_study_and_name_and_one_that_was_stopped_is_refused(tmp_path):
    folder = RunFolder(str(tmp_path / "study" / "trials" / "trial_0003"))
    folder.start(load_config(), {"config": {}}, {})
    folder.write_metrics([EPOCH | {"validation": {"macro_f1": 0.3}}])
    conclude(folder, "macro_f1", "stopped_by_scheduler", "below the cutoff")
    found = open_finished(str(tmp_path / "study" / "trial_0003"))
    assert found.location.path == str((tmp_path / "study" / "trials" / "trial_0003").resolve())
    with pytest.raises(UsageError, match=r"stopped by scheduler after 1 epochs.*rafce train --config"):
        plan_replay(found)


def test_a_trial_that_took_over_the_weights_of_another_is_refused(tiny_overrides, tmp_path):
    folder = pretend_run(tmp_path / "study" / "trials" / "trial_0001", tiny_overrides)
    folder.add_event("adopted", donor="trial_0002", epoch=2)
    with pytest.raises(UsageError, match=r"took over the weights of another trial.*rafce train --config"):
        plan_replay(folder)
