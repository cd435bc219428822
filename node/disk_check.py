"""After each start: everything that this disk keeps for others is read once, and what is damaged is named and replaced.

The state that a peer starts from is checked while it is restored (node.local_state). Older updates and snapshots are
read only when somebody asks for them, which may be never, or when nobody else has them any more. So they are read once,
at a rate that leaves the disk to the round: of updates what is lost is fetched again from others; a snapshot that is
spoilt is removed, the updates around it and the next one take its place.

Invariants: at most CHECK_BYTES_PER_S are read, a blob or a snapshot at a time; nothing is fetched but what a retained
round's certificate names; what nobody has is asked for again every RETRY_S as long as its round is retained.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from shoal.node.donors import Donors
from shoal.node.fetch import Transfer, TransferPorts
from shoal.node.ledger_store import StoreError
from shoal.node.links import TensorLinks
from shoal.node.local_state import LocalState
from shoal.node.snapshot_fetch import is_whole
from shoal.protocol.fetch_plan import Piece

CHECK_BYTES_PER_S = 64e6
RETRY_S = 60.0

log = logging.getLogger("shoal")


class DiskCheck:
    """All calls on the event loop. `tell` says what was found and mended."""

    def __init__(
        self,
        state: LocalState,
        links: TensorLinks,
        donors: Donors,
        tell: Callable[[str], None],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._state = state
        self._links = links
        self._donors = donors
        self._tell = tell
        self._pause = pause

    async def run(self) -> None:
        """Until everything that is retained is whole."""
        try:
            await self._check_snapshots()
            lost = await self._find_lost()
            if lost:
                self._tell(f"{len(lost)} damaged or missing blobs of retained rounds; other peers are asked for them")
        except (OSError, StoreError) as error:
            log.error("this disk could not be checked: %s", error)
            return
        while lost:
            count = len(lost)
            try:
                lost = await self.fetch(lost)
            except OSError as error:
                log.error("lost blobs were not stored: %s", error)
            if not lost:
                self._tell(f"{count} lost blobs of retained rounds were fetched again")
            else:
                await self._pause(RETRY_S)

    async def _check_snapshots(self) -> None:
        snapshots = self._state.stores.snapshots
        for number in snapshots.rounds():
            snapshot = snapshots.get(number)
            if snapshot is None:
                continue
            try:
                whole = await asyncio.to_thread(is_whole, snapshot)
            except FileNotFoundError:
                continue  # it was dropped meanwhile
            if not whole:
                self._tell(f"the snapshot of round {number} is damaged and is removed")
                await asyncio.to_thread(snapshots.remove, number)
            await self._pause(8 * snapshot.index.elements / CHECK_BYTES_PER_S)

    async def _find_lost(self) -> list[Piece]:
        """The newest first: they are asked for most."""
        lost = []
        for number, sizes in sorted(self._state.holdings.updates.items(), reverse=True):
            for digest, nbytes in sizes.items():
                # It says and removes what is not what its name says.
                if await asyncio.to_thread(self._state.stores.blobs.read, digest) is None:
                    lost.append(Piece(digest=digest, nbytes=nbytes, round=number))
                await self._pause(nbytes / CHECK_BYTES_PER_S)
        return self._keep_retained(lost)

    def _keep_retained(self, pieces: Sequence[Piece]) -> list[Piece]:
        updates, blobs = self._state.holdings.updates, self._state.stores.blobs
        return [piece for piece in pieces if piece.round in updates and not blobs.has(piece.digest)]

    async def fetch(self, lost: Sequence[Piece]) -> list[Piece]:
        """Ask for these; what is still lost, and still retained, then. Raises OSError."""
        oldest = min(piece.round for piece in lost)
        ports = TransferPorts(
            sources=lambda: self._donors.of_updates(oldest),
            addresses_of=self._donors.ports.addresses_of,
            take=self._take,
            failed=self._donors.ports.failed,
            lied=self._donors.liars.add,
        )
        async with Transfer(self._links, ports) as transfer:
            transfer.add(lost)
            await transfer.wait([piece.digest for piece in lost])
        await asyncio.to_thread(self._state.stores.blobs.sync_fetched)
        return self._keep_retained(lost)

    async def _take(self, piece: Piece, raw: memoryview) -> None:
        if piece.round in self._state.holdings.updates:
            await asyncio.to_thread(self._write, piece.digest, raw)

    def _write(self, digest: bytes, raw: memoryview) -> None:
        self._state.stores.blobs.write(digest, raw, fetched=True)
