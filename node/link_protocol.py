"""One tensor link: an asyncio BufferedProtocol that carries frames in sealed records over one TCP connection.

Headers and payloads travel in separate records, so a header (an answer, a ping, an end) may pass between two records
of a payload; payloads themselves go one after another. A payload crosses user space twice: sealed from the sender's
memory into this link's one record buffer, and opened from the receiver's inbox into the buffer that the sink has
reserved. Nothing else copies it.

Invariants: one record of ciphertext is all that a link ever has queued besides headers (the transport's high-water mark
is 0, and the next record is sealed when the kernel has taken the last); a header never waits for more than that; a link
ends once, with one reason.
"""

import asyncio
from dataclasses import replace
from typing import cast

from shoal.node.link_host import LinkHost
from shoal.node.link_inlet import Fetch, FetchTable, PayloadInlet, answers
from shoal.node.link_pacing import Reading, pace, set_bulk
from shoal.node.link_port import Address, LinkEnd, LinkLost, LinkPath
from shoal.node.link_records import SCRATCH, LinkDeadlines, LinkSigns, RecordInbox, RecordKind
from shoal.node.link_traffic import PeerTraffic
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import (
    HEADER_BYTES,
    REQUEST_MAX,
    FrameHeader,
    FrameKind,
    decode_header_untrusted,
    encode_header,
)
from shoal.protocol.identity import PeerId
from shoal.protocol.secure_channel import (
    RECORD_BYTES_MAX,
    RECORD_OVERHEAD_BYTES,
    Handshake,
    RecordOpener,
    RecordSealer,
    SecureChannel,
)

HANDSHAKE_READ_BYTES = 2048
# Unsent bytes that the kernel may hold: what a header waits behind on a slow path.
KERNEL_UNSENT_BYTES_MAX = 512 * 1024
# A sender lets the loop breathe after this many bytes.
YIELD_BYTES = 1024 * 1024
UNSENT_HEADERS_MAX = 64

_HEADER_RECORD_BYTES = HEADER_BYTES + RECORD_OVERHEAD_BYTES


