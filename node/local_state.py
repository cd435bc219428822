"""This peer's copy of the state, on disk and in memory: restore at start, commit a certified round, install a snapshot.

Order of a commit: the update's bytes are durable, then the certificate (fully synced), then the outer step runs. So
after kill -9 every certified round that was ever acted on can be replayed from the disk.

Invariants: `head` always names what `replica` holds; one operation on the vectors at a time (`lock`); a snapshot is
used only when its index hashes to the state root that the next certificate names.
"""

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.node.blobs import BlobStore
from shoal.node.certificate_trail import CERTIFICATES_KEPT, CertificateTrail
from shoal.node.config import StoreTable
from shoal.node.feedback import FeedbackStore, Settled
from shoal.node.ledger_store import LedgerStore, StoredCertificate, StoreError
from shoal.node.payload_memory import PayloadMemory
from shoal.node.process import count_cores
from shoal.node.retention import GIB, Holdings, Limits, Sizes, first_rebuildable, plan_removal
from shoal.node.snapshots import LEASES_MAX, SnapshotStore
from shoal.protocol.codecs import Float32s
from shoal.protocol.contribution import Contributor, Frozen
from shoal.protocol.effects import VoteRecord
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Manifest, genesis_head
from shoal.protocol.messages import Certificate, Result, digest_record
from shoal.protocol.quorum import Head, list_contributors
from shoal.protocol.replica import Replica
from shoal.protocol.trail import Anchor
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted, encode_record

# They encode parts, apply them, and hash; idle between rounds.
PART_THREADS_MAX = 8
VOTE_NAMESPACE = "round"
VOTE_KEY = b"vote"

