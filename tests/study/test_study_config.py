import pytest
import yaml

from rafce_ray.config import ConfigError, flatten, load_config
from rafce_ray.study.config import SCHEDULER_KEYS, SchedulerConfig, StudyConfig, build_study, load_study, study_yaml

STUDY = """
name: first
base:
  recipe: demo
  optim: {epochs: 20}
space:
  optim.lr: {loguniform: [1e-4, 1e-2]}
  model.au_attention: {choice: [false, true]}
  loss.au_start_epoch: {randint: [0, 5]}
  loss.au_ramp_epochs: {choice: [0, 4], when: {loss.au_start_epoch: [2, 3]}}
num_trials: 12
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def faults(values):
    """The lines of what is wrong with a study, without the headline."""
    with pytest.raises(ConfigError) as caught:
        build_study(values)
    headline, *lines = str(caught.value).splitlines()
    assert headline == "the study cannot be used:"
    return [line.removeprefix("  ") for line in lines]


def plain(**others):
    return {"name": "s", "num_trials": 4, "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}}, **others}


def searched(key, domain, **others):
    return plain(space={key: domain}, **others)


def test_a_study_is_read_with_its_defaults(file):
    study = load_study(file)
    assert (study.name, study.storage, study.search, study.seed, study.num_trials) == ("first", "runs", "random", 0, 12)
    assert (study.metric, study.mode, study.direction) == ("score", None, 1.0)
    assert study.scheduler == SchedulerConfig(type="asha", grace_period=3, reduction_factor=3, brackets=1)
    assert (study.resources.workers, study.resources.cpus_per_worker) == (1, 1)
    assert (study.resources.gpus_per_worker, study.resources.concurrent) == (None, None)
    assert (study.finalists.k, study.finalists.seeds, study.keep, study.start_timeout_s) == (3, 3, 5, 120)
    assert (study.time_budget_s, study.mlflow) == (None, None)
    assert study.space["optim.lr"].ends() == (1e-4, 1e-2)


def test_every_field_says_what_it_means():
    def undocumented(model, prefix=""):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from undocumented(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undocumented(StudyConfig)) == []


def test_the_base_is_recipe_then_sections_then_what_the_study_sets(file):
    base = load_study(file, ["metric=au_f1_mean", "resources={workers: 2, cpus_per_worker: 3}"]).base_config
    expected = load_config(
        recipe="demo",
        overrides=[
            "optim.epochs=20",
            "optim.monitor=au_f1_mean",
            "run.num_workers=2",
            "run.cpus_per_worker=3",
            "run.keep_checkpoints=1",
        ],
    )
    assert base == expected
    assert base.run.name is None


def test_sampled_values_are_laid_over_the_base_and_nothing_else_changes(file):
    study = load_study(file)
    config = study.config_of({"optim.lr": 0.003, "model.au_attention": True})
    changed = {key: value for key, value in flatten(config).items() if value != flatten(study.base_config)[key]}
    assert changed == {"optim.lr": 0.003, "model.au_attention": True}
    assert study.config_of({}) == study.base_config
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        study.config_of({"optim.lr": -1})


def test_overrides(file):
    study = load_study(
        file,
        [
            "name=x",
            "num_trials=8",
            "base.data.root=y",
            "base.recipe=seed_fixed",
            "scheduler.grace_period=2",
            "search=optuna",
            "mode=max",
        ],
    )
    assert (study.name, study.num_trials, study.search, study.mode) == ("x", 8, "optuna", "max")
    assert (study.base_config.data.root, study.base_config.model.backbone) == ("y", "resnet50")
    assert study.base_config.optim.epochs == 20
    assert study.scheduler.grace_period == 2


def test_a_dotted_key_of_the_space_is_one_key_and_is_replaced_whole(file):
    study = load_study(
        file,
        [
            "space.optim.lr={uniform: [1e-3, 2e-3]}",
            "space.model.dropout={grid: [0.3, 0.5]}",
            "space.model.au_attention=null",
        ],
    )
    assert list(study.space) == ["optim.lr", "loss.au_start_epoch", "loss.au_ramp_epochs", "model.dropout"]
    assert study.space["optim.lr"].to_plain() == {"uniform": [1e-3, 2e-3]}
    with pytest.raises(ConfigError, match=r"does not search 'optim\.lrr'.*did you mean 'optim\.lr'"):
        load_study(file, ["space.optim.lrr=null"])


def test_a_study_written_down_reads_back_the_same(file, tmp_path):
    for overrides in (
        [],
        ["scheduler.type=none"],
        [
            "space.data.action_units={choice: [[AU12, 6], auto]}",
            "metric=macro_f1",
            "base.model.weights=DEFAULT",
            "mode=max",
            "mlflow=http://x",
        ],
        ["scheduler={type: median, grace_period: 2, brackets: 1}"],
    ):
        study = load_study(file, overrides)
        written = tmp_path / "written.yaml"
        written.write_text(study_yaml(study))
        assert load_study(written) == study
        assert load_study(written).unused_scheduler_keys() == study.unused_scheduler_keys()
        assert yaml.safe_load(study_yaml(study))["name"] == "first"


def test_choices_are_held_as_a_run_holds_them(file):
    study = load_study(file, ["space.data.action_units={choice: [[AU12, 6], auto]}", "metric=macro_f1"])
    assert study.space["data.action_units"].values() == ([12, 6], "auto")


def test_scheduler_keys_that_the_type_does_not_read_are_listed_when_set(file):
    assert load_study(file).unused_scheduler_keys() == []
    study = load_study(file, ["scheduler={type: median, brackets: 2, grace_period: 2, reduction_factor: 4}"])
    assert study.unused_scheduler_keys() == ["reduction_factor", "brackets"]
    assert study.scheduler.brackets == 2
    assert {key for keys in SCHEDULER_KEYS.values() for key in keys} | {"type"} == set(SchedulerConfig.model_fields)


def test_every_fault_is_said_at_once_with_the_nearest_key():
    lines = faults(
        {
            "nmae": "a",
            "num_trails": 3,
            "optim": {"lr": 1},
            "base": {"recipe": "dmo", "optim": {"lrr": 1, "monitor": "uar"}, "modle": {}, "run": {"num_workers": 2}},
            "space": {
                "optim.lr": {"loguniform": [1e-4, 100]},
                "loss.au_weigth": {"uniform": [0, 1]},
                "model.dropout": [0.3, 0.5],
                "optim": {"weight_decay": {"uniform": [0, 1]}},
                "loss.au_ramp_epochs": {"choice": [0, 2], "when": {"loss.au_start_epok": [1]}},
            },
            "search": "rnadom",
            "finalists": {"sedes": 3, "seeds": 0},
            "metric": "f1",
            "scheduler": {"reduction_factor": 1},
        }
    )
    text = "\n".join(lines)
    for part in (
        "name: missing",
        "nmae: unknown key; did you mean 'name'?",
        "num_trails: unknown key; did you mean 'num_trials'?",
        "optim: unknown key; did you mean 'base.optim'?",
        "base.recipe: found 'dmo'",
        "did you mean 'demo'?",
        "base.optim.lrr: unknown key; did you mean 'base.optim.lr'?",
        "base.optim.monitor: is the study's to set; set metric",
        "base.modle: unknown key; did you mean 'base.model'?",
        "base.run.num_workers: is the study's to set; set resources.workers",
        "space.optim.lr: 100.0 cannot be trained: optim.lr: found 100.0; Input should be less than or equal to 10",
        "space.loss.au_weigth: unknown key; did you mean 'loss.au_weight'?",
        "space.model.dropout: found the list [0.3, 0.5]: write {grid: [0.3, 0.5]}",
        "space.optim: is a section; write dotted keys, such as optim.epochs: {...}",
        "space.loss.au_ramp_epochs: when: loss.au_start_epok: unknown key; did you mean 'loss.au_start_epoch'?",
        "search: found 'rnadom'; Input should be 'grid', 'random' or 'optuna'",
        "finalists.sedes: unknown key; did you mean 'finalists.seeds'?",
        "finalists.seeds: found 0",
        "metric: found 'f1'",
        "scheduler.reduction_factor: found 1; Input should be greater than 1",
    ):
        assert part in text, part


def test_faults_between_keys_come_with_those_of_single_values():
    lines = faults(searched("model.dropout", {"uniform": [0.5, 1.5]}, mode="min", metric="macro_f1"))
    assert len(lines) == 2
    assert lines[0].startswith("space.model.dropout: 1.5 cannot be trained: model.dropout: found 1.5")
    assert lines[1] == "mode: found 'min'; macro_f1 is better when higher: write mode: max, or leave it out"


@pytest.mark.parametrize(
    ("domain", "bad"),
    [
        ({"uniform": [-0.1, 0.5]}, ["-0.1"]),
        ({"uniform": [0.5, 1.0]}, ["1.0"]),
        ({"quniform": [-0.5, 1.5, 0.5]}, ["-0.5", "1.5"]),
        ({"choice": [0.5, "much", 2]}, ["'much'", "2"]),
    ],
)
def test_both_ends_and_every_choice_are_built(domain, bad):
    lines = faults(searched("model.dropout", domain))
    assert [line.split(" cannot")[0] for line in lines] == [f"space.model.dropout: {one}" for one in bad]


def test_fractions_of_a_whole_number_are_found_between_the_ends():
    (line,) = faults(searched("optim.batch_size", {"uniform": [16, 64]}))
    assert "valid integer" in line
    (line,) = faults(searched("optim.batch_size", {"quniform": [16, 17, 0.5]}))
    assert line.startswith("space.optim.batch_size: 16.5 cannot be trained")


def test_a_value_that_does_not_go_with_the_base_is_found():
    (line,) = faults(searched("loss.au_start_epoch", {"grid": [0, 12]}, base={"recipe": "demo"}))
    assert line.startswith("space.loss.au_start_epoch: 12 cannot be trained: loss.au_start_epoch=12 is not before")


def test_a_conditional_key_is_tried_with_its_condition():
    freeze = {"choice": [True, False], "when": {"model.weights": ["DEFAULT"]}}
    base = {"recipe": "demo", "model": {"weights": "none"}}
    space = {"model.weights": {"choice": ["none", "DEFAULT"]}, "model.freeze_backbone": freeze}
    assert build_study(plain(space=space, base=base)).space["model.freeze_backbone"].when == {
        "model.weights": ("DEFAULT",)
    }
    del freeze["when"]
    (line,) = faults(plain(space=space, base=base))
    assert line.startswith(
        "space.model.freeze_backbone: True cannot be trained: model.freeze_backbone=true with model.weights=none"
    )


def test_a_condition_on_a_key_whose_domain_cannot_be_read_is_no_further_fault():
    ramp = {"grid": [0, 2], "when": {"loss.au_start_epoch": [1]}}
    (line,) = faults(plain(space={"loss.au_start_epoch": [0, 1], "loss.au_ramp_epochs": ramp}))
    assert line.startswith("space.loss.au_start_epoch: found the list [0, 1]")


def test_the_bases_value_meets_a_condition_only_where_the_other_key_can_keep_it():
    space = {
        "loss.au_loss": {"grid": ["bce", "asymmetric"]},
        "loss.au_start_epoch": {"grid": [1, 2], "when": {"loss.au_loss": ["bce"]}},
        "loss.pos_weight_cap": {"grid": [0.0, 5.0], "when": {"loss.au_start_epoch": [0]}},
    }
    assert build_study(plain(space=space, search="grid"))
    del space["loss.au_start_epoch"]["when"]
    (line,) = faults(plain(space=space, search="grid"))
    assert "loss.au_start_epoch is never 0: it is {grid: [1, 2]}" in line


def test_combinations_that_do_not_go_together_are_found_before_anything_starts():
    # Each value alone goes with the base (20 epochs, no start, warm-up 1, no freezing, weights from outside).
    base = {"recipe": "demo", "data": {"emotions": "auto"}, "model": {"weights": "DEFAULT"}}
    space = {"model.weights": {"grid": ["DEFAULT", "none"]}, "model.freeze_backbone": {"grid": [False, True]}}
    (line,) = faults(plain(space=space, base=base, search="grid"))
    assert line.startswith(
        "space: model.weights=none model.freeze_backbone=True cannot be trained: model.freeze_backbone=true"
    )
    # Of random draws one in four is that combination: twelve draws of four combinations have it.
    (again,) = faults(plain(space=space, base=base, num_trials=12))
    assert again == line


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("run.seed", "finalists.seeds"),
        ("run.num_workers", "resources.workers"),
        ("run.precision", "base.run.precision"),
        ("data.root", "base.data.root"),
        ("data.images", "base.data.images"),
        ("data.layout", "base.data.layout"),
        ("data.store_dir", "base.data.store_dir"),
        ("data.emotions", "base.data.emotions"),
        ("optim.epochs", "base.optim.epochs"),
        ("optim.monitor", "set metric"),
        ("optim.score_au_share", "base.optim.score_au_share"),
    ],
)
def test_keys_that_cannot_be_searched_say_why_and_where_to_set_them(key, remedy):
    (line,) = faults(searched(key, {"grid": [1, 2]}))
    assert line.startswith(f"space.{key}: cannot be searched: ")
    assert remedy in line


def test_every_other_key_of_a_run_may_be_searched():
    values = flatten(load_config())
    refused = {key for key in values if key.startswith("run.")}
    refused |= {
        f"data.{key}"
        for key in ("root", "images", "layout", "store_dir", "emotions", "evaluation_null_policy", "au_threshold")
    }
    refused |= {"optim.epochs", "optim.monitor", "optim.score_au_share"}
    for key in set(values) - refused:
        # By a metric of emotions alone even action units may be.
        assert build_study(searched(key, {"grid": [values[key]]}, metric="macro_f1")).space


@pytest.mark.parametrize(
    ("space", "part"),
    [
        (
            {"loss.au_ramp_epochs": {"grid": [0, 2], "when": {"loss.au_start_epoch": [1]}}},
            "is 0 in the base and is not searched",
        ),
        (
            {
                "loss.au_ramp_epochs": {"grid": [0, 2], "when": {"loss.au_start_epoch": [1, 4]}},
                "loss.au_start_epoch": {"grid": [0, 1, 2]},
            },
            "loss.au_start_epoch is never 4: it is {grid: [0, 1, 2]}",
        ),
        (
            {
                "loss.au_loss": {"grid": ["bce", "asymmetric"], "when": {"loss.au_weight": [0.5]}},
                "loss.au_weight": {"uniform": [0, 1]},
            },
            "loss.au_weight is continuous",
        ),
        (
            {
                "loss.au_start_epoch": {"grid": [0, 1], "when": {"loss.au_ramp_epochs": [1]}},
                "loss.au_ramp_epochs": {"grid": [0, 1], "when": {"loss.au_start_epoch": [1]}},
            },
            "depend on each other in a circle",
        ),
        ({"loss.au_ramp_epochs": {"grid": [0, 2], "when": {"loss.au_ramp_epochs": [0]}}}, "is the key itself"),
        ({}, "space: found {}"),
        ("optim.lr", "space: found 'optim.lr'"),
    ],
)
def test_conditions_that_cannot_hold_are_refused(space, part):
    assert part in "\n".join(faults(plain(space=space)))


@pytest.mark.parametrize(
    ("others", "part"),
    [
        ({"name": "a/b"}, "name: 'a/b' is no folder name"),
        ({"metric": "loss", "mode": "max"}, "loss is better when lower: write mode: min"),
        ({"search": "grid"}, "space.optim.lr: {loguniform: [0.0001, 0.01]} is continuous, which a grid cannot list"),
        ({"num_trials": None}, "num_trials: null means every combination, which search=random does not have"),
        ({"num_trials": 0}, "num_trials: found 0"),
        ({"scheduler": {"grace_period": 50}}, "scheduler.grace_period: 50 is not below base.optim.epochs=50"),
        ({"scheduler": {"type": "median", "grace_period": 60}}, "scheduler.grace_period: 60 is not below"),
        ({"scheduler": {"grace_period": 0}}, "scheduler.grace_period: found 0"),
        ({"scheduler": {"brackets": 0}}, "scheduler.brackets: found 0"),
        # First rungs of brackets 0, 1, 2, 3: 3, 9, 27, 81.
        ({"scheduler": {"brackets": 4}}, "bracket 3 has its first rung at epoch 81"),
        # No epoch but the last, 50, is behind it.
        (
            {"scheduler": {"grace_period": 1, "reduction_factor": 49.5, "brackets": 2}},
            "bracket 1 has its first rung at epoch 49.5",
        ),
        ({"finalists": {"k": -1}}, "finalists.k: found -1"),
        ({"resources": {"workers": 2, "gpus_per_worker": 0.5}}, "several workers take a whole GPU each"),
        ({"resources": {"gpus_per_worker": 1.5}}, "a worker uses one GPU. Set 1 or a fraction"),
        (
            {"base": {"data": {"emotions": "none"}}, "metric": "macro_f1"},
            "macro_f1 is undefined with base.data.emotions=none",
        ),
        (
            {"base": {"data": {"action_units": "none"}}, "metric": "au_loss"},
            "au_loss is undefined with base.data.action_units=none",
        ),
        ({"base": {"optim": {"lr": {"grid_search": [1, 2]}}}}, "belongs in space, as optim.lr: {grid: [1, 2]}"),
        ({"base": {"optim": {"lr": {"uniform": [1, 2]}}}}, "belongs in space, as optim.lr: {uniform: [1, 2]}"),
        ({"base": {"optim": {"lr": {"eval": "1"}}}}, "base.optim.lr: found {'eval': '1'}: expressions are never run"),
        ({"base": None}, "base: found None"),
        ({"base": {"optim": {"warmup_epochs": 60}}}, "base: optim.warmup_epochs=60.0 leaves nothing"),
    ],
)
def test_each_fault_says_what_was_expected(others, part):
    (line,) = faults(plain(**others))
    assert part in line


def test_what_is_allowed_at_the_edge():
    assert build_study(plain(scheduler={"reduction_factor": 1.5, "brackets": 3, "grace_period": 1}))
    assert build_study(plain(resources={"gpus_per_worker": 0.25}))
    assert build_study(plain(resources={"workers": 2, "gpus_per_worker": 1}))
    assert build_study(plain(finalists={"k": 0}))
    assert build_study(searched("optim.lr", {"grid": [1e-4]}, search="grid", num_trials=None)).num_trials is None
    assert build_study(plain(metric="loss", mode="min")).direction == -1.0


def test_population_based_training_is_refused_with_the_reason_and_the_remedy():
    [line] = faults(plain(scheduler={"type": "pbt", "perturbation_interval": 4, "quantile_fraction": 0.25}))
    assert line == "scheduler: type pbt: population-based training was removed; set {type: asha}"


def test_overrides_take_text_as_it_stands(file):
    study = load_study(file, ["base.data.root=faces #2", "name=010", "storage=a: b", "base.recipe=demo"])
    assert study.base_config.data.root == "faces #2"
    assert (study.name, study.storage, study.base.recipe) == ("010", "a: b", "demo")
    assert load_study(file, ["base.recipe=null", "mlflow=null"]).base.recipe is None


def test_dotted_keys_of_a_file_are_sections(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "name: s\nnum_trials: 4\nscheduler.type: none\nbase.data.root: faces\nbase: {recipe: demo, optim.epochs: 5}\n"
        "space: {model.dropout: {uniform: [0.1, 0.5]}}\nspace.optim.lr: {loguniform: [1e-4, 1e-2]}\n"
    )
    study = load_study(file)
    base = study.base_config
    assert (study.scheduler.type, base.data.root, base.optim.epochs) == ("none", "faces", 5)
    assert list(study.space) == ["model.dropout", "optim.lr"]
    assert str(study.space["optim.lr"]) == "{loguniform: [0.0001, 0.01]}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "space: {optim.lr: {grid: [1]}}\nspace: {model.dropout: {grid: [0.1]}}\n",
            "'space' is set twice, on lines 1 and 2",
        ),
        (
            "space: {optim.lr: {grid: [1]}}\nspace.optim.lr: {grid: [2]}\n",
            "'space.optim.lr' is set twice, on lines 1 and 2",
        ),
        (
            "space: {optim.lr: {grid: [1]}}\nspace.optim.lr: {choice: [2]}\n",
            "'space.optim.lr' is set twice, on lines 1 and 2",
        ),
        ("base: {optim.lr: 1, optim: {lr: 2}}\n", "'base.optim.lr' is set twice, on line 1"),
    ],
)
def test_a_key_that_is_set_twice_is_refused_with_its_lines(text, line, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    assert str(caught.value) == f"{file}: {line}. Set it once."


def test_an_option_in_two_spellings_is_listed_twice():
    (line,) = faults(searched("data.action_units", {"choice": [["AU12", 6], [12, 6], "seed18"]}, metric="macro_f1"))
    assert line == "space.data.action_units: [12, 6] is listed twice, in two spellings. List it once"
    (line,) = faults(searched("data.action_units", {"choice": [[12, "AU12"], "seed18"]}, metric="macro_f1"))
    assert "data.action_units: AU12 is listed 2 times. List it once." in line


def test_a_studys_name_leaves_room_for_its_trials():
    longest = "x" * (255 - len("-final_9999_seed2147483647"))
    assert build_study(plain(name=longest)).name == longest
    (line,) = faults(plain(name="x" * 300))
    assert f"has 300 characters; expected {len(longest)} at most" in line


def test_a_condition_may_say_yes_for_true(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "name: s\nnum_trials: 4\nspace:\n  model.au_attention: {choice: [yes, no]}\n"
        "  optim.lr: {loguniform: [1e-4, 1e-2], when: {model.au_attention: [on]}}\n"
    )
    space = load_study(file).space
    assert space["model.au_attention"].values() == (True, False)
    assert space["optim.lr"].when == {"model.au_attention": (True,)}


def test_true_is_no_number():
    lines = faults(plain(keep=True, seed=False, time_budget_s=True, base={"optim": {"epochs": True}}))
    assert [line.partition(": found ")[0] for line in lines] == ["seed", "time_budget_s", "keep", "base.optim.epochs"]


def test_a_grid_that_nobody_meant_is_refused():
    space = {key: {"quniform": [0.0, 0.5, 0.01]} for key in ("model.dropout", "loss.label_smoothing", "loss.au_weight")}
    (line,) = faults(plain(space=space, search="grid"))
    assert "more than 10000 combinations" in line


def test_a_study_is_frozen(file):
    with pytest.raises(ValueError, match="frozen"):
        load_study(file).name = "other"


def test_what_cannot_be_read_is_a_usage_error(tmp_path, file):
    assert ConfigError.exit_code == 2
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_study(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="is no override"):
        load_study(file, ["space.optim.lr"])
    with pytest.raises(ConfigError, match="is not YAML: while parsing a flow sequence"):
        load_study(file, ["space.optim.lr={uniform: [1"])
    file.write_text("name: a\nspace: all\n")
    with pytest.raises(ConfigError, match="space: found 'all'"):
        load_study(file, ["space.optim.lr={grid: [1]}"])
