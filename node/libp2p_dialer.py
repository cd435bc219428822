"""Connecting to peers: one peer by several addresses, and bootstrap peers for as long as the node runs. Runs in trio.

The library's own dialling is gone around: it waits out a quarter of a second after success, refuses to dial a peer
that failed within the last minute, has no time limit of its own, and resolves names past the system's resolver.

Invariants: at most one dial per peer at a time, which takes up whatever addresses are told meanwhile; every dial ends
within CONNECT_TIMEOUT_S; circuits through relays are tried after every direct address that is known then; a bootstrap
peer that cannot be reached is dialled again after a pause that doubles up to BOOTSTRAP_RETRY_MAX_S, and costs nothing
else.
"""

import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from multiaddr import Multiaddr

from shoal.dht.addresses import Address, keep_dialable, parse_address
from shoal.node.control import CONNECT_TIMEOUT_S, BootstrapFailed, PeerUnreachable
from shoal.node.endpoints import take_turns
from shoal.node.libp2p_stack import BoundedSwarm
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId, encode_libp2p_peer_id

# The next address of a peer is tried when the one before has not answered for this long (RFC 8305).
HEAD_START_S = 0.25
BOOTSTRAP_RETRY_MIN_S = 1.0
BOOTSTRAP_RETRY_MAX_S = 60.0
# How long an address that was told for a peer may be used by look-ups.
TOLD_ADDRESS_TTL_S = 600

_FAMILIES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}


class _Dial:
    """One peer that is being dialled: by which addresses, those included that are told while others hang."""

    def __init__(self, targets: Sequence[Address]) -> None:
        self.ended = trio.Event()
        self.more = trio.Event()
        self._known = dict.fromkeys(targets)
        self._fresh = list(self._known)

    def add(self, targets: Sequence[Address]) -> None:
        fresh = [target for target in targets if target not in self._known]
        self._known |= dict.fromkeys(fresh)
        self._fresh += fresh
        if fresh:
            self.more.set()

    def take(self) -> list[Address]:
        """Those that nobody has begun with."""
        fresh, self._fresh, self.more = self._fresh, [], trio.Event()
        return fresh


