from pathlib import Path

import pytest
import yaml

from rafce_ray.study.config import load_study, study_yaml
from rafce_ray.study.space import planned_trials, propose

FOLDER = Path(__file__).parents[2] / "tune_configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def study_named(name):
    return load_study(FOLDER / f"{name}.yaml")


def ends(study, key):
    domain = study.space[key]
    return (min(domain.values()), max(domain.values())) if domain.is_finite else domain.ends()


def test_five_studies_are_shipped():
    assert [file.stem for file in FILES] == ["au_weight", "backbone", "full", "regularization", "smoke"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_study_is_usable_as_it_is(file, tmp_path):
    study = load_study(file, ["base.data.root=PATH"])
    assert study.name == file.stem
    assert study.unused_scheduler_keys() == []
    assert study.base_config.data.root == "PATH"
    assert (study.base.recipe == "seed_fixed") == (file.stem != "smoke")
    assert study.config_of(propose(study, 1) or {}) != study.base_config
    written = tmp_path / "study.yaml"
    written.write_text(study_yaml(study))
    assert load_study(written) == study


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_study_opens_with_what_command_time_and_score(file):
    opening = [line for line in file.read_text().split("\nname:")[0].splitlines() if line]
    assert all(line.startswith("#") for line in opening)
    text = "\n".join(opening)
    assert f"python -m rafce_ray.tune --config tune_configs/{file.name} base.data.root=PATH" in text
    for part in ("# Searches:", "# Time", "# Score"):
        assert part in text
    # No figure without saying whether it was measured.
    assert "estimated" in text
    assert "measured" in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_commands_in_the_opening_are_accepted(file):
    """Every key=value that the opening offers can be given together with the command's own."""
    text = file.read_text().split("\nname:")[0].replace("\n#", "")
    given = [
        word.rstrip(".,;:") for word in text.split() if word.startswith(("base.", "time_budget_s")) and "=" in word
    ]
    assert "base.data.root=PATH" in given
    load_study(file, given)


def test_smoke_is_small():
    study = study_named("smoke")
    base = study.base_config
    assert (base.model.backbone, base.model.image_px) == ("mobilenet_v3_small", 48)
    assert (
        planned_trials(study) * base.optim.epochs + study.finalists.k * study.finalists.seeds * base.optim.epochs <= 40
    )
    assert study.scheduler.type == "asha"


def test_regularization_has_the_ranges_that_the_seed_names():
    study = study_named("regularization")
    assert ends(study, "model.dropout") == (0.3, 0.7)
    assert ends(study, "optim.weight_decay") == (1e-4, 5e-3)
    assert study.space["optim.weight_decay"].kind == "loguniform"
    assert study.space["optim.grad_clip"].values() == (0.5, 1.0)
    assert ends(study, "loss.label_smoothing") == (0.0, 0.2)
    assert study.space["data.augmentation"].values() == ("none", "light", "strong")
    assert "optim.lr" in study.space
    assert planned_trials(study) == 24


def test_au_weight_has_weight_labels_head_and_curriculum():
    study = study_named("au_weight")
    assert ends(study, "loss.au_weight") == (0.1, 3.0)
    assert study.space["data.null_policy"].values() == ("mask", "negative")
    assert study.space["model.au_attention"].values() == (False, True)
    assert 0.0 in study.space["loss.pos_weight_cap"].values()
    ramp = study.space["loss.au_ramp_epochs"]
    assert ramp.when == {"loss.au_start_epoch": (1, 3)}
    assert planned_trials(study) == 24


@pytest.mark.parametrize("name", ["au_weight", "full"])
def test_no_curriculum_is_stopped_before_its_au_loss_is_whole(name):
    study = study_named(name)
    whole = max(study.space["loss.au_start_epoch"].values()) + max(study.space["loss.au_ramp_epochs"].values())
    assert study.scheduler.grace_period > whole


def test_full_searches_both_by_optuna():
    study = study_named("full")
    both = {**study_named("regularization").space, **study_named("au_weight").space}
    assert study.space == both
    assert (study.search, study.num_trials) == ("optuna", 48)


def test_backbone_is_every_combination_of_trunk_and_weights():
    study = study_named("backbone")
    assert planned_trials(study) == len(study.space["model.backbone"].values()) * len(
        study.space["model.weights"].values()
    )
    assert study.base_config.model.backbone in study.space["model.backbone"].values()
    assert all(domain.kind == "grid" for domain in study.space.values())


def test_demo_size_keeps_a_rung_below_its_epochs():
    for name in ("regularization", "au_weight"):
        study = load_study(
            FOLDER / f"{name}.yaml",
            [
                "base.model.backbone=mobilenet_v3_small",
                "base.model.weights=none",
                "base.model.image_px=64",
                "base.optim.epochs=14",
            ],
        )
        assert study.scheduler.grace_period < 14


def test_numbers_are_written_so_that_every_yaml_reader_reads_numbers():
    """YAML 1.1 reads 1e-4 as text; 1.0e-4 is a number for all."""
    for file in FILES:
        space = yaml.safe_load(file.read_text())["space"]
        for plain in space.values():
            for kind in ("uniform", "loguniform"):
                assert all(isinstance(one, float) for one in plain.get(kind, []))
