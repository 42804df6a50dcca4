from itertools import pairwise

import pytest
import yaml

from rafce_ray.config import (
    LATER_KEYS,
    RECIPES,
    Config,
    ConfigError,
    apply_overrides,
    build_config,
    config_hash,
    differences,
    identity_of,
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
    assert (config.model.backbone, config.optim.lr, config.optim.epochs) == ("efficientnet_lite0", 3e-4, 9)


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
        ("model={freeze_backbone: true, weights: none}", "learnt nothing"),
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


def test_a_key_that_came_later_leaves_earlier_runs_and_studies_as_they_were():
    """The hash of the defaults of version 0.1.0, which were from scratch, names its runs; a study's claim holds the
    same keys.
    """
    assert config_hash(load_config(overrides=["model.weights=none"])) == "06f6dbcb"
    assert not LATER_KEYS.keys() & identity_of(load_config()).keys()
    for override in ("data.encoding=cp1252", "data.au_threshold=2"):
        changed = load_config(overrides=["model.weights=none", override])
        assert config_hash(changed) != "06f6dbcb"
        assert override.partition("=")[0] in identity_of(changed)


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


def test_yaml_is_written_as_pyyamls_own_writer_does():
    values = load_config(recipe="demo", overrides=["data.root=fäces/ü x", f"run.storage={'long ' * 60}"]).model_dump()
    for style in ({}, {"default_flow_style": None, "width": 120}):
        assert write_yaml(values, **style) == yaml.safe_dump(values, sort_keys=False, **style)


def said(*overrides, **files):
    """What is said of a configuration that cannot be used, without the headline; it is one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides, **files)
    message = str(caught.value).removeprefix("the configuration cannot be used:\n  ")
    assert "\n" not in message
    return message


TEXTS = [
    "faces #2",
    "~/faces",
    "[x]",
    "{a: 1}",
    "a: b",
    "x # y: z",
    "010",
    "1e-3",
    "on",
    "2026-11-25",
    "it's",
    '"a" b "c"',
    " a ",
    "a\\b",
    "x=y",
    "-",
    "*",
    "&a",
    "!x",
    "%",
    "@",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands_and_reads_back_from_a_file(text, tmp_path):
    config = load_config(overrides=[f"data.root={text}", f"run.storage={text}", f"model.weights={text}"])
    assert (config.data.root, config.run.storage, config.model.weights) == (text, text, text)
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "printed.yaml") == config


@pytest.mark.parametrize("name", ["on", "010", "1e-3", "12", "0x1f", "2026-11-25", "NO", "1_000", "0o17"])
def test_a_run_may_have_a_name_that_yaml_reads_as_something_else(name, tmp_path):
    config = load_config(overrides=[f"run.name={name}"])
    assert config.run.name == name
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "printed.yaml") == config


def test_words_and_lists_of_words_are_taken_as_they_stand():
    config = load_config(overrides=["data.layout=auto", "data.emotions=[no, 'a: b', c]", "data.action_units=none"])
    assert (config.data.emotions, config.data.action_units) == (("no", "a: b", "c"), "none")
    assert said("data.layout=auto # looks").startswith("data.layout: found 'auto # looks'; Input should be 'auto'")
    assert said("data.emotions=*").startswith("data.emotions: found '*'")


def test_nothing_and_null_take_a_text_back_and_quotes_make_null_a_text():
    config = load_config(overrides=["run.name=a", "run.name=", "data.root=b", "data.root=null"])
    assert (config.run.name, config.data.root) == (None, None)
    config = load_config(overrides=['run.name="null"', "data.root='it''s #2'"])
    assert (config.run.name, config.data.root) == ("null", "it's #2")
    assert said("run.storage=").startswith("run.storage: found ''; expected text")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-010", -10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("1.e3", 1000.0),
        ("+.INF", float("inf")),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("on", "on"),
        ("NO", "NO"),
        ("y", "y"),
        ("True", True),
        ("2026-11-25", "2026-11-25"),
        ("~", None),
        ("", None),
        ("[4, AU12, 'no', \"1\"]", [4, "AU12", "no", "1"]),
        ("{a: ,b}", {"a": None, "b": None}),
        ("{1: a, on: b, ~: c}", {"1": "a", "on": "b", "~": "c"}),
        ("é: 😀", {"é": "😀"}),
        ("a\n\nb", "a\nb"),
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}),
        ('{"a":\t1}', {"a": 1}),
        ("\ufeffa: 1", {"a": 1}),
    ],
)
def test_yaml_means_what_people_mean_by_it(text, value):
    for given in (text, text.encode()):
        found = parse_yaml(given)
        assert found == value
        assert type(found) is type(value)
    assert parse_yaml(write_yaml({"a": value})) == {"a": value}


def test_the_recipes_read_the_same_in_every_version_of_yaml():
    for path in RECIPES.glob("*.yaml"):
        assert parse_yaml(path.read_bytes()) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.epochs=true", "optim.epochs: found True; expected a whole number"),
        ("optim.lr=false", "optim.lr: found False; expected a number"),
        ("calibration.max_error=true", "calibration.max_error: found True; expected a number"),
        ("optim.epochs=12:30", "optim.epochs: found '12:30'; Input should be a valid integer"),
        ("optim.epochs=3.5", "optim.epochs: found 3.5; Input should be a valid integer"),
        ("optim.epochs=2026-11-25", "optim.epochs: found '2026-11-25'; Input should be a valid integer"),
        ("optim.lr=nan", "optim.lr: found 'nan'; Input should be a finite number"),
        ("optim.lr=1e400", "optim.lr: found inf; Input should be a finite number"),
        ("optim.patience=" + "9" * 20, "optim.patience: found 99999999999999999999; expected a number below 2**63"),
        ("optim.patience=" + "9" * 5000, "is not YAML: Exceeds the limit"),
        ("optim.lr=" + "[" * 5000, "is not YAML"),
        ("optim.lr=[1,", "'optim.lr=[1,', line 2, column 1: is not YAML"),
        ("optim={lr: 1, lr: 2}", "'optim={lr: 1, lr: 2}': 'lr' is set twice, on line 1. Set it once."),
        ("optim..lr=1", "'optim..lr=1' is no override: write section.key=value"),
        ("data.root=a\0b", "data.root: found 'a\\x00b'; expected text in UTF-8, not empty and without zero bytes"),
        ("data.root=\udcff", "data.root: found '\\udcff'; expected text in UTF-8"),
        (
            "data.emotions=[1, 2]",
            "data.emotions: found 1 in the list; expected text. Write it in quotes where it is text",
        ),
        ("data.emotions=[smiling,smiling]", "data.emotions: 'smiling' is listed 2 times. List it once."),
        ("data.action_units=[AU12, 6, 12]", "data.action_units: AU12 is listed 2 times. List it once."),
        ("data.action_units=[12, AUx]", "data.action_units: 'AUx' is not an action unit: write 12 or AU12"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(override, line):
    assert line in said(override)


def test_what_means_the_same_number_is_read():
    config = load_config(overrides=["run.seed=010", "optim.epochs=3.0", "optim.lr=1e-2 # high", "optim.batch_size=1_0"])
    assert (config.run.seed, config.optim.epochs, config.optim.lr, config.optim.batch_size) == (10, 3, 0.01, 10)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {lr: 1}\nmodel: {}\noptim: {epochs: 2}\n", "'optim' is set twice, on lines 1 and 3. Set it once."),
        ("optim:\n  lr: 1\n  lr: 2\n", "'optim.lr' is set twice, on lines 2 and 3. Set it once."),
        ("optim: {lr: 1}\noptim.lr: 2\n", "'optim.lr' is set twice, on lines 1 and 2. Set it once."),
        ("optim.lr: 2\noptim: 3\n", "'optim' is set twice, on lines 1 and 2. Set it once."),
        ("optim:\noptim.lr: 2\n", "'optim' is set twice, on lines 1 and 2. Set it once."),
        ('{"optim": {"lr": 1,\n\t"lr": 2}}', "'optim.lr' is set twice, on lines 1 and 2. Set it once."),
        ("x: &x {lr: 1}\noptim: {<<: *x, <<: *x}\n", "'optim.<<' is set twice, on line 2. Set it once."),
        ("", "sets nothing: it is empty, or all of it is comments. Write sections such as 'optim:'."),
        ("# optim: {lr: 1}\n", "sets nothing"),
        ("- 1\n", "holds a list; expected sections"),
        ("optim\n", "holds a str; expected sections"),
        ("optim:\n\tlr: 1\n", "line 2, column 1: is not YAML: while scanning for the next token, found character"),
        ("optim:\n\tlr: 1\n", "Indent with spaces, not with tabs"),
        ("optim:\n  lr: [1\n", "is not YAML: while parsing a flow sequence that begins on line 2"),
        ("optim: {lr: 1}\n---\noptim: {}\n", "line 2, column 1: is not YAML: expected a single document"),
        ("optim: &o {lr: *o}\n", "an alias within itself"),
        (
            "a: &a [1,1,1,1,1,1,1,1]\n"
            + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 8)}]\n" for a, b in pairwise("abcdefghi")),
            "more than 100,000 values",
        ),
        ("optim: {[lr]: 1}\n", "line 1, column 9: is not YAML: a key that is no text."),
        ("optim: !!python/object:os.system x\n", "line 1, column 8: is not YAML: could not determine a constructor"),
        ("optim: *x\n", "found undefined alias"),
        ("run: {name: 2026}\n", "run.name: found 2026; expected text. Write it in quotes where it is text"),
        ('data: {root: "a\\0b"}\n', "data.root: found 'a\\x00b'; expected text in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_in_one_line(text, line, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    message = said(path=file)
    assert line in message
    assert message.startswith((str(file), "run.name: ", "data.root: "))


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"optim:\n  lr: 1 # fr\xf6hlich\n")
    assert said(path=file) == f"{file}: line 2 is not UTF-8. Save it as UTF-8."
    assert "(Is a directory)" in said(path=tmp_path)
    assert "name too long" in said(path=tmp_path / ("x" * 300)).lower()
    assert "Not a directory" in said(path=file / "x.yaml")


def test_dotted_keys_of_a_file_are_sections(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim.lr: 1e-3\noptim: {epochs: 010}\nrun: {name: 2026-11-25}\n")
    config = load_config(file, ["optim={batch_size: 4}"])
    assert (config.optim.lr, config.optim.epochs, config.optim.batch_size) == (1e-3, 10, 4)
    assert config.run.name == "2026-11-25"


def test_a_name_is_as_long_as_file_systems_take_it():
    assert load_config(overrides=[f"run.name={'x' * 255}"]).run.name == "x" * 255
    message = said(f"run.name={'x' * 300}")
    assert "has 300 characters; expected 255 at most" in message
    assert len(message) < 300
    for name in ("a/b", ".a", "a ", "-a", "a\nb", "ä"):
        assert "is no folder name" in said(f"run.name={name}")
