"""The dashboard and the alert rules of the endpoint: well formed, and reading nothing but what is published."""

import json
import re
from pathlib import Path

import pytest
import yaml

from rafce_ray.service.meter import Meter

OF_RAY = {
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_replica_starts_total",
    "ray_serve_replica_processing_queries",
}


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up", {"up"}),
        ('sum by (le, max) (rate(a_bucket{route=~"/x{y}|z",le="1"}[5m])) > 1e3', {"a_bucket"}),
        ("histogram_quantile(0.99, sum by(le)(rate(a_bucket[$__rate_interval])))", {"a_bucket"}),
        ("a / ignoring(x) group_left sum(b offset 15m) unless on () c == 0", {"a", "b", "c"}),
        ('absent(a{b="c"} > 0) and on () (count(last_over_time(d:e[1h])) > 0)', {"a", "d:e"}),
    ],
)
def test_the_names_in_an_expression(metric_names, expression, names):
    assert metric_names(expression) == names


def published() -> set[str]:
    names = set()
    for family in Meter().registry.collect():
        parts = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
        names |= {f"ray_{family.name}{part}" for part in parts}
    return names


def test_everything_that_is_read_is_published_and_everything_published_is_shown(watched_names):
    assert {name: places for name, places in watched_names.items() if name not in published() | OF_RAY} == {}
    read = {re.sub("_(bucket|sum|count|total)$", "", name) for name in watched_names}
    assert {f"ray_{family.name}" for family in Meter().registry.collect()} - read == set()


def test_every_panel_says_what_it_shows_in_which_unit_and_what_to_do(monitoring_folder: Path):
    board = json.loads((monitoring_folder / "grafana" / "serve.json").read_text())
    assert (board["uid"], board["title"]) == ("rafceServe", "rafce serving")
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len(panels) > 10
    taken = set()
    for panel in panels:
        assert panel["title"]
        assert len(panel["description"]) > 40
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_alert_is_a_rule_of_prometheus_that_says_what_to_do(monitoring_folder: Path, metric_names):
    rules = yaml.safe_load((monitoring_folder / "alerts_serve.yaml").read_text())
    assert rules.keys() == {"groups"}
    (group,) = rules["groups"]
    assert group.keys() == {"name", "rules"}
    alerts = [rule["alert"] for rule in group["rules"]]
    assert len(set(alerts)) == len(alerts) >= 6
    for rule in group["rules"]:
        assert (
            {"alert", "expr", "labels", "annotations"}
            <= rule.keys()
            <= {"alert", "expr", "for", "labels", "annotations"}
        )
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert len(rule["annotations"]["description"]) > 60
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert metric_names(rule["expr"])
