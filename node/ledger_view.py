"""The ledger of a data folder as people look at it: read from the file, or asked of the running daemon that holds it.

Nothing here changes a ledger: the replica that is made of what was read has a throw-away identity and is never stored.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shoal.crdt.certified import ChainBase, decode_base_untrusted
from shoal.crdt.clock import Hlc, wall_ms_of
from shoal.crdt.entries import BATCH_BYTES_MAX, Batch, Entry, decode_batch_untrusted
from shoal.crdt.fold import LedgerState
from shoal.crdt.kinds import (
    AdmissionBody,
    BanBody,
    EntryId,
    Kind,
    ReadmissionBody,
    RegisterBody,
    RoundBody,
    TagBody,
    VersionedBody,
    decode_body_untrusted,
)
from shoal.crdt.ledger import Ledger
from shoal.crdt.measurements import HELD_OUT_TAG, decode_measurement_untrusted, list_measurements
from shoal.node.certificate_source import (
    LEDGER_FILE,
    AskedCertificates,
    CertificateSource,
    StoredCertificates,
)
from shoal.node.config import MANIFEST_FILE
from shoal.node.ledger_store import LedgerStore, StoreError
from shoal.node.ledger_sync import make_rules
from shoal.node.manifest_source import read_manifest_file
from shoal.node.repair import abstains
from shoal.node.running import read_running
from shoal.node.status import fetch_status
from shoal.node.training.loss_units import find_loss_unit, write_loss
from shoal.protocol.errors import ConfigError, Failure, ProtocolError
from shoal.protocol.identity import Identity, PeerId, format_peer_id
from shoal.protocol.manifest import Manifest, read_manifest_untrusted
from shoal.protocol.wire import DELTA_BYTES_MAX, U63, Bound, decode_record_untrusted, encode_record

BATCHES_PER_PAGE = 64
PAGE_BYTES_MAX = 128 * 1024
ASK_TIMEOUT_S = 10.0
_NOBODY = bytes(32)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerPage:
    """What the daemon's web port answers: batches in the order of their storing, and where the next page begins."""

    base: Annotated[bytes, Bound(0, DELTA_BYTES_MAX)]
    batches: Annotated[tuple[Annotated[bytes, Bound(0, BATCH_BYTES_MAX)], ...], Bound(0, BATCHES_PER_PAGE)]
    last: U63


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSource:
    """Where the rows are, and how to go through them."""

    manifest: Manifest
    swarm: bytes
    where: str
    stored_bytes: int
    certificates: CertificateSource
    base: Callable[[], ChainBase | None]
    batches: Callable[[], Iterator[bytes]]
    abstains: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerView:
    """A source, read and folded."""

    source: LedgerSource
    ledger: Ledger
    state: LedgerState
    batches: tuple[Batch, ...]


@contextmanager
def open_source(data_dir: Path) -> Iterator[LedgerSource]:
    """Of a peer that runs or not. Raises ConfigError, StoreError, StatusError, each with what to do."""
    manifest_path, path = data_dir / MANIFEST_FILE, data_dir / LEDGER_FILE
    if not manifest_path.exists() or not path.exists():
        fix = "give the --data-dir of a peer that has taken part in a swarm"
        raise ConfigError("--data-dir", f"{data_dir} holds no ledger", fix)
    signed, swarm = read_manifest_file(manifest_path)
    manifest, _ = read_manifest_untrusted(signed, swarm)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    try:
        store = LedgerStore.open(path)
    except StoreError as error:
        if error.failure is not Failure.STORE_IN_USE:
            raise
        host, port = read_running(data_dir)
        asked = _AskedBatches(host, port)
        yield LedgerSource(
            manifest=manifest,
            swarm=swarm,
            where=f"the running peer at {host}:{port}",
            stored_bytes=size,
            certificates=AskedCertificates(host, port),
            base=asked.base,
            batches=asked.batches,
            abstains=any(Failure.VOTES_FORGOTTEN in text for text in fetch_status(host, port).warnings),
        )
        return
    with store:
        yield LedgerSource(
            manifest=manifest,
            swarm=swarm,
            where=str(path),
            stored_bytes=size,
            certificates=StoredCertificates(store),
            base=store.load_base,
            batches=lambda: _list_stored(store),
            abstains=abstains(store),
        )


def make_page(store: LedgerStore, base: ChainBase, after: int) -> bytes:
    """For the local web port: the batches after this position, as many as fit. Blocking."""
    kept: list[bytes] = []
    last, size = after, 0
    for position, encoded in store.list_batches(after, BATCHES_PER_PAGE):
        size += len(encoded)
        if kept and size > PAGE_BYTES_MAX:
            break
        kept.append(encoded)
        last = position
    summed = base.encode() if base.round and after <= 0 else b""
    return encode_record(LedgerPage(base=summed, batches=tuple(kept), last=last))


