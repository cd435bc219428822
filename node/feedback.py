"""Error feedback on the disk: the residual, and the contributions of the open round that may still be counted.

What a peer produced is what was applied of it plus the residual, to the bit, over kill -9: the residual that a
contribution leaves is durable before the contribution is offered, and when a certificate counts it, the residual and
the record of what it was settled by change in one transaction. Which of the two a restart finds, it can go on from:
the certificate is on the disk before, too, and settling is looked up there again. So a disk that takes no writes
costs nothing at first: only no further contribution is offered until it takes them again.

Files are named by their digest; the record in the ledger's store names those that count. Blocking calls.

Of a ledger's file that is older than what was stored last nothing of this is believed (`forget_contributions`): what
was contributed since may have been counted. And a certificate that counts a contribution of this peer which the record
does not know tells of such a life, too, as after a whole folder was put back. Then the residual, and the local
parameters with it, are partly in what was counted: all of that is dropped, told, and not applied a second time.

Invariants: at most PENDING_MAX contributions are kept, and none to the open round is forgotten while that is open; the
same contribution is settled once, and none that the record does not know.
"""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from blake3 import blake3

from shoal.node.ledger_store import LedgerStore, StoreError
from shoal.node.residual_file import ResidualFile, map_residual
from shoal.protocol.codecs import Float32s
from shoal.protocol.contribution import Contributor, Frozen
from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import PARTS_MAX, Result
from shoal.protocol.quorum import make_bitmap
from shoal.protocol.state import chunk_digests
from shoal.protocol.wire import DELTA_BYTES_MAX, U63, Bound, Bytes32, decode_record_untrusted, encode_record

# A peer makes a second contribution to a round only after a restart that lost what the first one was made from.
PENDING_MAX = 4
FEEDBACK_NAMESPACE = "feedback"
FEEDBACK_KEY = b"state"
_SUFFIX = ".safetensors"
_TEMPORARY = ".partial"  # the suffix; alone it is the name of what is being frozen

log = logging.getLogger(__name__)


class FeedbackFull(ShoalError):
    """So many contributions to the open round are pending that another one is not kept, and so not offered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A contribution that was offered, or may have been: made from `batches_done` batches, it leaves `residual`."""

    round: U63
    root: Bytes32
    batches_done: U63
    residual: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The last contribution that was counted: of which round, made from how many batches, in which parts."""

    round: U63
    batches_done: U63
    parts: Annotated[bytes, Bound(0, PARTS_MAX // 8)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackRecord:
    """`residual` names its file; zeros stand for a residual of zeros. `generation` is drawn when the record is made:
    the trainer's checkpoints belong to one, so that none outlives the memory of what was contributed of it."""

    generation: Bytes32 = bytes(32)
    residual: Bytes32 = bytes(32)
    pending: Annotated[tuple[Pending, ...], Bound(0, PENDING_MAX)] = ()
    settled: Settled | None = None


