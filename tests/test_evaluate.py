"""Evaluation: the figures are those of the metrics on the right rows, and names are matched, never positions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from rafce_ray.base.console import finite
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, SEED18, make_taxonomy
from rafce_ray.bundle.bundle import Bundle, load_bundle, save_bundle
from rafce_ray.bundle.evaluate import data_config_for, evaluate_bundle, open_for_bundle
from rafce_ray.bundle.model import Predictor
from rafce_ray.cli.evaluate import main
from rafce_ray.config import load_config
from rafce_ray.data.loader import open_dataset, prepare
from rafce_ray.faces.preprocess import Preprocessing
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.model.network import Architecture, build_model

pytestmark = pytest.mark.numeric

TAXONOMY = make_taxonomy(tuple(RAFCE_EMOTIONS), SEED18)


def make_bundle(path: Path, taxonomy, provenance, stored_px: int = 100) -> Bundle:
    torch.manual_seed(0)
    architecture = Architecture("mobilenet_v3_small", 32, taxonomy.num_emotions, taxonomy.num_action_units)
    model = build_model(architecture)
    with torch.no_grad():
        for parameter in model.emotion_head.parameters():
            parameter.normal_(std=1.0)
    save_bundle(
        path,
        model=model,
        architecture=architecture,
        taxonomy=taxonomy,
        preprocessing=Preprocessing(stored_px, 32),
        calibration=Calibration.uncalibrated(taxonomy.num_action_units),
        metrics={},
        provenance=provenance,
    )
    return load_bundle(path)


@pytest.fixture(scope="module")
def config(drawn_faces, store_dir):
    return load_config(overrides=[f"data.root={drawn_faces}", f"data.store_dir={store_dir}"])


@pytest.fixture(scope="module")
def dataset(config):
    return open_dataset(prepare(config.data).store, TAXONOMY, "mask")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, config, dataset) -> Bundle:
    provenance = {"config": config.model_dump(mode="json"), "data_fingerprint": dataset.fingerprint}
    return make_bundle(tmp_path_factory.mktemp("bundles") / "bundle", TAXONOMY, provenance)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_figures_are_those_of_scikit_learn_on_the_rows_of_the_split(bundle, dataset, split):
    figures = evaluate_bundle(bundle, dataset, split)
    rows = dataset.indices(split)
    found = Predictor(bundle).probabilities(dataset.images.gather(rows))
    true, predicted = dataset.targets.emotion[rows], found.emotion.argmax(axis=1)
    assert figures["split"] == split
    assert figures["num_images"] == len(rows)
    assert figures["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    occurring = np.unique(true)
    expected = f1_score(true, predicted, labels=occurring, average="macro", zero_division=0)
    assert figures["macro_f1"] == pytest.approx(expected)
    np.testing.assert_array_equal(figures["confusion"], confusion_matrix(true, predicted, labels=range(14)))
    known = ~np.isnan(dataset.targets.action_units[rows, 0])
    au1 = f1_score(dataset.targets.action_units[rows, 0][known], found.action_units[known, 0] >= 0.5, zero_division=0)
    assert figures["per_au"][0]["f1"] == pytest.approx(au1)


def test_the_same_figures_again_and_in_other_batches(bundle, dataset):
    once, again = (evaluate_bundle(bundle, dataset, "test") for _ in range(2))
    np.testing.assert_equal(once, again)
    other = evaluate_bundle(bundle, dataset, "test", batch_size=7)
    assert other["accuracy"] == once["accuracy"]
    assert other["emotion_loss"] == pytest.approx(once["emotion_loss"], abs=1e-6)


def test_the_command_prints_what_training_stored(bundle, dataset, capsys):
    assert main(["--bundle", bundle.path, "--split", "validation", "--json", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out.splitlines()[-1])
    stored = evaluate_bundle(bundle, dataset, "validation")
    for key in ("accuracy", "macro_f1", "macro_f1_supported", "uar", "au_f1_mean", "emotion_loss", "au_loss"):
        assert printed[key] == finite(stored[key])
    assert printed["per_class"][0]["f1"] == stored["per_class"][0]["f1"]
    assert printed["intervals"]["accuracy"] == list(stored["intervals"]["accuracy"])
    assert printed["bundle"] == bundle.path
    au45 = next(entry for entry in printed["per_au"] if entry["action_unit"] == "AU45")
    assert (au45["support"], au45["f1"], au45["floor"]) == (0, None, None)
    assert captured.err.startswith("Evaluating ")
    assert "AU45 Blink" in captured.err
    assert "Next: rafce predict" in captured.err


def test_the_default_is_the_test_split_and_train_is_warned_of(bundle, capsys):
    assert main(["--bundle", bundle.path]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "on the test split of" in said.err
    assert "the model was trained on these images" not in said.err
    assert main(["--bundle", bundle.path, "--split", "train"]) == 0
    assert "the model was trained on these images" in capsys.readouterr().err


def test_emotions_are_matched_by_name(bundle, config, dataset):
    """The same images with classes named in another order: figures must not change where names are the same."""
    names = list(RAFCE_EMOTIONS)
    shuffled = make_taxonomy(tuple(names[::-1]), SEED18)
    other = replace(bundle, taxonomy=shuffled)
    opened = open_for_bundle(other, data_config_for(other, [f"data.emotions={names}"]))
    assert opened.taxonomy == shuffled
    known = dataset.targets.emotion >= 0
    np.testing.assert_array_equal(opened.targets.emotion[known], 13 - dataset.targets.emotion[known])
    np.testing.assert_array_equal(opened.targets.emotion[~known], -1)
    np.testing.assert_array_equal(opened.targets.action_units, dataset.targets.action_units)


def test_classes_that_differ_in_spelling_alone_stay_apart(bundle, config, dataset):
    names = list(RAFCE_EMOTIONS)
    other = replace(bundle, taxonomy=make_taxonomy((*names, names[0].upper()), SEED18))
    opened = open_for_bundle(other, data_config_for(other, [f"data.emotions={names}"]))
    np.testing.assert_array_equal(opened.targets.emotion, dataset.targets.emotion)


def test_unknown_emotions_are_refused(tmp_path, config):
    small = make_bundle(
        tmp_path / "bundle", make_taxonomy(("calm", "glad"), (1, 12)), {"config": config.model_dump(mode="json")}
    )
    with pytest.raises(RafceError, match=r"happily surprised.* are none of the bundle's \['calm', 'glad'\]"):
        open_for_bundle(small, data_config_for(small, []))


def test_action_units_that_the_data_does_not_have_are_said_and_undefined(tmp_path, config, capsys):
    table = tmp_path / "data" / "labels.csv"
    source = Path(str(config.data.root)) / "aligned"
    images = sorted(source.iterdir())[:6]
    table.parent.mkdir()
    rows = [f"{path.name},test,{['calm', 'glad'][i % 2]},{i % 2}" for i, path in enumerate(images)]
    table.write_text("name,split,emotion,AU12\n" + "\n".join(rows) + "\n")
    small = make_bundle(tmp_path / "bundle", make_taxonomy(("calm", "glad"), (1, 12)), {})
    overrides = [f"data.root={table}", f"data.images={source}", f"data.store_dir={tmp_path / 'stores'}"]
    assert main(["--bundle", small.path, "--json", *overrides]) == 0
    captured = capsys.readouterr()
    assert "has no labels of AU1: their figures are undefined" in captured.err
    printed = json.loads(captured.out)
    assert [entry["known"] for entry in printed["per_au"]] == [0, 6]
    assert printed["per_au"][0]["f1"] is None
    assert [entry["support"] for entry in printed["per_class"]] == [3, 3]


def test_nothing_in_common_is_refused(tmp_path, config):
    other = make_bundle(
        tmp_path / "bundle", make_taxonomy(("calm", "glad"), ()), {"config": config.model_dump(mode="json")}
    )
    with pytest.raises(RafceError, match="nothing that the bundle predicts"):
        open_for_bundle(other, data_config_for(other, ["data.emotions=none"]))


def test_data_comes_from_the_provenance_with_overrides_on_top(bundle, config):
    data = data_config_for(bundle, ["data.null_policy=negative"])
    assert data == config.data.model_copy(update={"null_policy": "negative", "action_units": SEED18})
    with pytest.raises(UsageError, match=r"takes data.key=value only"):
        data_config_for(bundle, ["optim.lr=1"])
    with pytest.raises(UsageError, match="reads images of 100 px"):
        data_config_for(bundle, ["data.stored_px=64"])


def test_what_cannot_be_evaluated_is_refused(tmp_path, bundle, dataset, capsys):
    with pytest.raises(RafceError, match="Open the dataset with the bundle's taxonomy"):
        evaluate_bundle(replace(bundle, taxonomy=make_taxonomy(("a",), (1,))), dataset, "test")
    with pytest.raises(RafceError, match=r"Set data.stored_px=64"):
        evaluate_bundle(replace(bundle, preprocessing=Preprocessing(64, 32)), dataset, "test")
    empty = replace(dataset, targets=replace(dataset.targets, split=np.zeros_like(dataset.targets.split)))
    with pytest.raises(RafceError, match="the test split has no images"):
        evaluate_bundle(bundle, empty, "test")
    nowhere = make_bundle(tmp_path / "bundle", TAXONOMY, {})
    assert main(["--bundle", nowhere.path]) == 2
    assert "data.root is not set" in capsys.readouterr().err
