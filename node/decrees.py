"""The owner's word in the ledger: ban a peer, lift a ban, admit peers, re-admit one whose chain has two branches.

It is written into the folder of a peer that is not running; when that peer is started again, the others hear of it. The
owner has one chain of decrees for all time, so beside its key stands a note of where it ends: with a folder that has
not heard of the last decree yet, none is signed, because a chain with two branches is heard up to the first of them
and no further, for ever.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shoal.crdt.entries import Batch, Entry
from shoal.crdt.eras import PERMANENT_ERA
from shoal.crdt.key_set import KEY_END, KEY_FIRST, id_of_key
from shoal.crdt.kinds import (
    ADMISSIONS_MAX,
    TAG_REMOVALS_MAX,
    AdmissionBody,
    BanBody,
    Body,
    EntryId,
    Kind,
    ReadmissionBody,
    decode_body_untrusted,
)
from shoal.crdt.ledger import Draft, Ledger
from shoal.node.ban_watch import find_ban
from shoal.node.config import MANIFEST_FILE
from shoal.node.decree_exchange import list_chain
from shoal.node.durability import sync_path
from shoal.node.identity_file import load_identity
from shoal.node.ledger_store import LedgerStore
from shoal.node.ledger_sync import make_rules
from shoal.node.manifest_source import read_manifest_file
from shoal.protocol.admission import AdmissionRule
from shoal.protocol.errors import ConfigError, ProtocolError
from shoal.protocol.identity import Identity, PeerId, format_peer_id
from shoal.protocol.manifest import Manifest, read_manifest_untrusted
from shoal.protocol.wire import Bound, Bytes32, decode_record_untrusted, encode_record

CHAIN_SUFFIX = ".chain"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChainEnd:
    """The last decree that was signed with the key beside it, and how many there are."""

    count: Annotated[int, Bound(1, 2**32)]
    entry: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class AlreadyDecreed:
    """What was to be decreed is so already, as `text` says: by which decree of the owner. None is signed."""

    seq: int
    entry: EntryId
    text: str


def ban(data_dir: Path, owner_key: Path, peer: PeerId, reason: str, wall_ms: int) -> Batch | AlreadyDecreed:
    """From now on nothing counts that `peer` writes."""

    def draft(ledger: Ledger) -> Draft | AlreadyDecreed:
        if (held := find_ban(ledger.standing, peer)) is not None:
            told = f"{format_peer_id(peer)} is banned already ({held.reason or 'no reason given'})"
            found = _find_newest(ledger, told, lambda entry_id, body: entry_id == held.entry)
            assert found is not None, "a ban that holds is a decree of the chain"
            return found
        return Draft(kind=Kind.BAN, body=BanBody(peer=peer, reason=reason, removes=()))

    return _sign(data_dir, owner_key, draft, wall_ms)


def unban(data_dir: Path, owner_key: Path, peer: PeerId, wall_ms: int) -> Batch | AlreadyDecreed:
    """Lift all bans of this peer."""

    def draft(ledger: Ledger) -> Draft | AlreadyDecreed:
        bans = [one.entry for one in ledger.standing.bans if one.peer == peer]
        if not bans:
            decrees = _list_decrees(ledger)
            past = {entry_id for entry_id, _, body in decrees if isinstance(body, BanBody) and body.peer == peer}
            told = f"the ban of {format_peer_id(peer)} is lifted already"
            found = _find_newest(
                ledger, told, lambda _, body: isinstance(body, BanBody) and bool(past & {*body.removes})
            )
            if found is not None:
                return found
            raise ConfigError("PEER_ID", f"{format_peer_id(peer)} is not banned, as far as this folder knows", _START)
        return Draft(kind=Kind.BAN, body=BanBody(peer=b"", reason="", removes=tuple(bans[:TAG_REMOVALS_MAX])))

    return _sign(data_dir, owner_key, draft, wall_ms)


def admit(data_dir: Path, owner_key: Path, peers: Collection[PeerId], wall_ms: int) -> Batch | AlreadyDecreed:
    """Let these peers take part in a swarm that is not open. Those who are admitted already are left out."""
    rule = load_swarm(data_dir, owner_key).manifest.admission_rule
    if rule is AdmissionRule.OPEN:
        raise ConfigError("PEER_ID", 'this swarm is open (admission.rule = "open")', "let them join: nobody is refused")

    def draft(ledger: Ledger) -> Draft | AlreadyDecreed:
        fresh = sorted(frozenset(peers) - ledger.standing.admitted)
        if not fresh:
            named = " and ".join(map(format_peer_id, sorted(peers)))
            told = f"{named} {'is' if len(peers) == 1 else 'are'} admitted already"
            found = _find_newest(
                ledger, told, lambda _, body: isinstance(body, AdmissionBody) and bool({*peers} & {*body.peers})
            )
            assert found is not None, "who is admitted is so by a decree of the chain"
            return found
        if len(fresh) > ADMISSIONS_MAX:
            raise ConfigError("PEER_ID", f"{len(fresh)} peers", f"admit at most {ADMISSIONS_MAX} at once")
        return Draft(kind=Kind.ADMISSION, body=AdmissionBody(peers=tuple(fresh)))

    return _sign(data_dir, owner_key, draft, wall_ms)


def readmit(
    data_dir: Path, owner_key: Path, peer: PeerId, wall_ms: int, stands: EntryId | None = None
) -> Batch | AlreadyDecreed:
    """Forgive what this peer's chain contradicts itself in. `stands`: the last entry of the branch that counts; by
    default the longest branch."""

    def draft(ledger: Ledger) -> Draft | AlreadyDecreed:
        slot = ledger.forks.get(peer)
        if slot is None:
            told = f"{format_peer_id(peer)} is readmitted already"
            found = _find_newest(
                ledger,
                told,
                lambda _, body: (
                    isinstance(body, ReadmissionBody) and body.author == peer and stands in (None, body.stands)
                ),
            )
            if found is not None:
                return found
            problem = f"the chain of {format_peer_id(peer)} has no two branches, as far as this folder knows"
            raise ConfigError("PEER_ID", problem, _START)
        entries = _list_entries(ledger, peer)
        era = max(entry.era for entry in entries.values())
        # All eras up to the newest one that shows two branches; what comes after it is innocent.
        forked = [one for one in range(slot.era, era + 1) if _has_branches(entries, one)]
        named = entries.get(stands) if stands is not None else None
        if stands is not None and (named is None or named.era != forked[-1]):
            raise ConfigError("--entry", f"is no entry of this peer in era {forked[-1]}", "leave it out")
        body = ReadmissionBody(author=peer, era=forked[-1], stands=stands or _choose_branch(entries, forked[-1]))
        return Draft(kind=Kind.READMISSION, body=body)

    return _sign(data_dir, owner_key, draft, wall_ms)


_START = "start the peer of this folder until it has heard of everything, stop it, and try again"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedSwarm:
    """A swarm and the key of its owner."""

    manifest: Manifest
    swarm: bytes
    owner: Identity


def load_swarm(data_dir: Path, owner_key: Path) -> OwnedSwarm:
    """The swarm of a data folder, for whoever has its owner's key; raises ConfigError."""
    if not (data_dir / MANIFEST_FILE).exists():
        fix = "give the --data-dir of a peer that has taken part in the swarm"
        raise ConfigError("--data-dir", f"{data_dir} holds no manifest", fix)
    if not owner_key.exists():
        raise ConfigError("--owner-key", f"{owner_key} does not exist", "give the key that `shoal swarm create` made")
    signed, swarm = read_manifest_file(data_dir / MANIFEST_FILE)
    manifest, _ = read_manifest_untrusted(signed, swarm)
    owner = load_identity(owner_key)
    if owner.peer != manifest.owner:
        fix = "give the key that `shoal swarm create` made for this swarm"
        raise ConfigError("--owner-key", f"{owner_key} is not the key of this swarm's owner", fix)
    return OwnedSwarm(manifest=manifest, swarm=swarm, owner=owner)