class Dialer:
    """Makes connections for one host."""

    def __init__(self, swarm: BoundedSwarm, me: PeerId) -> None:
        self._swarm = swarm
        self._me = me
        self._dials: dict[PeerId, _Dial] = {}
        self._closed = False
        self._retry = trio.Event()

    def retry(self) -> None:
        """The way out may be another one now: dial lost bootstrap peers at once."""
        self._retry.set()
        self._retry = trio.Event()

    def close(self) -> None:
        """Refuse every later dial."""
        self._closed = True

    def is_connected(self, peer: PeerId) -> bool:
        """Whether any connection to the peer stands."""
        return any(not connection.is_closed for connection in self._swarm.get_connections(_peer_id(peer)))

    def is_directly_connected(self, peer: PeerId) -> bool:
        """Whether a connection to the peer stands that goes through no relay."""
        return self._swarm.is_directly_connected(_peer_id(peer))

    def known_addresses(self, peer: PeerId) -> tuple[str, ...]:
        """What the peer said of itself, or others of it, in canonical form."""
        try:
            known = self._swarm.peerstore.addrs(_peer_id(peer))
        except PeerStoreError:
            return ()
        return keep_dialable((str(address) for address in known), peer)

    async def connect(self, peer: PeerId, addresses: Sequence[Address] = (), *, directly: bool = False) -> None:
        """Connect by these addresses, or by those that are known; raises PeerUnreachable within CONNECT_TIMEOUT_S.

        `directly`: a connection through a relay is not enough.
        """
        errors: list[str] = []
        is_connected = self.is_directly_connected if directly else self.is_connected
        with trio.move_on_after(CONNECT_TIMEOUT_S) as limit:
            while not is_connected(peer) and (ongoing := self._dials.get(peer)) is not None:
                ongoing.add([target for target in addresses if not (directly and target.is_relayed)])
                await ongoing.ended.wait()
            if is_connected(peer):
                return
            if self._closed or peer == self._me:
                raise _unreachable(peer, "this node is stopping" if self._closed else "that is this node itself")
            targets = addresses or [parse_address(text) for text in self.known_addresses(peer)]
            if directly:
                targets = [target for target in targets if not target.is_relayed]
            if not targets:
                raise _unreachable(peer, "no address is known")
            dial = self._dials[peer] = _Dial(targets)
            try:
                await self._dial(peer, dial, errors)
            finally:
                del self._dials[peer]
                dial.ended.set()
        if not is_connected(peer):
            if limit.cancelled_caught:
                errors.append(f"no answer within {CONNECT_TIMEOUT_S:.0f} s")
            raise _unreachable(peer, "; ".join(errors) or "hung up at once")

    async def _dial(self, peer: PeerId, dial: _Dial, errors: list[str]) -> None:
        peer_id = _peer_id(peer)
        running = 0

        async def attempt(target: Address, failed: trio.Event) -> None:
            nonlocal running
            target = replace(target, peer=peer)
            try:
                await self._swarm.dial_addr(Multiaddr(str(target)), peer_id)
            except (BaseLibp2pError, OSError) as error:
                errors.append(f"{target.host} port {target.port}: {_root_cause(error)}")
                failed.set()
                running -= 1
                if not running:
                    dial.more.set()  # to be told that there is nothing to wait for
                return
            self._swarm.peerstore.add_addr(peer_id, Multiaddr(str(target)), TOLD_ADDRESS_TTL_S)
            attempts.cancel_scope.cancel()

        async with trio.open_nursery() as attempts:
            while (targets := dial.take()) or running:
                for target in order_targets(await _resolve(targets, errors)):
                    failed = trio.Event()
                    running += 1
                    attempts.start_soon(attempt, target, failed)
                    with trio.move_on_after(HEAD_START_S):
                        await failed.wait()
                if running:
                    await dial.more.wait()

    async def keep_bootstrapped(
        self,
        peer: PeerId,
        addresses: Sequence[Address],
        loss_of: Callable[[PeerId], trio.Event],
        on_failed: Callable[[BootstrapFailed], None],
    ) -> None:
        """Dial a bootstrap peer now and whenever it was lost, for ever."""
        attempts, pause_s = 0, BOOTSTRAP_RETRY_MIN_S
        while True:
            try:
                await self.connect(peer, addresses)
            except PeerUnreachable as error:
                attempts += 1
                address = " or ".join(str(address) for address in addresses)
                on_failed(BootstrapFailed(address=address, detail=error.detail, attempts=attempts, retry_s=pause_s))
            else:
                attempts, pause_s = 0, BOOTSTRAP_RETRY_MIN_S
                await loss_of(peer).wait()
            # Not all peers that lost the same bootstrap peer come back at the same moment.
            with trio.move_on_after(pause_s * random.uniform(0.75, 1.25)) as pause:
                await self._retry.wait()
            pause_s = min(2 * pause_s, BOOTSTRAP_RETRY_MAX_S) if pause.cancelled_caught else BOOTSTRAP_RETRY_MIN_S


def order_targets(targets: Sequence[Address]) -> list[Address]:
    """Direct addresses first, the families by turns as RFC 8305 has it, in their order otherwise; then circuits."""
    ordered: list[Address] = []
    for through_relays in (False, True):
        same = [target for target in targets if target.is_relayed == through_relays]
        six = [target for target in same if target.net == "ip6"]
        four = [target for target in same if target.net != "ip6"]
        ordered.extend(take_turns(six, four) if same and same[0].net == "ip6" else take_turns(four, six))
    return list(dict.fromkeys(ordered))


async def _resolve(targets: Sequence[Address], errors: list[str]) -> list[Address]:
    resolved: list[Address] = []
    for target in targets:
        if target.net not in _FAMILIES:
            resolved.append(target)
            continue
        try:
            found = await trio.socket.getaddrinfo(target.host, target.port, _FAMILIES[target.net], socket.SOCK_STREAM)
        except OSError as error:
            errors.append(f"{target.host}: {error.strerror or error}")
            continue
        for family, _, _, _, endpoint in found:
            net = "ip6" if family == socket.AF_INET6 else "ip4"
            resolved.append(replace(target, net=net, host=str(endpoint[0])))
    return resolved


def _peer_id(peer: PeerId) -> ID:
    return ID(encode_libp2p_peer_id(peer))


def _unreachable(peer: PeerId, detail: str) -> PeerUnreachable:
    return PeerUnreachable(peer, Failure.PEER_UNREACHABLE, detail)


def _root_cause(error: BaseException) -> str:
    # The library wraps what happened several times over; a person needs the innermost.
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        return _root_cause(error.exceptions[0])
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
