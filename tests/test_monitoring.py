"""deploy/monitoring and docs/operations.md speak of what /metrics really says, and of each other."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fakes import FakeTorchServe, gateway, make_store
from prometheus_client.parser import text_string_to_metric_families

from serve.gateway.access import keys
from serve.gateway.access.keys import Scope
from serve.residency.events import Event, What
from serve.residency.model import Reason

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "monitoring"
PAGE = ROOT / "docs" / "operations.md"
EVERYWHERE = {"le", "job", "instance"}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of every sample by its name, from a server to which all has happened that is counted."""
    store = make_store(tmp_path_factory.mktemp("store"), "sam", "lama", ours=True)
    key, _ = keys.add(store / ".state" / "keys.json", "studio", [Scope.EDIT], keep=False)
    fake = FakeTorchServe()
    fake.replies["POST /predictions/p.sam"] = _written
    fake.replies["POST /models"] = httpx.Response(200, json={})
    with gateway(fake, store) as client:
        client.post("/predictions/sam", headers={"x-api-key": key})
        client.post("/predictions/sam", headers={"x-api-key": key})
        client.post("/predictions/none", headers={"x-api-key": key})
        fake.replies["POST /predictions/p.sam"] = httpx.Response(500, json={"error": {"code": "x", "message": ""}})
        client.post("/predictions/sam", headers={"x-api-key": key})
        fake.replies["POST /predictions/p.sam"] = httpx.Response(400, json={"error": {"code": "x", "message": ""}})
        client.post("/predictions/sam", headers={"x-api-key": key})
        services = client.app.state.services
        [model] = services.scheduler.active()
        for what in What:
            reasons = (Reason.MEMORY, Reason.WORKER_LOST) if what is What.EVICTED else (None,)
            for reason in reasons:
                services.metrics.on_event(Event(what, model, 1.0, reason))
        services.metrics.on_phases(model.archive, {"read": 1.0})
        services.metrics.on_unpacked(model.archive, 1.0)
        text = client.get("/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _written(request: httpx.Request) -> httpx.Response:
    timings = {"decode": 0.01, "embed": 0.01, "model": 0.01, "encode": 0.01}
    told = {"content_type": "image/png", "headers": {}, "fields": None, "spans": {}, "timings": timings, "end": 0}
    return httpx.Response(200, content=json.dumps(told | {"kept": {}}))


def families(samples: dict[str, set[str]]) -> set[str]:
    """The names under which the documentation has them."""
    histograms = {name.removesuffix("_bucket") for name in samples if name.endswith("_bucket")}
    parts = {f"{name}{end}" for name in histograms for end in ("_bucket", "_sum", "_count")}
    return {name for name in samples if name not in parts} | histograms


def test_each_metric_is_described_with_its_labels(scraped: dict[str, set[str]]) -> None:
    rows = dict(re.findall(r"^\| `(palimpsest_\w+)` \| ([\w, ]*) \|", PAGE.read_text(), re.M))
    assert rows.keys() == families(scraped)
    for name, told in rows.items():
        labels = scraped[name] if name in scraped else scraped[f"{name}_bucket"] - {"le"}
        assert {label for label in told.strip().split(", ") if label} == labels, name


def expressions() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        yield variable["name"], variable["query"]["query"]


def dashboard() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((FOLDER / "grafana" / "dashboards" / "palimpsest.json").read_text())
    return parsed


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def names_and_labels(expression: str) -> tuple[set[str], set[str]]:
    """Of a PromQL expression; and of label_values(metric, label)."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"\"", bare))
    for group in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", bare):
        labels |= {label.strip() for label in group.split(",")}
    labels |= set(re.findall(r"label_values\(\w+, (\w+)\)", bare))
    return set(re.findall(r"\b(palimpsest_\w+|up)\b", bare)), labels


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_name_and_label_of_an_expression_is_there(
    scraped: dict[str, set[str]], where: str, expression: str
) -> None:
    names, labels = names_and_labels(expression)
    assert names
    assert names - {"up"} <= scraped.keys()
    assert labels <= EVERYWHERE.union(*(scraped[name] for name in names - {"up"}))


def test_names_and_labels_are_found_in_expressions() -> None:
    found = names_and_labels(
        'sum by (le, model) (rate(palimpsest_a_bucket{stage=~"x|y",b!="1"}[5m])) / on (c) up{job="p"}'
    )
    assert found == ({"palimpsest_a_bucket", "up"}, {"le", "model", "stage", "b", "c", "job"})


def test_each_alert_has_its_place_in_the_runbook_and_no_other_is_there() -> None:
    [group] = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    headings = re.findall(r"^### (Palimpsest\w+)$", PAGE.read_text(), re.M)
    assert [rule["alert"] for rule in group["rules"]] == headings
    for rule in group["rules"]:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
    tested = {
        test["alertname"]
        for test in yaml.safe_load((FOLDER / "rules-test.yml").read_text())["tests"][0]["alert_rule_test"]
    }
    assert tested == set(headings)


def test_what_an_annotation_names_is_a_label_of_its_expression() -> None:
    for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
            assert used <= names_and_labels(rule["expr"])[1], rule["alert"]


def test_the_dashboard_is_one_that_grafana_provisions() -> None:
    """As far as its schema can be checked without it: places, references, sources."""
    board = dashboard()
    assert board["uid"] == "palimpsest"
    assert not board["editable"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells
    [source] = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": source["uid"]}
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= names_and_labels(target["expr"])[1]
    for said in ("Queue", "Load", "Model", "Evictions", "Parks", "Memory by place", "Errors"):
        assert any(said in panel["title"] for panel in board["panels"])


def test_prometheus_scrapes_as_the_server_answers() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["job_name"] == "palimpsest"  # which the rules name
    assert config["rule_files"] == ["rules.yml"]
    [provider] = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/palimpsest.yaml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here")
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules rules.yml", "test rules rules-test.yml"]
)
def test_promtool_agrees(command: str) -> None:
    ran = subprocess.run(["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here")
def test_promtool_can_read_what_the_dashboard_asks(tmp_path: Path) -> None:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    expanded = [each.replace("$__rate_interval", "1m").replace("$model", ".*") for each in asked]
    rules = [{"record": f"asked:{number}", "expr": each} for number, each in enumerate(expanded)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    ran = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
