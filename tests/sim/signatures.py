"""Signatures of the simulator: ideal ones in place of Ed25519, and nothing encoded or judged twice.

A key remembers what it signed: a signature is valid for exactly those contents under exactly that key, domain and
swarm. So a forged, altered or borrowed one is refused as in life, and nobody pays for curves and canonical bytes.
Messages are immutable values that travel by reference here, so what was verified once needs no second look.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from shoal.protocol import identity as real
from shoal.protocol import messages
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import SIGNATURE_BYTES, Identity, PeerId, short_peer_id
from shoal.protocol.wire import encode_record

MEMO_MAX = 1 << 14  # entries, of each kind; then all are forgotten
_Signed = tuple[str, bytes, object]  # domain, swarm, contents
# The object stands beside what is known of it, so that its id stays its own.
_encoded: dict[int, tuple[object, bytes]] = {}
_verified: dict[int, tuple[object, PeerId, bytes]] = {}


class SimIdentity(Identity):
    """An identity that signs by remembering."""

    __slots__ = ("__weakref__", "_signed")

    def __init__(self, seed: bytes) -> None:
        super().__init__(seed)
        self._signed: dict[bytes, _Signed] = {}
        if len(_signers) >= MEMO_MAX:
            for peer in [peer for peer, signers in _signers.items() if not signers]:
                del _signers[peer]
        _signers.setdefault(self.peer, WeakSet()).add(self)
        _newest[self.peer] = self

    def sign(self, domain: str, swarm: bytes, payload: bytes) -> bytes:
        return self.remember(domain, swarm, payload)

    def remember(self, domain: str, swarm: bytes, contents: object) -> bytes:
        """A new signature of these contents."""
        signature = len(self._signed).to_bytes(8, "big") + self.peer + bytes(SIGNATURE_BYTES - 40)
        self._signed[signature] = (domain, swarm, contents)
        return signature

    def has_signed(self, signature: bytes, domain: str, swarm: bytes, contents: object) -> bool:
        known = self._signed.get(signature)
        if known is None or known[:2] != (domain, swarm):
            return False
        return known[2] is contents or known[2] == contents


# The same key may live in several worlds of one process.
_signers: dict[PeerId, WeakSet[SimIdentity]] = {}
_newest: WeakValueDictionary[PeerId, SimIdentity] = WeakValueDictionary()


def _verify(peer: PeerId, domain: str, swarm: bytes, contents: object, signature: bytes) -> None:
    newest = _newest.get(peer)
    if newest is not None and newest.has_signed(signature, domain, swarm, contents):
        return
    if not any(one.has_signed(signature, domain, swarm, contents) for one in _signers.get(peer, ())):
        raise ProtocolError(Refusal.BAD_SIGNATURE, f"{domain} is not signed by {short_peer_id(peer)}")


def verify_signature(peer: PeerId, domain: str, swarm: bytes, payload: bytes, signature: bytes) -> None:
    if peer in _signers:
        _verify(peer, domain, swarm, payload, signature)
    else:
        _real_verify_signature(peer, domain, swarm, payload, signature)


def encode_once(value: object) -> bytes:
    """`encode_record`, once for each object."""
    known = _encoded.get(id(value))
    if known is not None and known[0] is value:
        return known[1]
    raw = encode_record(value)
    _remember(_encoded, value, (value, raw))
    return raw


def sign_message(identity: Identity, swarm: bytes, message: Any) -> Any:
    if not isinstance(identity, SimIdentity):
        return _real_sign_message(identity, swarm, message)
    domain = messages._DOMAINS[type(message)]
    signed = replace(message, signature=identity.remember(domain, swarm, None))
    identity._signed[signed.signature] = (domain, swarm, signed)
    return signed


def verify_message(peer: PeerId, swarm: bytes, message: Any) -> None:
    known = _verified.get(id(message))
    if known is not None and known[0] is message and known[1] == peer and known[2] == swarm:
        return
    if peer in _signers:
        _verify(peer, messages._DOMAINS[type(message)], swarm, message, message.signature)
    else:
        _real_verify_message(peer, swarm, message)
    _remember(_verified, message, (message, peer, swarm))


def sign_ready(identity: Identity, swarm: bytes, ready: messages.Ready) -> messages.SignedReady:
    if not isinstance(identity, SimIdentity):
        return _real_sign_ready(identity, swarm, ready)
    signature = identity.remember("ready", swarm, ready)
    return messages.SignedReady(peer=identity.peer, ready=ready, signature=signature)


def verify_ready(swarm: bytes, signed: messages.SignedReady) -> None:
    known = _verified.get(id(signed))
    if known is not None and known[0] is signed and known[2] == swarm:
        return
    if signed.peer in _signers:
        _verify(signed.peer, "ready", swarm, signed.ready, signed.signature)
    else:
        _real_verify_ready(swarm, signed)
    _remember(_verified, signed, (signed, signed.peer, swarm))


def _remember(memo: dict[int, Any], value: object, entry: tuple[Any, ...]) -> None:
    if len(memo) >= MEMO_MAX:
        memo.clear()
    memo[id(value)] = entry


_real_verify_signature = real.verify_signature
_real_sign_message = messages.sign_message
_real_verify_message = messages.verify_message
_real_sign_ready = messages.sign_ready
_real_verify_ready = messages.verify_ready
_STAND_INS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "verify_signature": (real.verify_signature, verify_signature),
    "sign_message": (messages.sign_message, sign_message),
    "verify_message": (messages.verify_message, verify_message),
    "sign_ready": (messages.sign_ready, sign_ready),
    "verify_ready": (messages.verify_ready, verify_ready),
}


def install() -> None:
    """Put the stand-ins wherever the cores and the simulator call the originals. For keys that are no SimIdentity's
    the originals are called."""
    if messages.__dict__["encode_record"] is encode_once:
        return
    messages.__dict__["encode_record"] = encode_once  # for digest_record; no other function there gets one value twice
    _exchange(_STAND_INS)


def uninstall() -> None:
    """Put the originals back: what else is tested in this process finds the production code."""
    if messages.__dict__["encode_record"] is not encode_once:
        return
    messages.__dict__["encode_record"] = encode_record
    _exchange({attribute: (stand_in, original) for attribute, (original, stand_in) in _STAND_INS.items()})


def _exchange(functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(("shoal.protocol.", "tests.sim.")) and module.__dict__ is not globals():
            for attribute, (there, wanted) in functions.items():
                if module.__dict__.get(attribute) is there:
                    setattr(module, attribute, wanted)
