"""Trials on Ray Tune: what a study runs once it does not run again, and a trial is a run like any other."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from studies import results

from rafce_ray.base.errors import UsageError
from rafce_ray.cli.ablate import main
from rafce_ray.config import load_config
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.plan import Shares
from rafce_ray.study.trials import TRIAL_FILE, Training, read_plan
from rafce_ray.tune.ablation import ablate

pytestmark = pytest.mark.ray

ARMS = "labels-read,emotion-only"
"""With what they are compared with: seed_before and seed_fixed."""


@pytest.fixture(scope="module")
def overrides(tiny_overrides, tmp_path_factory) -> list[str]:
    # The arms set the learning rate themselves.
    kept = [text for text in tiny_overrides if not text.startswith("optim.lr=")]
    return [
        *kept,
        "optim.epochs=4",
        "optim.warmup_epochs=0",
        f"run.storage={tmp_path_factory.mktemp('studies')}",
        "run.name=study",
    ]


@dataclass(frozen=True)
class Finished:
    """An ablation that ended, lost the result of one trial and was started again: what was told, and when each result
    was written, ns.
    """

    study: StudyFolder
    out: str
    lost: str
    before: dict[str, int]
    after: dict[str, int]


@pytest.fixture(scope="module")
def finished(overrides, ray_cluster_of_tests) -> Finished:
    command = [*overrides, "--arms", ARMS, "--seeds", "1", "--concurrent", "2", "--json"]
    study, lost = StudyFolder(str(Path(load_config(overrides=overrides).run.storage) / "study")), "seed_fixed-seed0"
    assert main(command) == 0
    before = results(study)
    for name in before:
        # Ablations wrote no more into a trial's plan before an arm was part of it.
        file = study.trial(name).location / TRIAL_FILE
        file.write_bytes(json.dumps({**json.loads(file.read_bytes()), "values": {}, "of": None}).encode())
    # A driver that is killed leaves trials without a result; that of a study is killed in tests/test_tune_studies.py.
    (study.trial(lost).location / "result.json").delete()
    with io.StringIO() as told:
        with redirect_stdout(told):
            assert main(command) == 0
        return Finished(study, told.getvalue(), lost, before, results(study))


def test_an_ablation_goes_on_and_runs_no_finished_trial_again(finished):
    study = finished.study
    assert finished.out.startswith("# Ablation"), "standard output is for the result alone"
    assert len(finished.before) == len(finished.after) == 4
    again = {name for name, written in finished.after.items() if finished.before[name] != written}
    assert again == {finished.lost}
    assert len(json.loads((study.location / "ablation.json").read_bytes())["arms"]) == 4
    plan, job = read_plan(study.trial(finished.lost))
    assert (plan.of, plan.values["data.action_unit_targets"], job.config.run.seed) == ("seed_fixed", "labels", 0)
    for name in finished.after:
        epochs = [record["epoch"] for record in study.trial(name).metrics()]
        assert epochs == list(range(1, len(epochs) + 1))
        assert not study.trial(name).checkpoints.exists(), "the checkpoints of a finished trial are not kept"
        assert study.trial(name).bundle.exists()


def test_the_seeds_recipe_reaches_the_seeds_au_f1_and_reading_the_labels_is_what_changes(finished):
    study = finished.study
    arms = json.loads(finished.out.splitlines()[-1])["arms"]
    assert [f"{value:.4f}" for value in arms["seed_before"]["figures"]["au_f1"]["values"]] == ["0.0000"]
    assert arms["emotion-only"]["figures"]["au_f1"]["mean"] is None
    targets = study.trial("seed_before-seed0").targets()
    audit = study.trial("seed_before-seed0").audit()
    assert sum(unit["positives"] for unit in targets["train"]["action_units"].values()) == 0
    assert sum(unit["positives"] for unit in audit["splits"]["train"]["action_units"].values()) > 100
    assert "| arm | against |" in (study.location / "ablation.md").read_bytes().decode()


def test_a_trial_trains_what_its_folder_says_and_its_figures_are_those_of_a_plain_loop(finished, tmp_path):
    from rafce_ray.base.console import to_json
    from rafce_ray.data.loader import prepare
    from rafce_ray.run.loop import fit
    from rafce_ray.run.state import Job, LocalSession

    study = finished.study
    trial = study.trial("labels-read-seed0")
    config = trial.config()
    assert (config.run.seed, config.data.action_unit_targets, config.loss.au_weight) == (0, "labels", 0.5)
    prepared = prepare(config.data)
    plain = fit(Job(config, prepared.store_uri, prepared.taxonomy, str(tmp_path / "run"), {}), LocalSession())
    assert json.loads(to_json(plain["metrics"])) == trial.result()["metrics"]


def test_another_size_under_the_same_name_is_refused(finished, overrides):
    with pytest.raises(UsageError, match=r"optim\.epochs 4 there, 5 here"):
        ablate(load_config(overrides=[*overrides, "optim.epochs=5"]), seeds=1, only=["labels-read"])
    with pytest.raises(UsageError, match=r"--minority: \['jolly'\] are no classes"):
        ablate(load_config(overrides=overrides), seeds=1, only=["labels-read"], minority=["jolly"])


def test_more_trials_at_a_time_than_fit_are_refused_with_the_arithmetic(overrides, ray_cluster_of_tests):
    config = load_config(overrides=[*overrides, "run.name=crowded", "run.cpus_per_worker=2"])
    with pytest.raises(UsageError, match=r"3 trials at a time x 1 worker x 2 CPU = 3 workers; the cluster has 4 CPUs"):
        ablate(config, seeds=1, only=["labels-read"], concurrent=3)


def test_a_trial_that_cannot_be_trained_is_named_and_does_not_stop_the_others(
    overrides, ray_cluster_of_tests, tmp_path, capsys
):
    """Two trainings, one of which has images that its network cannot cut into patches."""
    from rafce_ray.data.loader import Readings, prepare
    from rafce_ray.tune.sweep import train_seeds
    from rafce_ray.tune.trials import Settings

    study = StudyFolder(str(tmp_path / "study"))
    base = [*overrides, "optim.epochs=1", "run.cpus_per_worker=1"]
    good, bad = load_config(overrides=base), ["model.backbone=vit_b_16", "model.image_px=40"]
    trainings = [
        Training("good", 0, "arm", good, {}),
        Training("bad", 1, "other", load_config(overrides=[*base, *bad]), {"model.image_px": 40}),
    ]
    shares = Shares(workers=1, cpus=1.0, gpus=0.0, at_once=2, fitting=2)
    train_seeds(study, trainings, Settings(shares, max_failures=0), Readings(prepare), "sweep")
    result = study.trial("bad").result()
    assert result["status"] == "failed"
    assert "vit_b_16 cuts patches of 16 px" in result["reason"]
    assert study.trial("good").result()["status"] == "finished"
    assert "bad failed after 0 of 1 epochs: model.image_px: found 40; vit_b_16 cuts patches of 16 px" in " ".join(
        capsys.readouterr().err.split()
    )
