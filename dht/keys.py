"""Under which DHT keys the peers of a swarm announce themselves, and what they hold of its log.

A key is the sha2-256 multihash of (namespace, swarm, epoch), so that any Kademlia implementation can provide and find
it. It changes with every epoch: storing nodes keep a provider for up to two days and only so many for one key, so
under a single key the peers of yesterday would crowd out those of today; and who wants to sit next to the key to
censor it has to find new node ids every hour (libp2p kad-dht specification, provider records).

What a peer holds has keys of its own, one for every SEGMENT_ROUNDS rounds: whoever has all updates of a segment, up to
its own head, and whoever has a snapshot of one of its rounds. Those need no epochs: segments go by.

Invariant: two peers whose clocks differ by less than an epoch share at least one of their lookup keys.
"""

import hashlib
import struct

NAMESPACE = b"shoal/providers/1"
UPDATES_NAMESPACE = b"shoal/updates/1"
SNAPSHOTS_NAMESPACE = b"shoal/snapshots/1"
EPOCH_S = 3600
SEGMENT_ROUNDS = 64

_SHA2_256_HEADER = bytes((0x12, 0x20))


def epoch_at(now_s: float) -> int:
    """The epoch of a wall-clock time in seconds since 1970."""
    return int(now_s // EPOCH_S)


def provider_key(swarm: bytes, epoch: int) -> bytes:
    """The 34-byte multihash under which peers of `swarm` announce themselves in `epoch`."""
    digest = hashlib.sha256(NAMESPACE + struct.pack(">B", len(swarm)) + swarm + struct.pack(">q", epoch)).digest()
    return _SHA2_256_HEADER + digest


def updates_key(swarm: bytes, number: int) -> bytes:
    """Under which those are found who hold the updates of the segment of round `number`."""
    return _segment_key(UPDATES_NAMESPACE, swarm, number)


def snapshots_key(swarm: bytes, number: int) -> bytes:
    """Under which those are found who hold a snapshot of the segment of round `number`."""
    return _segment_key(SNAPSHOTS_NAMESPACE, swarm, number)


def _segment_key(namespace: bytes, swarm: bytes, number: int) -> bytes:
    segment = struct.pack(">q", number // SEGMENT_ROUNDS)
    return _SHA2_256_HEADER + hashlib.sha256(namespace + struct.pack(">B", len(swarm)) + swarm + segment).digest()


def lookup_keys(swarm: bytes, now_s: float) -> tuple[bytes, ...]:
    """Where to look for peers now, the most promising first: this epoch, the one before, the one after."""
    epoch = epoch_at(now_s)
    return tuple(provider_key(swarm, at) for at in (epoch, epoch - 1, epoch + 1))


def presence_topic(swarm: bytes) -> str:
    """The gossip topic of a swarm's presences."""
    return f"shoal/{swarm.hex()}"
