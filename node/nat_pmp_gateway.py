"""A router that is asked by NAT-PMP: the socket under node/nat_pmp.py.

Invariants: one question is under way at a time, and ends within the sum of ANSWER_WAITS_S; only the router's own
datagrams are read (the socket is connected to it), ANSWERS_QUEUED_MAX of them at most.
"""

import asyncio
from collections.abc import Callable

from shoal.node.nat_pmp import (
    ANSWER_WAITS_S,
    PORT,
    Answer,
    ExternalAddress,
    GatewayClock,
    Mapped,
    Refused,
    ResultCode,
    decode_answer_untrusted,
    encode_address_question,
    encode_mapping_question,
    matches,
)
from shoal.node.port_mapping import LEASE_S, NO_ADDRESS, GatewayFailed, Lease, Way
from shoal.protocol.errors import Failure, ProtocolError

ANSWERS_QUEUED_MAX = 16


class AnswerQueue(asyncio.DatagramProtocol):
    """What came on the socket and was not read yet; more than ANSWERS_QUEUED_MAX is dropped."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | OSError] = asyncio.Queue(ANSWERS_QUEUED_MAX)

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        self._take(data)

    def error_received(self, exc: Exception) -> None:
        if isinstance(exc, OSError):
            self._take(exc)

    def _take(self, one: bytes | OSError) -> None:
        if not self.queue.full():
            self.queue.put_nowait(one)


class NatPmpGateway:
    """A port_mapping.Gateway. Made by `open_nat_pmp`."""

    way = Way.NAT_PMP

    def __init__(
        self, host: str, transport: asyncio.DatagramTransport, answers: AnswerQueue, now: Callable[[], float]
    ) -> None:
        self.host = host
        self._transport = transport
        self._answers = answers.queue
        self._now = now
        self._clock = GatewayClock()
        self._held: set[int] = set()  # the internal ports that it maps, as far as its clock tells
        self._lock = asyncio.Lock()

    # -- as port_mapping.Gateway -------------------------------------------------------------------------------------

    async def external_ip(self) -> str:
        """As Gateway."""
        answer = await self._ask(encode_address_question())
        assert isinstance(answer, ExternalAddress)
        return answer.ip

    async def add(self, internal_port: int, external_port: int) -> Lease:
        """As Gateway; the router chooses another port by itself where that one is taken."""
        answer = await self._ask(encode_mapping_question(internal_port, external_port, LEASE_S))
        assert isinstance(answer, Mapped)
        if not answer.lifetime_s:
            raise GatewayFailed(Failure.GATEWAY_REFUSED, "it grants no time")
        self._held.add(internal_port)
        return Lease(external_port=answer.external_port, lease_s=min(answer.lifetime_s, LEASE_S))

    async def holds(self, internal_port: int, external_port: int) -> bool:
        """As Gateway: its clock starts anew when it has forgotten everything."""
        await self.external_ip()
        return internal_port in self._held

    async def remove(self, internal_port: int, external_port: int) -> None:
        """As Gateway."""
        self._held.discard(internal_port)
        await self._ask(encode_mapping_question(internal_port, 0, 0))

    async def close(self) -> None:
        """As Gateway."""
        self._transport.close()

    # -- the socket --------------------------------------------------------------------------------------------------

    async def _ask(self, question: bytes) -> Answer:
        """The router's answer to `question`, of its kind; raises GatewayFailed."""
        problem: ProtocolError | None = None
        async with self._lock:
            for wait_s in ANSWER_WAITS_S:
                self._transport.sendto(question)
                try:
                    async with asyncio.timeout(wait_s):
                        return await self._read(question)
                except TimeoutError:
                    continue
                except ProtocolError as error:
                    problem = error
        if problem is not None:
            raise GatewayFailed(Failure.GATEWAY_MALFORMED, f"{self.host} speaks something else than NAT-PMP: {problem}")
        raise GatewayFailed(Failure.GATEWAY_SILENT, f"{self.host} does not answer NAT-PMP")

    async def _read(self, question: bytes) -> Answer:
        while True:
            raw = await self._answers.get()
            if isinstance(raw, OSError):
                detail = f"nothing at {self.host} speaks NAT-PMP ({raw.strerror or raw})"
                raise GatewayFailed(Failure.GATEWAY_SILENT, detail)
            answer = decode_answer_untrusted(raw)
            if not matches(answer, question):
                continue
            if isinstance(answer, Refused):
                why = NO_ADDRESS if answer.code == ResultCode.NETWORK_FAILURE else str(answer)
                raise GatewayFailed(Failure.GATEWAY_REFUSED, f"{self.host} refuses by NAT-PMP: {why}")
            if self._clock.note(answer.epoch_s, self._now()):
                self._held.clear()
            return answer


async def open_nat_pmp(host: str, port: int = PORT) -> NatPmpGateway:
    """The router at `host`; nothing is sent yet. Raises GatewayFailed."""
    loop = asyncio.get_running_loop()
    try:
        transport, answers = await loop.create_datagram_endpoint(AnswerQueue, remote_addr=(host, port))
    except OSError as error:
        raise GatewayFailed(Failure.NO_GATEWAY, f"no way to {host}: {error.strerror or error}") from error
    return NatPmpGateway(host, transport, answers, loop.time)