def _sign(
    data_dir: Path, owner_key: Path, make_draft: Callable[[Ledger], Draft | AlreadyDecreed], wall_ms: int
) -> Batch | AlreadyDecreed:
    owned = load_swarm(data_dir, owner_key)
    with LedgerStore.open(data_dir / "ledger.sqlite") as store:
        ledger = Ledger(identity=owned.owner, rules=make_rules(owned.manifest, owned.swarm))
        ledger.restore(store.load(), store.load_base())
        end = _read_end(owner_key)
        if end is not None and ledger.next_seq(PERMANENT_ERA) < end.count:
            known = ledger.next_seq(PERMANENT_ERA)
            problem = f"this folder knows {known} of the owner's {end.count} decrees"
            raise ConfigError("--data-dir", problem, _START)
        draft = make_draft(ledger)
        if isinstance(draft, AlreadyDecreed):
            return draft
        batch = ledger.write([draft], wall_ms)
        # First the note: a decree that is noted and lost is missed, one that is not noted may be signed twice.
        _write_end(owner_key, _ChainEnd(count=batch.entries[-1].seq + 1, entry=batch.tip))
        store.append([batch], own=True)
    return batch


def _list_decrees(ledger: Ledger) -> list[tuple[EntryId, int, Body]]:
    """The owner's chain, as far as it is known, with the place of each decree in it."""
    entries = ((entry_id, ledger.get(entry_id)) for entry_id in list_chain(ledger))
    return [(one, entry.seq, decode_body_untrusted(entry.kind, entry.body)) for one, entry in entries if entry]


