"""A transfer over the tensor links: carries out a fetch plan (protocol.fetch_plan) with the donors that are there.

Every piece arrives in memory of its own, is checked against its digest by the link, and is handed to `take`, which puts
it on the disk; only then it counts as here. A slow disk holds up the donors when OPEN_BYTES_MAX wait for it.

Invariants: at most OPEN_BYTES_MAX bytes and a piece are held in buffers, whatever donors do; every ask ends within its
time-out; when the transfer is left, no task of it goes on.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from shoal.node.link_port import Address, FetchFailed, FetchFailure, LinkEnd, LinkLost
from shoal.node.links import TensorLinks
from shoal.protocol.errors import Failure
from shoal.protocol.fetch_plan import Ask, AskFailure, FetchPlan, Piece
from shoal.protocol.identity import PeerId

OPEN_BYTES_MAX = 64 * 2**20
LOOK_S = 1.0  # how often it is looked up who can be asked
HOPE_S = 5.0  # a piece that nobody has is waited for so long: donors come and go

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A peer that may be asked for pieces of round `first_round` and later ones."""

    peer: PeerId
    first_round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPorts:
    """`take` stores a piece and may raise what ends the transfer; `failed` tells of a donor that did not give one,
    `lied` of one that sent other bytes."""

    sources: Callable[[], Sequence[Source]]
    addresses_of: Callable[[PeerId], tuple[Address, ...]]
    take: Callable[[Piece, memoryview], Awaitable[None]]
    failed: Callable[[PeerId, Failure], None]
    lied: Callable[[PeerId], None]


class Transfer:
    """Use as an async context: it runs inside. All calls on the event loop."""

    def __init__(self, links: TensorLinks, ports: TransferPorts) -> None:
        self.plan = FetchPlan()
        self._links = links
        self._ports = ports
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._asks: dict[asyncio.Task[None], Ask] = {}
        self._storing: set[asyncio.Task[None]] = set()
        self._storing_bytes = 0
        self._stored: set[bytes] = set()
        self._known: set[PeerId] = set()
        self._looked_s = float("-inf")
        self._hopeless_s: float | None = None
        self._error: Exception | None = None
        self._runner: asyncio.Task[None]

    async def __aenter__(self) -> "Transfer":
        self._runner = self._loop.create_task(self._run())
        self._runner.add_done_callback(self._finish_running)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        running = [self._runner, *self._asks, *self._storing]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def note_held(self, digest: bytes) -> None:
        """This one is here already; it is not fetched."""
        self.plan.note_held(digest)
        if self.plan.is_here(digest):
            self._stored.add(digest)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Fetch these, too."""
        self.plan.add(pieces)
        self._wake.set()

    def look_again(self) -> None:
        """Somebody else can be asked now."""
        self._looked_s = float("-inf")
        self._wake.set()

    async def wait(self, digests: Sequence[bytes]) -> bool:
        """Until these pieces are here; False when one of those that were asked for is to be had nowhere. Raises what
        `take` raised."""
        while True:
            self._changed.clear()
            if self._error is not None:
                raise self._error
            if self._stored.issuperset(digests):
                return True
            if self._is_hopeless():
                return False
            await self._changed.wait()

    @property
    def fetched_bytes(self) -> int:
        return sum(one.delivered_bytes for one in self.plan.figures().values())

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            now = self._loop.time()
            self._look_up(now)
            for ask in self.plan.take_asks(now, OPEN_BYTES_MAX - self._storing_bytes):
                task = self._loop.create_task(self._carry_out(ask))
                self._asks[task] = ask
                task.add_done_callback(self._finish)
            self._judge_hope(now)
            due = self.plan.next_deadline(now)
            pause_s = LOOK_S if due is None else min(LOOK_S, due - now)
            if self._hopeless_s is not None:
                pause_s = min(pause_s, HOPE_S)
            # Not wait_for: Python 3.11's swallows a cancellation that meets the event.
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _look_up(self, now: float) -> None:
        if now < self._looked_s + LOOK_S:
            return
        self._looked_s = now
        rates = {one.peer: one.receive_bytes_per_s for one in self._links.statistics().peers}
        sources = {source.peer: source for source in self._ports.sources()}
        for gone in self._known.difference(sources):
            self.plan.drop_donor(gone)
        for peer, source in sources.items():
            self.plan.add_donor(peer, rates.get(peer), source.first_round)
            if peer not in self._known:
                self.plan.readmit(peer)
        self._known = set(sources)

    def _judge_hope(self, now: float) -> None:
        if self.plan.open_asks or self.plan.find_unobtainable() is None:
            self._hopeless_s = None
            return
        if self._hopeless_s is None:
            self._hopeless_s = now
        if self._is_hopeless():
            self._changed.set()

    def _is_hopeless(self) -> bool:
        return self._hopeless_s is not None and self._loop.time() >= self._hopeless_s + HOPE_S

    async def _carry_out(self, ask: Ask) -> None:
        buffer = memoryview(bytearray(ask.piece.nbytes))
        try:
            addresses = self._ports.addresses_of(ask.donor)
            await self._links.fetch(ask.donor, addresses, ask.piece.digest, buffer, ask.timeout_s)
        except (LinkLost, FetchFailed) as error:
            self._fail(ask, error)
            return
        if self.plan.delivered(ask, self._loop.time()):
            self._storing_bytes += ask.piece.nbytes
            storing = self._loop.create_task(self._store(ask.piece, buffer))
            self._storing.add(storing)
            storing.add_done_callback(self._finish_storing)
        for task, other in self._asks.items():
            if other.piece.digest == ask.piece.digest and other is not ask:
                task.cancel()

    async def _store(self, piece: Piece, buffer: memoryview) -> None:
        try:
            await self._ports.take(piece, buffer)
            self._stored.add(piece.digest)
        finally:
            self._storing_bytes -= piece.nbytes

    def _fail(self, ask: Ask, error: LinkLost | FetchFailed) -> None:
        failure = AskFailure.LOST
        if error.reason is FetchFailure.MISSING:
            failure = AskFailure.MISSING
        elif error.reason in (FetchFailure.WRONG_DIGEST, LinkEnd.MISBEHAVED):
            failure = AskFailure.WRONG  # the link has told why, and the peer's account is charged there
            self._ports.lied(ask.donor)
        log.debug("%s: %s", Failure.DONOR_FAILED, error)
        if failure is not AskFailure.MISSING:
            self._ports.failed(ask.donor, Failure.DONOR_FAILED)
        self.plan.failed(ask, failure, self._loop.time())

    def _finish_running(self, task: "asyncio.Task[None]") -> None:
        # It ends by a defect only; who waits for pieces must not wait for ever.
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._error = self._error or error
            self._changed.set()

    def _finish(self, task: "asyncio.Task[None]") -> None:
        ask = self._asks.pop(task)
        if task.cancelled():
            self.plan.withdrawn(ask)
        else:
            task.result()  # an ask that raises is a defect
        self._wake.set()

    def _finish_storing(self, task: "asyncio.Task[None]") -> None:
        self._storing.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._error = self._error or error
        self._wake.set()
        self._changed.set()
