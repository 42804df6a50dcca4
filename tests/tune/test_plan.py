"""What a study says before it starts: rungs, disk, shares; and that a dry run writes nothing."""

from collections import namedtuple
from contextlib import nullcontext

import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.cli.tune import main
from rafce_ray.config import build_config
from rafce_ray.data.loader import prepare
from rafce_ray.study import plan
from rafce_ray.study.config import StudyConfig, build_study, load_study, study_yaml
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.plan import (
    Node,
    Shares,
    asha_rungs,
    first_line,
    largest_model_bytes,
    model_bytes,
    shown_bytes,
    tell_batches,
    tell_disk,
    tell_plan,
    tell_trials,
)
from rafce_ray.tune import launch, trials
from rafce_ray.tune.scheduler import Control, Course, Halving

TAXONOMY = make_taxonomy(("happy", "sad"), (1, 12))

RESNET18 = 11_176_512
"""Parameters of torchvision's resnet18 without its classifier: 11,689,512 - 513,000."""

RESNET18_BUFFERS = 2 * 4_800 + 20
"""Mean and variance of its 4,800 normalised channels, and a counter for each of its 20 layers that normalise."""

BUNDLE = 4 * (RESNET18 + RESNET18_BUFFERS + 2 * (512 * 2 + 2))
"""Bytes of float32, with a head for two emotions and one for two action units."""

SHARES = Shares(workers=1, cpus=1.0, gpus=0.0, at_once=2, fitting=3)
Usage = namedtuple("Usage", ("total", "used", "free"))


def build(**values) -> StudyConfig:
    plain = {
        "name": "s",
        "base": {"model": {"backbone": "resnet18", "weights": "none"}, "optim": {"epochs": 20}},
        "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}},
        "num_trials": 12,
    }
    return build_study(plain | values)


def told_of_batches(capsys, num_images, domain=None, **values) -> list[str]:
    space = {} if domain is None else {"optim.batch_size": domain}
    others = values.pop("space", {"model.dropout": {"choice": [0.4, 0.5]}})
    tell_batches(build(space=space | others, **values), num_images)
    return capsys.readouterr().err.replace("warning: ", "").splitlines()


def test_batch_sizes_that_come_to_the_same_are_told_with_their_trials(capsys):
    lines = told_of_batches(capsys, 40, {"grid": [8, 48, 64, 512]}, search="grid", num_trials=None)
    assert lines[0] == "optim.batch_size 32, 48, 64 and 512 come to the same on 40 train images: 1 step an epoch."
    # In the order of the grid: dropout 0.4 and 0.5 (the base's) with 8, 48, 64 and 512 images.
    assert lines[1:] == [
        "trial_0000, trial_0004, trial_0006 and trial_0008 train the same and will get the same figures. Search one of "
        "their batch sizes.",
        "trial_0003, trial_0005 and trial_0007 train the same and will get the same figures. Search one of their batch "
        "sizes.",
    ]


