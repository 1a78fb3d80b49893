"""The dashboard and the alert rules ask only for metrics and labels that there are."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from leoflow_celery.metrics import METRICS
from tests.support.requirements import require

ROOT = Path(__file__).parents[3]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
PROMETHEUS = ROOT / "deploy/prometheus/prometheus.yml"
DASHBOARD = ROOT / "deploy/grafana/dashboards/leoflow.json"
_HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")
#: Labels that Prometheus adds.
_TARGET_LABELS = {"instance", "job", "service"}


def dashboard_expressions() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def alert_expressions() -> Iterator[str]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def series(name: str) -> dict[str, set[str]]:
    """The series that a metric of ours makes, each with its labels."""
    metric = METRICS[name]
    labels = set(metric.labels) | _TARGET_LABELS
    if metric.kind != "histogram":
        return {name: labels}
    return {name + part: labels | ({"le"} if part == "_bucket" else set()) for part in _HISTOGRAM_PARTS}


ALL_SERIES = {name: labels for metric in METRICS for name, labels in series(metric).items()}


@pytest.mark.parametrize("expression", sorted({*dashboard_expressions(), *alert_expressions()}))
def test_an_expression_uses_series_and_labels_that_exist(expression: str) -> None:
    used = re.findall(r"\bleoflow_\w+", expression)
    assert used or "up{" in expression
    assert [name for name in used if name not in ALL_SERIES] == []
    known = set.union(_TARGET_LABELS, *(ALL_SERIES[name] for name in used))
    grouped = {label.strip() for names in re.findall(r"\bby \(([^)]*)\)", expression) for label in names.split(",")}
    selected = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    assert grouped | selected <= known


def test_every_metric_is_on_the_dashboard() -> None:
    text = " ".join(dashboard_expressions())
    assert [name for name in METRICS if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", text)] == []


def test_the_dashboard_is_what_its_source_makes() -> None:
    source = runpy.run_path(str(ROOT / "deploy/grafana/make_dashboard.py"))
    assert json.loads(DASHBOARD.read_text()) == source["dashboard"](), "run: python deploy/grafana/make_dashboard.py"


def test_every_alert_says_what_is_wrong_and_the_docs_what_to_do() -> None:
    docs = (ROOT / "docs/monitoring.md").read_text()
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert rule["annotations"]["summary"]
            assert f"`{rule['alert']}`" in docs, rule["alert"]


def promtool(*arguments: str | Path) -> None:
    found = shutil.which("promtool")
    if found is None:
        require("prometheus", "no promtool on the machine (Debian: prometheus)")
    result = subprocess.run([found, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    here = tmp_path / "prometheus.yml"
    here.write_text(PROMETHEUS.read_text().replace("/etc/prometheus/", f"{tmp_path}/"))
    shutil.copy(ALERTS, tmp_path)
    promtool("check", "config", here)


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)
    promtool("test", "rules", tmp_path / "alerts_test.yml")
