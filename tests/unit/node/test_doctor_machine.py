"""How the doctor reads this machine: ports that it binds, texts that other programs print, looks that hang."""

import asyncio
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from shoal.node import doctor_machine
from shoal.node.config import ControlTable, NodeConfig, TensorTable, WebTable
from shoal.node.doctor_findings import DeviceSeen, TorchSeen, Unknown
from shoal.node.doctor_machine import (
    count_dials,
    find_holder,
    list_listeners,
    look,
    measure_folder,
    parse_nft,
    parse_port_list,
    parse_torch,
    parse_ufw,
    run_command,
    see_disk,
    see_identity,
    see_port,
    see_ports,
    see_versions,
)
from shoal.node.doctor_network import Firewall, PortState
from shoal.node.identity_file import create_identity
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import format_peer_id


async def test_a_look_that_hangs_is_left_behind() -> None:
    let_go = threading.Event()
    assert await look(let_go.wait, 0.01) is None
    let_go.set()


async def test_a_look_answers_or_raises_what_was_raised() -> None:
    assert await look(lambda: 7) == 7

    def fail() -> int:
        raise ConfigError("field", "problem", "fix")

    def fall() -> int:
        raise PermissionError("no")

    with pytest.raises(ConfigError):
        await look(fail)
    with pytest.raises(PermissionError):
        await look(fall)


# -- identity ----------------------------------------------------------------------------------------------------------


