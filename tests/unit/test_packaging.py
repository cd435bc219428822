"""What is shipped: the wheel's contents, the image, and the compose swarm, as far as files tell without building."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

import shoal
from shoal.dht.addresses import parse_peer_address
from shoal.node.config import CONTROL_PORT, FLAGS, TENSOR_PORT, WEB_PORT, NodeConfig, load_config
from shoal.node.identity_file import load_identity
from shoal.node.manifest_source import read_manifest_file
from shoal.node.web import STATIC
from shoal.protocol.manifest import parse_draft, read_manifest_untrusted, task_options

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PEERS = {name: service for name, service in SERVICES.items() if "ROLE" in service.get("environment", {})}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE)).splitlines()
FOLDERS = ("crdt", "dht", "node", "protocol")
FACE = Path("node/face")  # installed as `shoal` itself


def arguments_of(instruction: str) -> list[str]:
    """What stands behind each occurrence of a Dockerfile's instruction."""
    return [line.partition(" ")[2].strip() for line in INSTRUCTIONS if line.split(" ")[0] == instruction]


# -- the wheel -----------------------------------------------------------------------------------------------------


def test_every_folder_with_code_is_a_package_of_the_wheel() -> None:
    folders = {file.parent.relative_to(ROOT) for one in FOLDERS for file in (ROOT / one).rglob("*.py")}
    packages = {"shoal" if folder == FACE else ".".join(("shoal", *folder.parts)) for folder in folders}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])
    places = {"shoal": str(FACE), **{f"shoal.{one}": one for one in FOLDERS}}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == places


def test_the_wheel_takes_every_file_that_the_code_reads() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = ROOT / FACE if package == "shoal" else ROOT.joinpath(*package.split(".")[1:])
        assert (folder / "py.typed").is_file(), package
        for file in (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts):
            owner = next(one for one in (file.parent, *file.parents) if (one / "__init__.py").exists())
            name = file.relative_to(owner).as_posix()
            # A folder's README is for people who read the repository.
            assert file.suffix in (".py", ".md") or any(fnmatch(name, pattern) for pattern in patterns), file
    assert {file.name for file in STATIC.iterdir()} >= {"index.html", "page.css", "page.js"}


def test_importing_shoal_loads_nothing_until_it_is_asked_for() -> None:
    code = "import sys, shoal; print(sorted(shoal.__all__), 'torch' in sys.modules, 'shoal.node' in sys.modules)"
    told = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "['Attachment', 'attach'] False False"
    assert shoal.attach.__module__ == "shoal.node.training.attachment"
    with pytest.raises(AttributeError, match="module 'shoal' has no attribute 'detach'"):
        _ = shoal.detach


def test_what_the_metadata_names_is_there() -> None:
    project = PROJECT["project"]
    for name in (project["readme"], *project["license-files"]):
        assert (ROOT / name).is_file(), name
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    assert project["license"] == "Apache-2.0"


def test_every_dependency_is_explained_and_nothing_else() -> None:
    text = (ROOT / "docs/dependencies.md").read_text()
    shipped, tools = text.split("\n## To work on it\n")
    optional = dict(PROJECT["project"]["optional-dependencies"])
    dev = names_of(optional.pop("dev"))
    needed = names_of([*PROJECT["project"]["dependencies"], *(one for extra in optional.values() for one in extra)])
    assert explained_in(shipped) == needed
    assert explained_in(tools) <= dev


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


def explained_in(tables: str) -> set[str]:
    return set(re.findall(r"(?m)^\| ([\w-]+) \|", tables)) - {"package"}


# -- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_preset_reads(path: Path, tmp_path: Path) -> None:
    if path.name.endswith(".manifest.toml"):
        text = path.read_text()
        assert parse_draft(text, json.dumps(task_options(text))).name == path.name.partition(".")[0]
        return
    manifest = tmp_path / "a.shoal"
    manifest.touch()
    assert load_config(path, {"manifest": str(manifest)}) != NodeConfig()


@pytest.mark.parametrize("path", sorted(DOCKER.rglob("*.*")), ids=lambda path: path.name)
def test_every_file_for_the_services_parses(path: Path) -> None:
    read: dict[str, Callable[[str], Any]] = {".yml": yaml.safe_load, ".json": json.loads, ".md": str}
    assert read[path.suffix](path.read_text())


# -- the image -------------------------------------------------------------------------------------------------------


