"""Catch-up: from wherever this peer stands to the swarm's head, by the cheaper way (protocol.route).

Certificates are checked one after the other from the own head on, each against the voters that the one before it names,
so what a donor says is never believed. Where nobody keeps the next certificates any more, a trail leads over them
(protocol.trail), and a snapshot behind it is fetched. Chunks and parts are content-addressed: several donors serve at
once, each byte is checked before it is used, and what was fetched before a restart is found again on the disk.

Invariants: a snapshot of round s is installed only when its root is the base root in the certificate of round s+1; a
donor that lies is charged and another one is asked; one partial snapshot is on the disk at most; a catch-up that gets
nowhere ends, so that the next one can begin.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from shoal.node.control import ControlPlane
from shoal.node.donors import DONORS_ASKED_MAX, DonorPorts, Donors
from shoal.node.ledger_store import StoreError
from shoal.node.link_port import Address
from shoal.node.links import TensorLinks
from shoal.node.local_state import LocalState
from shoal.node.replay import Replay, ReplayPorts
from shoal.node.snapshot_fetch import SnapshotFetch, map_state
from shoal.node.snapshots import Snapshot
from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import CERTIFICATES_PER_ANSWER, Certificate, Checkpoint, Presence, digest_record
from shoal.protocol.quorum import Head, is_reroot
from shoal.protocol.route import Distance, Route, SnapshotOffer, choose_route
from shoal.protocol.state import SnapshotIndex
from shoal.protocol.trail import anchor_of

LEGS_MAX = 16  # of one catch-up: each one is a snapshot or a replay, to where the swarm stood when it began
DONORS_WANTED = 3  # with fewer in sight, the DHT is asked, too

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatchUpPorts:
    """What catch-up asks of the daemon."""

    live: Callable[[], Mapping[PeerId, Presence]]  # who is there
    addresses_of: Callable[[PeerId], tuple[Address, ...]]
    take_certificate: Callable[[Certificate, PeerId], None]  # to the round core, which checks and commits it
    wait_past: Callable[[int, float], Awaitable[bool]]  # whether the head got past a round within so many seconds
    other_log: Callable[[PeerId], None]
    install: Callable[[Head, Float32s, Float32s], Awaitable[None]]  # take over a state that was checked
    misbehaved: Callable[[PeerId, ProtocolError], None]
    donor_failed: Callable[[PeerId, Failure], None]
    find_donors: Callable[[int, int], Awaitable[None]]  # of these rounds, in the DHT


class Jump(Enum):
    """What became of a snapshot that was to be fetched."""

    DONE = auto()
    CUT_SHORT = auto()  # its donors have gone, or have lied
    NOT_OFFERED = auto()  # nobody has one that a certificate vouches for


class CatchUp:
    """One catch-up at a time; `run` may be called whenever a peer is seen to be ahead."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        swarm: bytes,
        control: ControlPlane,
        links: TensorLinks,
        state: LocalState,
        folder: Path,
        ports: CatchUpPorts,
    ) -> None:
        self.active = False
        self.detail = ""
        self.fetched_bytes = 0  # in all catch-ups
        self.snapshots_taken = 0
        self._manifest = manifest
        self._links = links
        self._state = state
        self._folder = folder
        self._ports = ports
        self._apply_s: float | None = None
        self._install_s: float | None = None
        self._update_bytes = sum(map(manifest.update_bytes, manifest.list_parts(1)))
        self.donors = Donors(
            swarm,
            manifest.authority(swarm),
            control,
            links,
            DonorPorts(
                live=ports.live,
                addresses_of=ports.addresses_of,
                misbehaved=ports.misbehaved,
                failed=ports.donor_failed,
            ),
        )
        self.ask_certificates = self.donors.ask_certificates

    async def run(self, peer: PeerId, target: int) -> None:
        """Go to round `target`, which `peer` holds, and on to where the swarm stands then, or as far as donors lead."""
        if self.active:
            return
        self.active = True
        self.donors.begin()
        looking: asyncio.Task[None] | None = None
        try:
            if len(self.donors.of_round(self._state.head.round + 1)) < DONORS_WANTED:
                looking = asyncio.create_task(self._look_for_donors(self._state.head.round + 1, target))
            for _ in range(LEGS_MAX):
                before = self._state.head.round
                if before >= target or not await self._go(peer, target) or self._state.head.round == before:
                    break
                target = max(target, self.donors.newest)
        except ProtocolError as error:
            log.info("catch-up stopped at round %d: %s", self._state.head.round, error)
            if error.refusal is Refusal.OTHER_LOG:
                self.donors.other_log = self.donors.other_log or peer
        except (OSError, StoreError) as error:
            log.error("catch-up stopped at round %d, the disk fails: %s", self._state.head.round, error)
        finally:
            if looking is not None:
                looking.cancel()
                await asyncio.gather(looking, return_exceptions=True)
            self.active = False
            self.detail = ""
        if self.donors.other_log is not None:
            self._ports.other_log(self.donors.other_log)

    async def _look_for_donors(self, first: int, last: int) -> None:
        await self._ports.find_donors(first, last)

    async def _go(self, peer: PeerId, target: int) -> bool:
        """One leg of the way; whether it led anywhere."""
        head = self._state.head
        self.detail = f"asking for the rounds {head.round + 1} to {target}"
        count = min(CERTIFICATES_PER_ANSWER, target - head.round)
        page = await self.donors.collect(peer, head.round + 1, count, head.digest, head.voters)
        if not page:
            return await self._go_by_trail(peer, target)
        route = choose_route(await self._measure(page, target), await asyncio.to_thread(self._list_offers))
        log.info("from round %d to %d: %s", head.round, target, _describe(route))
        if route is not None and route.snapshot is not None:
            jump = await self._jump(page, peer, target)
            if jump is not Jump.NOT_OFFERED:
                return jump is Jump.DONE
        await self._replay(page, peer, target)
        return True

    async def _go_by_trail(self, peer: PeerId, target: int) -> bool:
        """Nobody has the next certificates. Whether the trail over them, and a snapshot behind it, led on."""
        self.detail = "looking for a trail over rounds that nobody keeps"
        trail = await self.donors.collect_trail(self._state.trail.genesis, self._state.head.round)
        if not trail:
            return False
        await asyncio.to_thread(self._check_same_log, trail)
        end = anchor_of(trail[-1].certificate)
        count = min(CERTIFICATES_PER_ANSWER, max(1, target - end.round))
        page = await self.donors.collect(peer, end.round + 1, count, end.digest, end.voters)
        if not page:
            return False
        log.info("a trail of %d checkpoints leads to round %d", len(trail), end.round)
        return await self._jump(page, peer, target, trail) is Jump.DONE

    def _check_same_log(self, trail: Sequence[Checkpoint]) -> None:
        """Raise ProtocolError(OTHER_LOG) where the own log is not one that the trail leads over: no other result where
        both hold one, and no re-root that the trail does not know of."""
        head = self._state.head.round
        theirs = {one.certificate.result.round: one.certificate for one in trail}
        own = self._state.list_certificates(1, head + 1) if head else ()
        for certificate in (*(one.certificate for one in self._state.trail.load()), *own):
            number = certificate.result.round
            other = theirs.get(number)
            if (is_reroot(certificate) and other is None) or (other and other.result != certificate.result):
                raise ProtocolError(Refusal.OTHER_LOG, f"the trail leads over another round {number}")

    # -- the way -----------------------------------------------------------------------------------------------------

    async def _measure(self, page: Sequence[Certificate], target: int) -> Distance:
        head = self._state.head.round
        sources = self.donors.of_updates(head + 1)
        return Distance(
            head=head,
            target=target,
            elements=self._manifest.layout.elements,
            update_bytes=self._update_bytes,
            updates_from=min((source.first_round for source in sources), default=0),
            updates_held=await asyncio.to_thread(self._count_held, page),
            bytes_per_s=self.donors.rate_of([source.peer for source in sources]),
            apply_s=self._apply_s if self._apply_s is not None else self._state.apply_s,
            install_s=self._install_s,
        )

    def _count_held(self, page: Sequence[Certificate]) -> int:
        """How many of these rounds' updates are here already, from the first on."""
        blobs, count = self._state.stores.blobs, 0
        for certificate in page:
            if not all(blobs.has(part.digest) for part in certificate.result.parts):
                break
            count += 1
        return count

    def _list_offers(self) -> list[SnapshotOffer]:
        nbytes = 8 * self._manifest.layout.elements
        offers = []
        for number, peers in self.donors.of_snapshots().items():
            # The file of a fetch that was cut short is sparse: its blocks are what came.
            partial = next(self._folder.glob(f"{number:08d}.*"), None)
            held = 0 if partial is None else min(nbytes, partial.stat().st_blocks * 512)
            rate = self.donors.rate_of(peers)
            offers.append(SnapshotOffer(round=number, nbytes=nbytes, held_bytes=held, bytes_per_s=rate))
        return offers

    # -- by replay ---------------------------------------------------------------------------------------------------

    async def _replay(
        self, page: Sequence[Certificate], peer: PeerId, target: int, begin: Awaitable[bool] | None = None
    ) -> None:
        ports = ReplayPorts(
            take_certificate=self._ports.take_certificate, wait_past=self._ports.wait_past, tell=self._tell
        )
        replay = Replay(self._manifest, self._state, self._links, self.donors, ports)
        try:
            await replay.run(page, peer, target, begin)
        finally:
            self.fetched_bytes += replay.fetched_bytes
            self._apply_s = replay.apply_s if replay.apply_s is not None else self._apply_s

    def _tell(self, detail: str) -> None:
        self.detail = detail

    # -- by snapshot -------------------------------------------------------------------------------------------------

    async def _jump(
        self, page: Sequence[Certificate], peer: PeerId, target: int, trail: Sequence[Checkpoint] = ()
    ) -> Jump:
        having = {one for peers in self.donors.of_snapshots().values() for one in peers}
        ranked = [one for one in self.donors.of_round(0) if one in having]
        chain, first = list(page), page[0].result.round
        for donor in dict.fromkeys((*([peer] if peer in having else []), *ranked[:DONORS_ASKED_MAX])):
            if donor in self.donors.liars:
                continue
            index = await self.donors.ask_snapshot(donor, target - 1, self._manifest.layout.elements)
            if index is None or index.round < max(first, self._state.head.round + 1):
                continue
            await self._lengthen(chain, donor, index.round + 1)
            if first + len(chain) <= index.round + 1:
                continue  # nobody has told what vouches for it
            following = chain[index.round + 1 - first].result
            if index.root != following.base_root:
                # An honest donor may have been on another log when it answered.
                detail = f"the index of round {index.round} has not the certified root"
                self._ports.misbehaved(donor, ProtocolError(Refusal.WRONG_BASE, detail))
                continue
            # The chunks that came stay: the next catch-up goes on from them.
            end = index.round + 1 - first
            way = _Way(to=chain[:end], behind=chain[end:], trail=trail, peer=peer, target=target)
            return Jump.DONE if await self._take_over(index, donor, way) else Jump.CUT_SHORT
        return Jump.NOT_OFFERED

    async def _lengthen(self, chain: list[Certificate], peer: PeerId, last: int) -> None:
        """Add the certificates up to round `last`, as far as donors have them."""
        while chain[-1].result.round < last:
            end = chain[-1].result
            self.detail = f"checking certificate {end.round + 1} of {last}"
            count = min(CERTIFICATES_PER_ANSWER, last - end.round)
            page = await self.donors.collect(peer, end.round + 1, count, digest_record(end), end.voters)
            if not page:
                return
            chain += page

    async def _take_over(self, index: SnapshotIndex, donor: PeerId, way: "_Way") -> bool:
        """Fetch the snapshot, become its round and go on from there; whether that worked. The line does not wait while
        the snapshot is checked and taken over: the updates behind it come meanwhile."""
        loop = asyncio.get_running_loop()
        taken: asyncio.Future[bool] = loop.create_future()
        replaying: list[asyncio.Task[None]] = []

        def go_on() -> None:
            replaying.append(loop.create_task(self._replay(way.behind, way.peer, way.target, taken)))

        snapshots = self._state.stores.snapshots
        fetch = SnapshotFetch(index, self._folder, snapshots, self._links, self.donors, self._tell, go_on)
        try:
            snapshot = await fetch.run(donor)
            taken.set_result(snapshot is not None and await self._become(snapshot, way))
            await asyncio.gather(*replaying)
        finally:
            self.fetched_bytes += fetch.fetched_bytes
            for task in replaying:
                task.cancel()
            await asyncio.gather(*replaying, return_exceptions=True)
        return taken.result()

    async def _become(self, snapshot: Snapshot, way: "_Way") -> bool:
        """Take the snapshot's round over, behind the trail if there is one."""
        index = snapshot.index
        self.detail = f"taking over the snapshot of round {index.round}"
        began_s = asyncio.get_running_loop().time()
        for certificate in way.to:
            await asyncio.to_thread(self._state.save_certificate, certificate)
        if way.trail:
            await asyncio.to_thread(self._state.trail.adopt, way.trail)
        own = way.to[-1].result
        head = Head(round=own.round, digest=digest_record(own), state_root=index.root, voters=own.voters)
        if head.round <= self._state.head.round:
            return True  # the swarm's live rounds have led past it
        await self._ports.install(head, *map_state(snapshot))
        self.snapshots_taken += 1
        self._install_s = asyncio.get_running_loop().time() - began_s
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """The certificates up to a snapshot's round and those behind it, checked; the trail before them, if one leads
    there; who is ahead, and where the catch-up is to end."""

    to: Sequence[Certificate]
    behind: Sequence[Certificate]
    trail: Sequence[Checkpoint]
    peer: PeerId
    target: int


def _describe(route: Route | None) -> str:
    if route is None:
        return "no donor has announced what is missing; replay is tried"
    way = "replay" if route.snapshot is None else f"the snapshot of round {route.snapshot.round}, then replay"
    return f"{way}: {route.nbytes / 1e6:.1f} MB, about {route.seconds:.1f} s"