def _find_newest(ledger: Ledger, text: str, matches: Callable[[EntryId, Body], bool]) -> AlreadyDecreed | None:
    """The newest decree that matches, by which is so what the text says."""
    for entry_id, seq, body in reversed(_list_decrees(ledger)):
        if matches(entry_id, body):
            return AlreadyDecreed(seq=seq, entry=entry_id, text=text)
    return None


def _end_path(owner_key: Path) -> Path:
    return owner_key.with_suffix(CHAIN_SUFFIX)


def _read_end(owner_key: Path) -> _ChainEnd | None:
    path = _end_path(owner_key)
    try:
        return decode_record_untrusted(_ChainEnd, path.read_bytes())
    except FileNotFoundError:
        return None
    except ProtocolError as error:
        raise ConfigError(str(path), f"is damaged: {error}", f"delete it, and {_START}") from error


def _write_end(owner_key: Path, end: _ChainEnd) -> None:
    path = _end_path(owner_key)
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.write_bytes(encode_record(end))
        sync_path(draft)
        draft.replace(path)
        sync_path(path.parent)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written: {error.strerror}", "check the folder's rights") from error


def _list_entries(ledger: Ledger, author: PeerId) -> dict[EntryId, Entry]:
    found = ((id_of_key(key), ledger.get(id_of_key(key))) for key in ledger.keys.iterate(KEY_FIRST, KEY_END))
    return {entry_id: entry for entry_id, entry in found if entry is not None and entry.author == author}


def _has_branches(entries: dict[EntryId, Entry], era: int) -> bool:
    slots = [entry.seq for entry in entries.values() if entry.era == era]
    return len(set(slots)) < len(slots)


def _choose_branch(entries: dict[EntryId, Entry], era: int) -> EntryId:
    """The last entry of the longest branch; of several the one with the lowest id."""
    return min(
        (entry_id for entry_id, entry in entries.items() if entry.era == era),
        key=lambda entry_id: (-entries[entry_id].seq, entry_id),
    )
