"""Alerts and dashboard: promtool accepts and proves them, and every metric and label they name exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import DOCS, ROOT, anchors
from metric_catalog import FAMILIES, check_promql
from outside_programs import outside_program

from nann.service.settings import ENV_PREFIX, Settings

PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RULES = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "nann.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def promtool(*arguments: str | Path) -> str:
    tool = outside_program("promtool", install="apt install --no-install-recommends prometheus")
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Alerts


def test_promtool_accepts_rules_and_configuration() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", PROMETHEUS / "alerts.yml")
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_promtool_runs_the_tests_of_the_rules() -> None:
    promtool("test", "rules", PROMETHEUS / "alerts_test.yml")


def test_those_tests_see_each_alert_fire() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    fired = {
        check["alertname"]
        for test in tests
        for check in test.get("alert_rule_test", [])
        if check["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in RULES}


def test_those_tests_notice_an_alert_that_does_not_fire(tmp_path: Path) -> None:
    """The tests of the rules are tests themselves: a threshold out of reach must make them fail."""
    rules = (PROMETHEUS / "alerts.yml").read_text(encoding="utf-8")
    shutil.copy(PROMETHEUS / "alerts_test.yml", tmp_path)
    (tmp_path / "alerts.yml").write_text(rules.replace("> 0.01", "> 2.01"), encoding="utf-8")
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", tmp_path / "alerts_test.yml")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_happens_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "runbook"}
    file, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert file == "docs/operations.md"
    assert anchor == rule["alert"].lower()
    assert anchor in anchors((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_names_metrics_that_exist(rule: dict[str, Any]) -> None:
    check_promql(rule["expr"])


def test_every_alert_section_of_the_runbook_has_its_alert() -> None:
    headings = re.findall(r"^### (Nann\w+)$", (DOCS / "operations.md").read_text(encoding="utf-8"), re.M)
    assert sorted(headings) == sorted(rule["alert"] for rule in RULES)


# Dashboard


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_a_panel_names_metrics_that_exist(title: str, expression: str) -> None:
    check_promql(expression)


def test_the_dashboard_shows_every_metric() -> None:
    shown = " ".join(expression for _, expression in EXPRESSIONS)
    assert not {name for name in FAMILIES if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", shown)}


def test_promtool_can_read_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    queries = [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    queries += [expression for _, expression in EXPRESSIONS]
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(queries)
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def test_the_dashboard_can_be_provisioned() -> None:
    """With a uid of its own and no database id, and a data source that is chosen where it is shown."""
    assert (DASHBOARD["id"], DASHBOARD["uid"]) == (None, "nann")
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    used = set(re.findall(r"\$(\w+)", " ".join(expression for _, expression in EXPRESSIONS)))
    assert used - {"__rate_interval"} <= set(variables)
    for variable in variables.values():
        if variable["type"] == "query":
            metric, label = re.findall(r"^label_values\((\w+).*, (\w+)\)$", variable["definition"])[0]
            check_promql(f"sum by ({label}) ({metric})")


def test_panels_do_not_lie_over_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        for cell in _cells(panel["gridPos"]):
            assert cell not in taken, f"{panel['title']} lies over {taken[cell]}"
            taken[cell] = panel["title"]
            assert cell[0] < 24


def _cells(position: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(position["x"], position["x"] + position["w"]):
        for y in range(position["y"], position["y"] + position["h"]):
            yield x, y


def test_legends_use_labels_that_are_left() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            left = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"]))))
            names = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            # Without an aggregation every label of the series is left.
            assert names <= (left or {"instance"}), panel["title"]


# Compose


COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))


def test_what_compose_mounts_is_there_and_where_it_is_looked_for() -> None:
    mounts = {
        (name, target): source
        for name, service in COMPOSE["services"].items()
        for source, target in (
            re.fullmatch(r"(\$\{.*\}|[^:]+):([^:]+)(?::ro)?", v).groups()  # type: ignore[union-attr]
            for v in service["volumes"]
        )
    }
    files = {target: source for (_, target), source in mounts.items() if source.startswith(".")}
    assert files
    for source in files.values():
        assert (ROOT / "deploy" / source).exists(), source
    named = {source for source in mounts.values() if source[0] not in ".$"}
    assert named == set(COMPOSE["volumes"])
    provider = yaml.safe_load(
        (GRAFANA / "provisioning" / "dashboards" / "nann.yaml").read_text(encoding="utf-8")
    )["providers"][0]
    assert f"{provider['options']['path']}/nann.json" in files
    assert provider["allowUiUpdates"] is False
    (rules,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))["rule_files"]
    assert f"/etc/prometheus/{rules}" in files


def test_compose_wires_grafana_to_prometheus_to_the_server() -> None:
    source = yaml.safe_load(
        (GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text(encoding="utf-8")
    )["datasources"][0]
    assert source["url"].split("//")[1].split(":")[0] in COMPOSE["services"]
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["job_name"] == "nann"  # what the alerts select
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    ports = {line.split(":")[-1] for line in COMPOSE["services"][host]["ports"]}
    assert port in ports


def test_compose_gives_the_server_settings_that_exist_and_time_to_drain() -> None:
    server = COMPOSE["services"]["nann"]
    fields = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in server["environment"].items()}
    assert set(fields) <= set(Settings.model_fields)
    settings = Settings.model_validate({"repository": "/models", **fields})
    assert int(server["stop_grace_period"].removesuffix("s")) >= settings.drain_grace_s + 5
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f" AS {server['build']['target']}\n" in dockerfile
    assert server["image"] == f"nann:{server['build']['target']}"
    assert server["read_only"] is True
    (declared,) = re.findall(r"^VOLUME (\[.*\])$", dockerfile, re.M)
    mounted = {volume.split(":")[1] for volume in server["volumes"] if not volume.endswith(":ro")}
    assert mounted == set(json.loads(declared))


def test_compose_opens_no_port_to_the_network_and_pins_every_image() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(line.startswith("127.0.0.1:") for line in service["ports"]), name
        assert service["cap_drop"] == ["ALL"]
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