class Link(asyncio.BufferedProtocol):
    """One connection to one peer, in either direction. Made by TensorLinks, which alone calls it.

    `expected` is the only peer that will do, None for an accepted connection. `binding` names the connection alike at
    both ends, once it is proven.
    """

    def __init__(
        self, host: LinkHost["Link"], handshake: Handshake, expected: PeerId | None, path: LinkPath = LinkPath.DIRECT
    ) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._handshake: Handshake | None = handshake
        self._sealer: RecordSealer
        self._opener: RecordOpener
        self.expected = expected
        self.peer: PeerId | None = None
        self.path = path
        self.binding = b""
        self.local: Address = ("", 0)
        self.remote: Address = ("", 0)
        self.ended: LinkEnd | None = None
        self.refusal: Refusal | None = None
        self.opened: asyncio.Future[None] = self._loop.create_future()  # fails with LinkLost
        self.closed: asyncio.Future[None] = self._loop.create_future()  # the socket is gone
        self.waiting_sends = 0
        self._began_s = self._loop.time()
        self._deadlines = LinkDeadlines(host.config, self._began_s)
        self._abort_at_s: float | None = None
        self._leaving: LinkEnd | None = None
        self._peer_left = False
        self._traffic = PeerTraffic()
        self._wire_bytes_in = 0
        self._wire_bytes_out = 0
        self._frames = 0
        self._frames_at_tick = 0
        self._bare_headers_since_tick = 0
        self._ping: tuple[int, float] | None = None
        # receiving
        self._early = memoryview(bytearray(HANDSHAKE_READ_BYTES))
        self._inbox: RecordInbox | None = None
        self._header_bytes = memoryview(bytearray(HEADER_BYTES))
        self._inlet: PayloadInlet | None = None
        self._completions = 0
        self._reading: Reading
        # sending
        self._turn = asyncio.Lock()
        self._record: memoryview | None = None
        self._outgoing: FrameHeader | None = None
        self._outgoing_refused = False
        self._paused = False
        self._resumed: asyncio.Future[None] | None = None
        self._unsent_headers = 0
        # asking and answering; the requests of the two sides differ in their lowest bit
        self._request = 0
        self._fetches = FetchTable(host.config.fetches_max)
        self._serving: dict[int, bool] = {}  # by request; False: the asker has gone

    # What the table asks of a link

    @property
    def is_usable(self) -> bool:
        """Whether a new frame may be sent."""
        return self.peer is not None and self.ended is None and self._leaving is None and not self._peer_left

    async def send_frame(self, header: FrameHeader, payload: memoryview) -> None:
        """Send a header and its payload; returns when the kernel has every byte. Raises LinkLost.

        Cancelled in the middle, it tells the peer that the rest will not come, and the link goes on.
        """
        self.waiting_sends += 1
        try:
            async with self._turn, self._host.turns:
                self._require_usable()
                if header.request and not self._serving[header.request]:
                    self._answer(header, FrameKind.MISSING)
                else:
                    await self._stream(header, payload)
        finally:
            self.waiting_sends -= 1
            self._host.sent(self._known_peer)
            self._close_after_goodbye()

    async def fetch(self, digest: bytes, into: memoryview) -> None:
        """Ask for the blob and fill `into` with it, checked. Raises LinkLost or FetchFailed."""
        await self._fetches.take_slot()
        try:
            self._require_usable()
        except LinkLost:
            self._fetches.return_slot()
            raise
        request = self._next_request()
        fetch = Fetch(digest=digest, nbytes=len(into), into=into, answered=self._loop.create_future())
        self._fetches.add(request, fetch)
        self._write_header(FrameHeader(kind=FrameKind.FETCH, nbytes=len(into), digest=digest, request=request))
        try:
            await fetch.answered
        finally:
            fetch.into = None
            if self._fetches.find(request) is fetch:
                # The asker has gone: spare both sides the bytes. The request stays open until the peer has answered.
                gone = FrameHeader(kind=FrameKind.REFUSED, request=request, refusal=Refusal.EXPIRED)
                self._write_header(gone)

    def leave(self, reason: LinkEnd) -> None:
        """Say goodbye: send nothing new, take what is under way, close when the peer does or a deadline passes."""
        if self.ended is not None or self._leaving is not None:
            return
        if self.peer is None:
            self.end(reason)
            return
        self._leaving = reason
        self._abort_at_s = self._loop.time() + self._host.config.goodbye_timeout_s
        self._write_header(FrameHeader(kind=FrameKind.GOODBYE))
        self._wake_sender()
        self._reading.release()
        if self._peer_left:
            self._transport.close()

    def become_dialer(self, handshake: Handshake, peer: PeerId) -> None:
        """This side begins the handshake after all, though the other one has made the connection; before `connected`
        returns."""
        self._handshake, self.expected = handshake, peer

    def dismiss(self, refusal: Refusal) -> None:
        """End the link because of what the peer did elsewhere, and tell it."""
        if self.ended is None:
            self._say_why(refusal, linger=True)

    def doubt(self) -> None:
        """The peer may be gone: end this link unless it shows soon that it is not."""
        self._deadlines.doubt()

    def end(self, reason: LinkEnd, refusal: Refusal | None = None) -> None:
        """Cut the connection now."""
        self._finish(reason, refusal)
        self._transport.abort()

    def tick(self, now_s: float) -> None:
        """Judge the deadlines, ping, and give back what a quiet link does not need."""
        if self._abort_at_s is not None and now_s >= self._abort_at_s:
            self._transport.abort()
        if self.ended is not None:
            return
        if self.peer is None:
            self._judge_handshake(now_s)
            return
        self._bare_headers_since_tick = 0
        reason = self._deadlines.judge(now_s, self._signs())
        if reason is LinkEnd.IDLE:
            self.leave(reason)
        elif reason is not None:
            self.end(reason)
        elif self.is_usable and not self._paused and self._deadlines.is_ping_due(now_s):
            self._ping = (self._next_request(), self._loop.time())
            self._write_header(FrameHeader(kind=FrameKind.PING, request=self._ping[0]))
        if self._frames == self._frames_at_tick and self._outgoing is None and not self._paused:
            self._record = None
            if self._inbox is not None:
                self._inbox.shrink()
        self._frames_at_tick = self._frames

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface of asyncio's without descending from them.
        self._transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(high=0)
        self._reading = Reading(transport, self._host.download, self._read_records)
        congestion_control = self._host.config.congestion_control
        set_bulk(transport.get_extra_info("socket"), KERNEL_UNSENT_BYTES_MAX, congestion_control)
        # None where the other side has hung up already.
        self.local = (transport.get_extra_info("sockname") or self.local)[:2]
        self.remote = (transport.get_extra_info("peername") or self.remote)[:2]
        if self._host.connected(self):
            self._send_handshake()
        else:
            self.end(LinkEnd.LIMIT)

    def connection_lost(self, error: Exception | None) -> None:
        orderly = LinkEnd.PEER_SAID_GOODBYE if self._peer_left else None
        abrupt = LinkEnd.RELAY_ENDED if self.path is LinkPath.RELAYED else LinkEnd.CLOSED_BY_PEER
        self._finish(self._leaving or orderly or abrupt, None)
        self._host.disconnected(self)
        self.closed.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self.ended is not None:
            return SCRATCH
        return self._early if self._inbox is None else self._inbox.free()

    def buffer_updated(self, nbytes: int) -> None:
        if self.ended is not None:
            return
        self._wire_bytes_in += nbytes
        self._traffic.wire_bytes_in += nbytes
        if self._inbox is None:
            self._shake_hands(nbytes)
        else:
            self._inbox.add(nbytes)
            self._read_records()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._unsent_headers = 0
        self._wake_sender()

    # Opening and ending

    @property
    def _known_peer(self) -> PeerId:
        peer = self.peer or self.expected
        assert peer is not None, "only a link to a known peer is used"
        return peer

    def _send_handshake(self) -> bool:
        """Whether there was anything to say."""
        assert self._handshake is not None
        outgoing = self._handshake.take_outgoing()
        if outgoing:
            self._write(outgoing)
        return bool(outgoing)

    def _shake_hands(self, nbytes: int) -> None:
        assert self._handshake is not None
        is_new = self.expected is None and self._wire_bytes_in == nbytes
        if is_new and self._host.divert(self._transport, self._early[:nbytes]):
            self._finish(LinkEnd.DIVERTED, None)
            self._host.disconnected(self)
            self.closed.set_result(None)
            return
        try:
            channel = self._handshake.receive(self._early[:nbytes])
        except ProtocolError as error:
            self._condemn(error, linger=self._send_handshake())
            return
        self._send_handshake()
        if channel is not None:
            self._open(channel, dialer=self._handshake.dialer)

    def _open(self, channel: SecureChannel, *, dialer: bool) -> None:
        self._handshake = None
        self._request = int(dialer)
        self._sealer, self._opener = channel.sealer, channel.opener
        self.peer, self.binding = channel.peer, channel.binding
        self._traffic = self._host.traffic_with(channel.peer)
        self._traffic.wire_bytes_in += self._wire_bytes_in
        self._traffic.wire_bytes_out += self._wire_bytes_out
        self._inbox = RecordInbox(channel.leftover)
        self._inlet = PayloadInlet(channel.peer, self._host.sink, self._fetches, self._traffic, self._loop.time)
        refusal = self._host.link_opened(self, channel.peer)
        if refusal is not None:
            self._condemn(ProtocolError(refusal, "not admitted"))
            return
        self.opened.set_result(None)
        self._read_records()

    def _judge_handshake(self, now_s: float) -> None:
        if now_s - self._began_s < self._host.config.handshake_timeout_s:
            return
        if self.expected is None:
            self._host.sink.on_refusal(None, Refusal.EXPIRED)
        self.end(LinkEnd.HANDSHAKE_TIMEOUT)

    def _condemn(self, error: ProtocolError, *, linger: bool = True, proven: bool = True) -> None:
        """End the link because of what came over it. What is not `proven` to come from the peer may come from anyone on
        the path, and is held against nobody."""
        if self.ended is None:
            self._host.sink.on_refusal(self.peer if proven else None, error.refusal)
            self._say_why(error.refusal, linger=linger)

    def _say_why(self, refusal: Refusal, *, linger: bool) -> None:
        """End the link, and linger just long enough for the peer to read why."""
        if self.peer is not None:
            self._write_header(FrameHeader(kind=FrameKind.GOODBYE, refusal=refusal))
        self._finish(LinkEnd.MISBEHAVED, refusal)
        if not linger:
            self._transport.abort()
        elif not self._transport.is_closing():
            self._abort_at_s = self._loop.time() + self._host.config.goodbye_timeout_s
            # What still arrives is dropped: closing upon unread bytes would reset the connection and lose the reason.
            self._transport.resume_reading()
            self._transport.write_eof()

    def _finish(self, reason: LinkEnd, refusal: Refusal | None) -> None:
        if self.ended is not None:
            return
        self.ended, self.refusal = reason, refusal
        self._handshake = None
        self._record = None
        self._reading.stop()
        if self.peer is not None:
            self._fetches.settle_all(LinkLost(self.peer, reason, refusal))
        if self._inlet is not None:
            self._inlet.abort()
        if not self.opened.done():
            if self.expected is None:
                self.opened.cancel()
            else:
                self.opened.set_exception(LinkLost(self.expected, reason, refusal))
                # Retrieved here, because nobody may be waiting any more.
                self.opened.exception()
        self._wake_sender()
        self._host.link_ended(self)

    def _require_usable(self) -> None:
        self._require_open()
        if self._peer_left:
            raise LinkLost(self._known_peer, LinkEnd.PEER_SAID_GOODBYE)

    def _require_open(self) -> None:
        end = self.ended or self._leaving
        if end is not None:
            raise LinkLost(self._known_peer, end, self.refusal)

    def _close_after_goodbye(self) -> None:
        """The peer has said goodbye: close as soon as nothing of ours is under way."""
        if self._peer_left and self.ended is None and not self.waiting_sends:
            self._abort_at_s = self._loop.time() + self._host.config.goodbye_timeout_s
            self._transport.close()

    def _signs(self) -> LinkSigns:
        payload = self._inlet is not None and self._inlet.is_open
        return LinkSigns(
            wire_bytes_in=self._wire_bytes_in,
            wire_bytes_taken=self._wire_bytes_out - self._transport.get_write_buffer_size(),
            frames=self._frames,
            reading_held=self._reading.is_held,
            writing_paused=self._paused,
            unfinished=payload or (self._inbox is not None and self._inbox.has_partial),
            busy=bool(self.waiting_sends or self._serving or self._completions or len(self._fetches)),
        )

    # Sending

    def _next_request(self) -> int:
        self._request = (self._request + 2) & REQUEST_MAX or 2
        return self._request

    def _write(self, data: bytes | memoryview) -> None:
        self._wire_bytes_out += len(data)
        self._traffic.wire_bytes_out += len(data)
        if not self._transport.is_closing():
            self._transport.write(data)

    def _write_header(self, header: FrameHeader) -> None:
        """Send a header at once, in front of what is left of the payload under way."""
        if self.ended is not None:
            return
        if self._paused:
            self._unsent_headers += 1
            if self._unsent_headers > UNSENT_HEADERS_MAX:
                self.end(LinkEnd.STALLED)
                return
        record = memoryview(bytearray(_HEADER_RECORD_BYTES))
        self._sealer.seal_into(RecordKind.HEADER, encode_header(header), record)
        self._write(record)
        if header.kind not in (FrameKind.PING, FrameKind.PONG):
            self._frames += 1
            self._traffic.frames_out += 1

    async def _stream(self, header: FrameHeader, payload: memoryview) -> None:
        began_s, offset = self._loop.time(), 0
        self._outgoing, self._outgoing_refused = header, False
        self._write_header(header)
        try:
            while offset < header.nbytes and not self._outgoing_refused:
                await pace(self._host.upload, min(RECORD_BYTES_MAX, header.nbytes - offset))
                await self._wait_writable()
                offset = self._write_payload(payload, offset)
                if offset % YIELD_BYTES == 0:
                    await asyncio.sleep(0)
            await self._wait_writable()
            self._traffic.send_rate.add(offset, self._loop.time() - began_s)
        finally:
            self._outgoing = None
            if offset < header.nbytes and self._leaving is None:
                # Refused or cancelled; a link that has ended drops this, and a goodbye has said it already.
                self._write_header(FrameHeader(kind=FrameKind.ABANDON))

    def _write_payload(self, payload: memoryview, offset: int) -> int:
        end = min(offset + RECORD_BYTES_MAX, len(payload))
        if self._record is None:
            self._record = memoryview(bytearray(RECORD_BYTES_MAX + RECORD_OVERHEAD_BYTES))
        nbytes = self._sealer.seal_into(RecordKind.PAYLOAD, payload[offset:end], self._record)
        self._write(self._record[:nbytes])
        self._traffic.payload_bytes_out += end - offset
        return end

    async def _wait_writable(self) -> None:
        """Wait until the kernel has taken everything, and the record buffer with it. Raises LinkLost."""
        while self._paused and self.ended is None and self._leaving is None:
            self._resumed = self._loop.create_future()
            await self._resumed
        self._require_open()

    def _wake_sender(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)

    # Receiving

    def _read_records(self) -> None:
        assert self._inbox is not None and self._inlet is not None
        proven = False
        try:
            while not self._reading.is_held and self.ended is None:
                proven = False  # a record's prefix is in the clear
                found = self._inbox.next_record(self._expect_bytes)
                if found is None:
                    break
                kind, record = found
                proven = True
                if kind == RecordKind.HEADER:
                    self._opener.open_into(record, self._header_bytes)
                    self._take_header(self._inlet, decode_header_untrusted(self._header_bytes))
                else:
                    self._reading.took(record.nbytes)
                    pushed = self._inlet.take(record, self._opener)
                    if pushed is not None:
                        self._hand_over(*pushed)
        except ProtocolError as error:
            self._condemn(error, proven=proven and error.refusal is not Refusal.NOT_AUTHENTIC)
        self._inbox.compact()

    def _expect_bytes(self, kind: int) -> int:
        if kind == RecordKind.HEADER:
            return HEADER_BYTES
        if kind == RecordKind.PAYLOAD and self._inlet is not None:
            return self._inlet.next_record_bytes
        raise ProtocolError(Refusal.UNKNOWN_TYPE, f"record kind {kind}")

    def _hand_over(self, header: FrameHeader, buffer: memoryview) -> None:
        self._completions += 1
        if self._completions >= self._host.config.completions_max and self._leaving is None:
            self._reading.hold()
        self._host.spawn(self._complete(header, buffer))

    async def _complete(self, header: FrameHeader, buffer: memoryview) -> None:
        try:
            await self._host.sink.complete(self._known_peer, header, buffer)
        except ProtocolError as error:
            self._condemn(error)
        finally:
            self._completions -= 1
            if self.ended is None:
                self._reading.release()

    def _take_header(self, inlet: PayloadInlet, header: FrameHeader) -> None:
        if header.kind not in (FrameKind.PING, FrameKind.PONG):
            self._frames += 1
            self._traffic.frames_in += 1
        if header.payload_bytes:
            self._begin_payload(inlet, header)
            return
        self._bare_headers_since_tick += 1
        if self._bare_headers_since_tick > self._host.config.bare_headers_per_tick_max:
            raise ProtocolError(Refusal.LIMIT, "too many frames without a payload")
        match header.kind:
            case FrameKind.PING:
                self._write_header(FrameHeader(kind=FrameKind.PONG, request=header.request))
            case FrameKind.PONG:
                if self._ping is not None and self._ping[0] == header.request:
                    now = self._loop.time()
                    self._traffic.add_round_trip(now, now - self._ping[1])
            case FrameKind.FETCH:
                self._take_fetch(header)
            case FrameKind.MISSING:
                inlet.take_answer(header)
            case FrameKind.REFUSED:
                self._take_refusal(inlet, header)
            case FrameKind.ABANDON:
                if not inlet.is_open:
                    raise ProtocolError(Refusal.MALFORMED, "nothing to abandon")
                inlet.abort()
            case _:
                self._take_goodbye(inlet, header)

    def _begin_payload(self, inlet: PayloadInlet, header: FrameHeader) -> None:
        refusal = inlet.begin(header, refuse=Refusal.EXPIRED if self._host.stopping else None)
        if refusal is not None:
            self._answer(header, FrameKind.REFUSED, refusal)

    def _answer(self, header: FrameHeader, kind: FrameKind, refusal: Refusal | None = None) -> None:
        self._write_header(replace(header, kind=kind, nbytes=0, refusal=refusal))

    def _take_fetch(self, header: FrameHeader) -> None:
        if header.request in self._serving:
            raise ProtocolError(Refusal.DUPLICATE, f"request {header.request} is being served")
        if self._host.stopping or len(self._serving) >= self._host.config.serves_max:
            self._answer(header, FrameKind.REFUSED, Refusal.LIMIT)
            return
        self._serving[header.request] = True
        self._host.spawn(self._serve(header))

    async def _serve(self, header: FrameHeader) -> None:
        try:
            found = await self._host.sink.serve(self._known_peer, header.digest)
            if found is None:
                self._answer(header, FrameKind.MISSING)
            elif isinstance(found, Refusal):
                self._answer(header, FrameKind.REFUSED, found)
            elif found.nbytes != header.nbytes:
                self._answer(header, FrameKind.REFUSED, Refusal.WRONG_LENGTH)
            else:
                await self.send_frame(replace(header, kind=FrameKind.BLOB), found.cast("B"))
        except LinkLost:
            # The asker learns of it at its own end of the link.
            pass
        finally:
            del self._serving[header.request]

    def _take_refusal(self, inlet: PayloadInlet, header: FrameHeader) -> None:
        if header.request and header.request & 1 == self._request & 1:
            inlet.take_answer(header)
            return
        if header.request in self._serving:
            self._serving[header.request] = False
        if self._outgoing is not None and answers(header, self._outgoing):
            self._outgoing_refused = True
        if not header.request:
            self._host.sink.refused(self._known_peer, header)

    def _take_goodbye(self, inlet: PayloadInlet, header: FrameHeader) -> None:
        if header.refusal is not None:
            self.end(LinkEnd.REFUSED_BY_PEER, header.refusal)
            return
        self._peer_left = True
        self._fetches.settle_all(LinkLost(self._known_peer, LinkEnd.PEER_SAID_GOODBYE))
        inlet.abort()
        if self._leaving is not None:
            self._transport.close()
        else:
            self._close_after_goodbye()
