"""How null is read: by one policy in train, by another where a model is measured."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.evaluate import data_config_for, evaluate_bundle, open_for_bundle
from rafce_ray.config import DataConfig, load_config
from rafce_ray.data.audit import render
from rafce_ray.data.loader import prepare
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.loop import fit
from rafce_ray.run.state import Job, LocalSession, choose_splits, describe_targets, open_for_training

pytestmark = pytest.mark.numeric

ROWS = {
    "train": ["12", "4+12", "null", "4", "null", "null"],
    "test": ["12", "null", "null"],
    "validation": ["12", "null", "4", "4+12"],
}
"""AU labels of the images of each split."""

POSITIVES = {"train": (2, 2), "validation": (2, 2), "test": (0, 1)}
"""AU4 and AU12, counted by hand."""

CODES = {"train": 0, "test": 1, "validation": 2}


@pytest.fixture(scope="module")
def few_faces(tmp_path_factory):
    root = tmp_path_factory.mktemp("few") / "faces"
    (root / "aligned").mkdir(parents=True)
    rows = [(split, label) for split, labels in ROWS.items() for label in labels]
    generator = np.random.default_rng(0)
    for number in range(len(rows)):
        pixels = generator.integers(0, 256, (100, 100, 3), np.uint8)
        Image.fromarray(pixels).save(root / "aligned" / f"{number:04d}.jpg")
    for file, value in (
        ("RAFCE_emolabel.txt", lambda number, _: number % 2),
        ("RAFCE_AUlabel.txt", lambda _, row: row[1]),
        ("RAFCE_partition.txt", lambda _, row: CODES[row[0]]),
    ):
        (root / file).write_text("".join(f"{n:04d}.jpg {value(n, row)}\n" for n, row in enumerate(rows)))
    return root


def make_job(overrides: list[str], run_dir: Path) -> Job:
    config = load_config(overrides=overrides)
    prepared = prepare(config.data)
    provenance = {"data_fingerprint": prepared.fingerprint, "config": config.model_dump(mode="json")}
    return Job(config, str(prepared.store), prepared.taxonomy, str(run_dir), provenance)


def units(known: dict[str, int]) -> dict[str, dict[str, dict[str, int]]]:
    """What is known of each action unit, and the positives of :data:`POSITIVES`, by split."""
    return {
        split: {
            code: {"known": known[split], "positives": positives}
            for code, positives in zip(("AU4", "AU12"), POSITIVES[split], strict=True)
        }
        for split in ROWS
    }


@pytest.mark.parametrize(
    ("policy", "evaluation", "known"),
    [
        ("mask", "mask", {"train": 3, "validation": 3, "test": 1}),
        ("mask", "negative", {"train": 3, "validation": 4, "test": 3}),
        ("negative", "mask", {"train": 6, "validation": 3, "test": 1}),
        ("negative", "negative", {"train": 6, "validation": 4, "test": 3}),
        ("mask", "same", {"train": 3, "validation": 3, "test": 1}),
        ("negative", "same", {"train": 6, "validation": 4, "test": 3}),
    ],
)
def test_each_split_is_read_by_its_policy(policy, evaluation, known, few_faces, store_dir, tmp_path):
    overrides = [
        f"data.root={few_faces}",
        f"data.store_dir={store_dir}",
        "data.emotions=[calm, glad]",
        "data.action_units=[AU4, AU12]",
        f"data.null_policy={policy}",
        f"data.evaluation_null_policy={evaluation}",
    ]
    job = make_job(overrides, tmp_path / "run")
    dataset = open_for_training(job)
    described = describe_targets(dataset, choose_splits(dataset, job.config))
    assert {split: one["action_units"] for split, one in described.items()} == units(known)
    assert dataset.targets.null_row.sum() == 6

    audit = prepare(job.config.data).audit
    counted = {
        split: {code: {key: unit[key] for key in ("known", "positives")} for code, unit in one["action_units"].items()}
        for split, one in audit.to_json()["splits"].items()
    }
    assert counted == units(known)
    in_evaluation = policy if evaluation == "same" else evaluation
    assert [audit.to_json()[key] for key in ("null_policy", "evaluation_null_policy")] == [policy, in_evaluation]
    console = Console(width=150)
    with console.capture() as captured:
        render(audit, console)
    assert ("in validation and test" in captured.get()) == (policy != in_evaluation)

    # Zeros in place of positives leave unknown what was unknown, in train alone.
    zeros = open_for_training(make_job([*overrides, "data.action_unit_targets=all_zero"], tmp_path / "zero"))
    expected = dataset.targets.action_units.copy()
    expected[(expected == 1) & (dataset.targets.split == 0)[:, None]] = 0
    np.testing.assert_array_equal(zeros.targets.action_units, expected)


@pytest.mark.parametrize(("policy", "evaluation"), [("negative", "mask"), ("mask", "negative")])
def test_a_bundle_is_measured_by_the_labels_that_chose_its_best_epoch(
    policy, evaluation, tiny_overrides, tmp_path, capsys
):
    overrides = [
        *tiny_overrides,
        f"data.null_policy={policy}",
        f"data.evaluation_null_policy={evaluation}",
        "optim.epochs=1",
        "calibration.enabled=false",
    ]
    job = make_job(overrides, tmp_path / "run")
    result = fit(job, LocalSession())
    folder = RunFolder(result["run_dir"])
    in_training = folder.metrics()[result["best_epoch"] - 1]["validation"]
    bundle = load_bundle(folder.bundle.uri)

    dataset = open_for_bundle(bundle, data_config_for(bundle, []))
    figures = evaluate_bundle(bundle, dataset, "validation")
    assert set(bundle.calibration.au_thresholds) == {0.5}
    for key in ("action_unit", "support", "known", "predicted"):
        assert [entry[key] for entry in figures["per_au"]] == [entry[key] for entry in in_training["per_au"]]
    for key in ("au_f1_mean", "au_loss", "score"):
        assert figures[key] == pytest.approx(in_training[key], abs=1e-5)

    alike = open_for_bundle(bundle, data_config_for(bundle, ["data.evaluation_null_policy=same"]))
    in_train = dataset.targets.split == 0
    np.testing.assert_array_equal(
        alike.targets.action_units[in_train], open_for_training(job).targets.action_units[in_train]
    )
    num_known = [np.count_nonzero(~np.isnan(one.targets.action_units[~in_train])) for one in (dataset, alike)]
    assert (num_known[0] > num_known[1]) == (evaluation == "negative")
    assert num_known[0] != num_known[1]

    # What a person sets without effect on what is measured is told.
    capsys.readouterr()
    data_config_for(bundle, [f"data.null_policy={policy}"])
    assert f"read as in this bundle's training, by data.evaluation_null_policy={evaluation}" in " ".join(
        capsys.readouterr().err.split()
    )
    data_config_for(bundle, [f"data.null_policy={policy}", "data.evaluation_null_policy=mask"])
    data_config_for(bundle, [])
    assert capsys.readouterr().err == ""


def test_same_means_as_in_train():
    for policy in ("mask", "negative"):
        assert DataConfig(null_policy=policy).null_policy_in_evaluation == policy
        for evaluation in ("mask", "negative"):
            data = DataConfig(null_policy=policy, evaluation_null_policy=evaluation)
            assert data.null_policy_in_evaluation == evaluation
