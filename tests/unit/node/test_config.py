"""The node's configuration: defaults, files, flags, and the presets in configs/."""

import json
import os
from pathlib import Path

import pytest

from shoal.node.config import CONFIG_BYTES_MAX, FLAGS, NodeConfig, load_config
from shoal.node.training.tasks import describe
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import Identity, format_peer_id
from shoal.protocol.manifest import make_manifest, parse_draft, task_options

CONFIGS = Path(__file__).parents[3] / "configs"
SWARM = "shoal://" + "ab" * 32
PEER = format_peer_id(Identity(bytes(32)).peer)
BOOTSTRAP = f"/ip4/203.0.113.5/tcp/9460/p2p/{PEER}"


def write(folder: Path, text: str) -> Path:
    path = folder / "shoal.toml"
    path.write_text(text)
    return path


def test_the_defaults_serve_one_volunteer_machine() -> None:
    config = load_config(None, {"swarm": SWARM})
    assert config.data_path == Path.home() / ".local/share/shoal"
    assert config.web.host == "127.0.0.1", "what the page tells is not for the network"
    ports = {config.control.port, config.tensor.port, config.web.port}
    assert len(ports) == 3
    assert 0 not in ports
    assert config.node.role == "trainer"


def test_a_file_is_read_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "run.manifest").touch()
    text = '[node]\ndata_dir = "../data"\nmanifest = "run.manifest"\n[web]\nport = 0\n[log]\nformat = "json"\n'
    config = load_config(write(tmp_path, text), {})
    assert config.data_path == tmp_path.parent / "data"
    assert config.node.manifest == str(tmp_path / "run.manifest")
    assert (config.web.port, config.log.format) == (0, "json")


def test_flags_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = write(tmp_path, f'[node]\ndata_dir = "data"\nswarm = "{SWARM}"\n[control]\nport = 1\n')
    flags = {"data-dir": "other", "control-port": "2", "bootstrap": f"{BOOTSTRAP}, {BOOTSTRAP}", "device": "cuda"}
    config = load_config(path, flags)
    assert config.data_path == elsewhere / "other"
    assert config.control.port == 2
    assert config.control.bootstraps == (BOOTSTRAP, BOOTSTRAP)
    assert config.trainer.device == "cuda"


def test_no_code_of_others_is_allowed_unless_it_is_named(tmp_path: Path) -> None:
    assert load_config(None, {"swarm": SWARM}).trainer.allow_tasks == ()
    path = write(tmp_path, '[trainer]\nallow_tasks = ["a.b:C", "d:E"]\n')
    assert load_config(path, {"swarm": SWARM}).trainer.allow_tasks == ("a.b:C", "d:E")
    assert load_config(path, {"swarm": SWARM, "allow-task": "f:G"}).trainer.allow_tasks == ("f:G",)


def test_a_data_set_is_a_path_unless_it_is_named_as_one_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = write(tmp_path, '[trainer]\ndataset = "data"\ndataset_split = "all"\ndataset_column = "body"\n')
    trainer = load_config(path, {"swarm": SWARM}).trainer
    assert (trainer.dataset, trainer.dataset_split, trainer.dataset_column) == (str(tmp_path / "data"), "all", "body")
    hub = load_config(path, {"swarm": SWARM, "dataset": "hf://datasets/owner/name"}).trainer
    assert hub.dataset == "hf://datasets/owner/name"
    with pytest.raises(ConfigError, match="hf://datasets/NAME"):
        load_config(path, {"swarm": SWARM, "dataset": "owner/name"})


def test_every_flag_names_a_field() -> None:
    for flag, field in FLAGS.items():
        section, _, name = field.partition(".")
        assert hasattr(getattr(NodeConfig(), section), name), flag


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_config(None, {"swarm": SWARM, "data-dir": "~/x"}).data_path == Path("/home/somebody/x")


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("[web]\n# local\nport = 70000\n", "web.port (line 3)", "70000 is out of range"),
        ("[web]\nport = 9460\n", "web.port (line 2)", "9460 is control.port, too"),
        ("[tensor]\nport = 9464\n", "web.port", "9464 is tensor.port, too"),
        ('[node]\nrole = "boss"\n', "node.role (line 2)", "'boss' is not allowed"),
        ('[node]\nname = "a\\u0007"\n', "node.name (line 2)", "cannot be shown"),
        ('[node]\nmanifest = "gone"\n', "node.manifest (line 2)", "is no file"),
        ('[trainer]\ndataset = "gone"\n', "trainer.dataset (line 2)", "does not exist"),
        ('[trainer]\ntext = "."\ndataset = "."\n', "trainer.dataset (line 3)", "and so is trainer.text"),
        ('[trainer]\ndataset_config = "en"\n', "trainer.dataset_config (line 2)", "trainer.dataset is not"),
        ('[trainer]\ntext = "gone"\n', "trainer.text (line 2)", "does not exist"),
        ('[trainer]\nweights = "gone"\n', "trainer.weights (line 2)", "is no folder"),
        ('[trainer]\nallow_tasks = ["os"]\n', "trainer.allow_tasks (line 2)", "'os' names no class"),
        ('[trainer]\nallow_tasks = "a:B"\n', "trainer.allow_tasks (line 2)", "is not a list of strings"),
        ("[limits]\ndownload_mbit = 0.5\n", "limits.download_mbit (line 2)", "less than links can live with"),
        ('[limits]\nhours = ["8-18 upload 5"]\n', "limits.hours (line 2)", "form of an example"),
        ("[trainer]\nnice = -1\n", "trainer.nice (line 2)", "out of range"),
        ('[control]\nhost = "eth0"\n', "control.host (line 2)", "no IP address"),
        ('[control]\nannounce = ["/ip4/0.0.0.0/tcp/1"]\n', "control.announce (line 2)", "cannot be dialled"),
        ('[control]\nannounce = ["203.0.113.5:1"]\n', "control.announce (line 2)", "is not a TCP multiaddr"),
        ('[control]\nbootstraps = ["/ip4/1.2.3.4/tcp/1"]\n', "control.bootstraps (line 2)", "does not say whose"),
        ('[tensor]\nannounce_host = "a.example:1"\n', "tensor.announce_host (line 2)", "cannot be dialled"),
        ('[tensor]\nannounce_host = "0.0.0.0"\n', "tensor.announce_host (line 2)", "cannot be dialled"),
        ('[tensor]\ncongestion_control = "none"\n', "tensor.congestion_control (line 2)", "not known to this kernel"),
        ('[tensor]\nannounce_host = "1.2.3"\n', "tensor.announce_host (line 2)", "cannot be dialled"),
        ("[colour]\nweb = 1\n", "colour (line 1)", "is no known field"),
    ],
)
def test_a_fault_names_the_field_and_the_line(tmp_path: Path, text: str, where: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), {"swarm": SWARM})
    assert caught.value.field == where
    assert problem in caught.value.problem
    assert caught.value.fix


