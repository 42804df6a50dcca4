"""The dashboard and the alert rules: every name is a metric of ours, and everything says what it means and what to
do.
"""

import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

import rafce_ray.monitoring
from rafce_ray.monitoring import metrics
from rafce_ray.monitoring.metrics import Metric

MONITORING = Path(rafce_ray.monitoring.__file__).parent
HISTOGRAM_ENDINGS = ("_bucket", "_sum", "_count")


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up", {"up"}),
        ('max by (run, split) (a_loss{run=~"$run", task="b_loss"})', {"a_loss"}),
        (
            'sum by (le) (rate(a_bucket{study=~"$study"}[5m])) / on (run) group_left (le) b_count',
            {"a_bucket", "b_count"},
        ),
        ("time() - a_seconds > 900 and on(run) b:c unless d offset 30m", {"a_seconds", "b:c", "d"}),
        ("(a - (a offset 1h or 0 * a)) >= bool 1e3", {"a"}),
        ('a{x="}\\"b"} + avg_over_time(c[1h:10s])', {"a", "c"}),
        ('label_replace(a, "to", "$1", "from", "(.*)")', {"a"}),
        ("histogram_quantile(0.9, sum without (pod) (a_bucket))", {"a_bucket"}),
    ],
)
def test_the_metrics_of_an_expression_are_found(metric_names, expression, names):
    assert metric_names(expression) == names


def exported(metric: Metric) -> set[str]:
    """Names under which a metric of ours is scraped."""
    if metric is metrics.TRIAL_SECONDS:
        return {f"ray_{metric.name}{ending}" for ending in HISTOGRAM_ENDINGS}
    return {f"ray_{metric.name}"}


def ours() -> list[Metric]:
    return [value for value in (*vars(metrics).values(), *metrics.ONE_OF_A_RUN.values()) if isinstance(value, Metric)]


def test_every_name_is_a_metric_of_ours_and_every_metric_of_ours_is_shown(expressions, metric_names):
    used = set().union(*(metric_names(expression) for expression in expressions))
    assert used - set().union(*(exported(metric) for metric in ours())) == set()
    assert [metric.name for metric in ours() if not exported(metric) & used] == []


def test_labels_in_expressions_are_tags_of_their_metrics(expressions):
    tags = {name: {*metric.tags, "le"} for metric in ours() for name in exported(metric)}
    for expression in expressions:
        for name, matchers in re.findall(r"(ray_rafce\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= tags[name], expression


def test_every_panel_says_what_it_shows_in_which_unit_and_what_to_do(dashboard):
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) > 20
    for panel in panels:
        assert panel["title"]
        assert len(panel["description"].split()) > 5, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        for target in panel["targets"]:
            # What a legend names must be left by the aggregation.
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert labels <= set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"])))), panel[
                "title"
            ]


def test_rows_have_titles_and_nothing_overlaps(dashboard):
    panels = dashboard["panels"]
    assert all(panel["title"] for panel in panels if panel["type"] == "row")
    assert panels[0]["type"] == "row"
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"], (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_every_variable_that_is_used_is_there(dashboard):
    there = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", str([panel.get("targets") for panel in dashboard["panels"]])))
    assert used == there == {"datasource", "run", "study"}


def test_every_alert_says_how_bad_what_and_what_to_do(rules):
    assert {"RafceTrainStalled", "RafceTrainRestarted", "RafceTrainInvalidCheckpoint"} <= {
        one["alert"] for one in rules
    }
    for rule in rules:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        labels = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert labels <= set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"])))), rule["alert"]
        assert len(rule["annotations"]["description"].split()) > 10, rule["alert"]


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("file", sorted(path.name for path in MONITORING.glob("alerts*.yaml")))
def test_prometheus_takes_the_rules(file):
    done = subprocess.run(
        ["promtool", "check", "rules", str(MONITORING / file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs("promtool")
def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    """Prometheus itself evaluates the rules over made-up series (alerts_test.yaml)."""
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yaml"), tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
