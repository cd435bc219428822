"""Replay: certified updates one after the other, those of the next rounds on their way while one is applied.

Certificates are fetched ahead and checked as a stretch of the log; then their parts come from all donors at once into
the blob store, where the round core finds them when the certificate is handed to it.

Invariants: nothing is fetched that is not named by a certificate which follows the own head, or that of the snapshot
which is being taken over; at most AHEAD_BYTES_MAX bytes and AHEAD_ROUNDS_MAX rounds are fetched ahead of the round that
is applied; every part decodes before it is kept.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from shoal.node.donors import Donors
from shoal.node.fetch import Transfer, TransferPorts
from shoal.node.links import TensorLinks
from shoal.node.local_state import LocalState
from shoal.protocol.codecs import CODECS
from shoal.protocol.fetch_plan import Piece
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import CERTIFICATES_PER_ANSWER, Certificate, digest_record
from shoal.protocol.quorum import check_result, is_reroot

AHEAD_BYTES_MAX = 1 << 30
AHEAD_ROUNDS_MAX = 32
APPLY_TIMEOUT_S = 120.0  # of one round whose parts are here

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPorts:
    """`take_certificate` hands it to the round core, which checks and commits it; `wait_past` tells whether the head
    got past a round within so many seconds."""

    take_certificate: Callable[[Certificate, PeerId], None]
    wait_past: Callable[[int, float], Awaitable[bool]]
    tell: Callable[[str], None]


class Replay:
    """One replay from the own head on. `run` it once."""

    def __init__(
        self, manifest: Manifest, state: LocalState, links: TensorLinks, donors: Donors, ports: ReplayPorts
    ) -> None:
        self.fetched_bytes = 0
        self.apply_s: float | None = None  # the mean time of a round whose parts were here
        self._manifest = manifest
        self._codec = CODECS[manifest.rounds.codec_out]
        self._state = state
        self._links = links
        self._donors = donors
        self._ports = ports
        self._loop = asyncio.get_running_loop()
        self._asked: asyncio.Queue[Certificate | None] = asyncio.Queue()  # bounded by what may be ahead
        self._ahead_bytes = 0
        self._ahead_rounds = 0
        self._freed = asyncio.Event()
        self._parts: dict[bytes, int] = {}  # which part a digest that is fetched stands for

    async def run(
        self, page: Sequence[Certificate], peer: PeerId, target: int, begin: Awaitable[bool] | None = None
    ) -> None:
        """Up to round `target`, or as far as the donors lead. `page` is checked and begins after the head, or after the
        one that is there once `begin` says that it is; until then updates are fetched and none is applied."""
        ports = TransferPorts(
            sources=lambda: self._donors.of_updates(self._state.head.round + 1),
            addresses_of=self._donors.ports.addresses_of,
            take=self._take,
            failed=self._donors.ports.failed,
            lied=self._donors.liars.add,
        )
        async with Transfer(self._links, ports) as transfer:
            looking = asyncio.create_task(self._look_ahead(page, peer, target, transfer))
            try:
                if begin is not None and not await begin:
                    return
                while (certificate := await self._asked.get()) is not None:
                    self._ports.tell(f"replaying round {certificate.result.round} of {target}")
                    if not await self._apply(certificate, peer, transfer):
                        return
                    self._leave_behind(certificate)
                await looking
            finally:
                looking.cancel()
                await asyncio.gather(looking, return_exceptions=True)
                self.fetched_bytes += transfer.fetched_bytes
        # Once, and not round by round: until then these are copies of what the donors hold.
        await asyncio.to_thread(self._state.stores.blobs.sync_fetched)

    # -- ahead -------------------------------------------------------------------------------------------------------

    async def _look_ahead(self, page: Sequence[Certificate], peer: PeerId, target: int, transfer: Transfer) -> None:
        try:
            while page:
                for certificate in page:
                    await self._begin_fetch(certificate, transfer)
                    self._asked.put_nowait(certificate)
                last = page[-1].result
                if last.round >= target:
                    return
                digest, count = digest_record(last), min(CERTIFICATES_PER_ANSWER, target - last.round)
                page = await self._donors.collect(peer, last.round + 1, count, digest, last.voters)
        finally:
            self._asked.put_nowait(None)

    async def _begin_fetch(self, certificate: Certificate, transfer: Transfer) -> None:
        nbytes = self._update_bytes(certificate)
        while self._ahead_rounds and (
            self._ahead_bytes + nbytes > AHEAD_BYTES_MAX or self._ahead_rounds >= AHEAD_ROUNDS_MAX
        ):
            self._freed.clear()
            await self._freed.wait()
        self._ahead_bytes += nbytes
        self._ahead_rounds += 1
        result = certificate.result
        held = await asyncio.to_thread(self._find_held, [one.digest for one in result.parts])
        pieces = []
        for part, one in self._manifest.match_parts(result):
            if one.digest in held:
                transfer.note_held(one.digest)
            elif not transfer.plan.is_here(one.digest):
                self._parts[one.digest] = part
                pieces.append(Piece(digest=one.digest, nbytes=self._manifest.update_bytes(part), round=result.round))
        transfer.add(pieces)

    def _leave_behind(self, certificate: Certificate) -> None:
        """The round is applied: there is room for another one ahead."""
        self._ahead_bytes -= self._update_bytes(certificate)
        self._ahead_rounds -= 1
        for part in certificate.result.parts:
            self._parts.pop(part.digest, None)
        self._freed.set()

    def _find_held(self, digests: Sequence[bytes]) -> set[bytes]:
        """What is here already, from before a restart. Whoever uses it checks it."""
        return {digest for digest in digests if self._state.stores.blobs.has(digest)}

    async def _take(self, piece: Piece, raw: memoryview) -> None:
        await asyncio.to_thread(self._store, self._parts[piece.digest], piece.digest, raw)

    def _store(self, part: int, digest: bytes, raw: memoryview) -> None:
        first, end = self._manifest.part_range(part)
        self._codec.check_untrusted(raw, end - first)
        self._state.stores.blobs.write(digest, raw, fetched=True)

    def _update_bytes(self, certificate: Certificate) -> int:
        return sum(self._manifest.update_bytes(part) for part, _ in self._manifest.match_parts(certificate.result))

    # -- apply -------------------------------------------------------------------------------------------------------

    async def _apply(self, certificate: Certificate, peer: PeerId, transfer: Transfer) -> bool:
        """Whether the round is applied."""
        result = certificate.result
        if not await transfer.wait([part.digest for part in result.parts]):
            log.info("the update of round %d is to be had nowhere", result.round)
            return False
        head = self._state.head
        if result.round <= head.round:
            return True  # the swarm's live rounds have led past it
        # The round core checks it, too. Here one that builds on another state ends the replay instead of being waited
        # for.
        parts = len(self._manifest.list_parts(result.round))
        check_result(result, head, parts, is_reroot=is_reroot(certificate))
        began_s = self._loop.time()
        self._ports.take_certificate(certificate, peer)
        if not await self._ports.wait_past(result.round - 1, APPLY_TIMEOUT_S):
            log.info("round %d was not applied within %.0f s", result.round, APPLY_TIMEOUT_S)
            return False
        took_s = self._loop.time() - began_s
        if self._state.apply_s is not None:  # a process's first outer step says nothing of the next ones
            self.apply_s = took_s if self.apply_s is None else 0.7 * self.apply_s + 0.3 * took_s
        return True
