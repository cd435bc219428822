"""Whom a peer that is behind can ask, and its questions to them over the control plane.

What a donor says is checked before it is used, and a donor that says what no honest peer says is charged for it; then
the next one is asked. Donors are ranked by the rates that were measured over the tensor links.

Invariant: a question is put to at most DONORS_ASKED_MAX donors, one after the other.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.fetch import Source
from shoal.node.link_port import Address, LinkPath
from shoal.node.links import TensorLinks
from shoal.node.reminders import Reminders
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.lineage import check_stretch
from shoal.protocol.messages import (
    Certificate,
    CertificatesAnswer,
    Checkpoint,
    CheckpointsAnswer,
    GetCertificates,
    GetCheckpoints,
    GetSnapshot,
    Presence,
    SnapshotAnswer,
    decode_message_untrusted,
    encode_message,
)
from shoal.protocol.quorum import Authority
from shoal.protocol.state import SnapshotIndex, decode_index_untrusted
from shoal.protocol.trail import Anchor, check_trail

DONORS_ASKED_MAX = 8
TRAIL_MAX = 4096  # checkpoints that are taken

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DonorPorts:
    """`live` are the newest presences of the peers that are there; `misbehaved` charges a donor, `failed` counts one
    that gave nothing."""

    live: Callable[[], Mapping[PeerId, Presence]]
    addresses_of: Callable[[PeerId], tuple[Address, ...]]
    misbehaved: Callable[[PeerId, ProtocolError], None]
    failed: Callable[[PeerId, Failure], None]


class Donors:
    """All calls on the event loop."""

    def __init__(
        self, swarm: bytes, authority: Authority, control: ControlPlane, links: TensorLinks, ports: DonorPorts
    ) -> None:
        self._reminders: Reminders[PeerId] = Reminders()
        self.ports = ports
        self.other_log: PeerId | None = None  # the first donor whose certificates did not follow ours
        self.liars: set[PeerId] = set()  # asked nothing more in this catch-up
        self._without: dict[PeerId, None] = {}  # those who have said that they have not what was asked for
        self._swarm = swarm
        self._authority = authority
        self._control = control
        self._links = links

    def begin(self) -> None:
        """Another catch-up begins."""
        self.other_log = None
        self.liars.clear()
        self._without.clear()

    # -- who is there ------------------------------------------------------------------------------------------------

    @property
    def newest(self) -> int:
        """The newest round that anybody has announced."""
        return max((one.head_round for one in self.ports.live().values()), default=0)

    def rates(self) -> dict[PeerId, float | None]:
        """What was measured of each peer, in bytes per second."""
        return {one.peer: one.receive_bytes_per_s for one in self._links.statistics().peers}

    def rate_of(self, peers: Sequence[PeerId]) -> float | None:
        """What these give together; None where nothing was measured. Who was not measured counts as the average."""
        rates = self.rates()
        known = [rate for peer in peers if (rate := rates.get(peer)) is not None]
        return sum(known) / len(known) * len(peers) if known else None

    def of_round(self, number: int) -> list[PeerId]:
        """Who stands at this round or later, the fastest first."""
        rates = self.rates()
        live = self.ports.live().items()
        found = [peer for peer, one in live if one.head_round >= number and peer not in self.liars]
        return sorted(found, key=lambda peer: (-(rates.get(peer) or 0.0), peer))

    def of_updates(self, number: int) -> list[Source]:
        """Who has updates of this round or later ones, and from where on."""
        live = self.ports.live()
        donors = self._spare_relays(self.of_round(number))
        return [Source(peer=peer, first_round=live[peer].updates_from) for peer in donors]

    def of_snapshots(self) -> dict[int, list[PeerId]]:
        """Who has announced which snapshot."""
        found: dict[int, list[PeerId]] = {}
        for peer, one in self.ports.live().items():
            for number in one.snapshots if peer not in self.liars else ():
                found.setdefault(number, []).append(peer)
        return {number: self._spare_relays(peers) for number, peers in found.items()}

    def _spare_relays(self, peers: list[PeerId]) -> list[PeerId]:
        """Without those whose bytes a third peer passes on, at twice their cost, while there are others."""
        return [peer for peer in peers if self._links.path_to(peer) is not LinkPath.RELAYED] or peers

    # -- what they are asked -----------------------------------------------------------------------------------------

    async def ask_certificates(self, peer: PeerId, first: int, count: int) -> tuple[Certificate, ...]:
        """Certificates of consecutive rounds from `first` on, as many as the peer holds of `count`, unchecked. Raises
        PeerUnreachable, RequestRefused and ProtocolError."""
        answer = await self._ask(peer, GetCertificates(first_round=first, count=count))
        if not isinstance(answer, CertificatesAnswer):
            raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(answer).__name__} is no answer to GetCertificates")
        if any(one.result.round != first + at for at, one in enumerate(answer.certificates)):
            raise ProtocolError(Refusal.WRONG_ROUND, f"not the certificates from round {first} on")
        return answer.certificates

    async def collect(
        self, peer: PeerId, first: int, count: int, previous: bytes, voters: tuple[PeerId, ...]
    ) -> tuple[Certificate, ...]:
        """Certificates from round `first` on that follow `previous` and are signed by the voters that the one before
        each names: from `peer` or, where it has none, from others."""
        for donor in dict.fromkeys((peer, *self.of_round(first)[:DONORS_ASKED_MAX])):
            try:
                found = await self.ask_certificates(donor, first, count)
                await asyncio.to_thread(check_stretch, previous, voters, found, self._authority)
            except ProtocolError as error:
                self._refuse(donor, error)
            except (PeerUnreachable, RequestRefused) as error:
                self._note_failure(donor, error)
            else:
                if found:
                    return found
                self._without[donor] = None
        return ()

    async def collect_trail(self, genesis: Anchor, last: int) -> tuple[Checkpoint, ...]:
        """Checkpoints that lead from the manifest to behind round `last`, from one of those who have said that they do
        not keep the certificates themselves. Empty where nobody has."""
        for donor in list(self._without):
            found = await self.ask_trail(donor, genesis)
            if found and found[-1].certificate.result.round > last:
                return found
        return ()

    async def ask_trail(self, donor: PeerId, genesis: Anchor) -> tuple[Checkpoint, ...]:
        """This donor's checkpoints, which lead from the manifest somewhere; empty where it has none, or did not say."""
        try:
            return await self._walk_trail(donor, genesis)
        except ProtocolError as error:
            self._refuse(donor, error)
        except (PeerUnreachable, RequestRefused) as error:
            self._note_failure(donor, error)
        return ()

    async def _walk_trail(self, donor: PeerId, anchor: Anchor) -> tuple[Checkpoint, ...]:
        found: list[Checkpoint] = []
        while len(found) < TRAIL_MAX:
            answer = await self._ask(donor, GetCheckpoints(after_round=anchor.round))
            if not isinstance(answer, CheckpointsAnswer):
                raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(answer).__name__} is no answer to GetCheckpoints")
            if not answer.checkpoints:
                break
            anchor = await asyncio.to_thread(check_trail, anchor, answer.checkpoints, self._authority)
            found += answer.checkpoints
        return tuple(found)

    async def ask_snapshot(self, peer: PeerId, round_max: int, elements: int) -> SnapshotIndex | None:
        """The index of the newest snapshot that this peer has up to there: of the right size, and otherwise unchecked.
        None when it has none, or did not say."""
        try:
            answer = await self._ask(peer, GetSnapshot(round_max=round_max))
            if not isinstance(answer, SnapshotAnswer):
                raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(answer).__name__} is no answer to GetSnapshot")
            index = decode_index_untrusted(answer.index) if answer.index else None
            if index is not None and (index.elements != elements or index.round > round_max):
                detail = f"a snapshot of {index.elements} elements of round {index.round}"
                raise ProtocolError(Refusal.OUT_OF_RANGE, detail)
        except ProtocolError as error:
            self._refuse(peer, error)
        except (PeerUnreachable, RequestRefused) as error:
            self._note_failure(peer, error)
        else:
            return index
        return None

    async def _ask(self, peer: PeerId, question: object) -> object:
        raw = await self._control.request(peer, encode_message(self._swarm, question))
        return decode_message_untrusted(self._swarm, raw)

    def _refuse(self, donor: PeerId, error: ProtocolError) -> None:
        log.info("an answer was refused: %s", error)
        if error.refusal is Refusal.OTHER_LOG:
            self.other_log = self.other_log or donor  # no lie: the logs are to be compared
        else:
            self.ports.misbehaved(donor, error)
        self.ports.failed(donor, Failure.DONOR_FAILED)

    def _note_failure(self, donor: PeerId, error: PeerUnreachable | RequestRefused) -> None:
        if (ending := self._reminders.take(donor, time.monotonic())) is not None:
            log.info("%s: %s%s", Failure.DONOR_FAILED, error, ending)
        self.ports.failed(donor, Failure.DONOR_FAILED)
