"""The gate of a swarm that is not open: who is let in, who waits before it, and what becomes of those who wait.

A peer that is not admitted, as far as this one knows, may keep its connection for GRACE_S. In that time it can show its
invitation (in its presence, sent to this peer alone), fetch the manifest and read the owner's decrees; nothing else of
it is taken or answered. Then it is told why, and hung up on if it was the one who dialled. Whom this peer has dialled
(bootstraps, relays, nodes of the DHT) may be no member and still carry what libp2p carries.

Who was away while others were admitted is a stranger to them no more than they are to it: so each asks the other for
the owner's decrees before it judges for good.

Invariants: at most WAITING_MAX wait, and the oldest goes for the newest; within PERIOD_S of being admitted a connected
peer is let in, and of being so no more it is hung up on; a plan that names a peer that is refused here is followed only
if its proposer knows better.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass

from shoal.crdt.standing import Standing
from shoal.dht.addresses import parse_peer_address
from shoal.node.ban_watch import find_ban, tell_own_ban
from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.decree_exchange import ask_decrees
from shoal.node.ledger_sync import LedgerSync
from shoal.node.membership import Membership
from shoal.protocol.admission import AdmissionProof, AdmissionRule, AdmissionTable, Known
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId, format_peer_id, short_peer_id
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import ROUND_MESSAGES, Plan, Presence, Proposal

GRACE_S = 15.0
WAITING_MAX = 32
PERIOD_S = 1.0
DECREES_PERIOD_S = 10.0  # from one question for decrees to the next, while somebody is not admitted
ASKED_MAX = 3  # peers, by one such question
HOLD_S = 3.0  # how long a plan waits for what its proposer knows of the peers in it
HELD_MAX = 8
ASKING_SHOWN_S = 120.0
ASKING_MAX = 8
INVITATION_WARN_S = 86_400.0

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePorts:
    """What the gate does beyond judging."""

    control: ControlPlane
    membership: Membership
    ledger: LedgerSync
    turn_away: Callable[[PeerId, bool], None]  # tell it why; whether its connection ends, too
    end: Callable[[PeerId], None]  # whatever else there is of it
    round_message: Callable[[ROUND_MESSAGES, PeerId], None]
    misbehaved: Callable[[PeerId, ProtocolError], None]
    spawn: Callable[[Coroutine[object, object, object]], None]


class Gate:
    """Judges from the start; acts from `open` on. The connections of `bootstraps` are left alone."""

    def __init__(
        self,
        *,
        me: PeerId,
        manifest: Manifest,
        swarm: bytes,
        standing: Standing,
        voters: Callable[[], tuple[PeerId, ...]],
        bootstraps: tuple[str, ...] = (),
        proof: AdmissionProof | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.table = AdmissionTable(manifest.admission_rule, swarm, manifest.owner, manifest.founders)
        self._me = me
        self._swarm = swarm
        self._owner = manifest.owner
        self._standing = standing
        self._voters = voters
        self._bootstraps = frozenset(parse_peer_address(text)[0] for text in bootstraps)
        self._clock = clock
        self._wall = wall
        self._ports: GatePorts | None = None
        self._waiting: dict[PeerId, float] = {}  # since when
        self._told: set[PeerId] = set()  # of those who wait
        self._asking: dict[PeerId, float] = {}  # daemons of this swarm that wait or have waited, and when
        self._asked_s = -DECREES_PERIOD_S
        self._held = 0
        self.table.take(me, proof, frozenset())

    @property
    def is_open(self) -> bool:
        """Whether the swarm's rule is that everybody may take part: then there is nothing to do here."""
        return self.table.rule is AdmissionRule.OPEN

    def open(self, ports: GatePorts) -> None:
        """Begin to act."""
        self._ports = ports
        if not self.is_open:
            ports.spawn(self._watch())

    # -- judging -----------------------------------------------------------------------------------------------------

    def admits(self, peer: PeerId) -> bool:
        """Whether this peer may take part, its own ban aside."""
        return self.is_open or self.table.admits(peer, self._known(), self._wall())

    def _known(self) -> Known:
        standing = self._standing
        return Known(voters=frozenset(self._voters()), admitted=standing.admitted, banned=standing.banned)

    def meet(self, presence: Presence) -> None:
        """A presence may bring its peer's invitation; raises ProtocolError for a forged one."""
        if not self.is_open:
            self.table.take(presence.peer, presence.admission, self._standing.banned)
            if presence.peer in self._waiting:
                self._note_asking(presence.peer)
                self._let_in()

    def find_refused(self, message: ROUND_MESSAGES) -> list[PeerId]:
        """Whom a plan names that is banned or not admitted, as far as this peer knows. A result that a quorum has
        locked or voted for is judged no more: it may be certified."""
        plan = message if isinstance(message, Plan) else None
        if isinstance(message, Proposal) and message.evidence is not None:
            plan = message.evidence.plan
        peers = [entry.signed.peer for entry in plan.roster] if plan else []
        return [peer for peer in peers if peer in self._standing.banned or not self.admits(peer)]

    # -- who comes ---------------------------------------------------------------------------------------------------

    def greet(self, peer: PeerId) -> None:
        """A connection to this peer stands: show it who this one is, and let it wait where it is a stranger."""
        ports = self._ports
        if self.is_open or ports is None:
            return
        if not self.admits(peer):
            self._waiting[peer] = self._clock()
            self._told.discard(peer)
            self._keep_bounded(ports)
        ports.membership.note_peers()
        ports.spawn(self._introduce(ports, peer))

    async def _introduce(self, ports: GatePorts, peer: PeerId) -> None:
        await ports.membership.introduce(peer)
        if not (self.admits(peer) and self.admits(self._me)):
            await self._ask(ports, peer)

    async def _ask(self, ports: GatePorts, peer: PeerId) -> None:
        try:
            if await ask_decrees(ports.control, self._swarm, self._owner, ports.ledger, peer):
                self._let_in()
        except (PeerUnreachable, RequestRefused) as error:
            log.debug("no decrees: %s", error)
        except ProtocolError as error:
            ports.misbehaved(peer, error)

    def _keep_bounded(self, ports: GatePorts) -> None:
        """The oldest goes for the newest: an honest one shows its invitation at once."""
        bound = self._list_bound(ports)
        comers = [peer for peer in self._waiting if peer not in bound]
        for peer in comers[: max(0, len(comers) - WAITING_MAX)]:
            self._refuse(ports, peer, ends=True)

    def _list_bound(self, ports: GatePorts) -> frozenset[PeerId]:
        """Whose connections are left alone."""
        dialled = (one.peer for one in ports.control.peers() if one.dialled)
        return frozenset((*dialled, *self._bootstraps, *ports.control.reach().relays))

    # -- who waits ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(PERIOD_S)

    def look(self) -> None:
        """Let in who is admitted by now, end what is left of those who are so no more, and of those who waited."""
        ports = self._ports
        assert ports is not None, "looks when it is open"
        connected = {one.peer for one in ports.control.peers()}
        for peer in self._waiting.keys() - connected:
            self._forget(peer)
        self._let_in()
        now = self._clock()
        live = ports.membership.table.live().keys()
        for peer in (connected | live) - self._waiting.keys() - self._standing.banned:
            if not self.admits(peer):
                if peer in live:  # it was admitted
                    ports.end(peer)
                if peer in connected:  # perhaps only just, and it has not been greeted yet
                    self._waiting[peer] = now - GRACE_S if peer in live else now
        bound = self._list_bound(ports)
        for peer, since_s in list(self._waiting.items()):
            if now >= since_s + GRACE_S and peer not in self._told:
                self._refuse(ports, peer, ends=peer not in bound)
        is_stranger = not self._waiting.keys().isdisjoint(self._asking) or not self.admits(self._me)
        if is_stranger and now >= self._asked_s + DECREES_PERIOD_S:
            self._asked_s = now
            for peer in sorted(connected, key=lambda peer: peer in self._waiting)[:ASKED_MAX]:
                ports.spawn(self._ask(ports, peer))

    def _let_in(self) -> None:
        ports = self._ports
        if ports is None:
            return
        for peer in [one for one in self._waiting if self.admits(one)]:
            self._forget(peer)
            self._asking.pop(peer, None)
            ports.membership.connection_opened(peer)

    def _refuse(self, ports: GatePorts, peer: PeerId, *, ends: bool) -> None:
        if ends:
            self._forget(peer)
        else:
            self._told.add(peer)
        ports.membership.book.note_failure(peer, self._wall())
        ports.turn_away(peer, ends)

    def _forget(self, peer: PeerId) -> None:
        del self._waiting[peer]
        self._told.discard(peer)

    def _note_asking(self, peer: PeerId) -> None:
        self._asking.pop(peer, None)
        self._asking[peer] = self._clock()
        if len(self._asking) > ASKING_MAX:
            del self._asking[next(iter(self._asking))]

    def was_refused(self, peer: PeerId) -> str:
        """Another peer says that this one is not admitted: it is tried again after a pause. What has to be done."""
        if self._ports is not None:
            self._ports.membership.book.note_failure(peer, self._wall())
        return self.explain()

    # -- plans -------------------------------------------------------------------------------------------------------

    async def judge(self, message: ROUND_MESSAGES, sender: PeerId) -> None:
        """A plan names peers that are refused here: learn what its proposer knows of them, and judge again."""
        ports = self._ports
        assert ports is not None, "messages come when it is open"
        if self._held < HELD_MAX:
            self._held += 1
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(HOLD_S):
                        await self._ask(ports, sender)
                        await ports.membership.exchange_peers(sender)
            finally:
                self._held -= 1
        refused = self.find_refused(message)
        if not refused:
            ports.round_message(message, sender)
            return
        banned = any(peer in self._standing.banned for peer in refused)
        detail = f"a plan names {', '.join(map(short_peer_id, refused[:4]))}"
        ports.misbehaved(sender, ProtocolError(Refusal.BANNED if banned else Refusal.NOT_ADMITTED, detail))

    # -- what is told ------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """What a person has to do so that this peer is admitted."""
        own = f"ask the swarm's owner for `shoal swarm admit {format_peer_id(self._me)}`"
        return own + (" or for an invitation" if self.table.rule is AdmissionRule.INVITED else "")

    def warnings(self) -> Iterable[str]:
        """For the status: what keeps this peer out, and who asks to be let in."""
        standing, now = self._standing, self._wall()
        if (ban := find_ban(standing, self._me)) is not None:
            yield tell_own_ban(ban)
        if self.is_open:
            return
        if not self.admits(self._me):
            yield f"{Refusal.NOT_ADMITTED}: this peer may not take part, as far as it has heard; {self.explain()}"
        invitation = self.table.find_invitation(self._me, standing.banned, now)
        if invitation is not None and now > invitation.expires_s - INVITATION_WARN_S:
            left_h = max(0.0, invitation.expires_s - now) / 3600
            yield f"this peer's invitation ends in {left_h:.0f} h; {self.explain()}"
        for peer, at_s in self._asking.items():
            if self._clock() < at_s + ASKING_SHOWN_S and not self.admits(peer):
                told = format_peer_id(peer)
                yield f"{Refusal.NOT_ADMITTED}: {told} asks to take part; the owner may `shoal swarm admit {told}`"
