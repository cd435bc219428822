"""When another peer's log parts from ours: compare the two, and go over to the heavier one.

It happens after a re-root only (protocol.lineage). What the lighter side certified since is put aside on the disk, its
local parameters stay with the trainer, and the rounds of the heavier log come by catch-up.

Where the other side does not keep the certificates of that time any more, its trail says where the logs part, because a
trail goes through every re-root, and the rounds behind the trail what it weighs at least (protocol.trail). That is
enough for who has been away with few rounds of its own.

Invariants: nothing is given up before the other log is checked, certificate by certificate or by its trail, back to the
common round; of two peers at most one goes over to the other's log; one comparison at a time; at most ROUNDS_MAX rounds
are asked for, and a peer's trail at most once in TRAIL_PERIOD_S.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from shoal.node.control import PeerUnreachable, RequestRefused
from shoal.node.ledger_store import StoreError
from shoal.node.local_state import LocalState
from shoal.protocol.effects import Pledge
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.lineage import Weight, check_stretch, find_parting, is_lawful, weigh
from shoal.protocol.messages import CERTIFICATES_PER_ANSWER, Certificate, Checkpoint, digest_record
from shoal.protocol.quorum import Authority, is_reroot
from shoal.protocol.trail import anchor_of

ROUNDS_MAX = 4096
TRAIL_PERIOD_S = 600.0
WALKED_MAX = 256  # peers in that time
NOT_KEPT = bytes(32)  # the digest of a round whose certificate the other side has dropped

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartingPorts:
    """`ask` gets certificates of consecutive rounds from a peer, `ask_trail` its trail, which leads from the manifest
    on or is empty; `head_of` is the newest round that it has announced; `switch` goes over to another log; `pledge` is
    the one that this peer is still on the way to."""

    ask: Callable[[PeerId, int, int], Awaitable[tuple[Certificate, ...]]]
    head_of: Callable[[PeerId], int]
    ask_trail: Callable[[PeerId], Awaitable[tuple[Checkpoint, ...]]]
    switch: Callable[[Pledge], Awaitable[None]]
    pledge: Callable[[], Pledge | None]
    misbehaved: Callable[[PeerId, ProtocolError], None]
    happen: Callable[[str], None]


class Parting:
    """`run` may be called whenever a peer is seen on another log."""

    def __init__(self, state: LocalState, authority: Authority, ports: PartingPorts) -> None:
        self._state = state
        self._authority = authority
        self._ports = ports
        self._active = False
        self._walked_s: dict[PeerId, float] = {}  # when each one was last asked for its trail

    async def run(self, peer: PeerId) -> bool:
        """Compare with this peer's log; whether this peer has left its own."""
        if self._active:
            return False
        self._active = True
        try:
            return await self._compare(peer)
        except (PeerUnreachable, RequestRefused, OSError, StoreError) as error:
            log.info("the log of %s was not compared: %s", short_peer_id(peer), error)
        except ProtocolError as error:
            self._ports.misbehaved(peer, error)
        finally:
            self._active = False
        return False

    async def _compare(self, peer: PeerId) -> bool:
        found = await self._find(peer)
        if found is None:
            return await self._compare_by_trail(peer)
        mine, theirs = found
        first = theirs[0].result.round
        if not is_lawful(mine[0], theirs[0]):
            problem = f"round {first} is certified with two results and no re-root: a quorum of its voters has lied"
            raise ProtocolError(Refusal.EQUIVOCATION, problem)
        before = (await asyncio.to_thread(self._state.load_certificates, first - 1, 1)) if first > 1 else ()
        if first > 1 and not before:
            return False  # this disk does not hold the round where they part
        genesis = self._state.genesis()
        previous = digest_record(before[0].result) if before else genesis.digest
        voters = before[0].result.voters if before else genesis.voters
        await asyncio.to_thread(check_stretch, previous, voters, theirs, self._authority)
        own, other = self._weigh_own(mine), weigh(theirs)
        if own >= other:
            log.debug("stays with its own log, which parts from that of %s at round %d", short_peer_id(peer), first)
            return False
        self._ports.happen(self._tell(peer, first, own, other))
        chosen, end = digest_record(theirs[0].result), theirs[-1].result.round
        await self._ports.switch(Pledge(first=first, digest=chosen, end=end, tokens=other.tokens))
        return True

    async def _compare_by_trail(self, peer: PeerId) -> bool:
        """They may part where the other one keeps no certificates any more; whether this peer has left its own log."""
        if not self._may_walk(peer):
            return False
        trail = await self._ports.ask_trail(peer)
        first = await asyncio.to_thread(self._find_reroot, trail) if trail else None
        if first is None:
            return False
        count = self._state.head.round - first + 1
        mine = list(await asyncio.to_thread(self._state.load_certificates, first, count))
        end = anchor_of(trail[-1].certificate)
        theirs = await self._ask(peer, end.round + 1, ROUNDS_MAX)
        await asyncio.to_thread(check_stretch, end.digest, end.voters, theirs, self._authority)
        own, other = self._weigh_own(mine), weigh(theirs)
        if not mine or other.tokens <= own.tokens:
            self._ports.happen(
                f"the swarm's log parts at round {first}, longer ago than certificates are kept: it is not known which "
                f"side has more certified tokens, and this peer stays on its own. To join {short_peer_id(peer)}, stop "
                "this peer and start it with a new data folder and its old identity.key"
            )
            return False
        self._ports.happen(self._tell(peer, first, own, other))
        await self._ports.switch(Pledge(first=first, digest=NOT_KEPT, end=theirs[-1].result.round, tokens=other.tokens))
        return True

    def _may_walk(self, peer: PeerId) -> bool:
        now = asyncio.get_running_loop().time()
        self._walked_s = {one: at_s for one, at_s in self._walked_s.items() if now - at_s < TRAIL_PERIOD_S}
        if peer in self._walked_s or len(self._walked_s) >= WALKED_MAX:
            return False
        self._walked_s[peer] = now
        return True

    def _find_reroot(self, trail: Sequence[Checkpoint]) -> int | None:
        """The first re-root up to the trail's end that only one of the two logs has. Each log's trail has all of its
        re-roots, so what a trail lacks is none of that log. None where there is no such, or it cannot be told."""
        theirs = {one.certificate.result.round: one.certificate for one in trail}
        end = max(theirs)
        held = self._state.list_certificates(1, min(self._state.head.round, end) + 1)
        first = min((one.result.round for one in held), default=1)
        own = {one.certificate.result.round: one.certificate for one in self._state.trail.load()}
        own |= {one.result.round: one for one in held}
        parted = [
            number
            for number, one in own.items()
            if number <= end and is_reroot(one) and (number not in theirs or theirs[number].result != one.result)
        ]
        for number, other in theirs.items():
            if not is_reroot(other) or number > self._state.head.round:
                continue
            if number in own:
                parted += [number] if own[number].result != other.result else []
            elif number < first and self._state.trail.is_whole:
                parted.append(number)
            else:
                return None  # a gap of this disk
        return min(parted, default=None)

    def _weigh_own(self, mine: list[Certificate]) -> Weight:
        """Half of a log that is being caught up on weighs as much as the whole of it did when it was chosen; otherwise
        this peer would go back and forth."""
        own, pledge = weigh(mine), self._ports.pledge()
        if pledge is None or own.tokens >= pledge.tokens:
            return own
        return replace(own, tokens=pledge.tokens)

    def _tell(self, peer: PeerId, first: int, own: Weight, other: Weight) -> str:
        return (
            f"the swarm's log parts at round {first}: going over to that of {short_peer_id(peer)}, which has "
            f"{other.tokens} certified tokens since against {own.tokens}; local work is kept"
        )

    async def _find(self, peer: PeerId) -> tuple[list[Certificate], list[Certificate]] | None:
        """Both logs from the round where they part to their ends; None when they do not part."""
        parts_at = await self._find_parting(peer)
        if parts_at is None:
            return None
        mine, theirs = await self._read_both(peer, parts_at)
        # Either peer may have left its log since: then the next sight of the other one begins anew.
        return (mine, theirs) if find_parting(mine, theirs) == parts_at else None

    async def _find_parting(self, peer: PeerId) -> int | None:
        """Go back page by page, until one begins with what both hold."""
        last = min(self._state.head.round, self._ports.head_of(peer))
        parts_at: int | None = None
        for end in range(last, max(0, last - ROUNDS_MAX), -CERTIFICATES_PER_ANSWER):
            start = max(1, end - CERTIFICATES_PER_ANSWER + 1)
            count = end - start + 1
            theirs = await self._ask(peer, start, count)
            mine = await asyncio.to_thread(self._state.load_certificates, start, count)
            found = find_parting(mine, theirs)
            if found is None:
                # They agree to the end of this page, so they part where the later one begins. A gap says nothing.
                return parts_at if len(mine) == len(theirs) == count else None
            if found > start or start == 1:
                return found
            parts_at = found
        return None

    async def _read_both(self, peer: PeerId, first: int) -> tuple[list[Certificate], list[Certificate]]:
        theirs = await self._ask(peer, first, ROUNDS_MAX)
        count = self._state.head.round - first + 1
        mine = await asyncio.to_thread(self._state.load_certificates, first, count)
        return list(mine), theirs

    async def _ask(self, peer: PeerId, first: int, count: int) -> list[Certificate]:
        """The peer's certificates from round `first` on, `count` at most. Large ones do not all fit into one answer."""
        found: list[Certificate] = []
        while len(found) < count:
            wanted = min(CERTIFICATES_PER_ANSWER, count - len(found))
            answered = await self._ports.ask(peer, first + len(found), wanted)
            if not answered:
                break
            found += answered
        return found