def _list_stored(store: LedgerStore) -> Iterator[bytes]:
    after = -1
    while rows := store.list_batches(after, BATCHES_PER_PAGE):
        yield from (encoded for _, encoded in rows)
        after = rows[-1][0]


class _AskedBatches:
    """Of a running daemon, page by page."""

    def __init__(self, host: str, port: int) -> None:
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}/ledger"

    def base(self) -> ChainBase | None:
        raw = self._ask(0).base
        return decode_base_untrusted(raw) if raw else None

    def batches(self) -> Iterator[bytes]:
        after = 0
        while (page := self._ask(after)).batches:
            yield from page.batches
            after = page.last

    def _ask(self, after: int) -> LedgerPage:
        # No proxy: one from the environment would be asked for this very machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self._url}?after={after}", timeout=ASK_TIMEOUT_S) as answer:
                raw = answer.read(DELTA_BYTES_MAX + 1)
            return decode_record_untrusted(LedgerPage, raw, DELTA_BYTES_MAX)
        except (OSError, urllib.error.URLError, http.client.HTTPException, ProtocolError) as error:
            fix = "stop it and try again: then its folder is read"
            raise ConfigError("--data-dir", f"the running daemon gives no ledger ({error})", fix) from error


def read_view(source: LedgerSource, progress: Tell) -> LedgerView:
    """Read and fold all of it. Raises ProtocolError where a row is not what it was when it was stored."""
    batches = []
    for raw in source.batches():
        batches.append(decode_batch_untrusted(raw))
        progress(f"read {len(batches):,} batches")
    ledger = Ledger(identity=Identity(_NOBODY), rules=make_rules(source.manifest, source.swarm))
    base = source.base()
    progress("checking certificates and folding")
    ledger.restore(batches, base)
    state = ledger.fold(time.time_ns() // 1_000_000)
    return LedgerView(source=source, ledger=ledger, state=state, batches=tuple(batches))


# -- show -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorRow:
    """One author: how much it wrote, of which kinds, and what it was credited with."""

    author: PeerId
    entries: int
    kinds: tuple[tuple[str, int], ...]
    newest: Hlc
    tokens: int
    rounds: int


def list_authors(view: LedgerView) -> tuple[AuthorRow, ...]:
    """Whoever wrote something or was credited with something, by entries and id."""
    entries: Counter[PeerId] = Counter()
    kinds: dict[PeerId, Counter[str]] = {}
    newest: dict[PeerId, Hlc] = {}
    for _, entry in list_entries(view):
        entries[entry.author] += 1
        kinds.setdefault(entry.author, Counter())[entry.kind] += 1
        newest[entry.author] = max(newest.get(entry.author, Hlc(0)), entry.hlc)
    credit = view.state.credit
    rows = []
    for author in {*entries, *credit}:
        had = credit.get(author)
        rows.append(
            AuthorRow(
                author=author,
                entries=entries[author],
                kinds=tuple(sorted(kinds.get(author, Counter()).items())),
                newest=newest.get(author, Hlc(0)),
                tokens=0 if had is None else had.tokens,
                rounds=0 if had is None else had.rounds,
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.entries, row.author)))


def list_entries(view: LedgerView) -> list[tuple[EntryId, Entry]]:
    """Every entry once, by its time and id: the same order wherever the same entries are."""
    entries = {
        entry_id: entry for batch in view.batches for entry_id, entry in zip(batch.ids, batch.entries, strict=True)
    }
    return sorted(entries.items(), key=lambda item: (item[1].hlc, item[0]))


