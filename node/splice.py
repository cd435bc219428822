"""Two connections of others joined into one stream of bytes, both ways: what a relaying member holds of a tensor link.

What passes is sealed from end to end by the two peers; nothing of it is looked at. Each direction has one buffer, and
nothing is read into it before the kernel has taken what was in it: a slow reader slows its writer, and nobody else.

Invariants: no byte passes that `spend` has not allowed; a splice ends once, with one reason or in order; when its ends
are gone, so are its buffers.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId

# What the first bytes of a connection to be spliced are, in place of a link's hello: this and a token.
MAGIC = b"RLAY"
TOKEN_BYTES = 32
PREAMBLE_BYTES = len(MAGIC) + TOKEN_BYTES
BUFFER_BYTES = 128 * 1024  # of each direction


class Side(asyncio.BufferedProtocol):
    """One accepted connection: first its preamble, then its half of a splice. `named` gets the token and what came
    behind it, once."""

    def __init__(self, transport: asyncio.BaseTransport, named: Callable[["Side", bytes, bytes], None]) -> None:
        # uvloop's transports have the interface of asyncio's without descending from them.
        self.transport = cast(asyncio.Transport, transport)
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.splice: Splice | None = None
        self.held = b""  # what came before the other side was there
        self.buffer = memoryview(bytearray(PREAMBLE_BYTES))
        self.finished = False  # it sends nothing more
        self._named: Callable[[Side, bytes, bytes], None] | None = named
        self._preamble = b""

    def begin(self, first: bytes) -> None:
        """The bytes that have already been read."""
        self._preamble += first
        if len(self._preamble) < PREAMBLE_BYTES or self._named is None:
            return
        named, self._named = self._named, None
        token, rest = self._preamble[len(MAGIC) : PREAMBLE_BYTES], self._preamble[PREAMBLE_BYTES:]
        named(self, token if self._preamble.startswith(MAGIC) else b"", rest)

    def write(self, data: bytes | memoryview) -> None:
        """Pass on; `pause_writing` is called within where the kernel does not take all of it."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def set_reading(self, wanted: bool) -> None:
        if not self.transport.is_closing():
            if wanted:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    # asyncio's side

    def get_buffer(self, sizehint: int) -> memoryview:
        # Never empty, which asyncio would not forgive.
        return self.buffer if self.splice is not None else self.buffer[: max(1, PREAMBLE_BYTES - len(self._preamble))]

    def buffer_updated(self, nbytes: int) -> None:
        if self.splice is None:
            self.begin(bytes(self.buffer[:nbytes]))
        else:
            self.splice.forward(self, self.buffer[:nbytes])

    def eof_received(self) -> bool:
        return self.splice is not None and self.splice.finish(self)

    def pause_writing(self) -> None:
        if self.splice is not None and (other := self.splice.other(self)) is not None:
            other.set_reading(False)

    def resume_writing(self) -> None:
        if self.splice is not None and (other := self.splice.other(self)) is not None:
            other.set_reading(True)

    def connection_lost(self, error: Exception | None) -> None:
        if self.splice is not None:
            self.splice.end()
        self.closed.set_result(None)


class Splice:
    """What was promised to two peers, in the order (who asked, who was called). `spend` says whether so many bytes may
    pass now."""

    def __init__(self, pair: tuple[PeerId, PeerId], made_s: float, spend: Callable[["Splice", int], bool]) -> None:
        self.pair = pair
        self.made_s = made_s
        self.relayed_bytes = 0
        self.reason: Failure | None = None
        loop = asyncio.get_running_loop()
        self.joined: asyncio.Future[None] = loop.create_future()  # both sides are there, or it has ended
        self.ended: asyncio.Future[None] = loop.create_future()
        self._spend = spend
        self._sides: list[Side | None] = [None, None]

    @property
    def is_open(self) -> bool:
        """Whether bytes may pass."""
        return None not in self._sides and not self.ended.done()

    def is_wanted(self, since_s: float) -> bool:
        """Whether it is being made, or was made since."""
        return not self.ended.done() and (not self.is_open or self.made_s > since_s)

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(side for side in self._sides if side is not None)

    def other(self, side: Side) -> Side | None:
        """The far side of this one, once it is there."""
        return self._sides[1 - self._sides.index(side)]

    def join(self, index: int, side: Side, rest: bytes) -> None:
        """The connection of the first or the second peer has come."""
        assert self._sides[index] is None, "a token is of one use"
        side.splice, side.held = self, rest
        self._sides[index] = side
        if self.ended.done():
            side.transport.abort()
            return
        side.set_reading(False)
        one, two = self._sides
        if one is None or two is None:
            return
        for here in (one, two):
            here.buffer = memoryview(bytearray(BUFFER_BYTES))
        self.joined.set_result(None)
        for here in (one, two):
            # First, because passing on what is held may pause it again.
            here.set_reading(True)
            held, here.held = here.held, b""
            if held:
                self.forward(here, held)

    def forward(self, side: Side, data: bytes | memoryview) -> None:
        """Pass these bytes to the other side, where they may pass."""
        other = self.other(side)
        if self.ended.done() or other is None:
            return
        if not self._spend(self, len(data)):
            self.end(Failure.BUDGET_SPENT)
            return
        self.relayed_bytes += len(data)
        other.write(data)

    def finish(self, side: Side) -> bool:
        """This side sends nothing more; whether it may still be sent to."""
        other = self.other(side)
        side.finished = True
        if other is None or other.finished or self.ended.done():
            self.end()
            return False
        if not other.transport.is_closing():
            other.transport.write_eof()
        return True

    def end(self, reason: Failure | None = None) -> None:
        """Once: in order, so that what was taken is still passed on, or for a reason, at once."""
        if self.ended.done():
            return
        self.reason = reason
        self.ended.set_result(None)
        if not self.joined.done():
            self.joined.set_result(None)
        for side in self.sides:
            if reason is None:
                side.transport.close()
            else:
                side.transport.abort()

    def cut(self) -> None:
        """Whatever is left of it goes now."""
        self.end()
        for side in self.sides:
            side.transport.abort()
