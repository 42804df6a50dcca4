"""The ablation: arms that differ in what they say they do, and statistics that tell luck from effect."""

import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from rafce_ray.base.errors import UsageError
from rafce_ray.cli.ablate import main
from rafce_ray.config import differences, load_config
from rafce_ray.data.loader import prepare
from rafce_ray.metrics.comparison import OverSeeds, Spread
from rafce_ray.study import ablation as ablation
from rafce_ray.study.ablation import EIGHT_CHANGES, GROUPS, Ablation, Contrast, Measured, ablation_arms, markdown, plot
from rafce_ray.tune.ablation import check_minority, choose_arms


@pytest.fixture(scope="module")
def base():
    return load_config(overrides=["optim.epochs=25", "model.backbone=resnet18"])


@pytest.fixture(scope="module")
def arms(base):
    return ablation_arms(base)


def test_every_change_of_the_seeds_table_is_there_alone_and_cumulatively(base, arms):
    configs = {arm.name: arm.config(base) for arm in arms}
    before = configs["seed_before"]
    assert (before.data.action_unit_targets, before.loss.au_weight, before.optim.grad_clip) == ("all_zero", 0.5, 0.0)
    # The seed's 15 and 20 epochs of patience were of 50.
    assert (before.optim.patience, configs["seed_fixed"].optim.patience) == (8, 10)
    alone = [arm for arm in arms if arm.group == "alone"]
    assert [set(differences(before, configs[arm.name])) for arm in alone] == [{key} for _, key in EIGHT_CHANGES]
    cumulative = [arm for arm in arms if arm.group == "cumulative"]
    for arm, (_, key) in zip(cumulative, EIGHT_CHANGES[1:], strict=True):
        assert set(differences(configs[arm.reference], configs[arm.name])) == {key}
    assert set(differences(configs[cumulative[-1].name], configs["seed_fixed"])) == {"data.action_unit_targets"}
    assert set(differences(before, configs["labels-read"])) == {"data.action_unit_targets"}


def test_the_fixed_arm_is_the_fixed_recipe_but_for_the_scaled_patience(base, arms):
    fixed = next(arm for arm in arms if arm.name == "seed_fixed").config(base)
    same_size = ["optim.epochs=25", "model.backbone=resnet18", "optim.patience=10"]
    assert differences(fixed, load_config(overrides=same_size, recipe="seed_fixed")) == {}


def test_every_arm_keeps_the_data_and_size_of_the_base_and_differs_from_every_other(base, arms):
    configs = [arm.config(base) for arm in arms]
    assert {(c.model.backbone, c.optim.epochs, c.optim.batch_size, c.model.image_px) for c in configs} == {
        ("resnet18", 25, 32, 224)
    }
    for i, one in enumerate(configs):
        assert all(differences(one, other) for other in configs[:i])
    assert {arm.group for arm in arms} == set(GROUPS)
    names = {arm.name for arm in arms}
    assert all(arm.reference in names or arm.name == "seed_before" for arm in arms)
    assert {
        "au-attention",
        "oversampling",
        "logit-adjustment",
        "compositional-head",
        "curriculum",
        "weak-supervision",
    } < names
    assert {"null-rows-out", "emotion-only", "best"} < names


def test_chosen_arms_bring_what_they_are_compared_with(arms):
    chosen = [arm.name for arm in choose_arms(arms, ["up-to-dropout", "emotion-only"])]
    assert chosen == ["up-to-au-loss-weight", "up-to-dropout", "seed_fixed", "emotion-only"]
    with pytest.raises(UsageError, match="did you mean 'emotion-only'"):
        choose_arms(arms, ["emotions-only"])


def test_a_key_that_the_arms_set_is_refused_on_the_command_line(capsys):
    assert main(["data.root=x", "loss.au_weight=2"]) == 2
    assert "the arms set this key themselves" in capsys.readouterr().err


def test_seeds_that_agree_exactly_have_no_interval_and_those_that_differ_have_the_pooled_one():
    spread = Spread(0.01, 4)
    measured = ablation._measure(OverSeeds((0.49, 0.50, 0.51)), spread)
    assert measured.mean == pytest.approx(0.50)
    assert measured.half_width == pytest.approx(student_t.ppf(0.975, 4) * 0.01 / math.sqrt(3))
    assert ablation._measure(OverSeeds((0.0, 0.0, 0.0)), spread).half_width == 0
    # Other images are no part of it: all arms are measured on the same.
    with_draws = OverSeeds((0.49, 0.50, 0.51), np.array([0.0, 1.0]))
    assert ablation._measure(with_draws, spread) == measured


def test_the_table_marks_real_differences_and_answers_the_seeds_claims(arms):
    def measured(au_f1: float, accuracy: float) -> dict:
        row = {name: Measured((0.5,), 0.5, 0.01) for name in ablation.FIGURES}
        return row | {
            "au_f1": Measured((au_f1,), au_f1, 0.0),
            "accuracy": Measured((accuracy,), accuracy, 0.01),
            "f1/sad": Measured((0.0,), 0.0, 0.1),
        }

    def contrasts(au_f1: Contrast, gap: Contrast) -> dict:
        return {name: Contrast(0.0, 0.02) for name in ablation.FIGURES} | {"au_f1": au_f1, "gap": gap}

    found = Ablation(
        arms=tuple(arms),
        seeds=(0, 1, 2),
        minority=("sad",),
        support={"sad": 4},
        num_images=100,
        measured={
            "seed_before": measured(0.0, 0.5),
            "alone-null-masking": measured(0.0, 0.5),
            "alone-dropout": measured(0.0, 0.4),
            "labels-read": measured(0.31, 0.5),
        },
        contrasts={
            "alone-null-masking": contrasts(Contrast(0.0, 0.01), Contrast(0.0, 0.05)),
            "alone-dropout": contrasts(Contrast(0.0, 0.01), Contrast(0.08, 0.05)),
            "labels-read": contrasts(Contrast(0.31, 0.02), Contrast(-0.01, 0.05)),
        },
        missing=("alone-patience-seed2",),
    )
    text = markdown(found)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "0.0000" in rows["seed_before, every AU target 0"]
    assert "0.3100 ▲" in rows["seed_before, labels read"]
    assert "50.0 ±1.0 ▼" in rows["dropout 0.3 -> 0.5"], "a gap that grows is worse"
    assert rows["null masking"].endswith("no effect at all |")
    assert rows["reading the labels"].endswith("| better |")
    assert "alone-patience-seed2" in text
    assert "sad (4)" in text
    svg = plot(found).decode()
    assert "seed_before, every AU target 0" in svg


def test_a_class_that_is_named_twice_is_shown_once(tiny_overrides):
    prepared = prepare(load_config(overrides=tiny_overrides).data)
    first, second, *_ = prepared.taxonomy.emotions
    assert check_minority([first, "0", second], prepared) == [first, second]