def tell_ledger(view: LedgerView) -> Iterator[str]:
    """The lines of `shoal ledger show`."""
    source, state = view.source, view.state
    entries = list_entries(view)
    yield f"swarm         {source.manifest.name} ({source.swarm.hex()[:16]}…)"
    yield f"owner         {format_peer_id(source.manifest.owner)}"
    yield f"read from     {source.where}, {source.stored_bytes:,} bytes on the disk"
    waiting = f", {len(entries) - len(view.ledger):,} wait for others" if len(view.ledger) < len(entries) else ""
    yield f"entries       {len(entries):,} in {len(view.batches):,} batches{waiting}"
    newest = source.certificates.newest
    yield f"certified     {f'rounds to {newest:,}' if newest else 'no round yet'}"
    head = state.verdicts.head
    yield f"by entries    {f'rounds to {head.round:,}, era {state.verdicts.era}' if head.round else 'no round yet'}"
    if state.verdicts.contradiction is not None:
        yield f"CONTRADICTION round {state.verdicts.contradiction:,} is certified with two results"
    if source.abstains:
        yield f"ABSTAINING    {Failure.VOTES_FORGOTTEN}: this peer does not vote; see docs/operations.md"
    for tag in state.tags:
        if tag.name != HELD_OUT_TAG:
            yield f"tag           {_show_text(tag.name)} = {_show_bytes(tag.value)} (by {format_peer_id(tag.author)})"
    yield from _tell_measurements(view)
    for ban in state.verdicts.bans:
        yield f"ban           {format_peer_id(PeerId(ban.peer))}: {ban.reason or 'no reason given'}"
    for peer in sorted(state.verdicts.admitted):
        yield f"admitted      {format_peer_id(peer)}"
    for author, slot in sorted(state.excluded.items()):
        yield f"EQUIVOCATED   {format_peer_id(author)}, from entry {slot.seq} of era {slot.era} on nothing counts"
    yield ""
    yield f"{'author':<54} {'entries':>8} {'tokens':>14} {'rounds':>7}  newest entry      kinds"
    for row in list_authors(view):
        kinds = ", ".join(f"{count} {kind}" for kind, count in row.kinds)
        told = _show_time(row.newest) if row.entries else "-"
        named = format_peer_id(row.author)
        yield f"{named:<54} {row.entries:>8,} {row.tokens:>14,} {row.rounds:>7,}  {told:<17} {kinds}"


def _tell_measurements(view: LedgerView) -> Iterator[str]:
    measured = list_measurements(view.state, view.source.manifest.training.evaluate_every)
    unit = find_loss_unit(view.source.manifest.task.kind)
    for one in measured:
        said = one.held_out
        figure = f"round {said.round:,}: {write_loss(f'{said.loss_nats:.4f}', unit)} over {said.tokens:,} tokens"
        yield f"held out      {figure} (measured by {format_peer_id(one.author)})"
    others = sum(tag.name == HELD_OUT_TAG for tag in view.state.tags) - len(measured)
    if others:
        yield f"held out      {others:,} more: older, or not by whom their round names"


def _show_time(hlc: Hlc) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(wall_ms_of(hlc) / 1000))


def _show_text(text: str) -> str:
    """Others chose it, and it may hold what moves a terminal's cursor."""
    return text if text.isprintable() else ascii(text)


def _show_bytes(raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return raw.hex()
    return text if text.isprintable() else raw.hex()


# -- export -----------------------------------------------------------------------------------------------------------


def export_lines(view: LedgerView) -> Iterator[str]:
    """One JSON object for each entry, in the order of `list_entries`; the last one of a batch has its signature."""
    signatures = {batch.tip: batch.signature for batch in view.batches}
    for entry_id, entry in list_entries(view):
        signature = signatures.get(entry_id)
        line = {
            "id": entry_id.hex(),
            "author": format_peer_id(entry.author),
            "era": entry.era,
            "seq": entry.seq,
            "prev": entry.prev.hex(),
            "deps": [dep.hex() for dep in entry.deps],
            "hlc": entry.hlc,
            "kind": entry.kind,
            "says": _tell_body(entry),
            "body": entry.body.hex(),
            "signature": None if signature is None else signature.hex(),
        }
        yield json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def _tell_body(entry: Entry) -> dict[str, object]:
    """What the entry says, for whoever reads along; `body` has the bytes."""
    match decode_body_untrusted(entry.kind, entry.body):
        case RegisterBody(value=value):
            number = int.from_bytes(value, "big") if entry.kind == Kind.LEASE and len(value) == 8 else None
            return {"bytes": len(value)} if number is None else {"incarnation": number}
        case RoundBody(round=number, value=value):
            return {"round": number, "bytes": len(value)}
        case TagBody(name=name, value=value, removes=removes):
            if removes:
                return {"removes": [one.hex() for one in removes]}
            return {"name": name, "value": _show_bytes(value)} | _tell_held_out(name, value)
        case VersionedBody(version=version, value=value):
            return {"version": version, "bytes": len(value)}
        case BanBody(peer=peer, reason=reason, removes=removes):
            if removes:
                return {"lifts": [one.hex() for one in removes]}
            return {"peer": format_peer_id(PeerId(peer)), "reason": reason}
        case AdmissionBody(peers=peers):
            return {"peers": [format_peer_id(peer) for peer in peers]}
        case ReadmissionBody(author=author, era=era, stands=stands):
            return {"author": format_peer_id(author), "era": era, "stands": stands.hex()}


def _tell_held_out(name: str, value: bytes) -> dict[str, object]:
    if name != HELD_OUT_TAG:
        return {}
    try:
        said = decode_measurement_untrusted(value)
    except ProtocolError:
        return {}
    return {"round": said.round, "loss_nats": said.loss_nats, "tokens": said.tokens}
