"""Signatures of the simulator: a keyed hash in place of Ed25519, and nothing judged twice.

A signature is still bound to key, domain, swarm and bytes, so a forged, altered or borrowed one is refused as in life;
only who holds the table of keys could forge, and that is this module. Messages are immutable values that travel by
reference here, so what was verified once needs no second look.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from blake3 import blake3

from shoal.protocol import identity as real
from shoal.protocol import messages
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import SIGNATURE_BYTES, Identity, PeerId, short_peer_id
from shoal.protocol.wire import encode_record

MEMO_MAX = 1 << 14  # entries, of each kind; then all are forgotten
_NO_SIGNATURE = bytes(SIGNATURE_BYTES)
_keys: dict[PeerId, bytes] = {}
# The object stands beside what is known of it, so that its id stays its own.
_encoded: dict[int, tuple[object, bytes]] = {}
_payloads: dict[int, tuple[object, bytes]] = {}
_verified: dict[int, tuple[object, PeerId, bytes]] = {}


class SimIdentity(Identity):
    """An identity whose signatures are keyed hashes."""

    __slots__ = ()

    def __init__(self, seed: bytes) -> None:
        super().__init__(seed)
        if len(_keys) >= MEMO_MAX:
            _keys.clear()
        _keys[self.peer] = seed

    def sign(self, domain: str, swarm: bytes, payload: bytes) -> bytes:
        return _sign(self.seed, domain, swarm, payload)


def _sign(seed: bytes, domain: str, swarm: bytes, payload: bytes) -> bytes:
    text = b"%d %s %d %s" % (len(domain), domain.encode(), len(swarm), swarm)
    return blake3(text + payload, key=seed).digest(SIGNATURE_BYTES)


def verify_signature(peer: PeerId, domain: str, swarm: bytes, payload: bytes, signature: bytes) -> None:
    seed = _keys.get(peer)
    if seed is None:
        _real_verify_signature(peer, domain, swarm, payload, signature)
    elif _sign(seed, domain, swarm, payload) != signature:
        raise ProtocolError(Refusal.BAD_SIGNATURE, f"{domain} is not signed by {short_peer_id(peer)}")


def encode_once(value: object) -> bytes:
    """`encode_record`, once for each object."""
    known = _encoded.get(id(value))
    if known is not None and known[0] is value:
        return known[1]
    raw = encode_record(value)
    _remember(_encoded, value, (value, raw))
    return raw


def sign_message(identity: Identity, swarm: bytes, message: Any) -> Any:
    payload = encode_record(
        replace(message, signature=_NO_SIGNATURE) if message.signature != _NO_SIGNATURE else message
    )
    domain = messages._DOMAINS[type(message)]
    signed = replace(message, signature=identity.sign(domain, swarm, payload))
    _remember(_payloads, signed, (signed, payload))
    return signed


def verify_message(peer: PeerId, swarm: bytes, message: Any) -> None:
    known = _verified.get(id(message))
    if known is not None and known[0] is message and known[1] == peer and known[2] == swarm:
        return
    kept = _payloads.get(id(message))
    if kept is not None and kept[0] is message:
        payload = kept[1]
    else:
        payload = encode_record(replace(message, signature=_NO_SIGNATURE))
    verify_signature(peer, messages._DOMAINS[type(message)], swarm, payload, message.signature)
    _remember(_verified, message, (message, peer, swarm))


def verify_ready(swarm: bytes, signed: messages.SignedReady) -> None:
    known = _verified.get(id(signed))
    if known is not None and known[0] is signed and known[2] == swarm:
        return
    verify_signature(signed.peer, "ready", swarm, encode_record(signed.ready), signed.signature)
    _remember(_verified, signed, (signed, signed.peer, swarm))


def _remember(memo: dict[int, Any], value: object, entry: tuple[Any, ...]) -> None:
    if len(memo) >= MEMO_MAX:
        memo.clear()
    memo[id(value)] = entry


_real_verify_signature = real.verify_signature
_STAND_INS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "verify_signature": (real.verify_signature, verify_signature),
    "sign_message": (messages.sign_message, sign_message),
    "verify_message": (messages.verify_message, verify_message),
    "verify_ready": (messages.verify_ready, verify_ready),
}


def install() -> None:
    """Put the stand-ins wherever the cores and the simulator call the originals. Of keys that are no SimIdentity's
    everything is judged as before, so other tests of the same process do not notice."""
    if messages.__dict__["encode_record"] is encode_once:
        return
    messages.__dict__["encode_record"] = encode_once  # for digest_record; no other function there gets one value twice
    for name, module in list(sys.modules.items()):
        if name.startswith(("shoal.protocol.", "tests.sim.")) and module.__dict__ is not globals():
            for attribute, (original, stand_in) in _STAND_INS.items():
                if module.__dict__.get(attribute) is original:
                    setattr(module, attribute, stand_in)
