"""Runs side by side: what may be compared, what is said, and that the figures are those of the paired comparison."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rafce_ray.base.console import to_json
from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, SEED18, Taxonomy, make_taxonomy
from rafce_ray.bundle.bundle import save_bundle
from rafce_ray.cli.compare import main
from rafce_ray.config import config_hash, load_config
from rafce_ray.data.loader import open_dataset, prepare
from rafce_ray.faces.preprocess import Preprocessing
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs
from rafce_ray.metrics.comparison import difference, f1_of, score
from rafce_ray.model.network import Architecture, build_model
from rafce_ray.run.compare import Run, compare, load_run, to_json_record
from rafce_ray.run.folder import RunFolder

EMOTIONS = tuple(list(RAFCE_EMOTIONS)[:3])
BOTH = make_taxonomy(EMOTIONS, (1, 12))
CIRCUMSTANCES = {"data fingerprint": "a" * 32, "seed": "0", "torch": "2.10", "git commit": "0" * 40}


def make_run(
    name: str, seed: int, *, taxonomy: Taxonomy = BOTH, signal: float = 1.0, overrides: tuple[str, ...] = ()
) -> Run:
    """A run of the same 200 images as every other, whose outputs hold ``signal`` of the truth."""
    of_images, of_model = np.random.default_rng(0), np.random.default_rng([seed, 1])
    emotion = of_images.integers(0, 3, 200)
    action_units = (of_images.random((200, 2)) < 0.4).astype(np.float32)
    emotion_logits = of_model.normal(size=(200, 3)) + signal * np.eye(3)[emotion]
    au_logits = of_model.normal(size=(200, 2)) + signal * (2 * action_units - 1)
    outputs = Outputs(
        emotion_logits[:, : taxonomy.num_emotions].astype(np.float32),
        au_logits[:, : taxonomy.num_action_units].astype(np.float32),
    )
    split = SplitOutputs(
        [f"{i}.jpg" for i in range(200)], emotion, action_units[:, : taxonomy.num_action_units], outputs
    )
    calibration = Calibration.uncalibrated(taxonomy.num_action_units)
    config = load_config(overrides=["data.root=faces", *overrides])
    return Run(name, f"/runs/{name}", config, taxonomy, calibration, split, dict(CIRCUMSTANCES))


def test_differences_are_those_of_the_paired_comparison():
    runs = [make_run("a", 1), make_run("b", 2), make_run("c", 3, signal=3.0)]
    compared = compare(runs, resamples=200)
    scored = [score(run.outputs, BOTH, run.calibration, resamples=200) for run in runs]
    assert compared.against_first[0] == {}
    for number in (1, 2):
        for figure in ("accuracy", "au_f1_mean", "score", f1_of("AU12"), f1_of(EMOTIONS[1])):
            assert compared.against_first[number][figure] == difference(scored[number], scored[0], figure)
    assert compared.against_first[2]["accuracy"].is_real
    assert compared.against_first[2]["accuracy"].value > 0
    assert compared.remarks == ()
    assert compared.config_differences == {}


def test_configurations_are_compared_by_what_they_compute():
    runs = [
        make_run("a", 1),
        make_run("b", 1, overrides=("optim.lr=1e-2", "run.num_workers=2", "run.name=b")),
        make_run("c", 1, overrides=("loss.au_weight=2",)),
    ]
    assert compare(runs, resamples=5).config_differences == {
        "loss.au_weight": [1.0, 1.0, 2.0],
        "optim.lr": [0.0005, 0.01, 0.0005],
    }


def test_the_order_of_images_does_not_matter():
    one, other = make_run("a", 1), make_run("b", 2)
    order = np.random.default_rng(5).permutation(200)
    split = other.outputs
    shuffled = SplitOutputs(
        [split.names[i] for i in order],
        split.emotion[order],
        split.action_units[order],
        Outputs(split.outputs.emotion[order], split.outputs.action_units[order]),
    )
    expected = compare([one, other], resamples=50)
    found = compare([one, replace(other, outputs=shuffled)], resamples=50)
    assert found.against_first == expected.against_first
    assert found.remarks == ()


def test_other_emotions_or_images_are_refused():
    other = make_taxonomy((*EMOTIONS[:2], "calm"), (1, 12))
    with pytest.raises(
        UsageError, match=r"a predicts the emotions .* b \['happily surprised', 'happily disgusted', 'calm'\]"
    ):
        compare([make_run("a", 1), make_run("b", 2, taxonomy=other)])
    fewer = make_run("b", 2)
    split = fewer.outputs
    renamed = replace(fewer, outputs=replace(split, names=["else.jpg", *split.names[1:]]))
    with pytest.raises(UsageError, match=r"else\.jpg"):
        compare([make_run("a", 1), renamed])
    units, emotions = make_taxonomy((), (1, 12)), make_taxonomy(EMOTIONS, ())
    with pytest.raises(UsageError, match=r"predict nothing in common: 3 emotions and 2 action units \(AU1, AU12\)"):
        compare([make_run("a", 1, taxonomy=emotions), make_run("b", 1, taxonomy=units)])


def test_action_units_of_another_vocabulary_are_left_out_aloud():
    compared = compare([make_run("a", 1), make_run("b", 2, taxonomy=make_taxonomy(EMOTIONS, (1, 2)))], resamples=20)
    (remark,) = compared.remarks
    assert remark == (
        "action units are not compared: a predicts 2 action units (AU1, AU12), b 2 action units (AU1, AU2)."
    )
    found = compared.against_first[1]
    assert "accuracy" in found
    # The score is of both tasks: where one is another question, so is the score.
    assert not {"au_f1_mean", "au_ap_mean", "score", f1_of("AU1")} & found.keys()


def test_a_run_of_emotions_alone_is_compared_by_its_emotions():
    alone = make_run("alone", 1, taxonomy=make_taxonomy(EMOTIONS, ()))
    compared = compare([make_run("both", 1), alone], resamples=20)
    found = compared.against_first[1]
    assert (found["accuracy"].value, found["accuracy"].low, found["accuracy"].high) == (0.0, 0.0, 0.0)
    assert not {"au_f1_mean", "score"} & found.keys()
    assert compared.remarks == ("action units are not compared: both predicts 2 action units (AU1, AU12), alone none.",)
    assert math.isnan(compared.scored[1].figures["au_f1_mean"])


def test_other_action_unit_labels_are_said_and_the_first_ones_are_used():
    one, other = make_run("a", 1), make_run("b", 1)
    labels = other.outputs.action_units.copy()
    labels[:30] = 1 - labels[:30]
    labels[30:40, 0] = np.nan
    compared = compare([one, replace(other, outputs=replace(other.outputs, action_units=labels))], resamples=20)
    assert compared.remarks == ("40 images have other AU labels in b than in a: both are measured by those of a.",)
    assert {(each.value, each.low, each.high) for each in compared.against_first[1].values()} == {(0.0, 0.0, 0.0)}


def test_other_data_are_said():
    other = make_run("b", 1)
    other = replace(other, circumstances=other.circumstances | {"data fingerprint": "b" * 32})
    (remark,) = compare([make_run("a", 1), other], resamples=5).remarks
    assert remark.startswith("b was trained on other data than a (fingerprint bbbbbbbbbbbb, aaaaaaaaaaaa)")


def test_the_record_is_plain():
    compared = compare([make_run("a", 1), make_run("b", 3, signal=3.0)], resamples=20)
    record = json.loads(to_json(to_json_record(compared, "validation")))
    assert [run["run"] for run in record["runs"]] == ["/runs/a", "/runs/b"]
    accuracy = record["runs"][1]["figures"]["accuracy"]
    assert accuracy["interval"][0] <= accuracy["value"] <= accuracy["interval"][1]
    assert record["runs"][0]["against_first"] == {}
    assert record["runs"][1]["against_first"]["accuracy"]["real"] is True


# Folders of runs


def save_run(place: Path, tiny_overrides: list[str], *extra: str, seed: int = 0) -> RunFolder:
    """The folder of a run that ended with random weights."""
    config = load_config(overrides=[*tiny_overrides, *extra])
    prepared = prepare(config.data)
    taxonomy = make_taxonomy(tuple(RAFCE_EMOTIONS), SEED18)
    provenance = {
        "config": config.model_dump(mode="json"),
        "config_hash": config_hash(config),
        "data_fingerprint": prepared.fingerprint,
        "seed": config.run.seed,
        "software": {"torch": "2.10", "git_commit": "0" * 40},
    }
    folder = RunFolder(str(place))
    folder.start(config, provenance, {})
    torch.manual_seed(seed)
    architecture = Architecture("mobilenet_v3_small", 32, 14, 18)
    model = build_model(architecture)
    with torch.no_grad():
        for parameter in (*model.emotion_head.parameters(), *model.au_head.parameters()):
            parameter.normal_(std=1.0)
    save_bundle(
        place / "bundle",
        model=model,
        architecture=architecture,
        taxonomy=taxonomy,
        preprocessing=Preprocessing(100, 32),
        calibration=Calibration(1.2, (0.3,) * 18),
        metrics={},
        provenance=provenance,
    )
    dataset = open_dataset(prepared.store, taxonomy, config.data.null_policy)
    rows = dataset.indices("validation")
    generator = np.random.default_rng(seed)
    logits = [generator.normal(size=(len(rows), width)).astype(np.float32) for width in (14, 18)]
    outputs = SplitOutputs(
        [dataset.names[row] for row in rows],
        dataset.targets.emotion[rows],
        dataset.targets.action_units[rows],
        Outputs(*logits),
    )
    folder.write_outputs("validation", outputs)
    folder.write_result({"status": "finished", "epochs": 1, "best_epoch": 1})
    return folder


@pytest.fixture(scope="module")
def folders(tiny_overrides, tmp_path_factory) -> list[RunFolder]:
    storage = tmp_path_factory.mktemp("runs")
    return [
        save_run(storage / "plain", tiny_overrides),
        save_run(storage / "negative", tiny_overrides, "data.null_policy=negative", seed=1),
    ]


def test_kept_outputs_of_the_validation_split_are_compared(folders, capsys):
    places = [folder.place for folder in folders]
    assert main([*places, "--json"]) == 0
    said = capsys.readouterr()
    record = json.loads(said.out)
    expected = compare(
        [load_run(place, name, "validation") for place, name in zip(places, ("plain", "negative"), strict=True)]
    )
    assert record == json.loads(to_json(to_json_record(expected, "validation")))
    assert record["split"] == "validation"
    assert record["config_differences"] == {"data.null_policy": ["mask", "negative"]}
    assert "images have other AU labels in negative than in plain" in said.err
    assert said.err.startswith("Comparing 2 runs on the validation split; the first, ")
    for shown in ("data.null_policy", "macro-F1, classes with 10", "difference to plain", "noise"):
        assert shown in said.err
    assert "Validation chose each run's best epoch" in said.err


def test_the_test_split_is_measured_with_the_bundles(folders, capsys):
    from rafce_ray.bundle.bundle import load_bundle
    from rafce_ray.bundle.evaluate import evaluate_bundle

    assert main([*[folder.place for folder in folders], "--split", "test", "--json", "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    bundle = load_bundle(folders[0].place)
    data = folders[0].config().data
    figures = evaluate_bundle(bundle, open_dataset(prepare(data).store, bundle.taxonomy, "mask"), "test")
    assert record["num_images"] == figures["num_images"]
    for figure in ("accuracy", "macro_f1", "au_f1_mean", "au_ap_mean"):
        assert record["runs"][0]["figures"][figure]["value"] == pytest.approx(figures[figure])
        assert record["runs"][0]["figures"][figure]["interval"] == pytest.approx(figures["intervals"][figure])


def test_what_cannot_be_compared_is_refused(folders, tmp_path, capsys):
    assert main([folders[0].place]) == 2
    assert "1 run(s) given: name the run to compare with first" in capsys.readouterr().err
    assert main([folders[0].place, str(tmp_path)]) == 2
    assert f"{tmp_path} is no run" in capsys.readouterr().err
    diverged = RunFolder(str(tmp_path / "diverged"))
    diverged.start(folders[0].config(), folders[0].provenance(), {})
    assert main([folders[0].place, diverged.place]) == 2
    assert "has not finished" in capsys.readouterr().err
    diverged.write_result({"status": "diverged", "epochs": 0, "bundle": None})
    assert main([folders[0].place, diverged.place]) == 2
    assert "has no bundle: it ended as diverged after 0 epochs" in capsys.readouterr().err


def test_runs_of_the_same_name_are_told_apart(folders, capsys):
    place = folders[0].place
    assert main([place, place]) == 0
    said = capsys.readouterr().err
    assert f"difference to {place}" in said
    assert "of no class and no action unit" in said
