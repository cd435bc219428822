"""Where a daemon has its manifest from: a file, the data folder of an earlier start, or the swarm itself.

Invariant: a manifest that this returns is whole, signed by its owner, and hashes to the swarm id that was asked for.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal.dht.keys import lookup_keys
from shoal.node.config import MANIFEST_FILE, NodeConfig
from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.protocol.errors import ConfigError, ProtocolError
from shoal.protocol.identity import short_peer_id
from shoal.protocol.manifest import parse_uri, read_manifest_untrusted
from shoal.protocol.messages import GetManifest, ManifestAnswer, decode_message_untrusted, encode_message

MANIFEST_BYTES_MAX = 512 * 1024
RETRY_S = 1.0
REMIND_S = 15.0
LOOK_UP_S = 10.0
MEMBERS_WANTED = 4
ALONE = (
    "no peer of the swarm is connected yet; name one that runs: a URI with bootstrap=…, as its log and `shoal status`"
    " print it, or --bootstrap ADDRESS"
)

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmChoice:
    """Which swarm, where to look for it, and its manifest if that is at hand already."""

    swarm: bytes
    bootstraps: tuple[str, ...]
    signed: bytes | None


def read_manifest_file(path: Path) -> tuple[bytes, bytes]:
    """The signed bytes and the swarm id; raises ConfigError naming the file."""
    try:
        with path.open("rb") as file:
            signed = file.read(MANIFEST_BYTES_MAX + 1)
        _, swarm = read_manifest_untrusted(signed)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}", "give the path of a manifest") from error
    except ProtocolError as error:
        fix = "make one with `shoal swarm create DRAFT.toml`, or copy it whole"
        raise ConfigError(str(path), f"is no signed manifest ({error})", fix) from error
    return signed, swarm


def choose_swarm(config: NodeConfig) -> SwarmChoice:
    """What the configuration says; raises ConfigError where its pieces contradict each other."""
    uri = parse_uri(config.node.swarm) if config.node.swarm else None
    signed, swarm = _read_stored(config)
    if config.node.manifest is not None:
        given, given_swarm = read_manifest_file(Path(config.node.manifest))
        if swarm not in (None, given_swarm):
            problem = f"{config.data_path} holds another swarm's state"
            raise ConfigError("node.manifest", problem, "give a fresh --data-dir for another swarm")
        signed, swarm = given, given_swarm
    if swarm is not None and uri is not None and uri.swarm != swarm:
        fix = "give one of the two, or a fresh --data-dir for another swarm"
        raise ConfigError("node.swarm", f"is {uri.swarm.hex()[:16]}…, the manifest is of {swarm.hex()[:16]}…", fix)
    chosen = swarm or (uri.swarm if uri else None)
    if chosen is None:
        fix = "give --manifest FILE (from `shoal swarm create`) or a shoal:// URI (`shoal join URI`)"
        raise ConfigError("node.manifest", "neither a manifest nor a swarm is given", fix)
    bootstraps = tuple(dict.fromkeys((*(uri.bootstraps if uri else ()), *config.control.bootstraps)))
    return SwarmChoice(swarm=chosen, bootstraps=bootstraps, signed=signed)


def _read_stored(config: NodeConfig) -> tuple[bytes, bytes] | tuple[None, None]:
    """The manifest of an earlier start. One that is damaged gives way where it can be had again."""
    stored = config.data_path / MANIFEST_FILE
    if not stored.exists():
        return None, None
    try:
        return read_manifest_file(stored)
    except ConfigError as error:
        if config.node.swarm is None and config.node.manifest is None:
            fix = "start it once with --swarm URI or --manifest FILE: then the manifest is fetched or copied again"
            raise ConfigError(str(stored), error.problem, fix) from error
        aside = stored.with_suffix(".damaged")
        stored.replace(aside)
        log.warning("%s: %s; it is kept as %s and had again", stored, error.problem, aside.name)
        return None, None


def store_manifest(config: NodeConfig, signed: bytes) -> None:
    """Keep it for the next start."""
    path = config.data_path / MANIFEST_FILE
    if not path.exists():
        temporary = path.with_suffix(".partial")
        temporary.write_bytes(signed)
        temporary.replace(path)


async def fetch_manifest(control: ControlPlane, swarm: bytes, waiting: Callable[[str], None]) -> bytes:
    """Ask connected peers until one has it; `waiting` is told from time to time why it takes long."""
    question = encode_message(swarm, GetManifest())
    loop = asyncio.get_running_loop()
    remind_at = loop.time() + REMIND_S
    look_up_at = loop.time() + RETRY_S
    problem = ALONE
    while True:
        for one in control.peers():
            try:
                answer = decode_message_untrusted(swarm, await control.request(one.peer, question))
                if isinstance(answer, ManifestAnswer):
                    read_manifest_untrusted(answer.signed_manifest, swarm)
                    return answer.signed_manifest
            except (PeerUnreachable, RequestRefused, ProtocolError) as error:
                problem = f"{short_peer_id(one.peer)} did not give it: {error}"
        if loop.time() >= look_up_at:
            await _meet_members(control, swarm)
            look_up_at = loop.time() + LOOK_UP_S
        if loop.time() >= remind_at:
            remind_at += REMIND_S
            waiting(problem)
        await asyncio.sleep(RETRY_S)


async def _meet_members(control: ControlPlane, swarm: bytes) -> None:
    """The bootstrap peers may be relays, which know no manifest and know where members are."""
    connected = {one.peer for one in control.peers()}
    for key in lookup_keys(swarm, time.time()) if connected else ():
        for one in await control.find_providers(key):
            if one.peer not in connected and one.addresses:
                with contextlib.suppress(PeerUnreachable):
                    await control.connect(one.addresses)
                    connected.add(one.peer)
        if len(connected) >= MEMBERS_WANTED:
            return
