"""The dashboard and the alert rules of training and tuning."""

import json
import re
from pathlib import Path

import pytest
import yaml

import rafce_ray.monitoring

MONITORING = Path(rafce_ray.monitoring.__file__).parent


@pytest.fixture(scope="session")
def dashboard() -> dict:
    """The dashboard of training and tuning."""
    return json.loads((MONITORING / "grafana" / "train_and_tune.json").read_text())


@pytest.fixture(scope="session")
def rules() -> list[dict]:
    """The alert rules of training and tuning."""
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="session")
def expressions(dashboard: dict, rules: list[dict]) -> list[str]:
    """Every expression of the dashboard, its variables included, and of the alert rules."""
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    variables = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    asked = [re.fullmatch(r"label_values\((.*),\s*\w+\)", query)[1] for query in variables]
    return [*targets, *asked, *(rule["expr"] for rule in rules)]
