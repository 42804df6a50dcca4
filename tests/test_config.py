import pytest
import yaml

from rafce_ray.config import (
    RECIPES,
    Config,
    ConfigError,
    apply_overrides,
    build_config,
    config_hash,
    differences,
    load_config,
    parse_yaml,
    recipe_names,
    to_yaml,
    write_yaml,
)


def test_the_defaults_are_the_seeds_fixed_recipe():
    config = load_config()
    assert config == load_config(recipe="seed_fixed")
    assert (config.model.backbone, config.optim.batch_size, config.optim.epochs) == ("resnet50", 32, 50)
    assert (config.loss.au_weight, config.model.dropout, config.optim.weight_decay) == (1.0, 0.5, 1e-3)
    assert (config.optim.lr, config.optim.grad_clip, config.loss.label_smoothing) == (5e-4, 1.0, 0.1)
    assert (config.optim.patience, config.optim.monitor) == (20, "macro_f1")


def test_every_recipe_loads_and_differs_from_the_others():
    names = recipe_names()
    assert {"seed_before", "seed_fixed", "au_attention", "minimal_augmentation", "demo"} <= set(names)
    assert len({config_hash(load_config(recipe=name)) for name in names}) == len(names)


def test_seed_before_is_the_before_column_of_the_seed():
    config = load_config(recipe="seed_before")
    assert (config.loss.au_weight, config.model.dropout, config.optim.weight_decay, config.optim.lr) == (
        0.5,
        0.3,
        1e-4,
        1e-3,
    )
    assert (config.optim.grad_clip, config.loss.label_smoothing, config.optim.patience) == (0.0, 0.0, 15)


def test_precedence_is_recipe_then_file_then_overrides(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 3e-4, epochs: 7}\n")
    config = load_config(file, ["optim.epochs=9"], recipe="demo")
    assert (config.model.backbone, config.optim.lr, config.optim.epochs) == ("resnet18", 3e-4, 9)


def test_what_is_printed_reads_back_the_same(tmp_path):
    config = load_config(overrides=["data.action_units=[AU12, 6]", "data.emotions=[neutral, smiling]", "optim.lr=1e-3"])
    file = tmp_path / "printed.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config
    assert config.data.action_units == (12, 6)


def test_all_faults_are_reported_at_once_with_the_nearest_key():
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["optim.lrr=3", "modle.backbone=x", "optim.epochs=-1", "dropout=0.3"])
    message = str(caught.value)
    assert "optim.lrr: unknown key; did you mean 'optim.lr'?" in message
    assert "modle: unknown key; did you mean 'model'?" in message
    assert "dropout: unknown key; did you mean 'model.dropout'?" in message
    assert "optim.epochs: found -1" in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("loss.imbalance=[oversampling, class_weights]", "two at once"),
        ("data.action_units=[12, AUx]", "'AUx' is not an action unit"),
        ("model.backbone=resnet9", "resnet18"),
        ("optim.lr=nan", "optim.lr"),
        ("run.name=a/b", "no folder name"),
        ("loss.au_start_epoch=50", "never come in"),
        ("model.freeze_backbone=true", "learnt nothing"),
        ("run.num_workers=0", r"run\.num_workers: found 0; write how many workers train"),
        ("run.num_workers=1-4", r"found '1-4'; write .* for example \[1, 4\]"),
        ("run.num_workers=true", "found True; write"),
        ("run.num_workers=[4, 1]", r"found \[4, 1\]; write .* the least and the most"),
        ("run.num_workers=[1]", r"found \[1\]; write"),
        ("run.num_workers=[0, 4]", r"found \[0, 4\]; write"),
        ("run.num_workers=[1, 2000]", "from 1 to 1024"),
        ("run.num_workers=[1, 17]", r"optim\.batch_size=32 leaves fewer than 2 images a step for each of 17 workers"),
    ],
)
def test_each_fault_says_what_was_expected(override, part):
    with pytest.raises(ConfigError, match=part):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    ("given", "least", "most", "elastic", "shown"),
    [
        ("1", 1, 1, False, "1 worker"),
        ("3", 3, 3, False, "3 workers"),
        ("[1, 4]", 1, 4, True, "1 to 4 workers"),
        ("[2,2]", 2, 2, True, "2 to 2 workers"),
    ],
)
def test_workers_are_a_number_or_a_range(given, least, most, elastic, shown, tmp_path):
    config = load_config(overrides=[f"run.num_workers={given}"])
    run = config.run
    assert (run.least_workers, run.most_workers, run.is_elastic, run.workers_shown) == (least, most, elastic, shown)
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "printed.yaml") == config
    assert build_config(config.model_dump()) == config
    assert config_hash(config) == config_hash(load_config())
    assert differences(config, load_config()) == {}


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        load_config(overrides=["data.emotions=none", "data.action_units=none"])


def test_what_is_no_override_or_no_mapping_is_a_usage_error(tmp_path):
    assert ConfigError.exit_code == 2
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config(overrides=["optim.lr"])
    file = tmp_path / "list.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"did you mean 'demo'"):
        load_config(recipe="dmo")


def test_overrides_do_not_change_what_they_are_laid_over():
    values = {"optim": {"lr": 1.0}}
    assert apply_overrides(values, ["optim.epochs=2"]) == {"optim": {"lr": 1.0, "epochs": 2}}
    assert values == {"optim": {"lr": 1.0}}


def test_the_hash_follows_what_is_computed_and_not_how_it_is_carried_out():
    base = load_config()
    assert config_hash(load_config(overrides=["run.num_workers=2", "run.storage=elsewhere"])) == config_hash(base)
    other = load_config(overrides=["optim.lr=1e-4", "run.num_workers=2"])
    assert config_hash(other) != config_hash(base)
    assert differences(base, other) == {"optim.lr": (5e-4, 1e-4)}


def test_every_field_says_what_it_means():
    undocumented = [
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        for name, inner in field.annotation.model_fields.items()
        if not inner.description
    ]
    assert undocumented == []


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config().optim.lr = 1.0


def test_plain_values_round_trip():
    config = load_config(recipe="demo")
    assert build_config(yaml.safe_load(to_yaml(config))) == config


def test_yaml_is_read_and_written_as_pyyamls_own_reader_and_writer_do():
    texts = [path.read_text() for path in RECIPES.glob("*.yaml")]
    texts += [
        "1e-3",
        "[4, AU12]",
        "{a: ,b}",
        "on",
        "~",
        "",
        "2026-11-25",
        ".nan",
        "0o17",
        "'it''s'",
        "- - 1",
        "é: 😀",
        "a\n\nb",
    ]
    for text in texts:
        assert repr(parse_yaml(text)) == repr(yaml.safe_load(text))
        assert parse_yaml(text.encode()) == parse_yaml(text) or "nan" in text
    values = load_config(recipe="demo", overrides=["data.root=fäces/ü x", f"run.storage={'long ' * 60}"]).model_dump()
    for style in ({}, {"default_flow_style": None, "width": 120}):
        assert write_yaml(values, **style) == yaml.safe_dump(values, sort_keys=False, **style)


def test_what_is_no_yaml_is_shown_with_its_line(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("optim:\n  lr: [1\n")
    with pytest.raises(ConfigError, match=r"broken.yaml: is not YAML: .*\n.* line 2, column 7:\n +lr: \[1\n +\^"):
        load_config(file)
