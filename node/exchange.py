"""The data plane of a round: what arrives over the tensor links and where it goes, and the core's bulk effects.

Implements the sink of the tensor links. A part's length comes from the manifest, never from the header; the round core
decides whether it is wanted; its scales are checked in a thread before it counts as received. The same goes for what is
fetched, so that nobody votes for bytes that a replica cannot apply.

Invariants: memory is bounded by the contributions that the core lets in, and per member and part by
RESULTS_PER_PART_MAX results; nothing of a finished round stays.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from blake3 import blake3

from shoal.node.blobs import BlobStore
from shoal.node.link_port import Address, FetchFailed, LinkEnd, LinkLost
from shoal.node.links import TensorLinks
from shoal.node.payload_memory import PayloadMemory
from shoal.node.snapshots import SnapshotStore, read_chunk
from shoal.protocol.aggregators import WeightedPart, clip_factors
from shoal.protocol.codecs import Codec
from shoal.protocol.contribution import Frozen
from shoal.protocol.effects import FetchBlob, Reduce, SendPart, SendResult
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.frames import FrameHeader, FrameKind
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.manifest import Manifest
from shoal.protocol.replica import make_reduction
from shoal.protocol.round_state import RESEND_AFTER, RESENDS_MAX
from shoal.protocol.rounds import RoundCore

SEND_TRIES = 3
SEND_RETRY_S = 0.5
FETCH_TIMEOUT_S = 20.0
FETCHES_MAX = 8  # at once; every one holds a part in memory
RESULTS_PER_PART_MAX = 8  # results of one part that a member may push in a round, one an attempt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangePorts:
    """What the exchange needs of the daemon. `pump` carries out the effects that a call to the core has made."""

    addresses_of: Callable[[PeerId], tuple[Address, ...]]
    pump: Callable[[], None]
    now: Callable[[], float]
    link_lost: Callable[[PeerId, LinkEnd], None]
    admit: Callable[[PeerId], Refusal | None]  # why this peer gets no link for now
    refusal: Callable[[PeerId | None, Refusal], None]  # a link was ended for this; None: nobody is to blame for it
    late: Callable[[PeerId, Refusal], None]  # a frame was dropped that an honest peer may send
    spawn: Callable[[Coroutine[object, object, object]], None]


class PartExchange:
    """Parts, results and blobs of the open round. `core` and `links` are set once, before anything is called."""

    core: RoundCore
    links: TensorLinks

    def __init__(
        self, me: PeerId, manifest: Manifest, blobs: BlobStore, snapshots: SnapshotStore, memory: PayloadMemory
    ) -> None:
        self._me = me
        self._memory = memory
        self._manifest = manifest
        self._reduction = make_reduction(manifest)
        self._blobs = blobs
        self._snapshots = snapshots
        self._parts: dict[tuple[PeerId, int, bytes], memoryview] = {}
        self._results: dict[bytes, memoryview] = {}
        self._lent: dict[bytes, memoryview] = {}  # parts of the own contribution, for the other one of a pair
        self._pushed: Counter[tuple[PeerId, int]] = Counter()  # results, by who sent them
        self._resends: Counter[tuple[PeerId, int]] = Counter()
        self._donors_failed: set[PeerId] = set()  # of this round, and among the core's candidates
        self._checked: set[str] = set()  # codecs whose kernels are loaded
        self._fetching = asyncio.Semaphore(FETCHES_MAX)
        self.frozen: Frozen | None = None
        self.ports: ExchangePorts
        self.encoded_bytes = 0
        self.fp32_bytes = 0

    def finish_round(self) -> None:
        """The round is applied: let go of everything that belonged to it."""
        self._parts.clear()
        self._results.clear()
        self._lent.clear()
        self._pushed.clear()
        self._resends.clear()
        self._donors_failed.clear()
        self.frozen = None

    def part_bytes(self, kind: FrameKind, round_number: int, part: int) -> int:
        """The exact encoded length of a part of a round's contributions or of its result."""
        number = self._manifest.list_parts(round_number)[part]
        is_result = kind is FrameKind.RESULT
        return self._manifest.update_bytes(number) if is_result else self._manifest.contribution_bytes(number)

    def _count_elements(self, round_number: int, part: int) -> int:
        first, end = self._manifest.part_range(self._manifest.list_parts(round_number)[part])
        return end - first

    def _codec_of(self, kind: FrameKind) -> Codec:
        return self._reduction.codec_in if kind is FrameKind.CONTRIBUTION else self._reduction.codec_out

    def result(self, digest: bytes) -> memoryview | None:
        """A result of the open round that is held in memory."""
        return self._results.get(digest)

    # -- the sink of the tensor links ------------------------------------------------------------------------------

    def admit(self, peer: PeerId) -> Refusal | None:
        # The handshake has bound the peer to this swarm; admission rules come with the manifest's owner.
        return self.ports.admit(peer)

    def reserve(self, peer: PeerId, header: FrameHeader) -> memoryview | Refusal:
        parts = self._manifest.list_parts(header.round)
        if header.part >= len(parts):
            raise ProtocolError(Refusal.OUT_OF_RANGE, f"part {header.part} of {len(parts)}")
        expected = self.part_bytes(header.kind, header.round, header.part)
        if header.nbytes != expected:
            detail = f"part {header.part} has {header.nbytes} bytes, the codec makes {expected}"
            raise ProtocolError(Refusal.WRONG_LENGTH, detail)
        if header.kind is FrameKind.CONTRIBUTION:
            refusal = self.core.check_part(peer, header.round, header.part, header.digest)
        elif header.digest in self._results:
            refusal = Refusal.DUPLICATE
        elif self._pushed[peer, header.part] >= RESULTS_PER_PART_MAX:
            refusal = Refusal.LIMIT
        else:
            refusal = self.core.check_result_part(peer, header.round, header.part)
        if refusal is not None:
            self.ports.late(peer, refusal)
            return refusal
        return self._memory.take(header.nbytes)

    async def complete(self, peer: PeerId, header: FrameHeader, buffer: memoryview) -> None:
        await self._check(header.kind, header.round, header.part, buffer)
        if header.round != self.core.round:
            self.ports.late(peer, Refusal.WRONG_ROUND)  # it was on its way when the round ended
            return
        if header.kind is FrameKind.CONTRIBUTION:
            self._parts[peer, header.part, header.digest] = buffer
            self.core.part_received(peer, header.round, header.part, header.digest, self.ports.now())
        else:
            self._pushed[peer, header.part] += 1
            self._results[header.digest] = buffer
            self.core.blob_held(header.digest, self.ports.now())
        self.ports.pump()

    async def _check(self, kind: FrameKind, round_number: int, part: int, buffer: memoryview) -> None:
        """Raises ProtocolError unless these bytes decode. That takes less time than the way to a thread and back, but
        for the first part of a codec, which loads its kernels."""
        codec, elements = self._codec_of(kind), self._count_elements(round_number, part)
        if codec.name in self._checked:
            codec.check_untrusted(buffer, elements)
        else:
            await asyncio.to_thread(codec.check_untrusted, buffer, elements)
            self._checked.add(codec.name)

    def aborted(self, peer: PeerId, header: FrameHeader) -> None:
        self.ports.late(peer, Refusal.EXPIRED)
        log.debug("%s did not finish part %d of round %d", short_peer_id(peer), header.part, header.round)

    def refused(self, peer: PeerId, header: FrameHeader) -> None:
        key = peer, header.part
        frozen = self.frozen
        known = (
            frozen is not None
            and frozen.round == header.round
            and frozen.digests[header.part : header.part + 1] == (header.digest,)
        )
        if known and header.refusal in RESEND_AFTER and self._resends[key] < RESENDS_MAX:
            self._resends[key] += 1
            self.ports.spawn(self._resend(peer, header))
        log.debug("%s refuses part %d of round %d: %s", short_peer_id(peer), header.part, header.round, header.refusal)

    async def serve(self, peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
        held = self._results.get(digest) or self._lent.get(digest)
        if held is not None:
            return held
        raw = await asyncio.to_thread(self._read_blob, digest)
        return None if raw is None else memoryview(raw)

    def _read_blob(self, digest: bytes) -> bytes | None:
        raw = self._blobs.read(digest)
        if raw is None and (found := self._snapshots.find_chunk(digest)):
            raw = read_chunk(*found)
        return raw

    def lend(self, frozen: Frozen) -> None:
        """Whoever asks for parts of this contribution gets them, until another one is lent or the round is over."""
        self._lent = dict(zip(frozen.digests, frozen.encoded, strict=True))

    async def fetch_lent(self, peer: PeerId, digest: bytes, buffer: memoryview) -> None:
        """A part of the contribution that this peer lends. Raises LinkLost and FetchFailed."""
        await self.links.fetch(peer, self.ports.addresses_of(peer), digest, buffer, FETCH_TIMEOUT_S)

    def link_up(self, peer: PeerId) -> None:
        log.debug("tensor link to %s", short_peer_id(peer))

    def link_lost(self, peer: PeerId, reason: LinkEnd) -> None:
        self.ports.link_lost(peer, reason)

    def on_refusal(self, peer: PeerId | None, refusal: Refusal) -> None:
        self.ports.refusal(peer, refusal)

    # -- effects of the round core ---------------------------------------------------------------------------------

    def send_part(self, effect: SendPart) -> None:
        """Push an own encoded part to its owner, unless the contribution was replaced since."""
        frozen = self.frozen
        if frozen is None or frozen.round != effect.round or frozen.digests[effect.part] != effect.digest:
            return
        payload = frozen.encoded[effect.part]
        self.encoded_bytes += payload.nbytes
        self.fp32_bytes += self._count_elements(effect.round, effect.part) * 4
        header = FrameHeader(
            kind=FrameKind.CONTRIBUTION,
            round=effect.round,
            part=effect.part,
            nbytes=payload.nbytes,
            digest=effect.digest,
        )
        self.ports.spawn(self._push(effect.peer, header, payload))

    def send_result(self, effect: SendResult) -> None:
        """Push a reduced part to one member."""
        payload = self._results.get(effect.digest)
        if payload is None:
            return  # the round has ended
        self.encoded_bytes += payload.nbytes
        self.fp32_bytes += self._count_elements(effect.round, effect.part) * 4
        header = FrameHeader(
            kind=FrameKind.RESULT,
            round=effect.round,
            part=effect.part,
            nbytes=payload.nbytes,
            digest=effect.digest,
        )
        self.ports.spawn(self._push(effect.peer, header, payload))

    async def _resend(self, peer: PeerId, header: FrameHeader) -> None:
        await asyncio.sleep(SEND_RETRY_S)
        self.send_part(SendPart(peer=peer, round=header.round, part=header.part, digest=header.digest))

    async def _push(self, peer: PeerId, header: FrameHeader, payload: memoryview) -> None:
        for attempt in range(1, SEND_TRIES + 1):
            if header.round != self.core.round:
                return
            try:
                await self.links.send(peer, self.ports.addresses_of(peer), header, payload)
                return
            except LinkLost as error:
                log.debug("%s, try %d of %d", error, attempt, SEND_TRIES)
                await asyncio.sleep(SEND_RETRY_S * attempt)

    def reduce(self, effect: Reduce) -> None:
        """Reduce a part in a thread and tell the core."""
        self.ports.spawn(self._reduce(effect))

    async def _reduce(self, effect: Reduce) -> None:
        if effect.round != self.core.round:
            return  # a snapshot has led past this round
        factors = clip_factors(effect.norms)
        parts = [
            WeightedPart(
                encoded=self._contributed(entry.signed.peer, effect.part, digest),
                weight=entry.weight,
                clip_factor=float(factors[index]),
            )
            for entry, digest, index in zip(effect.members, effect.digests, effect.indices, strict=True)
        ]
        elements = self._count_elements(effect.round, effect.part)
        reduced, digest = await asyncio.to_thread(self._reduce_now, parts, elements)
        if effect.round != self.core.round:
            return
        self._results[digest] = reduced
        indices = frozenset(effect.indices)
        self.core.part_reduced(effect.round, effect.attempt, effect.part, digest, indices, self.ports.now())
        self.ports.pump()

    def _reduce_now(self, parts: Sequence[WeightedPart], elements: int) -> tuple[memoryview, bytes]:
        """The encoded update of a part, and its digest. Blocking."""
        place = self._memory.take(self._reduction.codec_out.encoded_bytes(elements))
        reduced = self._reduction.reduce_part(parts, elements, place)
        return reduced, blake3(reduced).digest()

    def _contributed(self, peer: PeerId, part: int, digest: bytes) -> memoryview:
        if peer != self._me:
            return self._parts[peer, part, digest]
        assert self.frozen is not None, "an own part is reduced while the contribution is frozen"
        return self.frozen.encoded[part]

    def fetch(self, effect: FetchBlob) -> None:
        """Get a result part from whoever has it."""
        self.ports.spawn(self._fetch(effect))

    async def _fetch(self, effect: FetchBlob) -> None:
        stored = await asyncio.to_thread(self._blobs.read, effect.digest)
        if stored is not None:
            self._hold(effect, memoryview(stored))
            return
        async with self._fetching:
            # Peers that catch up ask different donors for different parts.
            turn = effect.part % len(effect.candidates) if effect.candidates else 0
            for peer in (*effect.candidates[turn:], *effect.candidates[:turn]):
                if effect.digest in self._results or effect.round != self.core.round:
                    return
                buffer = self._memory.take(self.part_bytes(FrameKind.RESULT, effect.round, effect.part))
                try:
                    addresses = self.ports.addresses_of(peer)
                    await self.links.fetch(peer, addresses, effect.digest, buffer, FETCH_TIMEOUT_S)
                except (LinkLost, FetchFailed) as error:
                    self._tell_donor_failed(peer, effect, error)
                    continue
                try:
                    await self._check(FrameKind.RESULT, effect.round, effect.part, buffer)
                except ProtocolError as error:
                    log.warning("part %d of round %d cannot be used: %s", effect.part, effect.round, error)
                    self.ports.refusal(peer, error.refusal)
                    return  # other candidates have the same bytes
                self._hold(effect, buffer)
                return

    def _tell_donor_failed(self, peer: PeerId, effect: FetchBlob, error: LinkLost | FetchFailed) -> None:
        """A joiner asks for many parts at once, and a donor that gives none of them is one piece of news a round."""
        level = logging.DEBUG if peer in self._donors_failed else logging.INFO
        self._donors_failed.add(peer)
        reason, donor = Failure.DONOR_FAILED, short_peer_id(peer)
        log.log(level, "%s: %s, part %d of round %d: %s", reason, donor, effect.part, effect.round, error)

    def _hold(self, effect: FetchBlob, buffer: memoryview) -> None:
        if effect.round == self.core.round:
            self._results[effect.digest] = buffer
            self.core.blob_held(effect.digest, self.ports.now())
            self.ports.pump()

    def store_results(self, digests: tuple[bytes, ...]) -> None:
        """Write held results to the blob store and force them to the disk. Blocking; raises OSError."""
        for digest in digests:
            held = self._results.get(digest)
            if held is not None:
                self._blobs.write(digest, held)
        self._blobs.sync(digests)
