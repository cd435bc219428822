"""What this peer answers when others ask: manifest, certificates, snapshot index, ledger steps, peers, reachability.

Invariant: every answer is bounded by its message's schema; a question that no honest peer asks costs the asker.
"""

import asyncio
from dataclasses import dataclass, field
from itertools import islice

from blake3 import blake3

from shoal.crdt.certified import ChainBase
from shoal.node.decree_exchange import list_decrees
from shoal.node.ledger_sync import LedgerSync
from shoal.node.ledger_view import make_page
from shoal.node.links import TensorLinks
from shoal.node.local_state import LocalState
from shoal.node.membership import Membership
from shoal.node.pair_mixing import PairMixing
from shoal.node.tensor_paths import TensorPaths
from shoal.node.upload_meter import UploadMeter
from shoal.protocol.admission import GetDecrees
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    BASE_PIECE_BYTES_MAX,
    CERTIFICATES_PER_ANSWER,
    CHECKPOINTS_PER_ANSWER,
    CertificatesAnswer,
    Checkpoint,
    CheckpointsAnswer,
    GetCertificates,
    GetCheckpoints,
    GetLedgerBase,
    GetManifest,
    GetPeers,
    GetSnapshot,
    LedgerBaseAnswer,
    ManifestAnswer,
    MeasureUpload,
    Reconcile,
    SnapshotAnswer,
    decode_message_untrusted,
    encode_message,
)
from shoal.protocol.pairing import AskPair
from shoal.protocol.wire import DELTA_BYTES_MAX, encode_record

ANSWER_BYTES_MAX = DELTA_BYTES_MAX - 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Answers on the event loop; what reads the disk does so in a thread."""

    swarm: bytes
    signed_manifest: bytes
    state: LocalState
    ledger: LedgerSync
    membership: Membership
    links: TensorLinks
    paths: TensorPaths
    mixing: PairMixing
    upload_meter: UploadMeter = field(default_factory=UploadMeter)

    async def answer(self, peer: PeerId, raw: bytes) -> bytes:
        """The encoded answer; raises ProtocolError for a question that has none."""
        question = decode_message_untrusted(self.swarm, raw)
        match question:
            case GetManifest():
                answer: object = ManifestAnswer(signed_manifest=self.signed_manifest)
            case GetCertificates():
                answer = await self._answer_certificates(question)
            case GetSnapshot():
                answer = await asyncio.to_thread(self._answer_snapshot, question)
            case Reconcile():
                answer = await self.ledger.answer_reconcile(question)
            case GetPeers():
                answer = self.membership.answer_peers()
            case MeasureUpload():
                answer = await self.upload_meter.measure(self.links, peer, question)
            case GetCheckpoints():
                answer = await asyncio.to_thread(self._answer_checkpoints, question.after_round)
            case GetLedgerBase():
                answer = await asyncio.to_thread(_cut_base, self.ledger.ledger.base, question.offset)
            case GetDecrees():
                answer = list_decrees(self.ledger.ledger, question.first)
            case AskPair():
                answer = self.mixing.answer(peer, question)
            case _:
                answer = await self.paths.answer(peer, question)
        return encode_message(self.swarm, answer)

    async def _answer_certificates(self, question: GetCertificates) -> CertificatesAnswer:
        count = min(question.count, CERTIFICATES_PER_ANSWER)
        found = await asyncio.to_thread(self.state.load_certificates, question.first_round, count)
        kept, size = [], 0
        for certificate in found:
            size += len(encode_record(certificate))
            if size > ANSWER_BYTES_MAX:
                break
            kept.append(certificate)
        return CertificatesAnswer(certificates=tuple(kept))

    def _answer_checkpoints(self, after: int) -> CheckpointsAnswer:
        kept, size = list[Checkpoint](), 0
        if not self.state.trail.is_whole:
            return CheckpointsAnswer(checkpoints=())  # whoever walked it would take this peer for a liar
        for checkpoint in islice(self.state.trail.load(after), CHECKPOINTS_PER_ANSWER):
            size += len(encode_record(checkpoint))
            if size > ANSWER_BYTES_MAX:
                break
            kept.append(checkpoint)
        return CheckpointsAnswer(checkpoints=tuple(kept))

    async def list_certificates(self, first: int) -> bytes:
        """For the local web port: a page of the log, as many certificates from round `first` on as fit an answer; from
        the oldest on where that one is not kept."""
        oldest = await asyncio.to_thread(self.state.stores.ledger.get_first_round)
        question = GetCertificates(first_round=max(first, oldest or 1), count=CERTIFICATES_PER_ANSWER)
        return encode_record(await self._answer_certificates(question))

    async def list_checkpoints(self, after: int) -> bytes:
        """For the local web port: a page of the trail."""
        return encode_record(await asyncio.to_thread(self._answer_checkpoints, after))

    async def list_batches(self, after: int) -> bytes:
        """For the local web port: a page of the ledger."""
        return await asyncio.to_thread(make_page, self.state.stores.ledger, self.ledger.ledger.base, after)

    def _answer_snapshot(self, question: GetSnapshot) -> SnapshotAnswer:
        snapshots = self.state.stores.snapshots
        usable = [number for number in snapshots.rounds() if number <= question.round_max]
        snapshot = snapshots.get(usable[-1]) if usable else None
        if snapshot is not None:
            snapshots.lend(snapshot.index.round)  # whoever asks is about to fetch it
        return SnapshotAnswer(index=b"" if snapshot is None else encode_record(snapshot.index))


def _cut_base(base: ChainBase, offset: int) -> LedgerBaseAnswer:
    if base.round == 0:
        return LedgerBaseAnswer(round=0, digest=bytes(32), nbytes=0, piece=b"")
    raw = base.encode()
    piece = raw[offset : offset + BASE_PIECE_BYTES_MAX]
    return LedgerBaseAnswer(round=base.round, digest=blake3(raw).digest(), nbytes=len(raw), piece=piece)
