"""docs/config.md is what the code says, and what it says of defaults and ranges is true of the configuration as it is
read.
"""

import re
from pathlib import Path

import pytest
from config_page import reference

from rafce_ray.config import Config, ConfigError, flatten, load_config
from rafce_ray.service.config import ServiceConfig, read_service_config

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
ROW = re.compile(r"^\| `([a-z0-9_.]+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*) \|$", re.MULTILINE)
NEXT_OUTSIDE = {"≥": -1, "≤": 1, ">": 0, "<": 0}


def rows(title: str) -> dict[str, tuple[str, ...]]:
    """Cells by key of the tables of one part of the page."""
    _, _, after = PAGE.read_text().partition(f"\n## {title}\n")
    return {key: cells for key, *cells in ROW.findall(after.partition("\n## ")[0])}


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text() == reference(), (
        "docs/config.md is not what the code says; write it again: python docs/config_page.py > docs/config.md"
    )


def test_every_key_of_a_run_is_there_and_its_default_can_be_set():
    run = rows("A run")
    assert set(run) == set(flatten(Config()))
    written = [f"{key}={default.strip('`')}" for key, (_, default, *_) in run.items()]
    assert load_config(overrides=written) == Config()


def test_what_lies_outside_a_range_is_refused():
    checked = 0
    for key, (_, _, bounds, *_) in rows("A run").items():
        for sign, number in re.findall(r"([≥≤<>]) ([\d.,]+\d|\d)", bounds):
            value = float(number.replace(",", "")) + NEXT_OUTSIDE[sign]
            with pytest.raises(ConfigError, match=re.escape(key)):
                load_config(overrides=[f"{key}={value:.17g}"])
            checked += 1
    assert checked > 30


def test_every_key_says_what_it_means_and_units_follow_names():
    for title in ("A run", "A study", "A service"):
        for key, (kind, _, _, unit, meaning) in rows(title).items():
            assert kind, key
            assert meaning.endswith("."), key
            assert (unit == "s") == key.endswith("_s"), key
            assert (unit == "bytes") == key.endswith("_bytes"), key


def test_every_key_of_a_service_is_there():
    limits = {
        f"limits.{key}"
        for key in ServiceConfig.model_fields["limits"].get_default(call_default_factory=True).model_dump()
    }
    assert set(rows("A service")) == set(ServiceConfig.model_fields) - {"limits"} | limits
    defaults = {key: cells[1].strip("`") for key, cells in rows("A service").items() if key.startswith("limits.")}
    written = {key.removeprefix("limits."): float(text) for key, text in defaults.items()}
    assert read_service_config({"bundle": "b", "limits": written}) == read_service_config({"bundle": "b"})