def test_the_image_exposes_and_probes_the_default_ports() -> None:
    (exposed,) = arguments_of("EXPOSE")
    assert [int(port) for port in exposed.split()] == [CONTROL_PORT, TENSOR_PORT, WEB_PORT]
    (probe,) = arguments_of("HEALTHCHECK")
    command = json.loads(probe.partition("CMD ")[2])
    assert f"'127.0.0.1', {WEB_PORT}," in command[2]
    assert "'/healthz'" in command[2]
    compile(command[2], "HEALTHCHECK", "exec")


def test_the_image_runs_as_nobody_special_and_has_no_compiler() -> None:
    first, last = DOCKERFILE.split("\nFROM ")[1:]
    assert "gcc" in first
    assert "gcc" not in last
    assert "libgmp10" in last, "what fastecdsa was compiled against"
    (user,) = arguments_of("USER")
    assert user.split(":")[0].isdigit()
    assert user.split(":")[0] != "0"
    assert arguments_of("ENTRYPOINT") == ['["shoal"]']


def test_the_image_is_built_from_the_packages_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert kept == {*FOLDERS, "pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}


def test_a_mounted_data_folder_is_where_the_commands_look() -> None:
    (volume,) = arguments_of("VOLUME")
    assert f"ln -s {volume} /home/shoal/{NodeConfig().node.data_dir.removeprefix('~/')}" in DOCKERFILE


# -- the compose swarm -----------------------------------------------------------------------------------------------


def test_prometheus_scrapes_every_peer_of_the_compose_swarm() -> None:
    (job,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    (static,) = job["static_configs"]
    assert static["targets"] == [f"{name}:{WEB_PORT}" for name in PEERS]


def test_the_compose_swarm_is_one_bootstrap_peer_and_four_trainers() -> None:
    assert {name: peer["environment"] for name, peer in PEERS.items()} == {
        "bootstrap": {"ROLE": "bootstrap", "NAME": "bootstrap"},
        **{f"peer{number}": {"ROLE": "trainer", "NAME": f"peer{number}"} for number in range(1, 5)},
    }
    for name, peer in PEERS.items():
        assert peer["depends_on"] == {"create": {"condition": "service_completed_successfully"}}, name
        assert peer["image"] == SERVICES["create"]["image"]
        (command,) = peer["command"]
        flags = re.findall(r"--([a-z-]+)", command)
        assert set(flags) <= set(FLAGS), name
        assert "--web-host 0.0.0.0" in command, "Prometheus is another machine to it"
        # $$ is compose's $.
        assert set(re.findall(r"\$\$([A-Z]+)", command)) == set(peer["environment"])
    assert not [name for name in SERVICES if "build" in SERVICES[name] and name != "create"]


def test_what_the_services_mount_is_there() -> None:
    for name, service in SERVICES.items():
        for source, _, rest in (mount.partition(":") for mount in service.get("volumes", [])):
            if source.startswith("."):
                assert (DOCKER / source).exists(), name
                assert rest.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"], name


def test_ports_of_the_compose_swarm_are_for_this_machine_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_create_swarm_makes_keys_and_a_manifest_once(tmp_path: Path) -> None:
    """The script itself in a shell, with other folders than the container's."""
    data, etc = tmp_path / "data", tmp_path / "etc"
    for folder in (data, etc):
        folder.mkdir()
    (etc / "tiny.manifest.toml").write_bytes((ROOT / "configs/tiny.manifest.toml").read_bytes())
    shoal = tmp_path / "shoal"
    shoal.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m shoal.node "$@"\n')
    shoal.chmod(0o755)
    script = (DOCKER / "create-swarm").read_text()
    script = script.replace("cd /data", f"cd {shlex.quote(str(data))}").replace("/etc/shoal", shlex.quote(str(etc)))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def create() -> tuple[bytes, bytes]:
        subprocess.run(["sh", "-c", script], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=240)
        return (data / "swarm.shoal").read_bytes(), (data / "bootstrap.multiaddr").read_bytes()

    signed, address = create()
    manifest, _ = read_manifest_untrusted(signed)
    trainers = [name for name, peer in PEERS.items() if peer["environment"]["ROLE"] == "trainer"]
    assert set(manifest.founders) == {load_identity(data / name / "identity.key").peer for name in trainers}
    assert read_manifest_file(data / "swarm.shoal")[0] == signed
    bootstrap, multiaddr = parse_peer_address(address.decode().strip())
    assert bootstrap == load_identity(data / "bootstrap/identity.key").peer
    assert (multiaddr.net, multiaddr.host, multiaddr.port) == ("dns4", "bootstrap", CONTROL_PORT)
    assert create() == (signed, address), "a second start keeps the swarm"
