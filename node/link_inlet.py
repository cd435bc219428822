"""What arrives on one tensor link besides headers: the payload in progress, and the blobs that were asked for.

Digests are taken record by record right after opening, while the bytes are in the cache: a pass over the whole payload
in a thread would read it again from memory and cost a hop per frame.

Invariants: no payload byte is read before the sink has reserved its place; every reserved buffer is returned by `take`
or reported to `sink.aborted`, once; a buffer whose asker has gone is not written to again.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from blake3 import blake3

from shoal.node.link_port import FetchFailed, FetchFailure, LinkLost, LinkSink
from shoal.node.link_records import SCRATCH
from shoal.node.link_traffic import PeerTraffic
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import FrameHeader, FrameKind
from shoal.protocol.identity import PeerId
from shoal.protocol.secure_channel import RECORD_BYTES_MAX, RecordOpener


@dataclass(slots=True, kw_only=True)
class Fetch:
    """A blob that was asked for. `into` is None once the asker has gone: its buffer is then no longer ours."""

    digest: bytes
    nbytes: int
    into: memoryview | None
    answered: asyncio.Future[None]


class FetchTable:
    """One link's open requests. Each keeps its slot until the peer has answered, even if its asker has gone."""

    __slots__ = ("_by_request", "_slots")

    def __init__(self, fetches_max: int) -> None:
        self._by_request: dict[int, Fetch] = {}
        self._slots = asyncio.Semaphore(fetches_max)

    def __len__(self) -> int:
        return len(self._by_request)

    async def take_slot(self) -> None:
        """Wait for room; `add` or `return_slot` has to follow."""
        await self._slots.acquire()

    def return_slot(self) -> None:
        """The slot was not used."""
        self._slots.release()

    def add(self, request: int, fetch: Fetch) -> None:
        """Enter a request in the slot that was taken for it."""
        self._by_request[request] = fetch

    def find(self, request: int) -> Fetch | None:
        """The open request of this number."""
        return self._by_request.get(request)

    def settle(self, request: int, error: LinkLost | FetchFailed | None = None) -> None:
        """The request is answered: wake its asker, if it still waits, and free the slot."""
        fetch = self._by_request.pop(request, None)
        if fetch is None:
            return
        self._slots.release()
        if fetch.answered.done():
            return
        if error is None:
            fetch.answered.set_result(None)
        else:
            fetch.answered.set_exception(error)

    def settle_all(self, error: LinkLost) -> None:
        """No answers will come any more."""
        for request in list(self._by_request):
            self.settle(request, error)


@dataclass(slots=True, kw_only=True)
class _Incoming:
    """The payload that is arriving. Neither `target` nor `fetch`: it was refused and is thrown away."""

    header: FrameHeader
    target: memoryview | None
    fetch: Fetch | None
    hasher: blake3
    began_s: float
    offset: int = 0

    @property
    def buffer(self) -> memoryview | None:
        return self.target if self.fetch is None else self.fetch.into


