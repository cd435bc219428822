"""The doctor as a whole: what it takes the configuration, the key and the swarm from, and what it leaves alone."""

import fcntl
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node import doctor
from shoal.node.config import BOOTSTRAP, MANIFEST_FILE, TRAINER, NodeConfig, NodeTable
from shoal.node.doctor import Report, describe_model, find_swarm, hold_key, read_config
from shoal.node.doctor_findings import Check, Unknown, Verdict, ok, problem
from shoal.node.identity_file import create_identity
from shoal.node.status import Status
from shoal.protocol.errors import ConfigError
from shoal.protocol.manifest import SwarmUri
from tests.unit.node.node_samples import make_samples

SWARM_ID = bytes(range(32))
URI = str(SwarmUri(swarm=SWARM_ID, bootstraps=()))


def config_at(folder: Path, **node: str) -> NodeConfig:
    return NodeConfig(node=NodeTable(data_dir=str(folder), **node))  # type: ignore[arg-type]


def test_a_trainer_without_a_swarm_is_looked_at_as_a_trainer(tmp_path: Path) -> None:
    config, fault = read_config(None, {"data-dir": str(tmp_path), "tensor-port": "7777"})
    assert fault is not None and fault.fix
    assert (config.node.role, config.tensor.port, config.data_path) == (TRAINER, 7777, tmp_path)


def test_a_file_that_cannot_be_read_leaves_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[tensor]\nport = 70000\n")
    config, fault = read_config(file, {"data-dir": str(tmp_path), "role": "bootstrap"})
    assert fault is not None and "port" in fault.field
    assert (config.node.role, config.data_path) == (BOOTSTRAP, tmp_path)
    config, fault = read_config(file, {"data-dir": "\0"})
    assert fault is not None


def test_a_usable_configuration_is_used(tmp_path: Path) -> None:
    config, fault = read_config(None, {"data-dir": str(tmp_path), "swarm": URI})
    assert fault is None and config.node.swarm == URI


def test_the_key_is_held_while_it_is_used_and_left_to_a_daemon(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with hold_key(path) as held:
        assert held is None
    assert list(tmp_path.iterdir()) == []
    made = create_identity(path)
    with hold_key(path) as held:
        assert held is not None and held.peer == made.peer
        with hold_key(path) as second:
            assert second is None
    with path.open("rb") as daemon:
        fcntl.flock(daemon, fcntl.LOCK_EX)
        with hold_key(path) as held:
            assert held is None
    path.chmod(0o644)
    with hold_key(path) as held:
        assert held is None


def test_the_swarm_is_that_of_the_uri_the_folder_or_the_daemon(tmp_path: Path, status: Status) -> None:
    assert find_swarm(config_at(tmp_path), None) is None
    named = find_swarm(config_at(tmp_path, swarm=URI), None)
    assert named is not None and (named.id, named.manifest) == (SWARM_ID, None)
    told = find_swarm(config_at(tmp_path), replace(status, uri=URI))
    assert told is not None and told.id == SWARM_ID


def test_a_damaged_manifest_is_left_where_it_is(tmp_path: Path) -> None:
    stored = tmp_path / MANIFEST_FILE
    stored.write_bytes(b"rubbish")
    found = find_swarm(config_at(tmp_path, swarm=URI), None)
    assert found is not None and found.manifest is None
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_what_the_manifest_says_of_a_machine() -> None:
    assert describe_model(None) is None
    manifest = make_samples().manifest
    model = describe_model(manifest)
    assert model is not None
    assert model.parameters == manifest.layout.elements
    assert model.parameters <= model.contribution_bytes < 2 * model.parameters + 4096
    assert not model.attached
    scripts = describe_model(replace(manifest, task=replace(manifest.task, kind="attached")))
    assert scripts is not None and scripts.attached
    short = describe_model(make_samples(codec="ternary", update_codec="fp32").manifest)
    assert short is not None and short.contribution_bytes < model.parameters / 2


def test_a_report_says_whether_this_machine_can_take_part() -> None:
    good = Report(findings=(ok(Check.DISK, "x"),), peer="p", swarm="s", took_s=1.0)
    assert good.takes_part and json.loads(good.to_json())["can_take_part"] is True
    bad = replace(good, findings=(problem(Check.DISK, "x", "y"),))
    assert not bad.takes_part and json.loads(bad.to_json())["can_take_part"] is False


async def test_nothing_known_and_nothing_answering_is_told_and_not_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def no_torch() -> Unknown:
        return Unknown(why="not asked in this test")

    monkeypatch.setattr(doctor, "see_torch", no_torch)
    monkeypatch.setattr(doctor, "see_gateway", no_torch)
    (tmp_path / "running.json").write_text('{"pid": 1, "web": "127.0.0.1:1"}')
    noticed: list[str] = []
    ports = {"control-port": "0", "tensor-port": "0", "web-port": "0"}
    given = {"data-dir": str(tmp_path), "role": "bootstrap", **ports}
    report = await doctor.examine(None, given, noticed.append, doctor.Deadline(began_s=time.monotonic()))
    verdicts = {one.check: one.verdict for one in report.findings}
    assert verdicts[Check.CONFIGURATION] is Verdict.OK
    assert verdicts[Check.BOOTSTRAP] is verdicts[Check.DHT] is Verdict.NOT_CHECKED
    assert verdicts[Check.DAEMON] is Verdict.OK
    assert noticed
    assert [path.name for path in tmp_path.iterdir()] == ["running.json"]


@pytest.mark.parametrize("within_s", [0.0, 9.9, 601.0, float("nan")])
def test_a_time_that_is_no_time_is_refused(within_s: float) -> None:
    with pytest.raises(ConfigError) as refused:
        doctor.run(None, {}, lambda text: None, within_s)
    assert refused.value.field == "--within" and "10 to 600" in refused.value.fix


@pytest.mark.parametrize("within_s", [doctor.DEADLINE_S_MIN, doctor.DEADLINE_S, doctor.DEADLINE_S_MAX])
def test_the_visit_ends_before_the_looks_and_these_before_the_deadline(within_s: float) -> None:
    deadline = doctor.Deadline(began_s=100.0, within_s=within_s)
    assert 100.0 < deadline.visit_ends_s < deadline.looks_end_s < 100.0 + within_s