def test_the_key_is_looked_at_and_never_made(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    assert see_identity(path, in_use=False).peer == ""
    assert list(tmp_path.iterdir()) == []
    made = create_identity(path)
    assert see_identity(path, in_use=True).peer == format_peer_id(made.peer)
    path.chmod(0o640)
    seen = see_identity(path, in_use=False)
    assert "0640" in seen.fault and seen.fix == f"run: chmod 600 {path}"


# -- ports -------------------------------------------------------------------------------------------------------------


def test_a_port_is_free_or_somebody_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        seen = see_port("tensor", "127.0.0.1", port)
        assert (seen.state, seen.port) == (PortState.TAKEN, port)
        assert seen.holder.endswith(f"(process {os.getpid()})")
        assert ("127.0.0.1", port) in list_listeners(os.getpid())
    assert see_port("tensor", "127.0.0.1", port).state is PortState.FREE
    assert find_holder(port) == ""


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    assert see_port("web", "192.0.2.77", 0).state is PortState.NO_ADDRESS


def test_all_three_ports_are_looked_at() -> None:
    local = "127.0.0.1"
    config = NodeConfig(
        control=ControlTable(host=local, port=0), tensor=TensorTable(host=local, port=0), web=WebTable(port=0)
    )
    assert [one.use for one in see_ports(config)] == ["control", "tensor", "web"]


def test_who_does_not_run_listens_to_nothing() -> None:
    assert list_listeners(2**22 + 1) == ()


# -- firewall ----------------------------------------------------------------------------------------------------------

UFW = """Status: active

To                         Action      From
--                         ------      ----
22/tcp                     ALLOW       Anywhere
9460:9461/tcp              ALLOW       Anywhere
80,443/tcp                 ALLOW       Anywhere
25/tcp                     DENY        Anywhere
22/tcp (v6)                ALLOW       Anywhere (v6)
"""


def test_ufw() -> None:
    assert parse_ufw(UFW) == {22, 80, 443, 9460, 9461}
    assert parse_ufw("ERROR: You need to be root") is None


def test_firewalld() -> None:
    assert parse_port_list("9460/tcp 9000-9002/tcp 53/udp\n") == {9460, 9000, 9001, 9002}
    assert parse_port_list("") == frozenset()


def chain(name: str, **more: object) -> dict[str, object]:
    return {"chain": {"family": "inet", "table": "filter", "name": name, **more}}


def rule(name: str, *expr: object) -> dict[str, object]:
    return {"rule": {"family": "inet", "table": "filter", "chain": name, "expr": list(expr)}}


def match(right: object) -> dict[str, object]:
    return {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": right}}


def nft(*entries: object) -> str:
    return json.dumps({"nftables": [{"metainfo": {}}, *entries]})


def test_nftables() -> None:
    told = nft(
        chain("input", hook="input", policy="drop"),
        rule("input", match(22), {"accept": None}),
        rule("input", match({"set": [9460, {"range": [9461, 9463]}]}), {"accept": None}),
        rule("input", match(25), {"drop": None}),
    )
    seen = parse_nft(told)
    assert (seen.kind, seen.drops) == (Firewall.NFTABLES, True)
    assert seen.open_ports == {22, 9460, 9461, 9462, 9463}


def test_nftables_that_end_with_a_rule_for_everything_turn_away() -> None:
    told = nft(chain("input", hook="input", policy="accept"), rule("input", {"counter": {}}, {"reject": None}))
    assert parse_nft(told).drops is True


def test_nftables_with_a_ban_list_turn_nothing_else_away() -> None:
    banned = {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "203.0.113.9"}}
    told = nft(chain("input", hook="input", policy="accept"), rule("input", banned, {"drop": None}))
    assert parse_nft(told).drops is False


@pytest.mark.parametrize("told", [nft(), nft(chain("forward", hook="forward", policy="drop"))])
def test_nftables_that_look_at_nothing_that_comes_in(told: str) -> None:
    assert parse_nft(told).kind is Firewall.NONE


@pytest.mark.parametrize("told", ["", "{}", "[]", '{"nftables": 3}', '{"nftables": [{"chain": 1}]}'])
def test_what_nft_does_not_say_is_not_guessed(told: str) -> None:
    assert parse_nft(told).drops is None


async def test_commands_that_are_not_there_fail_or_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await run_command("shoal-no-such-command") is None
    assert await run_command("false") is None
    assert await run_command("echo", "yes") == "yes\n"
    monkeypatch.setattr(doctor_machine, "COMMAND_TIMEOUT_S", 0.01)
    assert await run_command("sleep", "60") is None
    assert asyncio.all_tasks() == {asyncio.current_task()}


# -- routes ------------------------------------------------------------------------------------------------------------


def test_dials_are_counted_by_family() -> None:
    dials = [("1.2.3.4", ""), ("1.2.3.5", "refused"), ("2001:db8::1", "unreachable")]
    ipv4, ipv6 = count_dials("10.0.0.1", 4, dials), count_dials("", 6, dials)
    assert (ipv4.dials, ipv4.answered, ipv4.fault) == (2, 1, "refused")
    assert (ipv6.dials, ipv6.answered, ipv6.fault) == (1, 0, "unreachable")


# -- disk --------------------------------------------------------------------------------------------------------------


def test_a_disk_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    seen = see_disk(tmp_path / "not" / "there", 5)
    assert seen.folder == str(tmp_path) and seen.used_bytes == 5
    assert seen.free_bytes > 0 and seen.write_bytes_per_s is not None and seen.write_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_machine.os, "open", refuse)
    seen = see_disk(tmp_path, 0)
    assert seen.fault == "Permission denied" and seen.write_bytes_per_s is None


def test_what_the_model_takes_already(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "a").write_bytes(bytes(10))
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "b").write_bytes(bytes(5))
    (tmp_path / "other").write_bytes(bytes(100))
    assert measure_folder(tmp_path) == 15


# -- torch and versions ------------------------------------------------------------------------------------------------


def test_what_the_child_says_of_torch() -> None:
    found = {
        "version": "2.9",
        "cuda_built": True,
        "cuda_fault": "",
        "fault": "",
        "devices": [{"name": "H200", "total": 2, "free": 1}],
    }
    seen = parse_torch(json.dumps(found), "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release")
    device = DeviceSeen(name="H200", total_bytes=2, free_bytes=1)
    assert seen == TorchSeen(version="2.9", cuda_built=True, devices=(device,), driver="570.86.15")


@pytest.mark.parametrize("told", ["", "{}", "[]", '{"devices": [1]}'])
def test_a_child_that_dies_says_nothing(told: str) -> None:
    assert isinstance(parse_torch(told, ""), Unknown)


def test_versions_are_those_that_are_installed() -> None:
    seen = see_versions(("shoal/0.1.0",), ())
    assert seen.libp2p == seen.libp2p_wanted == "0.8.1"
    assert seen.agents == ("shoal/0.1.0",)
