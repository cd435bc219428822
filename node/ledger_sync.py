"""The ledger at work: one replica, its store, eager push of what is new, and anti-entropy with a random peer.

Whom to push to and to compare with, and how long, is decided in `shoal.crdt.anti_entropy`.

Nothing is written before other peers have been asked where this peer's own chain ends (`shoal.crdt.own_chain`). What
was not written meanwhile is made up for period by period: the lease of each era, and certificates that nobody entered.

To compare ledgers, and to read and verify batches, takes tens of milliseconds a message: threads do it. The ledger
knows nothing of them, so while one reads it nobody changes it (`_quiet`).

Invariants: what this peer signs is durable before anyone sees it; what arrives is verified by the ledger before it is
stored; a conversation is bounded and is taken up again at the next period; the ledger changes on the event loop only.
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3

from shoal.crdt.anti_entropy import ANSWER_TIMEOUTS_S, PERIOD_S, ROUND_TRIPS_MAX, Conversation, PeerChoice
from shoal.crdt.certified import ChainBase
from shoal.crdt.entries import Batch, decode_batch_untrusted, encode_batch, verify_batch
from shoal.crdt.eras import PERMANENT_ERA, choose_rounds_per_era, era_of_round, oldest_kept
from shoal.crdt.fold import LedgerState
from shoal.crdt.kinds import Kind, RegisterBody, RoundBody
from shoal.crdt.ledger import ChainForkedError, Draft, Ledger, LedgerRules
from shoal.crdt.measurements import HeldOutLoss, Measurement, draft_measurement, is_sayable, list_measurements
from shoal.crdt.own_chain import CLONE_MARK, SPREAD_S, OwnChain
from shoal.crdt.reconciliation import answer
from shoal.node.certified_log import CertifiedLog
from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.ledger_base import ask_for_base, fits
from shoal.node.ledger_store import LedgerStore, StoreError
from shoal.protocol.errors import Failure, ProtocolError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import (
    Certificate,
    LedgerEntries,
    Presence,
    Reconcile,
    Result,
    decode_message_untrusted,
    digest_record,
    encode_message,
    verify_message,
)
from shoal.protocol.wire import encode_record

HELD_PERIOD_S = 1.0  # while this peer may not write yet
MISSING_ENTERED_MAX = 16  # certificates entered in one period because nobody did

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The first round that the ledger lacks, and for how many periods."""

    first: Result | None = None
    periods: int = 0


def make_rules(manifest: Manifest, swarm: bytes) -> LedgerRules:
    """What every replica of this swarm's ledger goes by."""
    return LedgerRules(
        swarm=swarm,
        owner=manifest.owner,
        is_valid_snapshot=lambda number, body: False,
        authority=manifest.authority(swarm),
        founders=manifest.founders,
        rounds_per_era=choose_rounds_per_era(manifest.rounds.snapshot_every),
    )