class FeedbackStore:
    """One peer's. Without `load` it knows nothing."""

    def __init__(self, folder: Path, ledger: LedgerStore) -> None:
        self.record = FeedbackRecord()
        self._is_behind = False  # what is on the disk is older than `record`, and true together with the certificates
        self._folder = folder
        self._ledger = ledger
        self._open: ResidualFile | None = None  # of the contribution that is being frozen, until it is held

    @property
    def batches_done(self) -> int:
        """The batches that are in contributions: of one that was counted, or that may be."""
        settled = 0 if self.record.settled is None else self.record.settled.batches_done
        return max([settled, *(one.batches_done for one in self.record.pending)])

    def load(self, contributor: Contributor) -> list[Frozen]:
        """Fill the residual; the pending contributions, without their bytes. What is damaged is named in the log.

        Raises StoreError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        raw = self._ledger.get_record(FEEDBACK_NAMESPACE, FEEDBACK_KEY)
        if raw is None:
            if any(self._folder.iterdir()):
                log.error("the memory of what was contributed is lost, and with it the residual of the error feedback")
            self._save(FeedbackRecord(generation=os.urandom(32)))
            return []
        self.record = decode_record_untrusted(FeedbackRecord, raw, DELTA_BYTES_MAX)
        residual = self._read(self.record.residual, contributor.residual.size)
        if residual is None:
            log.error("the residual of the error feedback is damaged on this disk and lost")
            self.record = replace(self.record, residual=bytes(32))
        else:
            contributor.residual = residual
        found = [self._restore(one, contributor.residual.size) for one in self.record.pending]
        kept = tuple(one for one, frozen in zip(self.record.pending, found, strict=True) if frozen is not None)
        self.record = replace(self.record, pending=kept)
        self._remove_unnamed()
        return [frozen for frozen in found if frozen is not None]

    def _restore(self, pending: Pending, elements: int) -> Frozen | None:
        residual = self._read(pending.residual, elements)
        if residual is None:
            log.error("what the contribution to round %d leaves is damaged on this disk", pending.round)
            return None
        return Frozen(round=pending.round, encoded=(), digests=(), root=pending.root, norm=0.0, residual_next=residual)

    def take_residual(self, elements: int) -> Float32s:
        """Memory for what a contribution will leave: that of a file, which `hold` only has to name. Where the disk
        gives none it is memory of the process, and the disk's word comes from `hold`."""
        self._drop_open()
        try:
            self._open = ResidualFile(self._folder / _TEMPORARY, elements)
        except OSError as error:
            log.debug("no file for the next residual: %s", error)
            return np.empty(elements, np.float32)
        return self._open.values

    def hold(self, contributor: Contributor, frozen: Frozen, batches_done: int) -> None:
        """Durable on return: only then the contribution may be offered. Raises OSError, StoreError, FeedbackFull."""
        try:
            self._hold(contributor, frozen, batches_done)
        finally:
            self._drop_open()

    def _hold(self, contributor: Contributor, frozen: Frozen, batches_done: int) -> None:
        if self._is_behind:
            self._save(replace(self.record, residual=self._write(contributor.residual)))
        open_round = tuple(one for one in self.record.pending if one.round == frozen.round)
        if any(one.root == frozen.root for one in open_round):
            return
        room = PENDING_MAX - 1 - len(open_round)
        if room < 0:
            raise FeedbackFull(f"{PENDING_MAX} contributions to round {frozen.round} are pending")
        # Those to later rounds were offered on a log that was left, and it may be gone back to.
        later = tuple(one for one in self.record.pending if one.round > frozen.round and one.root != frozen.root)
        pending = Pending(
            round=frozen.round, root=frozen.root, batches_done=batches_done, residual=self._write(frozen.residual_next)
        )
        self._save(replace(self.record, pending=(*later[:room], *open_round, pending)))

    def knows(self, frozen: Frozen) -> bool:
        """Whether this contribution is pending: only then `settle` is durable."""
        return any((one.round, one.root) == (frozen.round, frozen.root) for one in self.record.pending)

    def settle(self, contributor: Contributor, frozen: Frozen, result: Result, me: PeerId) -> tuple[int, ...]:
        """Take over what a counted contribution leaves; which parts it was counted in."""
        members = [member.peer for member in result.members]
        included = contributor.settle(frozen, result, members.index(me))
        pending = next((one for one in self.record.pending if one.root == frozen.root), None)
        if pending is None or not included:
            return included
        parts = make_bitmap(frozenset(included), len(result.parts))
        settled = Settled(round=result.round, batches_done=pending.batches_done, parts=parts)
        is_whole = len(included) == len(result.parts)
        if is_whole:
            contributor.residual = self._map_privately(pending.residual, contributor.residual)

        def write() -> FeedbackRecord:
            residual = pending.residual if is_whole else self._write(contributor.residual)
            return replace(self.record, residual=residual, settled=settled, pending=())

        self._try_save(write, replace(self.record, settled=settled, pending=()))
        if not is_whole and not self._is_behind:
            self._map_again(contributor)
        return included

    def forget(self, number: int) -> None:
        """The rounds up to this one are decided: what is still pending of them was not counted."""
        kept = tuple(one for one in self.record.pending if one.round > number)
        # On the disk the next write says so; until then a restart looks it up in the certificates.
        self.record = replace(self.record, pending=kept)

    def release(self, root: bytes) -> None:
        """Nobody can count this contribution any more."""
        # On the disk the next write says so; a restart before it has one more pending than it needs.
        self.record = replace(self.record, pending=tuple(one for one in self.record.pending if one.root != root))

    def clear(self) -> None:
        """The residual is zeros from now on. What is pending may be counted all the same."""
        cleared = replace(self.record, residual=bytes(32))
        self._try_save(lambda: cleared, cleared)

    def renew(self) -> None:
        """What is known is of an older life than what others have counted: begin anew, with a residual of zeros and
        another generation, so that no checkpoint of the trainer is of use either."""
        fresh = FeedbackRecord(generation=os.urandom(32))
        self._try_save(lambda: fresh, fresh)

    def _try_save(self, make: Callable[[], FeedbackRecord], otherwise: FeedbackRecord) -> None:
        """On a disk that fails the record is `otherwise`, in memory alone, until `hold` finds the disk mended."""
        try:
            self._save(make())
        except (OSError, StoreError) as error:
            log.error("the error feedback cannot be written now: %s", error)
            self.record = otherwise
            self._is_behind = True

    def _save(self, record: FeedbackRecord) -> None:
        self._ledger.put_record(FEEDBACK_NAMESPACE, FEEDBACK_KEY, encode_record(record))
        self.record = record
        self._is_behind = False
        self._remove_unnamed()

    def _remove_unnamed(self) -> None:
        named = {
            self._path(digest) for digest in (self.record.residual, *(one.residual for one in self.record.pending))
        }
        if self._open is not None:
            named.add(self._open.path)
        for path in self._folder.iterdir():
            if path not in named:
                path.unlink(missing_ok=True)

    def _write(self, residual: Float32s) -> bytes:
        digest = digest_residual(residual)
        path = self._path(digest)
        if path.exists():
            return digest
        made = self._open
        if made is None or made.values is not residual:
            made = ResidualFile(path.with_suffix(_TEMPORARY), residual.size)
            made.values[:] = residual
        made.finish(path)
        if made is self._open:
            self._open = None
        return digest

    def _drop_open(self) -> None:
        """Whoever views its values keeps them; nobody else needs the file."""
        if self._open is not None:
            self._open.path.unlink(missing_ok=True)
            self._open = None

    def _map_again(self, contributor: Contributor) -> None:
        """What was changed of the residual is in memory of the process, and by now in a file, too: that suffices."""
        with suppress(OSError):
            mapped = map_residual(self._path(self.record.residual), contributor.residual.size)
            contributor.residual = contributor.residual if mapped is None else mapped

    def _map_privately(self, digest: bytes, residual: Float32s) -> Float32s:
        """The residual that was just settled, as its file has it. The view through which it was made would write into
        that file when a later contribution is settled in some of its parts."""
        try:
            mapped = map_residual(self._path(digest), residual.size)
        except OSError:
            mapped = None
        return residual.copy() if mapped is None else mapped

    def _read(self, digest: bytes, elements: int) -> Float32s | None:
        if digest == bytes(32):
            return np.zeros(elements, np.float32)
        try:
            residual = map_residual(self._path(digest), elements)
        except OSError:
            return None
        return None if residual is None or digest_residual(residual) != digest else residual

    def _path(self, digest: bytes) -> Path:
        return self._folder / (digest.hex() + _SUFFIX)


def digest_residual(residual: Float32s) -> bytes:
    """The digest that names a residual."""
    return blake3(chunk_digests(residual), derive_key_context="shoal residual").digest()


def forget_contributions(ledger: LedgerStore) -> None:
    """The record is older than what may have been offered; durable on return. Blocking; raises StoreError."""
    ledger.delete_record(FEEDBACK_NAMESPACE, FEEDBACK_KEY)