def test_a_bad_uri_in_the_file_is_found_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not start with shoal://") as caught:
        load_config(write(tmp_path, '[node]\nname = "x"\nswarm = "https://x"\n'), {})
    assert caught.value.field == "node.swarm (line 3)"


@pytest.mark.parametrize("host", ["203.0.113.5", "2001:db8::5", "peer.example"])
def test_a_dialable_announce_host_is_taken(host: str) -> None:
    assert load_config(None, {"swarm": SWARM, "announce-host": host}).tensor.announce_host == host


@pytest.mark.parametrize(
    ("overrides", "flag"),
    [
        ({"web-port": "nine"}, "--web-port"),
        ({"web-port": "70000"}, "--web-port"),
        ({"web-port": "9461"}, "--web-port"),
        ({"device": "tpu"}, "--device"),
        ({"allow-task": "a.b:C, d"}, "--allow-task"),
        ({"swarm": "x"}, "--swarm"),
        ({"manifest": "/gone"}, "--manifest"),
        ({"upload-mbit": "fast"}, "--upload-mbit"),
        ({"upload-mbit": "0.25"}, "--upload-mbit"),
        ({"download-mbit": "-1"}, "--download-mbit"),
        ({"colour": "blue"}, "--colour"),
    ],
)
def test_a_bad_flag_is_named_as_it_was_given(overrides: dict[str, str], flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"swarm": SWARM} | overrides)
    assert caught.value.field == flag


def test_a_trainer_needs_a_swarm_and_a_bootstrap_peer_does_not() -> None:
    with pytest.raises(ConfigError, match="shoal swarm create"):
        load_config(None, {})
    assert load_config(None, {"role": "bootstrap"}).node.swarm is None


def test_any_free_port_may_be_asked_for_more_than_once() -> None:
    config = load_config(None, {"swarm": SWARM, "control-port": "0", "tensor-port": "0", "web-port": "0"})
    assert config.control.port == config.tensor.port == config.web.port == 0


def test_a_file_that_cannot_be_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "gone.toml", {})
    path = tmp_path / "shoal.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path, {})
    path.write_bytes(b"#" * (CONFIG_BYTES_MAX + 1))
    with pytest.raises(ConfigError, match="larger"):
        load_config(path, {})
    os.truncate(path, CONFIG_BYTES_MAX)
    assert load_config(path, {"swarm": SWARM}).web == NodeConfig().web


def test_a_capped_peer_relays_no_tensors(tmp_path: Path) -> None:
    assert load_config(None, {"swarm": SWARM}).tensor_paths.relay
    assert not load_config(None, {"swarm": SWARM, "upload-mbit": "2.5"}).tensor_paths.relay
    text = '[limits]\nhours = ["08:00-18:00 upload 5 download 20"]\n'
    config = load_config(write(tmp_path, text), {"swarm": SWARM, "download-mbit": "50"})
    assert not config.tensor_paths.relay
    assert (config.limits.schedule.at(480).upload_mbit, config.limits.schedule.at(0).download_mbit) == (5.0, 50.0)


@pytest.mark.parametrize("name", ["local", "lan", "bootstrap"])
def test_the_presets_load(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.toml", {"swarm": SWARM})
    assert (CONFIGS / f"{name}.toml").read_text().startswith("# "), "a header says what it is for"
    loopback = name == "local"
    assert config.control.host == config.tensor.host == ("127.0.0.1" if loopback else "0.0.0.0")
    assert config.node.role == ("bootstrap" if name == "bootstrap" else "trainer")
    assert config.web.host == "127.0.0.1"


@pytest.mark.parametrize(("name", "elements", "parts_max"), [("tiny", 1e6, 16), ("small", 30e6, 128)])
def test_the_manifest_drafts_are_what_their_headers_say(name: str, elements: float, parts_max: int) -> None:
    text = (CONFIGS / f"{name}.manifest.toml").read_text()
    assert text.startswith("# ")
    draft = parse_draft(text, json.dumps(task_options(text)))
    assert (draft.name, draft.task.kind) == (name, "byte_gpt")
    founder = Identity(bytes(32)).peer
    manifest = make_manifest(draft, describe(draft.task), founder, (founder,))
    assert 0.9 * elements < manifest.layout.elements < 1.1 * elements
    assert 8 < manifest.parts <= parts_max
