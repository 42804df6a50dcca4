"""Which metrics a PromQL expression, a dashboard or a file of rules asks for."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import rafce_ray.monitoring

MONITORING = Path(rafce_ray.monitoring.__file__).parent

SET_OPERATORS = {"and", "or", "unless", "bool", "offset"}
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
KEYWORDS = SET_OPERATORS | GROUPING | {"inf", "nan", "start", "end"}
NOT_NAMES = re.compile(
    r'"(?:\\.|[^"\\])*"'  # strings
    r"|\{[^{}]*\}"  # matchers
    r"|\[[^\]]*\]"  # ranges
    r"|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)"  # lists of labels
    r"|\$\{?\w+(?::\w+)?\}?"  # Grafana's variables
    r"|\b\d+(?:\.\d+)?(?:e[+-]?\d+|[a-z]+)*"  # numbers and durations
)
NAME = re.compile(r"[a-zA-Z_:][\w:]*(?!\w)(?!\s*\()")


def names_in(expression: str) -> set[str]:
    # Strings first: one may hold a brace.
    without_strings = re.sub(r'"(?:\\.|[^"\\])*"', '""', expression)
    return {name for name in NAME.findall(NOT_NAMES.sub(" ", without_strings)) if name.lower() not in KEYWORDS}


@pytest.fixture(scope="session")
def metric_names() -> Callable[[str], set[str]]:
    """``metric_names(expression)``: the metrics that a PromQL expression reads."""
    return names_in


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
    """Every expression of the dashboard, its variables' included, and of the alert rules."""
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    variables = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    asked = [re.fullmatch(r"label_values\((.*),\s*\w+\)", query)[1] for query in variables]
    return [*targets, *asked, *(rule["expr"] for rule in rules)]