class PayloadInlet:
    """Takes one payload after another from a proven peer. Its errors are ProtocolError: the link then ends."""

    def __init__(
        self, peer: PeerId, sink: LinkSink, fetches: FetchTable, traffic: PeerTraffic, clock: Callable[[], float]
    ) -> None:
        self._peer = peer
        self._sink = sink
        self._fetches = fetches
        self._traffic = traffic
        self._clock = clock
        self._incoming: _Incoming | None = None

    @property
    def is_open(self) -> bool:
        """Whether a payload is under way."""
        return self._incoming is not None

    @property
    def next_record_bytes(self) -> int:
        """The one length that the next payload record may have."""
        if self._incoming is None:
            raise ProtocolError(Refusal.MALFORMED, "payload without a header")
        return min(RECORD_BYTES_MAX, self._incoming.header.nbytes - self._incoming.offset)

    def begin(self, header: FrameHeader, *, refuse: Refusal | None) -> Refusal | None:
        """A payload comes. A returned refusal has to be told to the peer; the bytes are then taken and dropped.

        `refuse` refuses it without asking the sink.
        """
        if self._incoming is not None:
            raise ProtocolError(Refusal.MALFORMED, "a payload within a payload")
        target: memoryview | None = None
        fetch: Fetch | None = None
        refusal: Refusal | None = None
        if header.kind is FrameKind.BLOB:
            fetch = self._find_fetch(header)
        else:
            place = refuse or self._sink.reserve(self._peer, header)
            if isinstance(place, Refusal):
                refusal = place
            else:
                assert not place.readonly and len(place) == place.nbytes == header.nbytes, (
                    "reserve: exactly the payload"
                )
                target = place
        self._incoming = _Incoming(header=header, target=target, fetch=fetch, hasher=blake3(), began_s=self._clock())
        return refusal

    def take(self, record: memoryview, opener: RecordOpener) -> tuple[FrameHeader, memoryview] | None:
        """Open the next record into its place; a pushed payload that is whole and authentic, for the sink."""
        nbytes = self.next_record_bytes
        incoming = self._incoming
        assert incoming is not None
        end = incoming.offset + nbytes
        buffer = incoming.buffer
        plain = SCRATCH[:nbytes] if buffer is None else buffer[incoming.offset : end]
        opener.open_into(record, plain)
        if buffer is not None:
            incoming.hasher.update(plain)
        incoming.offset = end
        self._traffic.payload_bytes_in += nbytes
        if end < incoming.header.nbytes:
            return None
        self._traffic.receive_rate.add(end, self._clock() - incoming.began_s)
        return self._finish(incoming)

    def abort(self, failure: FetchFailure = FetchFailure.ABANDONED) -> None:
        """The payload in progress, if any, will not be completed."""
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        if incoming.fetch is not None:
            self._fetches.settle(incoming.header.request, FetchFailed(self._peer, failure))
        elif incoming.target is not None:
            self._sink.aborted(self._peer, incoming.header)

    def take_answer(self, header: FrameHeader) -> None:
        """MISSING or REFUSED in answer to a FETCH of ours."""
        fetch = self._fetches.find(header.request)
        if fetch is None or (self._incoming is not None and self._incoming.fetch is fetch):
            raise ProtocolError(Refusal.NOT_PLANNED, f"{header.kind.name} answers nothing")
        failure = FetchFailure.REFUSED if header.refusal else FetchFailure.MISSING
        self._fetches.settle(header.request, FetchFailed(self._peer, failure, header.refusal))

    def _find_fetch(self, header: FrameHeader) -> Fetch:
        fetch = self._fetches.find(header.request)
        if fetch is None:
            raise ProtocolError(Refusal.NOT_PLANNED, "a blob that was not asked for")
        if (header.digest, header.nbytes) != (fetch.digest, fetch.nbytes):
            raise ProtocolError(Refusal.NOT_PLANNED, "another blob than the one that was asked for")
        return fetch

    def _finish(self, incoming: _Incoming) -> tuple[FrameHeader, memoryview] | None:
        header, buffer = incoming.header, incoming.buffer
        if buffer is not None and incoming.hasher.digest() != header.digest:
            self.abort(FetchFailure.WRONG_DIGEST)
            raise ProtocolError(Refusal.WRONG_DIGEST, f"{header.kind.name} is not what its header names")
        self._incoming = None
        if incoming.fetch is not None:
            self._fetches.settle(header.request)
            return None
        return None if buffer is None else (header, buffer)


def answers(refusal: FrameHeader, sent: FrameHeader) -> bool:
    """Whether this REFUSED is about the frame that is being sent."""
    if refusal.request:
        return refusal.request == sent.request
    named = (refusal.round, refusal.attempt, refusal.part, refusal.digest)
    return not sent.request and named == (sent.round, sent.attempt, sent.part, sent.digest)
