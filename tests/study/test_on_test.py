"""The test split: measured once, kept, counted; against figures computed from the kept outputs by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rafce_ray.base.console import to_json
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.evaluate import data_config_for, evaluate_bundle, open_for_bundle
from rafce_ray.config import config_hash, load_config
from rafce_ray.data.loader import prepare
from rafce_ray.metrics.comparison import Difference
from rafce_ray.run.loop import fit
from rafce_ray.run.state import Job, LocalSession
from rafce_ray.study import on_test
from rafce_ray.study.finalists import Verdict, judge
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.on_test import COMPARED, MeanFigure, OnTest, measure_on_test
from rafce_ray.study.trials import TrialPlan

T2 = 4.302653
"""Student's t, 97.5 %, 2 degrees of freedom."""


def figure(*values: float) -> MeanFigure:
    return MeanFigure(values, float(np.mean(values)), min(values) - 0.1, max(values) + 0.1)


@pytest.fixture
def record() -> OnTest:
    figures = {name: figure(0.5, 0.6) for name in on_test.MEASURED}
    return OnTest(
        winner="trial_0007",
        base="trial_0000",
        num_images=909,
        runs={"trial_0007": ("final_0007_seed1", "final_0007_seed2"), "trial_0000": ("final_0000_seed1",)},
        figures={"trial_0007": figures, "trial_0000": {**figures, "au_loss": MeanFigure((math.nan,), *[math.nan] * 3)}},
        differences={"score": Difference(0.03, 0.01, 0.05), "emotion_loss": Difference(0.2, -0.1, 0.5)},
        basis="seeds and images",
        looks=2,
        remarks=("said besides",),
    )


def test_what_the_test_split_says_in_plain_words(record):
    assert record.sentences() == [
        "On the 909 test images trial_0007 reaches score 0.550 (0.400 to 0.700), accuracy 0.550 (0.400 to 0.700), "
        "macro_f1_supported 0.550 (0.400 to 0.700), au_f1_mean 0.550 (0.400 to 0.700) (mean of 2 trainings).",
        "Its score is better than the base's, by 0.030 (+0.010 to +0.050): more than luck.",
        "Its emotion_loss is worse than the base's, by 0.200 (-0.100 to +0.500): no more than luck would explain.",
        "The intervals allow for other seeds and other images.",
        "2 winners of this study were measured on the test split so far: the more are, the less the best of them "
        "means.",
        "said besides",
    ]
    assert replace(record, base="trial_0007", looks=1, remarks=()).sentences()[1:] == [
        "It is the base itself: there is nothing to compare it with."
    ]
    assert replace(record, differences={}).sentences()[1] == "The base, trial_0000, has no model to compare it with."


def test_a_record_survives_json(record):
    back = OnTest.from_json(json.loads(to_json(record.to_json())))
    assert math.isnan(back.figures["trial_0000"]["au_loss"].mean)
    assert to_json(back.to_json()) == to_json(record.to_json())
    assert back.differences == record.differences
    assert back.sentences() == record.sentences()


def train(study: StudyFolder, number: int, seed: int, overrides: list[str], of: str | None) -> None:
    """A trial of the sweep or, with ``of``, a finalist's training."""
    name = f"trial_{number:04d}" if of is None else f"final_{number:04d}_seed{seed}"
    config = load_config(overrides=[*overrides, f"run.seed={seed}", f"run.name={name}", f"run.storage={study.trials}"])
    prepared = prepare(config.data)
    folder = study.trial(name)
    provenance = {
        "config": config.model_dump(mode="json"),
        "config_hash": config_hash(config),
        "data_fingerprint": prepared.fingerprint,
        "seed": seed,
        "software": {},
    }
    job = Job(config, str(prepared.store), prepared.taxonomy, folder.place, provenance)
    folder.start(config, provenance, prepared.audit.to_json())
    values = {"data.null_policy": config.data.null_policy}
    TrialPlan(name, number, "sweep" if of is None else "finalist", values, config_hash(config), 1.0, 0.0, of).write(
        study, job
    )
    fit(job, LocalSession())


@pytest.fixture(scope="module")
def trained(tiny_overrides, tmp_path_factory) -> tuple[StudyFolder, Verdict]:
    """The base and a trial that reads null as negative, each trained once in a sweep and twice more with other
    seeds.
    """
    study = StudyFolder(str(tmp_path_factory.mktemp("on_test") / "study"))
    for number, more in ((0, []), (1, ["data.null_policy=negative", "data.augmentation=none"])):
        overrides = [*tiny_overrides, "optim.epochs=1", "optim.monitor=score", "optim.gap_images=8", *more]
        for seed in (0, 1, 2):
            train(study, number, seed, overrides, of=None if seed == 0 else f"trial_{number:04d}")
    verdict = judge(study, "score", ["trial_0001", "trial_0000"], base="trial_0000")
    # Which of the two wins on a few drawn faces does not matter here: it is the other that is told about.
    return study, replace(verdict, winner="trial_0001")


def kept(study: StudyFolder) -> dict[str, int]:
    root = Path(study.place)
    return {str(file.relative_to(root)): hash(file.read_bytes()) for file in root.rglob("*test*") if file.is_file()}


