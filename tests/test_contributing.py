"""The recipes of CONTRIBUTING.md are true: what they name is there, and what has to agree in several places does."""

import re
from pathlib import Path
from typing import get_args

import yaml

from rafce_ray import config
from rafce_ray.base.figures import FIGURES, MAIN, MONITORS, OF_AN_EPOCH
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.engines import _COMPILERS, FASTEST_FIRST, PACKAGES, EngineChoice
from rafce_ray.cli.arguments import ENGINES
from rafce_ray.config import BACKBONES, LossConfig, flatten
from rafce_ray.doctor.evidence import SMALLER_BACKBONE
from rafce_ray.doctor.figures import ONLY_FOR_ACTION_UNITS
from rafce_ray.metrics.counts import Counts, summarise
from rafce_ray.model.losses import AU_LOSSES
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.documents import _NOT_OF_PREDICT
from rafce_ray.service.problems import PROBLEM_TYPES
from rafce_ray.study.config import NOT_SEARCHED

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text()
SOURCE = "\n".join(
    path.read_text() for folder in ("rafce_ray", "tests") for path in (REPOSITORY / folder).rglob("*.py")
)


def test_every_file_and_every_name_is_there():
    named = set(re.findall(r"`([^`\n]+)`", PAGE))
    files = {name for name in named if re.fullmatch(r"[\w./]+\.(py|yaml|toml|md)|[\w/]+/", name) and "/" in name}
    assert len(files) > 20
    assert [name for name in sorted(files) if not (REPOSITORY / name).exists()] == []
    constants = {name for name in named if re.fullmatch(r"_?[A-Z][A-Z_]+[A-Z]", name)}
    assert len(constants) >= 14
    assert [name for name in sorted(constants) if not re.search(rf"^{name}\b", SOURCE, re.MULTILINE)] == []


def test_losses_of_action_units_are_those_that_can_be_set():
    assert set(get_args(LossConfig.model_fields["au_loss"].annotation)) == set(AU_LOSSES)


def test_backbones_step_down_to_backbones():
    assert set(SMALLER_BACKBONE) | set(SMALLER_BACKBONE.values()) == set(BACKBONES)


def test_metrics_that_choose_are_figures_of_a_task_or_of_both():
    assert {name for name in MONITORS if FIGURES[name].task == "both"} == {"score", "loss"}
    assert set(MAIN) <= set(MONITORS)
    taxonomy = make_taxonomy(("happy", "sad"), (12,))
    summary = summarise(Counts.zero(taxonomy), taxonomy)
    assert summary.keys() & FIGURES.keys() == set(OF_AN_EPOCH)
    assert summary.keys() >= {one.floor for one in FIGURES.values() if one.floor}


def test_keys_that_are_listed_are_keys():
    listed = {*config.CARRIED_OUT_BY, *NOT_SEARCHED, *ONLY_FOR_ACTION_UNITS}
    assert listed <= set(flatten(config.Config()))


def test_codes_that_predict_cannot_answer_are_codes():
    assert set(PROBLEM_TYPES) > _NOT_OF_PREDICT


def test_engines_are_the_same_everywhere():
    engines = set(get_args(EngineChoice))
    assert engines == {"auto", "torch", *PACKAGES}
    assert set(PACKAGES) == set(_COMPILERS) == set(FASTEST_FIRST)
    assert set(get_args(ServiceConfig.model_fields["engine"].annotation)) == engines
    assert set(ENGINES) == engines


def test_every_search_space_is_in_the_guide():
    rows = set(re.findall(r"^\| `(\w+\.yaml)` \|", (REPOSITORY / "docs" / "tune.md").read_text(), re.MULTILINE))
    shipped = {path.name for path in (REPOSITORY / "tune_configs").glob("*.yaml")}
    assert rows == shipped
    assert all(yaml.safe_load((REPOSITORY / "tune_configs" / name).read_text())["space"] for name in shipped)
