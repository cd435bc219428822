"""NAT-PMP (RFC 6886): the datagrams by which a home router is asked for its external address and to map a port.

Owns the codec and what a gateway's clock tells; no sockets, no time of its own. Invariant: what is decoded is within
its bounds, and everything else from the gateway is a ProtocolError.
"""

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum

from shoal.protocol.errors import ProtocolError, Refusal

PORT = 5351
ANSWER_BYTES_MAX = 1100  # of PCP, which the same port may speak; anything longer is neither
# How long an answer is waited for before the question is sent again. The RFC goes on to 64 s, which nobody waits.
ANSWER_WAITS_S = (0.25, 0.5, 1.0, 2.0)

_VERSION = 0
_OPCODE_ADDRESS = 0
_OPCODE_MAP_TCP = 2
_ANSWER_BIT = 128
_HEADER = struct.Struct("!BBHI")
_ADDRESS = struct.Struct("!BBHI4s")
_MAPPED = struct.Struct("!BBHIHHI")
_ASK_MAPPING = struct.Struct("!BBHHHI")
# A gateway may lose an eighth of the time between two answers to a slow clock, and two seconds to the path.
_CLOCK_SLACK_S = 2.0


class ResultCode(IntEnum):
    """RFC 6886, section 3.5."""

    SUCCESS = 0
    UNSUPPORTED_VERSION = 1
    NOT_AUTHORIZED = 2
    NETWORK_FAILURE = 3
    OUT_OF_RESOURCES = 4
    UNSUPPORTED_OPCODE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalAddress:
    """The gateway's address on the other side. `epoch_s` is how long it has kept its mappings."""

    epoch_s: int
    ip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """A TCP port of this machine and the gateway's port that leads to it; both lifetime and port are 0 once removed."""

    epoch_s: int
    internal_port: int
    external_port: int
    lifetime_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The gateway does not do it; `code` is the RFC's, or another number."""

    code: int

    def __str__(self) -> str:
        known = self.code in ResultCode.__members__.values()
        return ResultCode(self.code).name.lower().replace("_", " ") if known else f"result {self.code}"


Answer = ExternalAddress | Mapped | Refused


def encode_address_question() -> bytes:
    """Ask for the external address."""
    return bytes((_VERSION, _OPCODE_ADDRESS))


def encode_mapping_question(internal_port: int, external_port: int, lifetime_s: int) -> bytes:
    """Ask to map a TCP port, by preference to `external_port`; a lifetime of 0 removes the mapping."""
    wanted = external_port if lifetime_s else 0
    return _ASK_MAPPING.pack(_VERSION, _OPCODE_MAP_TCP, 0, internal_port, wanted, lifetime_s)


def decode_answer_untrusted(datagram: bytes) -> Answer:
    """What the gateway says; raises ProtocolError for what is no answer to a question of this module."""
    if not _HEADER.size <= len(datagram) <= ANSWER_BYTES_MAX:
        raise ProtocolError(Refusal.WRONG_LENGTH, f"{len(datagram)} bytes are no NAT-PMP answer")
    version, opcode, code, _ = _HEADER.unpack_from(datagram)
    # A gateway that speaks PCP alone says so in its own version, with the result in the byte where both have it.
    if code == ResultCode.UNSUPPORTED_VERSION and opcode & _ANSWER_BIT:
        return Refused(code=code)
    if version != _VERSION:
        raise ProtocolError(Refusal.WRONG_VERSION, f"version {version}, not NAT-PMP's {_VERSION}")
    if opcode == _ANSWER_BIT | _OPCODE_ADDRESS:
        return Refused(code=code) if code else _decode_address(datagram)
    if opcode == _ANSWER_BIT | _OPCODE_MAP_TCP:
        return Refused(code=code) if code else _decode_mapped(datagram)
    raise ProtocolError(Refusal.UNKNOWN_TYPE, f"operation {opcode} was not asked for")


def _decode_address(datagram: bytes) -> ExternalAddress:
    if len(datagram) != _ADDRESS.size:
        raise ProtocolError(Refusal.WRONG_LENGTH, f"an address in {len(datagram)} bytes, not {_ADDRESS.size}")
    _, _, _, epoch_s, ip = _ADDRESS.unpack(datagram)
    return ExternalAddress(epoch_s=epoch_s, ip=str(ipaddress.IPv4Address(ip)))


def _decode_mapped(datagram: bytes) -> Mapped:
    if len(datagram) != _MAPPED.size:
        raise ProtocolError(Refusal.WRONG_LENGTH, f"a mapping in {len(datagram)} bytes, not {_MAPPED.size}")
    _, _, _, epoch_s, internal, external, lifetime_s = _MAPPED.unpack(datagram)
    if lifetime_s and not external:
        raise ProtocolError(Refusal.OUT_OF_RANGE, "a mapping of port 0")
    return Mapped(epoch_s=epoch_s, internal_port=internal, external_port=external, lifetime_s=lifetime_s)


def matches(answer: Answer, question: bytes) -> bool:
    """Whether this answers that question: there is one under way at a time, and late answers to others come in between.

    A refusal does not say of what; it belongs to the question that is under way.
    """
    if isinstance(answer, Mapped):
        return question[1] == _OPCODE_MAP_TCP and answer.internal_port == int.from_bytes(question[4:6], "big")
    return isinstance(answer, Refused) or question[1] == _OPCODE_ADDRESS


class GatewayClock:
    """Tells from the epochs of a gateway's answers whether it has lost its mappings (RFC 6886, section 3.6)."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None  # an epoch, and when it came

    def note(self, epoch_s: int, now_s: float) -> bool:
        """Whether the gateway was started anew, or has forgotten everything, since the answer before."""
        last, self._last = self._last, (float(epoch_s), now_s)
        return last is not None and epoch_s < last[0] + (now_s - last[1]) * 7 / 8 - _CLOCK_SLACK_S
