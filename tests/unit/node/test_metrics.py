"""What /metrics tells, and that nothing from outside can make it tell more."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shoal.node.config import WEB_PORT
from shoal.node.metrics import PREFIX, Deadline, Declaration, Direction, Metrics, PeerState, Plane
from shoal.protocol.effects import Phase
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.manifest import Rounds

SERIES_MAX = 768
BODY_BYTES_MAX = 256 * 1024
DOCKER = Path(__file__).parents[3] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/shoal.json").read_text())
TARGETS = [
    pytest.param(target, id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]
# What Prometheus itself adds to every series.
SCRAPE_LABELS = {"instance", "job"}


def read(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return read(metrics)[PREFIX + name, frozenset(labels.items())]


def test_handles_set_what_is_exposed() -> None:
    metrics = Metrics()
    metrics.round.set(7)
    metrics.tokens.add(100)
    metrics.tokens.add(28)
    metrics.attempt_failures[Failure.OWNER_LOST].add()
    metrics.refusals[Refusal.MALFORMED, Plane.TENSOR].add(2)
    metrics.peers[PeerState.READY].set(3)
    metrics.phase_s[Phase.COMMIT].observe(0.2)
    assert value(metrics, "round") == 7
    assert value(metrics, "tokens_total") == 128
    assert value(metrics, "round_attempt_failures_total", reason="owner_lost") == 1
    assert value(metrics, "round_attempt_failures_total", reason="owner_slow") == 0
    assert value(metrics, "refusals_total", reason="malformed", plane="tensor") == 2
    assert value(metrics, "peers", state="ready") == 3
    assert value(metrics, "phase_seconds_bucket", phase="commit", le="0.1") == 0
    assert value(metrics, "phase_seconds_bucket", phase="commit", le="0.25") == 1
    assert value(metrics, "phase_seconds_sum", phase="commit") == 0.2


def test_exactly_one_phase_is_current() -> None:
    metrics = Metrics()
    for phase in (Phase.GATHER, Phase.EXCHANGE):
        metrics.phase.set(phase)
        shown = {one: value(metrics, "phase", phase=one.value) for one in Phase}
        assert shown == {one: float(one is phase) for one in Phase}


def test_a_current_value_can_be_none() -> None:
    metrics = Metrics()
    metrics.last_failure.set(Failure.COMMIT_TIMEOUT)
    assert value(metrics, "round_last_failure", reason="commit_timeout") == 1
    metrics.last_failure.set(None)
    assert {value(metrics, "round_last_failure", reason=one.value) for one in Failure} == {0.0}


def test_every_deadline_has_the_name_of_a_field_of_the_manifest() -> None:
    limits = {field.name for field in dataclasses.fields(Rounds) if field.name.endswith("_s")}
    # Those that end no phase: a heartbeat's two figures, and the timer of a swarm without a quorum.
    assert limits - {"presence_period_s", "presence_timeout_s", "reroot_after_s"} == {one.value for one in Deadline}


def test_a_followed_total_never_makes_a_counter_fall() -> None:
    metrics = Metrics()
    sent = metrics.wire_bytes[Direction.SENT, Plane.TENSOR]
    for total, shown in ((10, 10), (15, 15), (15, 15), (4, 19), (6, 21)):
        sent.count_to(total)
        assert value(metrics, "wire_bytes_total", direction="sent", plane="tensor") == shown
    assert value(metrics, "wire_bytes_total", direction="received", plane="tensor") == 0


def test_an_unknown_loss_is_no_number() -> None:
    metrics = Metrics()
    assert math.isnan(value(metrics, "loss"))
    metrics.loss.set(2.5)
    assert value(metrics, "loss") == 2.5


def test_daemons_in_one_process_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.round.set(3)
    assert (value(one, "round"), value(other, "round")) == (3, 0)


def test_the_series_are_there_from_the_start_and_stay_the_same() -> None:
    metrics = Metrics()
    before = set(read(metrics))
    for failure in Failure:
        metrics.attempt_failures[failure].add()
        metrics.parts_reassigned[failure].add()
    for phase in Phase:
        metrics.phase.set(phase)
        metrics.phase_s[phase].observe(1e9)
    for refusal in Refusal:
        metrics.refusals[refusal, Plane.CONTROL].add()
    assert set(read(metrics)) == before
    assert len(before) <= SERIES_MAX
    assert len(metrics.render()) <= BODY_BYTES_MAX


def test_the_table_names_what_is_exposed() -> None:
    metrics = Metrics()
    exposed = {family.name for family in text_string_to_metric_families(metrics.render().decode())}
    own = {name for name in exposed if not name.startswith("process_")} - {f"{PREFIX}build_info"}
    assert {declaration.name.removesuffix("_total") for declaration in metrics.table} == own


@pytest.mark.parametrize("metric", Metrics().table, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Declaration) -> None:
    assert re.fullmatch(r"shoal_[a-z][a-z0-9_]*", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert metric.kind != "histogram" or metric.name.endswith("_seconds")
    assert metric.help.endswith(".")
    assert set(metric.labels) <= {"phase", "reason", "state", "plane", "direction", "deadline", "way", "path"}
    assert all(re.fullmatch(r"[a-z_]+", one) for values in metric.labels.values() for one in values)


def test_the_build_is_told() -> None:
    names = {(name, tuple(sorted(key for key, _ in labels))) for name, labels in read(Metrics())}
    assert (f"{PREFIX}build_info", ("python", "version")) in names
    assert ("process_open_fds", ()) in names
    assert not any(name.endswith("_created") for name, _ in names)


def known_series() -> dict[str, tuple[str, set[str]]]:
    """Every series name a query may use: its metric's kind and labels."""
    series = {f"{PREFIX}build_info": ("gauge", {"version", "python"})}
    for metric in Metrics().table:
        labels = set(metric.labels)
        if metric.kind == "histogram":
            series[f"{metric.name}_bucket"] = ("counter", labels | {"le"})
            series |= {f"{metric.name}_{end}": ("counter", labels) for end in ("sum", "count")}
        else:
            series[metric.name] = (metric.kind, labels)
    for family in text_string_to_metric_families(Metrics().render().decode()):
        if family.name.startswith("process_"):
            series |= {sample.name: (family.type, set()) for sample in family.samples}
    return series


@pytest.mark.parametrize("target", TARGETS)
def test_the_dashboard_asks_for_metrics_and_labels_that_exist(target: dict[str, str]) -> None:
    series, query = known_series(), target["expr"]
    used = re.findall(r"\b((?:shoal|process)_[a-z0-9_]+)(?:\{([^}]*)\})?(\[)?", query)
    assert used
    labels = set(SCRAPE_LABELS)
    for name, matchers, ranged in used:
        kind, own = series[name]
        labels |= own
        assert {match.split("=")[0] for match in matchers.split(",")} <= own | SCRAPE_LABELS
        assert not ranged or kind == "counter", "a rate of what is no counter means nothing"
    for group in re.findall(r"\bby \(([^)]*)\)", query):
        assert {label.strip() for label in group.split(",")} <= labels
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
    assert query.count("(") == query.count(")")


def test_every_metric_is_on_the_dashboard() -> None:
    queries = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ()))
    unseen = {metric.name for metric in Metrics().table if metric.name not in queries}
    assert unseen == set()


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_prometheus_scrapes_the_default_web_port_and_grafana_finds_prometheus() -> None:
    prometheus = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    (targets,) = (config["targets"] for config in job["static_configs"])
    assert {target.partition(":")[2] for target in targets} == {str(WEB_PORT)}
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/shoal.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