# Inside, the parameters are changed; what it gives is told of which round they are.
Writing = Callable[[], contextlib.AbstractContextManager[Callable[[int], None]]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """The places on the disk."""

    ledger: LedgerStore
    blobs: BlobStore
    snapshots: SnapshotStore
    snapshots_kept: int
    rounds_kept: int = 0  # more than the manifest's, where this peer wants them
    bytes_max: int = 0  # of updates and snapshots; 0 is no limit
    certificates_kept: int = CERTIFICATES_KEPT
    feedback: FeedbackStore | None = None  # of a peer that contributes


def open_stores(folder: Path, ledger: LedgerStore, limits: StoreTable, *, contributes: bool) -> Stores:
    """The places in a peer's data folder. Blocking; raises OSError."""
    return Stores(
        ledger=ledger,
        blobs=BlobStore(folder / "blobs"),
        snapshots=SnapshotStore(folder / "snapshots"),
        snapshots_kept=limits.snapshots_kept,
        rounds_kept=limits.rounds_kept,
        bytes_max=int(limits.gib_max * GIB),
        feedback=FeedbackStore(folder / "feedback", ledger) if contributes else None,
    )


def write_alone() -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """For parameters that nobody else reads."""
    return contextlib.nullcontext(lambda round: None)


class LocalState:
    """`params` may be the trainer's shared memory; they are changed inside of `writing` alone. Everything that blocks
    runs in a thread."""

    def __init__(
        self,
        manifest: Manifest,
        swarm: bytes,
        stores: Stores,
        params: Float32s,
        momentum: Float32s,
        writing: Writing = write_alone,
    ) -> None:
        self.lock = asyncio.Lock()
        self.stores = stores
        self._manifest = manifest
        self._swarm = swarm
        self._writing = writing
        self._threads = ThreadPoolExecutor(min(count_cores(), PART_THREADS_MAX), thread_name_prefix="parts")
        self.replica = Replica(manifest, params, momentum, each=self._threads.map)
        self.memory = PayloadMemory()
        feedback = stores.feedback
        take_residual = None if feedback is None else feedback.take_residual
        self.contributor = Contributor(
            manifest, take=self.memory.take, take_residual=take_residual, each=self._threads.map
        )
        anchor = Anchor(round=0, digest=swarm, voters=manifest.founders)
        self.trail = CertificateTrail(stores.ledger, anchor, manifest.authority(swarm))
        self.head: Head
        self.apply_s: float | None = None  # what the last outer step took; the first one loads compiled loops
        self._stepped = False
        self.roots: dict[int, bytes] = {}  # state roots by round, for the report; bounded by rounds_kept
        self._snapshot_task: asyncio.Task[None] | None = None
        self._updates: dict[int, Sizes] = {}  # the retained rounds' blobs; bounded by what is kept
        self._orphans: set[bytes] = set()  # blobs of a log that was left
        self._pending: dict[bytes, Frozen] = {}  # contributions to the open round by their roots; bounded by the store

    # -- start -----------------------------------------------------------------------------------------------------

    async def restore(self) -> Head:
        """The newest state that this disk can prove: a snapshot, then the certified updates after it."""
        async with self.lock:
            self.head = await asyncio.to_thread(self.restore_now)
            await asyncio.to_thread(self._restore_feedback)
            await asyncio.to_thread(self._find_updates)
            await asyncio.to_thread(self.trail.examine)
        return self.head

    def restore_now(self) -> Head:
        """`restore` for a caller without an event loop. Blocking; raises StoreError."""
        self.stores.snapshots.remove_leftovers()
        with self._writing() as name_round:
            head = self._rebuild()
            name_round(head.round)
        self.head = head
        self._remember(head)
        return head

    def _rebuild(self) -> Head:
        head = self._restore_snapshot() or genesis_head(self._manifest, self._swarm, self.replica.reset())
        while stored := self.stores.ledger.get_certificate(head.round + 1):
            result = _certificate_of(stored).result
            encoded = self._read_parts(result)
            if encoded is None or result.previous != head.digest or result.base_root != head.state_root:
                break  # the rest comes from peers
            head = self._advance(result, encoded)
        return head

    def _restore_snapshot(self) -> Head | None:
        snapshots = self.stores.snapshots
        for number in reversed(snapshots.rounds()):
            own = self.stores.ledger.get_certificate(number)
            snapshot = snapshots.get(number)
            if own is None or snapshot is None:
                continue
            following = self.stores.ledger.get_certificate(number + 1)
            if following is not None and _certificate_of(following).result.base_root != snapshot.index.root:
                log.warning("snapshot of round %d is not what was certified and was removed", number)
                snapshots.remove(number)
                continue
            if not snapshots.read(number, self.replica.params, self.replica.momentum):
                log.warning("snapshot of round %d is damaged and was removed", number)
                continue
            self.replica.round = number
            return Head(
                round=number,
                digest=own.result_digest,
                state_root=snapshot.index.root,
                voters=_certificate_of(own).result.voters,
            )
        return None

    def _read_parts(self, result: Result) -> dict[bytes, bytes] | None:
        encoded: dict[bytes, bytes] = {}
        for part in result.parts:
            raw = self.stores.blobs.read(part.digest)
            if raw is None:
                return None
            encoded[part.digest] = raw
        return encoded

    def load_vote(self) -> VoteRecord | None:
        """What this peer promised and voted for before it stopped. Blocking."""
        raw = self.stores.ledger.get_record(VOTE_NAMESPACE, VOTE_KEY)
        return None if raw is None else decode_record_untrusted(VoteRecord, raw, DELTA_BYTES_MAX)

    def save_vote(self, vote: VoteRecord) -> None:
        """Durable on return. Blocking; raises StoreError."""
        self.stores.ledger.put_record(VOTE_NAMESPACE, VOTE_KEY, encode_record(vote))

    def renew_vote(self) -> VoteRecord:
        """What is durable of the vote, and made so once more: proof that the disk takes writes. Blocking; raises
        StoreError."""
        vote = self.load_vote() or VoteRecord(round=0)  # of no round: it binds to nothing
        self.save_vote(vote)
        return vote

    # -- the log ---------------------------------------------------------------------------------------------------

    async def commit(self, certificate: Certificate, held: Callable[[bytes], memoryview | None]) -> Head:
        """Make the round durable and apply it. `held` finds parts that are still in memory."""
        async with self.lock:
            self.head = await asyncio.to_thread(self._commit, certificate, held)
        self._begin_snapshot()
        return self.head

    def _commit(self, certificate: Certificate, held: Callable[[bytes], memoryview | None]) -> Head:
        result = certificate.result
        encoded: dict[bytes, bytes | memoryview] = {}
        for part in result.parts:
            raw = held(part.digest)
            if raw is not None:
                self.stores.blobs.write(part.digest, raw)
            found = raw if raw is not None else self.stores.blobs.read(part.digest)
            if found is None:  # it was here when the round core was told so
                raise OSError(errno.EIO, "an update's part cannot be read any more", part.digest.hex())
            encoded[part.digest] = found
        self.stores.blobs.sync(encoded)
        try:
            self.save_certificate(certificate)
        except ProtocolError as error:
            # A catch-up stored another log's certificates ahead of the state; the round core has judged this one.
            log.warning("%s; what was stored ahead is put aside", error)
            self.stores.ledger.abandon_certificates(result.round)
            self.save_certificate(certificate)
        with self._writing() as name_round:
            head = self._advance(result, encoded)
            name_round(head.round)
        self._updates[head.round] = self._sizes(result)
        self._remember(head)
        return head

    def _advance(self, result: Result, encoded: Mapping[bytes, bytes | memoryview]) -> Head:
        began_s = time.perf_counter()
        root = self.replica.apply(result, encoded)
        if result.parts and self._stepped:
            self.apply_s = time.perf_counter() - began_s
        self._stepped = self._stepped or bool(result.parts)
        return Head(round=result.round, digest=digest_record(result), state_root=root, voters=result.voters)

    def save_certificate(self, certificate: Certificate) -> None:
        """Durable on return. Blocking; raises StoreError."""
        stored = StoredCertificate(
            round=certificate.result.round,
            result_digest=digest_record(certificate.result),
            body=encode_record(certificate),
        )
        self.stores.ledger.put_certificate(stored)

    def load_certificates(self, first: int, count: int) -> tuple[Certificate, ...]:
        """Stored certificates of consecutive rounds from `first` on, at most `count`. Blocking."""
        found = [_certificate_of(one) for one in self.stores.ledger.list_certificates(first, first + count)]
        return tuple(one for at, one in enumerate(found) if one.result.round == first + at)

    def list_certificates(self, first: int, end: int) -> tuple[Certificate, ...]:
        """Those that are stored of the rounds from `first` up to but not including `end`. Blocking."""
        return tuple(map(_certificate_of, self.stores.ledger.list_certificates(first, end)))

    def _remember(self, head: Head) -> None:
        self.roots[head.round] = head.state_root
        while len(self.roots) > self._manifest.rounds.rounds_kept:
            del self.roots[min(self.roots)]

    # -- contributions ---------------------------------------------------------------------------------------------

    @property
    def settled(self) -> Settled | None:
        """The last contribution of this peer that was counted."""
        return None if self.stores.feedback is None else self.stores.feedback.record.settled

    @property
    def generation(self) -> bytes:
        """Of the memory of what was contributed; checkpoints of another one are of no use."""
        return bytes(32) if self.stores.feedback is None else self.stores.feedback.record.generation

    @property
    def batches_done(self) -> int:
        """The batches that are in contributions."""
        return 0 if self.stores.feedback is None else self.stores.feedback.batches_done

    async def freeze(self, local: Float32s, batches_done: int = 0) -> Frozen:
        """Encode the contribution to the round after the head, made from so many batches, and keep what it leaves.

        Raises NonFiniteContribution, and OSError, StoreError and FeedbackFull where it must not be offered."""
        async with self.lock:
            return await asyncio.to_thread(self._freeze, local, batches_done)

    def _freeze(self, local: Float32s, batches_done: int) -> Frozen:
        frozen = self.contributor.freeze(self.head.round + 1, self.replica.params, local)
        if self.stores.feedback is not None:
            self.stores.feedback.hold(self.contributor, frozen, batches_done)
        self._pending[frozen.root] = frozen
        return frozen

    async def release(self, frozen: Frozen) -> None:
        """This contribution was offered, and nobody can have planned with it: it is as if it had not been made."""
        async with self.lock:
            self._pending.pop(frozen.root, None)
            if self.stores.feedback is not None:
                self.stores.feedback.release(frozen.root)

    async def settle(self, result: Result, me: PeerId) -> tuple[int, ...]:
        """A round is applied: the parts in which this peer's contribution was counted."""
        async with self.lock:
            return await asyncio.to_thread(self._settle, result, me)

    def _settle(self, result: Result, me: PeerId) -> tuple[int, ...]:
        roots = [member.contribution_root for member in result.members if member.peer == me]
        frozen = self._pending.get(roots[0]) if roots else None
        if frozen is not None and (frozen.round != result.round or not self._remembers(frozen)):
            frozen = None  # offered on a log that was left; since then the same work was offered, or counted, elsewhere
        included: tuple[int, ...] = ()
        if frozen is not None:
            if self.stores.feedback is None:
                index = [member.peer for member in result.members].index(me)
                included = self.contributor.settle(frozen, result, index)
            else:
                included = self.stores.feedback.settle(self.contributor, frozen, result, me)
        self._pending = {root: one for root, one in self._pending.items() if one.round > result.round}
        if self.stores.feedback is not None:
            if frozen is None and roots and self._is_forgotten(result, me):
                log.error("round %d counts a contribution of this peer that its disk does not know of", result.round)
                self.contributor.clear()
                self.stores.feedback.renew()
            self.stores.feedback.forget(result.round)
        return included

    def _remembers(self, frozen: Frozen) -> bool:
        return self.stores.feedback is None or self.stores.feedback.knows(frozen)

    def _is_forgotten(self, result: Result, me: PeerId) -> bool:
        """Whether work is in the result that this peer has done in a life of which its disk knows nothing. A round that
        comes once more, because two logs took turns, is no such thing."""
        is_first = self.settled is None or self.settled.round < result.round
        return is_first and me in list_contributors(result)

    def _restore_feedback(self) -> None:
        """The residual, settled by every certificate that is here; and what the open round may still count."""
        feedback = self.stores.feedback
        if feedback is None:
            return
        for frozen in feedback.load(self.contributor):
            stored = self.stores.ledger.get_certificate(frozen.round) if frozen.round <= self.head.round else None
            if stored is not None:
                result = _certificate_of(stored).result
                me = next((one.peer for one in result.members if one.contribution_root == frozen.root), None)
                if me is not None:
                    parts = feedback.settle(self.contributor, frozen, result, me)
                    log.info("the contribution to round %d was counted in %d parts", frozen.round, len(parts))
            elif frozen.round > self.head.round:
                self._pending[frozen.root] = frozen
        feedback.forget(self.head.round)

    async def forget_residual(self) -> None:
        """It belonged to local parameters that are gone."""
        async with self.lock:
            await asyncio.to_thread(self._forget_residual)

    def _forget_residual(self) -> None:
        self.contributor.clear()
        if self.stores.feedback is not None:
            self.stores.feedback.clear()

    # -- snapshots -------------------------------------------------------------------------------------------------

    def _begin_snapshot(self) -> None:
        due = self.head.round % self._manifest.rounds.snapshot_every == 0
        if due and (self._snapshot_task is None or self._snapshot_task.done()):
            self._snapshot_task = asyncio.get_running_loop().create_task(self.write_snapshot())

    async def write_snapshot(self) -> None:
        """Write the state as it is now, and drop what it makes unnecessary."""
        async with self.lock:
            if self.head.round and self.head.round not in self.stores.snapshots.rounds():
                await self._try_snapshot()

    async def _try_snapshot(self) -> None:
        """The state stands without one, too; only a restart then begins further back."""
        try:
            await asyncio.to_thread(self._write_snapshot)
        except (OSError, StoreError) as error:
            log.error("no snapshot of round %d: %s", self.head.round, error)

    def _write_snapshot(self) -> None:
        snapshots = self.stores.snapshots
        known = snapshots.get(self.head.round)
        if known is None or known.index.root != self.head.state_root:  # it may have been fetched
            snapshots.write(self.replica.index(), self.replica.params, self.replica.momentum)
        self._sweep()

    # -- retention -------------------------------------------------------------------------------------------------

    @property
    def holdings(self) -> Holdings:
        """What is on the disk."""
        snapshots = self.stores.snapshots
        return Holdings(
            head=self.head.round,
            snapshots=snapshots.rounds(),
            snapshot_bytes=8 * self._manifest.layout.elements,
            lent=snapshots.lent()[:LEASES_MAX],
            updates=self._updates,
        )

    @property
    def oldest_round(self) -> int:
        """From this one on every round up to the head can be rebuilt from this disk."""
        first = first_rebuildable(self.holdings)
        return self.head.round if first is None else first

    def _find_updates(self) -> None:
        """Back from the head to where everything was removed before."""
        for number in range(self.head.round, 0, -1):
            stored = self.stores.ledger.get_certificate(number)
            if stored is None:
                break
            sizes = self._sizes(_certificate_of(stored).result)
            if sizes and not any(self.stores.blobs.has(digest) for digest in sizes):
                break  # a round without parts says nothing
            self._updates[number] = sizes

    async def find_retained(self) -> None:
        """Look again which updates can be replayed: certificates were missing that are here now."""
        async with self.lock:
            await asyncio.to_thread(self._find_updates)

    def _sizes(self, result: Result) -> Sizes:
        return {one.digest: self._manifest.update_bytes(part) for part, one in self._manifest.match_parts(result)}

    def _sweep(self) -> None:
        """Remove what the limits make unnecessary."""
        limits = Limits(
            rounds_min=self._manifest.rounds.rounds_kept,
            rounds_kept=self.stores.rounds_kept,
            snapshots_kept=self.stores.snapshots_kept,
            bytes_max=self.stores.bytes_max,
        )
        removal = plan_removal(self.holdings, limits)
        for number in removal.snapshots:
            self.stores.snapshots.remove(number)
        for number in removal.rounds:
            del self._updates[number]
        kept = {digest for sizes in self._updates.values() for digest in sizes}
        for digest in removal.blobs | (self._orphans - kept):
            self.stores.blobs.remove(digest)
        self._orphans.clear()
        self._shorten_log()

    def _shorten_log(self) -> None:
        """Drop certificates behind all that needs them: what can be rebuilt, and what the ledger has not summed up."""
        base = self.stores.ledger.load_base()
        oldest_update = min(self._updates, default=self.head.round)
        oldest_snapshot = min(self.stores.snapshots.rounds(), default=self.head.round)
        window = self.head.round - self.stores.certificates_kept
        self.trail.shorten(min(window, oldest_update - 1, oldest_snapshot, base.round if base is not None else 0))

    async def install(self, head: Head, params: Float32s, momentum: Float32s) -> None:
        """Take over a whole state that was checked against `head.state_root`."""
        async with self.lock:
            assert head.round > self.head.round, "a snapshot only leads forward"
            with self._writing() as name_round:
                await asyncio.to_thread(np.copyto, self.replica.params, params)
                name_round(head.round)
            await asyncio.to_thread(np.copyto, self.replica.momentum, momentum)
            self.replica.round = head.round
            await asyncio.to_thread(self._forget_residual)
            self._pending.clear()
            self.head = head
            self._remember(head)
            await self._try_snapshot()

    def genesis(self) -> Head:
        """Round 0. Its state root is not computed: only the digest and the voters are to be used."""
        return genesis_head(self._manifest, self._swarm, b"")

    async def rewind(self, first: int) -> Head:
        """Give up the rounds from `first` on: another log of this swarm stays (protocol.lineage). Their certificates
        are put aside; the state becomes the newest one before them that this disk can prove. The residual stays: what
        was merged and not sent is still owed. Raises StoreError."""
        async with self.lock:
            self.head = await asyncio.to_thread(self._rewind, first)
        return self.head

    def _rewind(self, first: int) -> Head:
        self.stores.ledger.abandon_certificates(first)
        for number in self.stores.snapshots.rounds():
            if number >= first:
                self.stores.snapshots.remove(number)
        self.roots = {number: root for number, root in self.roots.items() if number < first}
        for number in [number for number in self._updates if number >= first]:
            self._orphans |= self._updates.pop(number).keys()
        return self.restore_now()

    async def finish(self) -> None:
        """Let a snapshot that is being written come to its end."""
        if self._snapshot_task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._snapshot_task

    def close(self) -> None:
        """End the threads; the state is used no more."""
        self._threads.shutdown()


def _certificate_of(stored: StoredCertificate) -> Certificate:
    try:
        return decode_record_untrusted(Certificate, stored.body, DELTA_BYTES_MAX)
    except ProtocolError as error:
        raise AssertionError(f"the stored certificate of round {stored.round} was checked when written") from error
