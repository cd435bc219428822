"""The ledger at work: one replica, its store, eager push of what is new, and anti-entropy with a random peer.

Whom to push to and to compare with, and how long, is decided in `shoal.crdt.anti_entropy`.

Invariants: what this peer signs is durable before anyone sees it; what arrives is verified by the ledger before it is
stored; a conversation is bounded and is taken up again at the next period.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence

from shoal.crdt.anti_entropy import PERIOD_S, Conversation, PeerChoice
from shoal.crdt.entries import Batch, decode_batch_untrusted, encode_batch
from shoal.crdt.eras import choose_rounds_per_era
from shoal.crdt.fold import LedgerState
from shoal.crdt.kinds import Kind, RegisterBody, RoundBody
from shoal.crdt.ledger import ChainForkedError, Draft, Ledger, LedgerRules
from shoal.crdt.reconciliation import answer
from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.ledger_store import LedgerStore, StoreError
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import (
    Certificate,
    LedgerEntries,
    Reconcile,
    decode_message_untrusted,
    encode_message,
)
from shoal.protocol.wire import encode_record

log = logging.getLogger(__name__)


class LedgerSync:
    """Owns the replica. All calls on the event loop; the store works in threads."""

    def __init__(
        self, *, identity: Identity, manifest: Manifest, swarm: bytes, store: LedgerStore, control: ControlPlane
    ) -> None:
        rules = LedgerRules(
            swarm=swarm,
            owner=manifest.owner,
            is_valid_snapshot=lambda number, body: False,
            authority=manifest.authority(swarm),
            founders=manifest.founders,
            rounds_per_era=choose_rounds_per_era(manifest.rounds.snapshot_every),
        )
        self.ledger = Ledger(identity=identity, rules=rules)
        self._identity = identity
        self._swarm = swarm
        self._store = store
        self._control = control
        self._choice = PeerChoice(os.urandom)
        self._lock = asyncio.Lock()
        self._signed: list[Batch] = []  # at most one: signed, and not stored yet
        self.forked = False

    async def start(self) -> None:
        """Take in what was stored. Call before anything else."""
        self.ledger.restore(await asyncio.to_thread(self._store.load))

    def state(self) -> LedgerState:
        """The fold as of now."""
        return self.ledger.fold(_wall_ms())

    async def write_lease(self, value: bytes, peers: Sequence[PeerId]) -> None:
        """Say that this peer takes part, and under which conditions."""
        await self._write(Draft(kind=Kind.LEASE, body=RegisterBody(value=value)), peers)

    async def write_certificate(self, certificate: Certificate, peers: Sequence[PeerId]) -> None:
        """Enter a certificate, unless the ledger has one of its round."""
        number = certificate.result.round
        if number not in self.state().certificates:
            body = RoundBody(round=number, value=encode_record(certificate))
            await self._write(Draft(kind=Kind.CERTIFICATE, body=body), peers)

    async def _write(self, draft: Draft, peers: Sequence[PeerId]) -> None:
        async with self._lock:
            stored = await self._store_signed()
            if not self._signed:
                try:
                    self._signed.append(self.ledger.write([draft], _wall_ms()))
                except ChainForkedError as error:
                    if not self.forked:
                        log.error("%s", error)
                    self.forked = True
                stored += await self._store_signed()
        if stored:
            await self._push(stored, peers)

    async def _store_signed(self) -> list[Batch]:
        """Make durable what this peer has signed, and only then take it into the ledger. What the disk does not take
        has used up its sequence number: it is stored first when the disk works again, and nothing is signed before."""
        stored: list[Batch] = []
        while self._signed and await self._keep(self._signed[:1], own=True):
            batch = self._signed.pop(0)
            self.ledger.accept(batch)
            stored.append(batch)
        return stored

    async def _push(self, batches: Sequence[Batch], peers: Sequence[PeerId]) -> None:
        message = LedgerEntries(payload=b"", batches=tuple(encode_batch(batch) for batch in batches))
        payload = encode_message(self._swarm, message)
        for peer in self._choice.choose_for_push(peers):
            try:
                await self._control.send(peer, payload)
            except PeerUnreachable as error:
                log.debug("ledger entries were not pushed: %s", error)

    async def take(self, message: LedgerEntries) -> int:
        """Entries from a peer; how many batches were new. Raises ProtocolError for what no replica may accept."""
        fresh: list[Batch] = []
        async with self._lock:
            own_seq = self.ledger.own_seq
            for raw in message.batches:
                # Ed25519 takes a quarter of a millisecond; between batches the loop may breathe.
                fresh += self.ledger.accept(decode_batch_untrusted(raw)).accepted
                await asyncio.sleep(0)
            others = [batch for batch in fresh if batch.author != self._identity.peer]
            if others:
                await self._keep(others, own=False)
            for batch in fresh:
                if batch.author == self._identity.peer:
                    # A restored backup learns its own later entries from others; a twin's do not go on from ours.
                    await self._keep([batch], own=batch.entries[0].seq >= own_seq)
                    own_seq = max(own_seq, batch.entries[-1].seq + 1)
        return len(fresh)

    async def _keep(self, batches: Sequence[Batch], *, own: bool) -> bool:
        """Make batches durable; whether that worked. What others wrote comes again from others after a restart."""
        try:
            await asyncio.to_thread(self._store.append, batches, own=own)
        except StoreError as error:
            log.error("ledger entries were not stored: %s", error)
            return False
        return True

    def answer_reconcile(self, message: Reconcile) -> LedgerEntries:
        """One step of a conversation that a peer opened."""
        reply = answer(self.ledger, message.payload)
        return LedgerEntries(payload=reply.reply or b"", batches=reply.batches)

    async def reconcile(self, peer: PeerId) -> int:
        """Compare ledgers with one peer until both hold the same; how many batches were new here.

        Raises PeerUnreachable, RequestRefused or ProtocolError; what came before that is kept.
        """
        fresh, _ = await self._converse(peer)
        return fresh

    async def _converse(self, peer: PeerId) -> tuple[int, bool]:
        conversation, fresh = Conversation(self.ledger, self._choice.draw_salt()), 0
        while conversation.request is not None:
            question = Reconcile(payload=conversation.request)
            raw = await self._control.request(peer, encode_message(self._swarm, question))
            reply = decode_message_untrusted(self._swarm, raw)
            if not isinstance(reply, LedgerEntries):
                break
            fresh += await self.take(reply)
            lacking = conversation.go_on(reply.payload, len(reply.batches))
            if lacking:
                push = LedgerEntries(payload=b"", batches=lacking)
                await self._control.send(peer, encode_message(self._swarm, push))
        return fresh, conversation.found_difference

    async def keep_up(self, list_live: Callable[[], tuple[PeerId, ...]], incarnation: int) -> None:
        """Compare ledgers with live peers, period after period; write the own lease once that has been done."""
        leased = False
        while True:
            live = list_live()
            for peer in self._choice.choose_for_comparison(live):
                try:
                    _, differed = await self._converse(peer)
                except (PeerUnreachable, RequestRefused, ProtocolError) as error:
                    log.debug("ledgers were not compared: %s", error)
                    continue
                if not differed:
                    break
            if not leased:
                leased = True
                await self.write_lease(incarnation.to_bytes(8, "big"), live)
            await asyncio.sleep(PERIOD_S)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
