"""A snapshot from several donors at once, into a file that outlives a restart (node.partial_snapshot).

Invariants: the index was compared with a certified root before a byte is fetched; every chunk is checked before it is
written, and all of them once more when the file is whole.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shoal.node.donors import Donors
from shoal.node.fetch import Source, Transfer, TransferPorts
from shoal.node.links import TensorLinks
from shoal.node.partial_snapshot import PartialSnapshot
from shoal.node.snapshots import Snapshot, SnapshotStore
from shoal.protocol.codecs import Float32s
from shoal.protocol.fetch_plan import Piece
from shoal.protocol.identity import PeerId
from shoal.protocol.state import SnapshotIndex, chunk_digests

SYNC_BYTES = 64 * 2**20

log = logging.getLogger(__name__)


class SnapshotFetch:
    """One snapshot. `run` it once."""

    def __init__(
        self,
        index: SnapshotIndex,
        folder: Path,
        store: SnapshotStore,
        links: TensorLinks,
        donors: Donors,
        tell: Callable[[str], None],
        line_freed: Callable[[], None],
    ) -> None:
        """`line_freed` is called when the last chunk is here: what follows takes the disk and the processor."""
        self.fetched_bytes = 0
        self._index = index
        self._folder = folder
        self._store = store
        self._links = links
        self._donors = donors
        self._tell = tell
        self._line_freed = line_freed
        self._having: dict[PeerId, None] = {}  # donors that have said that they have it
        self._numbers: dict[bytes, list[int]] = {}
        for number in range(index.chunks):
            self._numbers.setdefault(index.digest(number), []).append(number)
        self._here = 0
        self._unsynced_bytes = 0

    async def run(self, donor: PeerId) -> Snapshot | None:
        """The snapshot, whole and in the store; None where chunks of it are to be had nowhere. `donor` has it."""
        if (known := self._store.get(self._index.round)) is not None and known.index == self._index:
            self._line_freed()
            return known  # a restart came between its last chunk and its use
        partial = await asyncio.to_thread(PartialSnapshot, self._folder, self._index)
        try:
            if not await self._fill(partial, donor):
                return None
        finally:
            partial.close()
        self._line_freed()
        await asyncio.to_thread(partial.finish, self._store)
        snapshot = self._store.get(self._index.round)
        if snapshot is not None and not await asyncio.to_thread(is_whole, snapshot):
            log.warning("the snapshot of round %d was spoilt on this disk and is removed", self._index.round)
            await asyncio.to_thread(self._store.remove, self._index.round)
            return None
        return snapshot

    async def _fill(self, partial: PartialSnapshot, donor: PeerId) -> bool:
        self._tell(f"snapshot of round {self._index.round}: looking what is here already")
        held = await asyncio.to_thread(partial.find_held)
        self._having[donor] = None

        async def take(piece: Piece, raw: memoryview) -> None:
            for number in self._numbers[piece.digest]:
                await asyncio.to_thread(partial.write, number, raw)
            self._note_progress(len(self._numbers[piece.digest]))
            self._unsynced_bytes += piece.nbytes
            if self._unsynced_bytes >= SYNC_BYTES:
                # As it comes, or all of it would be waited for at the end.
                self._unsynced_bytes = 0
                await asyncio.to_thread(partial.sync)

        ports = TransferPorts(
            sources=self._list_sources, addresses_of=self._donors.ports.addresses_of, take=take,
            failed=self._donors.ports.failed,
            lied=self._donors.liars.add,
        )  # fmt: skip
        async with Transfer(self._links, ports) as transfer:
            here = set(held)
            missing = {digest: numbers for digest, numbers in self._numbers.items() if not here.issuperset(numbers)}
            self._note_progress(self._index.chunks - sum(len(numbers) for numbers in missing.values()))
            transfer.add(Piece(digest=digest, nbytes=self._nbytes(numbers[0])) for digest, numbers in missing.items())
            asking = asyncio.create_task(self._ask_others(donor, transfer))
            try:
                return await transfer.wait(list(missing))
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                self.fetched_bytes = transfer.fetched_bytes

    def _note_progress(self, chunks: int) -> None:
        self._here += chunks
        self._tell(f"snapshot of round {self._index.round}: chunk {self._here} of {self._index.chunks}")

    def _nbytes(self, number: int) -> int:
        span = self._index.span(number)
        return span.stop - span.start

    def _list_sources(self) -> list[Source]:
        there = self._donors.of_round(self._index.round)
        return [Source(peer=peer) for peer in there if peer in self._having]

    async def _ask_others(self, donor: PeerId, transfer: Transfer) -> None:
        """Whoever else says that it has this snapshot helps, and keeps it as long as it is asked for chunks."""
        others = [peer for peer in self._donors.of_round(self._index.round) if peer != donor]

        async def ask(peer: PeerId) -> None:
            index = await self._donors.ask_snapshot(peer, self._index.round, self._index.elements)
            if index == self._index:
                self._having[peer] = None
                transfer.look_again()

        await asyncio.gather(*(ask(peer) for peer in others))


def map_state(snapshot: Snapshot) -> tuple[Float32s, Float32s]:
    """Params and momentum as they stand in the file, without a copy in memory."""
    mapped: Float32s = np.memmap(
        snapshot.path, dtype="<f4", mode="r", offset=snapshot.data_start, shape=(2, snapshot.index.elements)
    )
    return mapped[1], mapped[0]  # as chunk_offset says


def is_whole(snapshot: Snapshot) -> bool:
    """Whether every chunk in the file has its digest. Reads all of it."""
    params, momentum = map_state(snapshot)
    return chunk_digests(params) + chunk_digests(momentum) == snapshot.index.digests
