"""Under which DHT keys the peers of a swarm announce themselves.

A key is the sha2-256 multihash of (namespace, swarm, epoch), so that any Kademlia implementation can provide and find
it. It changes with every epoch: storing nodes keep a provider for up to two days and only so many for one key, so
under a single key the peers of yesterday would crowd out those of today; and who wants to sit next to the key to
censor it has to find new node ids every hour (libp2p kad-dht specification, provider records).

Invariant: two peers whose clocks differ by less than an epoch share at least one of their lookup keys.
"""

import hashlib
import struct

NAMESPACE = b"shoal/providers/1"
EPOCH_S = 3600

_SHA2_256_HEADER = bytes((0x12, 0x20))


def epoch_at(now_s: float) -> int:
    """The epoch of a wall-clock time in seconds since 1970."""
    return int(now_s // EPOCH_S)


def provider_key(swarm: bytes, epoch: int) -> bytes:
    """The 34-byte multihash under which peers of `swarm` announce themselves in `epoch`."""
    digest = hashlib.sha256(NAMESPACE + struct.pack(">B", len(swarm)) + swarm + struct.pack(">q", epoch)).digest()
    return _SHA2_256_HEADER + digest


def lookup_keys(swarm: bytes, now_s: float) -> tuple[bytes, ...]:
    """Where to look for peers now, the most promising first: this epoch, the one before, the one after."""
    epoch = epoch_at(now_s)
    return tuple(provider_key(swarm, at) for at in (epoch, epoch - 1, epoch + 1))


def presence_topic(swarm: bytes) -> str:
    """The gossip topic of a swarm's presences."""
    return f"shoal/{swarm.hex()}"