class LedgerSync:
    """Owns the replica. All calls on the event loop; the store works in threads."""

    def __init__(
        self, *, identity: Identity, manifest: Manifest, swarm: bytes, store: LedgerStore, control: ControlPlane
    ) -> None:
        rules = make_rules(manifest, swarm)
        self.ledger = Ledger(identity=identity, rules=rules)
        self._identity = identity
        self._swarm = swarm
        self._store = store
        self._control = control
        self._choice = PeerChoice(os.urandom)
        self._lock = asyncio.Lock()  # held by whoever changes ledger and store
        self._quiet = asyncio.Lock()  # held while the ledger changes, and while a thread reads it
        self._signed: list[Batch] = []  # at most one: signed, and not stored yet
        self._log = CertifiedLog(store, rules)
        self._rounds_per_era = rules.rounds_per_era
        self._authority = rules.authority
        self._live: Mapping[PeerId, Presence] = {}
        self._leased_era = 0
        self._gap = Gap()
        self._evaluate_every = manifest.training.evaluate_every
        self._unsaid: HeldOutLoss | None = None  # the newest own measurement, while it may not be written
        self._listed: tuple[LedgerState, tuple[Measurement, ...]] | None = None
        self._mark_due = False
        self._fork_told = False
        self._incarnation: int | None = None
        # Told when others hold own entries that this disk lacks; whether they are of a clone that is running.
        self.on_forgotten: Callable[[bool], None] = lambda is_cloned: None
        self.own_chain = OwnChain(started_ms=_wall_ms(), spread_s=random.SystemRandom().uniform(0, SPREAD_S))

    @property
    def forked(self) -> bool:
        """Whether two histories are signed with this peer's key, and its entries do not count."""
        return self._identity.peer in self.ledger.forks

    @property
    def held(self) -> Failure | None:
        """Why this peer writes nothing into the ledger; None where it does."""
        return Failure.CHAIN_FORKED if self.forked else self.own_chain.held

    async def start(self) -> None:
        """Take in what was stored. Call before anything else."""
        await asyncio.to_thread(self._restore)
        await self._truncate()

    def _restore(self) -> None:
        base = self._store.load_base()
        # Thousands of votes would be checked for seconds; those in the own log were checked before they got there.
        trusted = self._log.hash_certificates(0 if base is None else base.round)
        self.ledger.restore(self._store.load(), base, trusted)

    def state(self) -> LedgerState:
        """The fold as of now."""
        return self.ledger.fold(_wall_ms())

    def measurements(self) -> tuple[Measurement, ...]:
        """What members have measured of the newest bases, the newest first."""
        state = self.state()
        if self._listed is None or self._listed[0] is not state:
            self._listed = state, list_measurements(state, self._evaluate_every)
        return self._listed[1]

    async def write_lease(self, value: bytes, peers: Sequence[PeerId]) -> None:
        """Say that this peer takes part, and under which conditions, unless it may not write (`held`)."""
        await self._write([Draft(kind=Kind.LEASE, body=RegisterBody(value=value))], peers)

    async def write_measurement(self, held_out: HeldOutLoss, peers: Sequence[PeerId]) -> None:
        """Say what this peer has measured. While it may not write (`held`), the newest one waits until it may."""
        if not is_sayable(held_out):
            log.warning("the held-out loss of round %d is not written into the ledger: out of range", held_out.round)
            return
        self._unsaid = held_out
        if self.held is None:
            await self._say_measured(peers)

    async def _say_measured(self, peers: Sequence[PeerId]) -> None:
        held_out, self._unsaid = self._unsaid, None
        if held_out is not None:
            await self._write(draft_measurement(self.state(), self._identity.peer, held_out), peers)

    async def write_certificate(self, certificate: Certificate, peers: Sequence[PeerId]) -> None:
        """Enter a certificate, unless the ledger knows of its result. What cannot be written now is made up for."""
        result = certificate.result
        if result.round > self.ledger.base.round and not self.ledger.follows(digest_record(result)):
            body = RoundBody(round=result.round, value=encode_record(certificate))
            await self._write([Draft(kind=Kind.CERTIFICATE, body=body)], peers)

    async def _write(self, drafts: Sequence[Draft], peers: Sequence[PeerId], *, is_mark: bool = False) -> None:
        if self.own_chain.held is not None and not is_mark:
            return
        async with self._lock:
            stored = await self._store_signed()
            if not self._signed:
                try:
                    async with self._quiet:
                        self._signed.append(self.ledger.write(drafts, _wall_ms()))
                except ChainForkedError as error:
                    if not self._fork_told:
                        log.error("%s: %s", Failure.CHAIN_FORKED, error)
                    self._fork_told = True
                stored += await self._store_signed()
        if stored:
            await self._push(stored, peers)

    async def _store_signed(self) -> list[Batch]:
        """Make durable what this peer has signed, and only then take it into the ledger. What the disk does not take
        has used up its sequence number: it is stored first when the disk works again, and nothing is signed before."""
        stored: list[Batch] = []
        while self._signed and await self._keep(self._signed[:1], own=True):
            batch = self._signed.pop(0)
            async with self._quiet:
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
        """Entries from a peer; how many batches were new. Raises ProtocolError for what no replica may accept; what
        came before that is kept."""
        fresh: list[Batch] = []
        async with self._lock:
            try:
                batches, fault = await asyncio.to_thread(_read_batches, message.batches, self.ledger)
                for batch in batches:
                    is_unknown = self._is_unknown_own(batch)
                    async with self._quiet:
                        fresh += self.ledger.accept(batch).accepted
                    if is_unknown:
                        self._meet_own(batch)
                    await asyncio.sleep(0)  # a certificate takes milliseconds; between batches the loop may breathe
                if fault is not None:
                    raise fault
            finally:
                await self._keep_fresh(fresh)
                await self._truncate()
        return len(fresh)

    async def _keep_fresh(self, fresh: Sequence[Batch]) -> None:
        others = [batch for batch in fresh if batch.author != self._identity.peer]
        if others:
            await self._keep(others, own=False)
        for batch in fresh:
            if batch.author == self._identity.peer:
                try:
                    await asyncio.to_thread(self._store.append_recovered, batch)
                except StoreError as error:
                    log.error("an own ledger entry that came from elsewhere was not stored: %s", error)

    def _is_unknown_own(self, batch: Batch) -> bool:
        # Where the chain of a dropped era ended is not known any more; whoever is a little behind sends of it still.
        is_kept = batch.era == PERMANENT_ERA or batch.era >= oldest_kept(self.ledger.era)
        is_own = batch.author == self._identity.peer
        return is_own and is_kept and batch.entries[-1].seq >= self.ledger.next_seq(batch.era)

    def _meet_own(self, batch: Batch) -> None:
        """An own entry that this process has not written: of before a backup was put back, or of a clone. Either way
        this disk does not know all that is signed with its key."""
        was_cloned = self.own_chain.held is Failure.CHAIN_CLONED
        is_cloned = self.own_chain.meet(batch.entries[-1].hlc)
        self.on_forgotten(is_cloned)
        if is_cloned and not was_cloned:
            # Whoever was told by a mark is known to the other one already.
            self._mark_due = not batch.entries[-1].body.startswith(CLONE_MARK)
            _tell_of_clone()

    def meet_presence(self, presence: Presence) -> None:
        """What others know of this peer's presence; raises ProtocolError for a forged one."""
        if self._incarnation in (None, presence.incarnation) or self.own_chain.held is Failure.CHAIN_CLONED:
            return
        verify_message(self._identity.peer, self._swarm, presence)
        assert self._incarnation is not None, "looked at above"
        if self.own_chain.meet_presence(presence.incarnation, presence.sent_at_s, self._incarnation):
            self.on_forgotten(True)
            _tell_of_clone()

    async def _truncate(self) -> None:
        """Drop what has no meaning any more, here and on the disk."""
        async with self._quiet:
            done = self.ledger.truncate()
        if done is not None:
            try:
                await asyncio.to_thread(self._store.truncate, done)
            except StoreError as error:
                # At the next start the ledger drops it again.
                log.error("old eras of the ledger were not dropped: %s", error)

    async def _keep(self, batches: Sequence[Batch], *, own: bool) -> bool:
        """Make batches durable; whether that worked. What others wrote comes again from others after a restart."""
        try:
            await asyncio.to_thread(self._store.append, batches, own=own)
        except StoreError as error:
            log.error("ledger entries were not stored: %s", error)
            return False
        return True

    async def answer_reconcile(self, message: Reconcile) -> LedgerEntries:
        """One step of a conversation that a peer opened."""
        async with self._quiet:
            reply = await asyncio.to_thread(answer, self.ledger, message.payload)
        return LedgerEntries(payload=reply.reply or b"", batches=reply.batches)

    async def reconcile(self, peer: PeerId) -> int:
        """Compare ledgers with one peer until both hold the same; how many batches were new here.

        Raises PeerUnreachable, RequestRefused or ProtocolError; what came before that is kept.
        """
        fresh, _ = await self._converse(peer)
        return fresh

    async def _converse(self, peer: PeerId) -> tuple[int, bool]:
        conversation, fresh, exchanges = Conversation(self.ledger, self._choice.draw_salt()), 0, 0
        while conversation.request is not None:
            question = Reconcile(payload=conversation.request)
            raw = await self._ask(peer, encode_message(self._swarm, question))
            reply = decode_message_untrusted(self._swarm, raw)
            exchanges += 1
            if not isinstance(reply, LedgerEntries):
                return fresh, conversation.found_difference
            fresh += await self.take(reply)
            async with self._quiet:
                lacking = await asyncio.to_thread(conversation.go_on, reply.payload, len(reply.batches))
            if lacking:
                push = LedgerEntries(payload=b"", batches=lacking)
                await self._control.send(peer, encode_message(self._swarm, push))
        # Of eras that this ledger does not know of yet nothing was sent, and what was broken off says nothing.
        known = self._live.get(peer)
        is_behind = known is not None and self._era_of(known.head_round) > self.ledger.era
        if not fresh and not is_behind and exchanges < ROUND_TRIPS_MAX:
            self.own_chain.confirm(peer, time.monotonic())
        return fresh, conversation.found_difference

    async def _ask(self, peer: PeerId, frame: bytes) -> bytes:
        for timeout_s in ANSWER_TIMEOUTS_S[:-1]:
            try:
                return await self._control.request(peer, frame, timeout_s)
            except PeerUnreachable as error:
                log.debug("asked again: %s", error)
        return await self._control.request(peer, frame, ANSWER_TIMEOUTS_S[-1])

    def _era_of(self, round_number: int) -> int:
        return era_of_round(round_number, self._rounds_per_era)

    async def keep_up(self, list_live: Callable[[], Mapping[PeerId, Presence]], incarnation: int) -> None:
        """Period after period: compare ledgers with live peers, follow the own log, write what is to be written."""
        self._incarnation = incarnation
        while True:
            begun_s = time.monotonic()
            self._live = list_live()
            live = tuple(self._live)
            await self._compare(live)
            await self._settle()
            if self._mark_due:
                self._mark_due = False
                mark = RegisterBody(value=CLONE_MARK + incarnation.to_bytes(8, "big"))
                await self._write([Draft(kind=Kind.LEASE, body=mark)], live, is_mark=True)
            if self.held is None:
                await self._renew_lease(incarnation, live)
                await self._enter_missing(live)
                await self._say_measured(live)
            period_s = PERIOD_S if self.held is not Failure.CHAIN_UNCONFIRMED else HELD_PERIOD_S
            await asyncio.sleep(max(0.0, begun_s + period_s - time.monotonic()))

    async def _compare(self, live: Sequence[PeerId]) -> None:
        for peer in self._choice.choose_for_comparison(live):
            try:
                _, differed = await self._converse(peer)
            except (PeerUnreachable, RequestRefused, ProtocolError) as error:
                log.debug("ledgers were not compared: %s", error)
                continue
            if not differed and self.held is not Failure.CHAIN_UNCONFIRMED:
                break

    async def _settle(self) -> None:
        """Where the own log is an era ahead of the ledger, or another one since a re-root, the ledger follows."""
        try:
            base = await asyncio.to_thread(self._log.find_base, self.ledger)
            if base is None and await asyncio.to_thread(self._log.lacks_rounds, self.ledger):
                base = await self._ask_for_base()
            if base is not None:
                async with self._lock:
                    await asyncio.to_thread(self._store.put_base, base)
                    async with self._quiet:
                        self.ledger.settle(base)
                    await self._truncate()
        except StoreError as error:
            log.error("the ledger was not settled on the certified rounds: %s", error)

    async def _ask_for_base(self) -> ChainBase | None:
        """Of rounds that nobody keeps any more the sum is taken on the word of voters (node.ledger_base)."""
        newest = await asyncio.to_thread(self._log.get_anchor)
        assert newest is not None and self._authority is not None, "the log is ahead of the ledger"
        base = await ask_for_base(self._put, newest.voters, self._live, self._authority.rule)
        if base is None:
            log.info("too few voters are in sight who say which rounds the ledger begins behind")
        elif not fits(base, await asyncio.to_thread(self._log.get_anchor, base.round)):
            log.warning("voters name a sum of %d rounds that does not fit the own log", base.round)
            return None
        return base

    async def _put(self, peer: PeerId, question: object) -> object:
        raw = await self._ask(peer, encode_message(self._swarm, question))
        return decode_message_untrusted(self._swarm, raw)

    async def _renew_lease(self, incarnation: int, live: Sequence[PeerId]) -> None:
        """Once after each start and in each era: what is not renewed ends with its era."""
        era = self.ledger.own_slot.era
        if self._leased_era != era:
            await self.write_lease(incarnation.to_bytes(8, "big"), live)
            self._leased_era = era

    async def _enter_missing(self, live: Sequence[PeerId]) -> None:
        """Certificates that the ledger lacks a period after it lacked them first are entered by whose turn it is; if
        the gap stays, by the next one."""
        try:
            missing = await asyncio.to_thread(self._log.list_missing, self.ledger, self.state(), MISSING_ENTERED_MAX)
        except StoreError as error:
            log.error("%s", error)
            return
        if not missing:
            self._gap = Gap()
            return
        first = missing[0].result
        self._gap = Gap(first=first, periods=self._gap.periods + 1 if self._gap.first == first else 0)
        turns = sorted((self._identity.peer, *live), key=lambda peer: blake3(first.previous + peer).digest())
        if self._gap.periods > turns.index(self._identity.peer):
            for certificate in missing:
                await self.write_certificate(certificate, live)


def _read_batches(encoded: Sequence[bytes], ledger: Ledger) -> tuple[list[Batch], ProtocolError | None]:
    """The batches up to the first that does not decode, and what is wrong with that one. Signatures, up to the first
    bad one, are checked here only so that the ledger, which judges them, finds them known (protocol.identity)."""
    batches: list[Batch] = []
    try:
        batches += map(decode_batch_untrusted, encoded)
    except ProtocolError as error:
        fault: ProtocolError | None = error
    else:
        fault = None
    with suppress(ProtocolError):
        for batch in batches:
            if batch.tip not in ledger:
                verify_batch(batch)
    return batches, fault


def _tell_of_clone() -> None:
    text = "another process signs with this peer's key; nothing more is written here. Fix: stop one of the two"
    log.error("%s: %s, and give it a new identity", Failure.CHAIN_CLONED, text)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
