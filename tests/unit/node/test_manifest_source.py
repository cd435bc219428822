"""Where the manifest comes from: a file, the data folder, or peers that may have another one."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node import manifest_source as module
from shoal.node.config import NodeConfig
from shoal.node.control import ControlConfig, ControlHandlers
from shoal.node.manifest_source import (
    MANIFEST_BYTES_MAX,
    MANIFEST_FILE,
    choose_swarm,
    fetch_manifest,
    read_manifest_file,
    store_manifest,
)
from shoal.protocol.errors import ConfigError, ProtocolError, Refusal, UriError
from shoal.protocol.identity import Identity, PeerId, format_peer_id
from shoal.protocol.manifest import SwarmUri, sign_manifest
from shoal.protocol.messages import (
    GetManifest,
    GetPeers,
    ManifestAnswer,
    decode_message_untrusted,
    digest_record,
    encode_message,
)
from tests.sim.memory_control import MemoryControl, MemoryNetwork
from tests.unit.protocol.samples import IDENTITIES, PEERS, make_sample_manifest

MANIFEST = make_sample_manifest()
SIGNED = sign_manifest(MANIFEST, IDENTITIES[0])
SWARM = digest_record(MANIFEST)
OTHER = replace(MANIFEST, name="another")
OTHER_SIGNED = sign_manifest(OTHER, IDENTITIES[0])
OTHER_SWARM = digest_record(OTHER)
BOOTSTRAPS = tuple(f"/ip4/203.0.113.{number}/tcp/9460/p2p/{format_peer_id(PEERS[number])}" for number in (1, 2))


def configure(
    folder: Path, manifest: Path | None = None, swarm: str | None = None, bootstraps: tuple[str, ...] = ()
) -> NodeConfig:
    config = NodeConfig()
    return replace(
        config,
        node=replace(
            config.node, data_dir=str(folder), manifest=None if manifest is None else str(manifest), swarm=swarm
        ),
        control=replace(config.control, bootstraps=bootstraps),
    )


def write(path: Path, raw: bytes = SIGNED) -> Path:
    path.write_bytes(raw)
    return path


def refuse(config: NodeConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        choose_swarm(config)
    assert caught.value.fix
    return caught.value


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_manifest_file_gives_its_swarm(tmp_path: Path) -> None:
    assert read_manifest_file(write(tmp_path / "run.shoal")) == (SIGNED, SWARM)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "is no signed manifest"),
        (b'name = "a draft"', "is no signed manifest"),
        (SIGNED[:-1], "is no signed manifest"),
        (SIGNED[:-1] + bytes([SIGNED[-1] ^ 1]), "bad_signature"),
        (bytes(MANIFEST_BYTES_MAX + 5), "oversized"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_by_its_name(tmp_path: Path, raw: bytes, problem: str) -> None:
    path = write(tmp_path / "run.shoal", raw)
    with pytest.raises(ConfigError) as caught:
        read_manifest_file(path)
    assert caught.value.field == str(path)
    assert problem in caught.value.problem
    assert "swarm create" in caught.value.fix


def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=problem) as caught:
            read_manifest_file(path)
        assert caught.value.field == str(path)


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match="oversized"):
        read_manifest_file(Path("/dev/zero"))


# -- the configuration's choice -------------------------------------------------------------------------------------


def test_a_file_is_enough(tmp_path: Path, data: Path) -> None:
    choice = choose_swarm(configure(data, write(tmp_path / "run.shoal")))
    assert (choice.swarm, choice.bootstraps, choice.signed) == (SWARM, (), SIGNED)


def test_a_uri_is_enough_and_brings_its_bootstrap_peers(data: Path) -> None:
    uri = SwarmUri(swarm=SWARM, bootstraps=BOOTSTRAPS[:1])
    choice = choose_swarm(configure(data, swarm=str(uri), bootstraps=BOOTSTRAPS))
    assert (choice.swarm, choice.bootstraps, choice.signed) == (SWARM, BOOTSTRAPS, None)


def test_a_file_and_the_uri_of_the_same_swarm_go_together(tmp_path: Path, data: Path) -> None:
    uri = SwarmUri(swarm=SWARM, bootstraps=BOOTSTRAPS)
    choice = choose_swarm(configure(data, write(tmp_path / "run.shoal"), str(uri)))
    assert (choice.swarm, choice.bootstraps, choice.signed) == (SWARM, BOOTSTRAPS, SIGNED)


def test_the_folder_of_an_earlier_start_is_enough(data: Path) -> None:
    store_manifest(configure(data), SIGNED)
    choice = choose_swarm(configure(data))
    assert (choice.swarm, choice.signed) == (SWARM, SIGNED)
    again = choose_swarm(configure(data, write(data / "copy"), str(SwarmUri(swarm=SWARM))))
    assert again.signed == SIGNED


def test_nothing_at_all_is_refused(data: Path) -> None:
    error = refuse(configure(data))
    assert error.field == "node.manifest"
    assert "swarm create" in error.fix and "join" in error.fix


def test_a_uri_that_does_not_parse_is_refused(data: Path) -> None:
    with pytest.raises(UriError):
        choose_swarm(configure(data, swarm="shoal://abc"))


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_uri_of_another_swarm_than_the_manifest_is_refused(tmp_path: Path, data: Path, where: str) -> None:
    uri = str(SwarmUri(swarm=OTHER_SWARM))
    path = write(tmp_path / "run.shoal") if where == "file" else None
    if path is None:
        store_manifest(configure(data), SIGNED)
    error = refuse(configure(data, path, uri))
    assert error.field == "node.swarm"
    assert SWARM.hex()[:16] in error.problem and OTHER_SWARM.hex()[:16] in error.problem


def test_a_manifest_of_another_swarm_than_the_folders_is_refused(tmp_path: Path, data: Path) -> None:
    # Its ledger, votes and snapshots are of the other swarm.
    store_manifest(configure(data), SIGNED)
    error = refuse(configure(data, write(tmp_path / "other.shoal", OTHER_SIGNED)))
    assert error.field == "node.manifest"
    assert str(data) in error.problem and "--data-dir" in error.fix


def test_a_damaged_stored_manifest_is_named(data: Path) -> None:
    path = write(data / MANIFEST_FILE, SIGNED[:-1])
    assert refuse(configure(data)).field == str(path)


def test_a_manifest_is_stored_once(data: Path) -> None:
    store_manifest(configure(data), SIGNED)
    store_manifest(configure(data), OTHER_SIGNED)
    assert (data / MANIFEST_FILE).read_bytes() == SIGNED
    assert [path.name for path in data.iterdir()] == [MANIFEST_FILE]


# -- from the swarm -------------------------------------------------------------------------------------------------

Answer = Callable[[object], object]


@asynccontextmanager
async def swarm_of(*answers: Answer) -> AsyncIterator[MemoryControl]:
    """A peer that asks, connected to one peer for each of `answers`."""
    network = MemoryNetwork()
    planes: list[MemoryControl] = []

    async def no_request(peer: PeerId, raw: bytes) -> bytes:
        raise ProtocolError(Refusal.NOT_READY, "it asks only")

    def make_plane(identity: Identity, on_request: Callable[[PeerId, bytes], object]) -> MemoryControl:
        handlers = ControlHandlers(
            on_message=lambda peer, raw: None,
            on_request=on_request,  # type: ignore[arg-type]  # an async function
            on_presence=lambda peer, raw: None,
            on_peer_connected=lambda peer: None,
            on_peer_lost=lambda peer: None,
        )
        config = ControlConfig(identity=identity, swarm=SWARM, listen=("/ip4/127.0.0.1/tcp/0",))
        planes.append(MemoryControl(network, config, handlers))
        return planes[-1]

    asker = make_plane(IDENTITIES[0], no_request)
    for number, answer in enumerate(answers, start=1):

        async def on_request(peer: PeerId, raw: bytes, answer: Answer = answer) -> bytes:
            return encode_message(SWARM, answer(decode_message_untrusted(SWARM, raw)))

        make_plane(IDENTITIES[number], on_request)
    for plane in planes:
        await plane.start()
    for plane in planes[1:]:
        await asker.connect(plane.addresses())
    yield asker
    for plane in planes:
        await plane.stop()


def refuses(question: object) -> object:
    raise ProtocolError(Refusal.NOT_READY, "this peer is starting")


def gives(signed: bytes) -> Answer:
    def answer(question: object) -> object:
        assert question == GetManifest()
        return ManifestAnswer(signed_manifest=signed)

    return answer


@pytest.mark.parametrize(
    "bad",
    [
        refuses,
        gives(OTHER_SIGNED),  # of another swarm
        gives(SIGNED[:-1]),  # torn
        gives(SIGNED[:-1] + bytes([SIGNED[-1] ^ 1])),  # forged
        lambda question: GetPeers(),  # no answer at all
    ],
)
async def test_a_bad_answer_leads_to_the_next_peer(bad: Answer) -> None:
    async with swarm_of(bad, gives(SIGNED)) as asker:
        assert await fetch_manifest(asker, SWARM, lambda problem: None) == SIGNED


async def test_a_peer_that_has_it_later_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    monkeypatch.setattr(module, "REMIND_S", 0.0)
    asked: list[object] = []
    told: list[str] = []

    def answer(question: object) -> object:
        asked.append(question)
        return refuses(question) if len(asked) < 3 else ManifestAnswer(signed_manifest=SIGNED)

    async with swarm_of(answer) as asker:
        assert await fetch_manifest(asker, SWARM, told.append) == SIGNED
    assert len(asked) == 3
    assert len(told) == 2 and all("not_ready" in problem for problem in told)


async def test_who_waits_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    monkeypatch.setattr(module, "REMIND_S", 0.0)
    told: asyncio.Queue[str] = asyncio.Queue()
    async with swarm_of() as asker:
        task = asyncio.create_task(fetch_manifest(asker, SWARM, told.put_nowait))
        problem = await told.get()
        assert problem.startswith("no peer of the swarm is connected yet") and "--bootstrap ADDRESS" in problem
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