def test_of_draws_that_nothing_repeats_only_the_batch_sizes_are_told(capsys):
    drawn = {"space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}}}
    (line,) = told_of_batches(capsys, 40, {"choice": [48, 64]}, **drawn)
    assert line == "optim.batch_size 32, 48 and 64 come to the same on 40 train images: 1 step an epoch."
    (line,) = told_of_batches(
        capsys, 40, {"randint": [8, 512]}, base={"optim": {"epochs": 20, "batch_size": 16}}, **drawn
    )
    assert line.startswith("optim.batch_size=512 is more than the 40 train images: every epoch is one step")
    assert told_of_batches(capsys, 3000, {"choice": [16, 48, 64]}, **drawn) == []


def test_a_base_whose_batch_is_larger_than_the_train_split_is_told(capsys):
    (line,) = told_of_batches(capsys, 20)
    assert line == "optim.batch_size=32 is more than the 20 train images: every epoch is one step with all of them."
    assert told_of_batches(capsys, 32) == []


@pytest.mark.parametrize(
    ("grace_period", "reduction_factor", "epochs", "rungs"),
    [
        (3, 3, 40, [3, 9, 27]),
        (3, 3, 27, [3, 9]),  # At the last epoch nothing is left to save.
        (3, 3, 28, [3, 9, 27]),
        (1, 2, 9, [1, 2, 4, 8]),
        (1, 2.5, 10, [1, 2.5, 6.25]),
        (4, 4, 5, [4]),
    ],
)
def test_rungs_by_hand(grace_period, reduction_factor, epochs, rungs):
    assert asha_rungs(grace_period, reduction_factor, epochs) == rungs


def test_the_rungs_that_are_said_are_those_that_are_used(tmp_path):
    """Ray's logarithm of 243 to base 3 is a little below 5."""
    for grace_period, reduction_factor, epochs in [
        (1, 3.0, 244),
        *(
            (grace, factor, epochs)
            for grace in (1, 2, 3, 5)
            for factor in (1.5, 2.0, 3.0, 4.0)
            for epochs in range(6, 66, 4)
        ),
    ]:
        scheduler = Halving(
            Course(StudyFolder(str(tmp_path)), "score", epochs, Control()),
            grace_period=grace_period,
            reduction_factor=reduction_factor,
            brackets=1,
            seed=0,
        )
        used = sorted(at for at, _ in scheduler._brackets[0]._rungs)
        assert asha_rungs(grace_period, reduction_factor, epochs) == used, (grace_period, reduction_factor, epochs)


@pytest.mark.parametrize(
    ("optim", "copies"),
    [
        ({"optimizer": "adamw"}, 3),
        ({"optimizer": "adam"}, 3),
        ({"optimizer": "sgd"}, 2),
        ({"optimizer": "sgd", "ema_decay": 0.99}, 3),
    ],
)
def test_bytes_of_a_model_by_hand(optim, copies):
    config = build_config({"model": {"backbone": "resnet18"}, "optim": optim})
    assert model_bytes(config, TAXONOMY) == (BUNDLE, copies * BUNDLE)


def test_the_disk_that_is_needed_by_hand(tmp_path, monkeypatch, capsys):
    """Checkpoints are 3 bundles large: 2 trials x 3 of them, the best 5 trials and the base with both, 3 + 1 finalists
    x 2 bundles, 2 more for the best: 18 + 6 x 4 + 8 + 2 = 52 bundles."""
    study = build(finalists={"k": 3, "seeds": 2})
    asked = []
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: asked.append(place) or Usage(0, 0, 52 * BUNDLE))
    tell_disk(study, locate(tmp_path / "not" / "there" / "yet"), SHARES, TAXONOMY)
    assert asked == [tmp_path]
    assert BUNDLE == 44_752_736
    said = " ".join(capsys.readouterr().err.split())
    assert said == (
        "disk: at most about 2 GB: 2 running x 3 checkpoints of 134 MB, the best 5 trials and the base, 8 finalists' "
        "bundles of 45 MB; 2 GB free"
    )
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: Usage(0, 0, 52 * BUNDLE - 1))
    with pytest.raises(UsageError, match=r"needs about 2 GB in .*, which has 2 GB free\. Lower keep"):
        tell_disk(study, locate(tmp_path), SHARES, TAXONOMY)
    # Without finalists 44 bundles, with less to keep 16 fewer.
    tight = Usage(0, 0, 28 * BUNDLE)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: tight)
    tell_disk(build(finalists={"k": 0}, keep=1), locate(tmp_path), SHARES, TAXONOMY)
    with pytest.raises(UsageError):
        tell_disk(build(finalists={"k": 0}, keep=2), locate(tmp_path), SHARES, TAXONOMY)


def test_the_disk_is_that_of_the_largest_model_searched(tmp_path, monkeypatch):
    space = {
        "model.backbone": {"choice": ["resnet18", "mobilenet_v3_small"]},
        "optim.optimizer": {"choice": ["adamw", "sgd"]},
    }
    base = {"model": {"backbone": "mobilenet_v3_small"}, "optim": {"epochs": 20, "optimizer": "sgd"}}
    study = build(space=space, base=base, num_trials=4, finalists={"k": 0})
    assert largest_model_bytes(study, TAXONOMY) == (BUNDLE, 3 * BUNDLE)
    monkeypatch.setattr(
        plan, "model_bytes", lambda config, taxonomy: (1, 2 if config.model.backbone == "resnet18" else 1)
    )
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: Usage(0, 0, 31))
    with pytest.raises(UsageError, match="needs about 32 B"):  # 2 x 3 x 2 running, 6 x (1 + 2) kept, 2 for the best.
        tell_disk(study, locate(tmp_path), SHARES, TAXONOMY)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (44_752_736, "45 MB"), (2.3e9, "2 GB"), (4.56e12, "4.6 TB")],
)
def test_bytes_are_shown_in_powers_of_ten(count, text):
    assert shown_bytes(count) == text


