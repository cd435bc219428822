"""Members of one swarm with real tensor links and the daemon's ways to them, of whom only some can be dialled; their
control plane is a table of who answers whom."""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from shoal.node.config import TensorTable
from shoal.node.control import REQUEST_TIMEOUT_S, PeerUnreachable, RequestRefused
from shoal.node.link_port import Address, LinkConfig, LinkPath
from shoal.node.punch import PunchFailed
from shoal.node.reach import ReachPorts
from shoal.node.tensor_paths import TensorPaths
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.messages import AskRelay, RelayTicket, decode_message_untrusted, encode_message
from tests.unit.node.link_harness import CONFIG, SWARM, Node, RecordingSink, describe, node


@dataclass
class Village:
    """Everybody who is there. `addresses` are those that are announced."""

    members: dict[PeerId, "Member"] = field(default_factory=dict)
    addresses: dict[PeerId, tuple[Address, ...]] = field(default_factory=dict)
    strangers: set[PeerId] = field(default_factory=set)  # in nobody's sight
    banned: set[PeerId] = field(default_factory=set)
    silent: set[PeerId] = field(default_factory=set)  # they answer nothing on the control plane
    ahead_s: float = 0.0  # of the machine's clock
    stopped_s: float | None = None

    def now(self) -> float:
        return (time.monotonic() if self.stopped_s is None else self.stopped_s) + self.ahead_s

    def stop_clock(self) -> None:
        self.stopped_s = time.monotonic()

    def live(self) -> dict[PeerId, Any]:
        return {peer: None for peer in self.members if peer not in self.strangers}


class _Questions:
    """The control plane of one member, as far as ways to peers need it."""

    def __init__(self, village: Village, me: PeerId) -> None:
        self._village = village
        self._me = me

    async def request(self, peer: PeerId, payload: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes:
        other = self._village.members.get(peer)
        if other is None or peer in self._village.silent:
            raise PeerUnreachable(peer, Failure.PEER_UNREACHABLE, "by the test")
        try:
            answer = await other.paths.answer(self._me, decode_message_untrusted(SWARM, payload))
        except ProtocolError as error:
            raise RequestRefused(peer, error.refusal) from error
        return encode_message(SWARM, answer)


class Member:
    """One peer. Holes come about nowhere here."""

    def __init__(self, village: Village, made: Node, config: TensorTable) -> None:
        self.village = village
        self.node = made
        self.links = made.links
        self.sink = made.sink
        self.me = made.peer
        self.opened: list[LinkPath] = []
        self.failed: list[Failure] = []
        ports = ReachPorts(
            live=lambda: {peer: known for peer, known in village.live().items() if peer != self.me},
            addresses_of=lambda peer: village.addresses.get(peer, ()),
            hosts=lambda: (),
            seen_hosts=lambda: (),
            changed=lambda: None,
            now=village.now,
        )
        control: Any = _Questions(village, self.me)
        self.paths = TensorPaths(self.me, SWARM, config, made.address, control, made.links, ports)
        self.paths.punches.punch = self._punch  # type: ignore[method-assign]
        self.paths.on_opened = lambda peer, path: self.opened.append(path)
        self.paths.on_failed = lambda peer, failure: self.failed.append(failure)
        made.sink.admit = self._admit  # type: ignore[method-assign]
        village.members[self.me] = self

    @property
    def relay(self) -> Any:
        return self.paths.relay

    async def _punch(self, peer: PeerId) -> None:
        raise PunchFailed(peer, Failure.PUNCH_TIMEOUT)

    def _admit(self, peer: PeerId) -> Refusal | None:
        return Refusal.BANNED if peer in self.village.banned else None

    def become_reachable(self) -> None:
        """Somebody has dialled it, and it announces its address."""
        self.village.addresses[self.me] = self.node.addresses
        self.paths.reach.link_came_in(PeerId(b"w" * 32), self.node.address, ("127.0.0.1", 1))

    async def push(self, to: "Member", payload: bytes, part: int = 0) -> None:
        await self.links.send(
            to.me, self.village.addresses.get(to.me, ()), describe(payload, part=part), memoryview(payload)
        )

    async def ask(self, relay: "Member", other: PeerId) -> bytes | Refusal:
        """The token, or why there is none."""
        try:
            ticket = await relay.paths.answer(self.me, AskRelay(peer=other))
        except ProtocolError as error:
            return error.refusal
        assert isinstance(ticket, RelayTicket)
        return ticket.token


@asynccontextmanager
async def open_village(
    *relays: TensorTable, ends: int = 2, links: LinkConfig = CONFIG, **changes: float
) -> AsyncIterator[tuple[Village, list[Member]]]:
    """`ends` members that nobody can dial, and behind them in the list one that can be for each of `relays`."""
    village = Village()
    async with AsyncExitStack() as stack:
        members = []
        for number in range(ends + len(relays)):
            made = await stack.enter_async_context(
                node(Identity(bytes([65 + number]) * 32), replace(links, **changes))  # type: ignore[arg-type]
            )
            config = relays[number - ends] if number >= ends else TensorTable()
            members.append(Member(village, made, replace(config, host="127.0.0.1")))
        for member in members[ends:]:
            member.become_reachable()
        yield village, members


def way_between(one: Member, other: Member) -> tuple[LinkPath | None, LinkPath | None]:
    """How each sees the link to the other one."""
    return one.links.path_to(other.me), other.links.path_to(one.me)


def payloads_of(sink: RecordingSink) -> list[bytes]:
    """What has arrived whole."""
    return [payload for _, _, payload in sink.payloads]
