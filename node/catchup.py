"""Catch-up: from wherever this peer stands to the swarm's head, by replaying updates, after a snapshot if far behind.

Certificates are checked one after the other from the own head on, each against the voters that the one before it names,
so what a donor says is never believed. Chunks and parts are content-addressed: several donors serve at once, each byte
is checked before it is used, and what was fetched before a restart is found again on the disk.

Invariants: a snapshot of round s is installed only when its root is the base root in the certificate of round s+1; a
donor that lies ends the catch-up at once, so that the next one can begin; one partial snapshot is on the disk at most.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.ledger_store import StoreError
from shoal.node.link_port import Address, FetchFailed, LinkLost
from shoal.node.links import TensorLinks
from shoal.node.local_state import LocalState
from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.lineage import check_stretch
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import (
    CERTIFICATES_PER_ANSWER,
    Certificate,
    CertificatesAnswer,
    GetCertificates,
    GetSnapshot,
    SnapshotAnswer,
    decode_message_untrusted,
    digest_record,
    encode_message,
)
from shoal.protocol.quorum import Head, check_certificate
from shoal.protocol.state import SnapshotIndex, StateVector, decode_index_untrusted

REPLAY_ROUNDS_MAX = 24  # behind by more, a snapshot is asked for first
CHUNKS_AT_ONCE = 6
CHUNK_TIMEOUT_S = 30.0
CHUNK_TRIES = 4
REPLAY_TIMEOUT_S = 60.0  # of one round: its parts are fetched within this

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatchUpPorts:
    """What catch-up asks of the daemon."""

    donors: Callable[[int], Sequence[PeerId]]  # live peers that hold at least this round
    address_of: Callable[[PeerId], Address | None]
    take_certificate: Callable[[Certificate, PeerId], None]  # to the round core, which checks and commits it
    wait_past: Callable[[int, float], Awaitable[bool]]  # whether the head got past a round within so many seconds
    other_log: Callable[[PeerId], None]
    install: Callable[[Head, Float32s, Float32s], Awaitable[None]]  # take over a state that was checked


class CatchUp:
    """One catch-up at a time; `run` may be called whenever a peer is seen to be ahead."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        swarm: bytes,
        control: ControlPlane,
        links: TensorLinks,
        state: LocalState,
        folder: Path,
        ports: CatchUpPorts,
    ) -> None:
        self.active = False
        self.detail = ""
        self._manifest = manifest
        self._swarm = swarm
        self._control = control
        self._links = links
        self._state = state
        self._folder = folder
        self._ports = ports

    async def run(self, peer: PeerId, target: int) -> None:
        """Go to round `target`, which `peer` holds, or as far as the donors lead."""
        if self.active:
            return
        self.active = True
        try:
            far = target - self._state.head.round > REPLAY_ROUNDS_MAX
            if not far or await self._jump(peer, target):
                await self._replay(peer, target)
        except ProtocolError as error:
            log.info("catch-up stopped at round %d: %s", self._state.head.round, error)
            if error.refusal is Refusal.OTHER_LOG:
                self._ports.other_log(peer)
        except (PeerUnreachable, RequestRefused) as error:
            log.info("catch-up stopped at round %d: %s", self._state.head.round, error)
        except (OSError, StoreError) as error:
            log.error("catch-up stopped at round %d, the disk fails: %s", self._state.head.round, error)
        finally:
            self.active = False
            self.detail = ""

    async def _replay(self, peer: PeerId, target: int) -> None:
        while (first := self._state.head.round + 1) <= target:
            self.detail = f"replaying round {first} of {target}"
            certificates = await self.ask_certificates(peer, first, CERTIFICATES_PER_ANSWER)
            if not certificates:
                return
            for certificate in certificates:
                number, head = certificate.result.round, self._state.head
                if number <= head.round:
                    continue
                # The round core checks it, too. Here a forged one ends the catch-up instead of being waited for.
                await asyncio.to_thread(check_certificate, certificate, head, self._manifest.authority(self._swarm))
                self._ports.take_certificate(certificate, peer)
                if not await self._ports.wait_past(number - 1, REPLAY_TIMEOUT_S):
                    return

    async def ask_certificates(self, peer: PeerId, first: int, count: int) -> tuple[Certificate, ...]:
        """Certificates of consecutive rounds from `first` on, as many as the peer holds of `count`, unchecked. Raises
        PeerUnreachable, RequestRefused and ProtocolError."""
        question = encode_message(self._swarm, GetCertificates(first_round=first, count=count))
        answer = decode_message_untrusted(self._swarm, await self._control.request(peer, question))
        if not isinstance(answer, CertificatesAnswer):
            raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(answer).__name__} is no answer to GetCertificates")
        if any(one.result.round != first + at for at, one in enumerate(answer.certificates)):
            raise ProtocolError(Refusal.WRONG_ROUND, f"not the certificates from round {first} on")
        return answer.certificates

    # -- by snapshot -----------------------------------------------------------------------------------------------

    async def _jump(self, peer: PeerId, target: int) -> bool:
        """Whether replay is to follow: after a snapshot, and where the donor has none that leads forward."""
        index = await self._ask_snapshot(peer, target - 1)
        if index is None or index.round <= self._state.head.round + 1:
            return True
        if index.elements != self._manifest.layout.elements:
            raise ProtocolError(Refusal.WRONG_LENGTH, f"a snapshot of {index.elements} elements")
        chain = await self._collect_chain(peer, index.round + 1)
        if len(chain) < 2 or chain[-1].result.round != index.round + 1:
            return False
        index.verify(chain[-1].result.base_root)
        vectors = await self._fetch_chunks(index, tuple(dict.fromkeys((peer, *self._ports.donors(index.round)))))
        if vectors is None:
            return False
        for certificate in chain[:-1]:
            await asyncio.to_thread(self._state.save_certificate, certificate)
        own = chain[-2].result
        head = Head(round=own.round, digest=digest_record(own), state_root=index.root, voters=own.voters)
        await self._ports.install(head, *vectors)
        self._partial_path(index).unlink(missing_ok=True)
        return True

    async def _ask_snapshot(self, peer: PeerId, round_max: int) -> SnapshotIndex | None:
        question = encode_message(self._swarm, GetSnapshot(round_max=round_max))
        answer = decode_message_untrusted(self._swarm, await self._control.request(peer, question))
        if not isinstance(answer, SnapshotAnswer):
            raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(answer).__name__} is no answer to GetSnapshot")
        return decode_index_untrusted(answer.index) if answer.index else None

    async def _collect_chain(self, peer: PeerId, last: int) -> list[Certificate]:
        """The certificates from the own head to `last`, each signed by the voters that the one before it names."""
        head = self._state.head
        previous, voters = head.digest, head.voters
        authority = self._manifest.authority(self._swarm)
        chain: list[Certificate] = []
        while head.round + len(chain) < last:
            self.detail = f"checking certificate {head.round + len(chain) + 1} of {last}"
            count = min(CERTIFICATES_PER_ANSWER, last - head.round - len(chain))
            answered = await self.ask_certificates(peer, head.round + len(chain) + 1, count)
            if not answered:
                break
            await asyncio.to_thread(check_stretch, previous, voters, answered, authority)
            previous, voters = digest_record(answered[-1].result), answered[-1].result.voters
            chain += answered
        return chain

    async def _fetch_chunks(self, index: SnapshotIndex, donors: Sequence[PeerId]) -> tuple[Float32s, Float32s] | None:
        """Both vectors, from all donors at once, through a file that outlives a restart; None if a chunk is nowhere."""
        path = self._partial_path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in set(path.parent.glob("*.partial")) - {path}:
            other.unlink()  # of a snapshot that the donors have replaced since
        if not path.exists() or path.stat().st_size != index.elements * 8:
            with path.open("wb") as file:
                file.truncate(index.elements * 8)
        stored = np.memmap(path, dtype=np.float32, mode="r+", shape=(2, index.elements))
        raw = stored.view(np.uint8).reshape(-1).data
        numbers = asyncio.Queue[int]()
        for number in range(index.chunks):
            numbers.put_nowait(number)
        done = 0
        complete = True

        async def work() -> None:
            nonlocal done, complete
            while complete and not numbers.empty():
                number = numbers.get_nowait()
                span = index.span(number)
                offset = index.elements * 4 if span.vector is StateVector.MOMENTUM else 0
                target = raw[offset + span.start : offset + span.stop]
                if not await self._fetch_chunk(index, number, target, donors):
                    complete = False
                done += 1
                self.detail = f"snapshot of round {index.round}: chunk {done} of {index.chunks}"

        await asyncio.gather(*(work() for _ in range(CHUNKS_AT_ONCE)))
        if not complete:
            return None
        return await asyncio.to_thread(lambda: (np.array(stored[0]), np.array(stored[1])))

    async def _fetch_chunk(
        self, index: SnapshotIndex, number: int, target: memoryview, donors: Sequence[PeerId]
    ) -> bool:
        if await asyncio.to_thread(_holds, index, number, target):
            return True  # from before a restart
        for attempt in range(min(CHUNK_TRIES, 2 * len(donors))):
            donor = donors[(number + attempt) % len(donors)]
            try:
                address = self._ports.address_of(donor)
                await self._links.fetch(donor, address, index.digest(number), target, CHUNK_TIMEOUT_S)
            except (LinkLost, FetchFailed) as error:
                log.debug("chunk %d: %s", number, error)
                continue
            return True
        return False

    def _partial_path(self, index: SnapshotIndex) -> Path:
        return self._folder / f"{index.round:08d}.{index.root.hex()[:16]}.partial"


def _holds(index: SnapshotIndex, number: int, raw: memoryview) -> bool:
    try:
        index.check_chunk_untrusted(number, raw)
    except ProtocolError:
        return False
    return True