@pytest.mark.slow
def test_winner_and_base_are_measured_once_on_the_same_images_by_the_same_labels(trained, monkeypatch):
    study, verdict = trained
    found = measure_on_test(study, verdict, device="cpu")
    assert found.runs == {
        "trial_0001": ("final_0001_seed1", "final_0001_seed2"),
        "trial_0000": ("final_0000_seed1", "final_0000_seed2"),
    }
    bundle = load_bundle(study.trial("final_0000_seed1").bundle.uri)
    expected = evaluate_bundle(bundle, open_for_bundle(bundle, data_config_for(bundle, [])), "test")
    assert found.num_images == expected["num_images"]
    for name in ("accuracy", "au_f1_mean", "score", "au_ap_mean", "emotion_loss", "au_loss"):
        assert found.figures["trial_0000"][name].values[0] == pytest.approx(expected[name]), name
    assert found.figures["trial_0000"]["emotion_loss"].values[0] == pytest.approx(
        expected["reliability"]["after"]["emotion"]["nll"]
    )

    # The difference in accuracy from the kept outputs, image by image.
    def hits(number: int) -> np.ndarray:
        splits = [study.trial(f"final_{number:04d}_seed{seed}").outputs("test") for seed in (1, 2)]
        return np.array([split.outputs.emotion.argmax(axis=1) == split.emotion for split in splits], dtype=float)

    ours, theirs = hits(1), hits(0)
    accuracies = [side.mean(axis=1) for side in (ours, theirs)]
    pairs = [one for one in accuracies if one[0] != one[1]]
    deviation = math.sqrt(sum(one.var(ddof=1) for one in pairs) / len(pairs))
    quantile = {1: 12.7062, 2: T2}[len(pairs)]
    per_image = ours.mean(axis=0) - theirs.mean(axis=0)
    difference = found.differences["accuracy"]
    assert difference.value == pytest.approx(per_image.mean())
    assert (difference.high - difference.low) / 2 == pytest.approx(
        quantile * math.sqrt(deviation**2 + per_image.var() / len(per_image)), rel=0.1
    )
    assert list(found.differences) == list(COMPARED)
    assert (found.basis, found.looks) == ("seeds and images", 1)
    assert found.remarks == ("trial_0001 reads other AU labels than trial_0000: it is measured by the latter's.",)

    before = kept(study)
    assert sorted(before) == sorted(
        [
            "test.json",
            *(f"trials/final_{number:04d}_seed{seed}/outputs_test.parquet" for number in (0, 1) for seed in (1, 2)),
        ]
    )

    def never(*arguments, **more):
        raise AssertionError("measured again")

    monkeypatch.setattr(on_test, "split_outputs", never)
    again = measure_on_test(study, verdict, device="cpu")
    assert to_json(again.to_json()) == to_json(found.to_json())
    assert kept(study) == before


@pytest.mark.slow
def test_trainings_that_came_later_are_not_measured_on_test_and_that_is_said(trained, capsys, monkeypatch):
    study, verdict = trained
    first = measure_on_test(study, verdict, device="cpu")
    assert "not measured" not in capsys.readouterr().err
    record = json.loads((study.location / "test.json").read_bytes())
    record["runs"]["trial_0001"] = record["runs"]["trial_0001"][:1]
    (study.location / "test.json").write_bytes(json.dumps(record).encode())
    again = measure_on_test(study, verdict, device="cpu")
    said = " ".join(capsys.readouterr().err.split())
    assert "final_0001_seed2 was trained since: not measured on the test split" in said
    assert again.figures["trial_0001"]["accuracy"] == first.figures["trial_0001"]["accuracy"]
    (study.location / "test.json").write_bytes(to_json(first.to_json()).encode())


@pytest.mark.slow
def test_another_winner_is_another_look_and_the_earlier_record_stays(trained, monkeypatch):
    study, verdict = trained
    first = measure_on_test(study, verdict, device="cpu")
    other = measure_on_test(study, replace(verdict, winner="trial_0000"), device="cpu")
    assert (other.winner, other.looks, other.differences) == ("trial_0000", 2, {})
    archived = OnTest.from_json(json.loads((study.location / "test-trial_0001.json").read_bytes()))
    assert to_json(archived.to_json()) == to_json(first.to_json())
    # The first winner wins again: what was measured of it is its record still.
    back = measure_on_test(study, verdict, device="cpu")
    assert to_json(back.to_json()) == to_json({**first.to_json(), "looks": 2})
    assert sorted(name for name in kept(study) if name.endswith(".json")) == ["test-trial_0000.json", "test.json"]


@pytest.mark.slow
def test_nothing_is_measured_where_no_test_image_is_labelled_or_no_model_is_left(
    trained, tmp_path, monkeypatch, capsys
):
    study, verdict = trained
    lone = StudyFolder(str(tmp_path / "study"))
    source = Path(study.place) / "trials" / "trial_0000"
    (tmp_path / "study" / "trials").mkdir(parents=True)
    (tmp_path / "study" / "trials" / "trial_0000").symlink_to(source)
    own = replace(verdict.finalist("trial_0000"), scores={0: 0.1}, runs={0: "trial_0000"})
    alone = replace(verdict, winner="trial_0000", ranked=(own,))

    def without_test(bundle, data):
        dataset = open_for_bundle(bundle, data)
        split = np.where(dataset.targets.split == 2, -1, dataset.targets.split).astype(np.int8)
        return replace(dataset, targets=replace(dataset.targets, split=split))

    monkeypatch.setattr(on_test, "open_for_bundle", without_test)
    assert measure_on_test(lone, alone, device="cpu") is None
    assert "no image of the test split" in capsys.readouterr().err
    nothing = replace(alone, ranked=(replace(own, runs={}, scores={}),))
    assert measure_on_test(lone, nothing, device="cpu") is None
    assert "trial_0000 has no bundle" in capsys.readouterr().err
    assert kept(lone) == {}