def test_what_a_study_will_do_is_said_before_it_does_it(drawn_faces, store_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: Usage(0, 0, 10**12))
    data = {"root": str(drawn_faces), "store_dir": str(store_dir)}
    base = {"data": data, "model": {"backbone": "resnet18"}, "optim": {"epochs": 20}}
    study = build(base=base, finalists={"k": 2, "seeds": 3})
    folder = StudyFolder(str(tmp_path / "s"))
    line = first_line(study, folder)
    assert "random search over 1 keys, 12 trials (the base first) of up to 20 epochs of resnet18" in line
    assert line.endswith(f"ASHA; results go to {folder.location.shown}")
    tell_plan(study, folder, SHARES, prepare(study.base_config.data))
    tell_trials(study)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "trials: 12, of which 0 have ended; 2 at a time, each 1 worker with 1 CPU (the cluster holds 3 at a time)"
        in said
    )
    assert "epochs: at most 240; ASHA compares trials after epochs 3, 9 and lets about the best 1/3" in said
    assert "then up to 3 finalists x 3 seeds to the end" in said
    assert "trial_0000: the base trial_0001: optim.lr 0.0" in said
    assert said.endswith("... and 4 more")
    assert not folder.location.exists()


@pytest.fixture
def dry(drawn_faces, store_dir, tmp_path, monkeypatch):
    """A study's file, and a cluster of 3 CPUs that is not started."""
    monkeypatch.setattr(launch, "ray_cluster", lambda config, name, **options: nullcontext((3.0, 0.0)))
    monkeypatch.setattr(trials, "cluster_nodes", lambda: [Node(3.0, 0.0)])
    base = {
        "data": {"root": str(drawn_faces), "store_dir": str(store_dir)},
        "model": {"backbone": "mobilenet_v3_small", "weights": "none", "image_px": 32},
        "optim": {"epochs": 4, "warmup_epochs": 0},
    }
    study = build(base=base, storage=str(tmp_path / "runs"), scheduler={"grace_period": 1})
    file = tmp_path / "study.yaml"
    file.write_text(study_yaml(study))
    return file


def test_a_dry_run_writes_nothing(dry, tmp_path, capsys):
    assert main(["--config", str(dry), "--dry-run"]) == 0
    assert [path.name for path in tmp_path.rglob("*")] == ["study.yaml"]
    captured = capsys.readouterr()
    said = " ".join(captured.err.split())
    assert captured.out == ""
    assert "3 at a time, each 1 worker with 1 CPU" in said
    assert said.endswith("dry run: nothing was trained; without --dry-run the study starts")
    # Where a study has begun, it is left as it is, and another one is refused.
    study = StudyFolder(str(tmp_path / "runs" / "s"))
    study.claim({"kind": "tune", "base": {}, "may_grow": {}})
    before = (study.location / "study.json").read_bytes()
    assert main(["--config", str(dry), "--dry-run"]) == 2
    assert "holds a study that differs" in " ".join(capsys.readouterr().err.split())
    assert (study.location / "study.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["s", "study.json"]


def test_a_study_of_an_earlier_release_goes_on(dry):
    study = load_study(dry)
    claimed = launch.claim_of(study, prepare(study.base_config.data))
    assert claimed["scheduler"] == {
        "type": "asha",
        "grace_period": 1,
        "reduction_factor": 3.0,
        "brackets": 1,
        "perturbation_interval": 4,
        "quantile_fraction": 0.25,
        "resample_probability": 0.25,
    }


def test_a_study_that_does_not_fit_trains_nothing(dry, tmp_path, monkeypatch, capsys):
    assert main(["--config", str(dry), "--dry-run", "resources.concurrent=4"]) == 2
    assert "4 trials at a time x 1 worker x 1 CPU = 4 workers; the cluster has 3 CPUs" in " ".join(
        capsys.readouterr().err.split()
    )
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: Usage(0, 0, 10**6))
    assert main(["--config", str(dry)]) == 2
    assert "which has 1 MB free. Lower keep or resources.concurrent" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs" / "s" / "trials").exists()
