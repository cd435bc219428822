"""Replicas that hear of the same entries hold the same ledger and fold it to the same bytes, whatever came between.

Two tests of that. The first states the laws of a join (commutative, associative, idempotent) over random histories. The
second is a random machine: honest replicas and one that lies, a network that loses, doubles, delays and replays,
crashes that forget what the disk had not been told to keep, clocks that jump. Both compare with a reference that
computes the state from the bare set of entries in one go.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations

from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.crdt.clock import HLC_ZERO, Hlc, is_due, merge
from shoal.crdt.entries import (
    NO_ENTRY,
    Batch,
    ChainPosition,
    Entry,
    EntryContent,
    decode_batch_untrusted,
    encode_batch,
    sign_batch,
)
from shoal.crdt.fold import LedgerState
from shoal.crdt.key_set import KEY_END, KEY_FIRST, id_of_key
from shoal.crdt.kinds import (
    EntryId,
    Kind,
    RegisterBody,
    RoundBody,
    TagBody,
    VersionedBody,
    decode_body_untrusted,
    encode_body,
)
from shoal.crdt.ledger import Draft, Ledger, LedgerRules, check_evidence
from shoal.crdt.merge import OwnerValue, RegisterValue, Tag
from shoal.crdt.reconciliation import answer, begin
from shoal.crdt.sketch import SALT_BYTES
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId

START_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
END_MS = START_MS + 1000 * HOUR_MS
IDENTITIES = [Identity(bytes([number]) * 32) for number in range(1, 6)]
LIAR = IDENTITIES[-1]
OWNER = IDENTITIES[0].peer


def is_valid(round_number: int, value: bytes) -> bool:
    return (round_number + len(value)) % 3 != 0


RULES = LedgerRules(swarm=b"s" * 32, owner=OWNER, is_valid_certificate=is_valid, is_valid_snapshot=is_valid)


def compute_reference_state(entries: dict[EntryId, Entry], wall_ms: int) -> LedgerState:
    """The state of this set of entries, without any of the code under test but the state's own encoding."""
    slots: dict[tuple[PeerId, int], list[EntryId]] = {}
    for entry_id, entry in entries.items():
        slots.setdefault((entry.author, entry.seq), []).append(entry_id)
    excluded: dict[PeerId, int] = {}
    for (author, seq), ids in slots.items():
        if len(ids) > 1:
            excluded[author] = min(seq, excluded.get(author, seq))
    counting = [
        (entry_id, entry, decode_body_untrusted(entry.kind, entry.body))
        for entry_id, entry in sorted(entries.items(), key=lambda item: item[1].seq)
        if is_due(entry.hlc, wall_ms) and entry.seq < excluded.get(entry.author, 2**63)
    ]
    rounds: dict[str, dict[int, set[bytes]]] = {Kind.CERTIFICATE: {}, Kind.SNAPSHOT: {}}
    for _, entry, body in counting:
        if isinstance(body, RoundBody) and is_valid(body.round, body.value):
            rounds[entry.kind].setdefault(body.round, set()).add(body.value)
    removals = {
        (removed, entry.author) for _, entry, body in counting if isinstance(body, TagBody) for removed in body.removes
    }
    tags = [
        Tag(name=body.name, value=body.value, author=entry.author, entry=entry_id)
        for entry_id, entry, body in counting
        if isinstance(body, TagBody) and body.name and not removals & {(entry_id, entry.author), (entry_id, OWNER)}
    ]
    decrees: dict[str, OwnerValue] = {}
    registers: dict[str, dict[PeerId, RegisterValue]] = {Kind.LEASE: {}, Kind.ADDRESSES: {}}
    for _, entry, body in counting:
        standing = decrees.get(entry.kind)
        if isinstance(body, VersionedBody) and (standing is None or standing.version < body.version):
            decrees[entry.kind] = OwnerValue(version=body.version, value=body.value)
        if isinstance(body, RegisterBody):
            registers[entry.kind][entry.author] = RegisterValue(seq=entry.seq, hlc=entry.hlc, value=body.value)
    return LedgerState(
        leases=registers[Kind.LEASE],
        addresses=registers[Kind.ADDRESSES],
        certificates={
            number: min(values, key=lambda value: blake3(value).digest())
            for number, values in rounds[Kind.CERTIFICATE].items()
        },
        snapshots={number: tuple(sorted(values)) for number, values in rounds[Kind.SNAPSHOT].items()},
        tags=tuple(sorted(tags, key=lambda tag: (tag.name, tag.entry))),
        manifest=decrees.get(Kind.MANIFEST),
        reroot=decrees.get(Kind.REROOT),
        excluded=excluded,
    )


def list_entries(ledger: Ledger) -> dict[EntryId, Entry]:
    entries = {}
    for key in ledger.keys.iterate(KEY_FIRST, KEY_END):
        entry = ledger.get(id_of_key(key))
        assert entry is not None
        entries[id_of_key(key)] = entry
    return entries


def assert_folds_like_the_reference(ledger: Ledger) -> None:
    entries = list_entries(ledger)
    for wall_ms in (END_MS, START_MS + HOUR_MS, START_MS, END_MS):
        assert ledger.fold(wall_ms).encode() == compute_reference_state(entries, wall_ms).encode()


def synchronize(opener: Ledger, other: Ledger, messages_max: int) -> None:
    """A session of anti-entropy that may be cut off after any message."""
    request: bytes | None = begin(opener, bytes(SALT_BYTES))
    asking, answering = opener, other
    for _ in range(messages_max):
        if request is None:
            return
        response = answer(answering, request)
        for raw in response.batches:
            asking.accept(decode_batch_untrusted(raw))
        asking, answering, request = answering, asking, response.reply


register_bodies = st.builds(RegisterBody, value=st.binary(max_size=3))
round_bodies = st.builds(RoundBody, round=st.integers(0, 3), value=st.binary(max_size=3))
versioned_bodies = st.builds(VersionedBody, version=st.integers(0, 3), value=st.binary(max_size=2))
tag_bodies = st.builds(TagBody, name=st.sampled_from(["best", "worst"]), value=st.just(b""), removes=st.just(()))
peers_drafts = st.one_of(
    st.builds(Draft, kind=st.sampled_from([Kind.LEASE, Kind.ADDRESSES]), body=register_bodies),
    st.builds(Draft, kind=st.sampled_from([Kind.CERTIFICATE, Kind.SNAPSHOT]), body=round_bodies),
    st.builds(Draft, kind=st.just(Kind.TAG), body=tag_bodies),
)
owners_drafts = st.builds(Draft, kind=st.sampled_from([Kind.MANIFEST, Kind.REROOT]), body=versioned_bodies)


# --- The laws of a join ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One writer, having taken in all of another's ledger or not, writes; `wall_ms` is its clock."""

    writer: int
    source: int | None
    drafts: list[Draft]
    wall_ms: int


# The last two writers share an identity and so equivocate as soon as both have written.
WRITERS = [*IDENTITIES, LIAR]
steps = st.lists(
    st.builds(
        Step,
        writer=st.integers(1, len(WRITERS) - 1),
        source=st.none() | st.integers(0, len(WRITERS) - 1),
        drafts=st.lists(peers_drafts, min_size=1, max_size=3),
        wall_ms=st.integers(START_MS - HOUR_MS, START_MS + 2 * HOUR_MS),
    )
    | st.builds(
        Step,
        writer=st.just(0),
        source=st.none() | st.integers(0, len(WRITERS) - 1),
        drafts=st.lists(peers_drafts | owners_drafts, min_size=1, max_size=3),
        wall_ms=st.integers(START_MS - HOUR_MS, START_MS + 2 * HOUR_MS),
    ),
    min_size=1,
    max_size=12,
)


def write_history(history: list[Step]) -> list[Batch]:
    writers = [Ledger(identity=identity, rules=RULES) for identity in WRITERS]
    batches = []
    for step in history:
        writer = writers[step.writer]
        if step.source is not None:
            merge_into(writer, writers[step.source])
        if WRITERS[step.writer].peer not in writer.forks:
            batches.append(writer.write(step.drafts, step.wall_ms))
            writer.accept(batches[-1])
    return batches


def make_replica(batches: Iterable[Batch]) -> Ledger:
    replica = Ledger(identity=Identity(b"r" * 32), rules=RULES)
    for batch in batches:
        replica.accept(batch)
    return replica


def merge_into(target: Ledger, source: Ledger) -> Ledger:
    for entry_id in list_entries(source):
        target.accept(source.prove(entry_id))
    return target


@settings(max_examples=100, deadline=None)
@given(history=steps, data=st.data())
def test_the_ledger_is_a_join(history: list[Step], data: st.DataObject) -> None:
    batches = write_history(history)
    choices = [data.draw(st.lists(st.sampled_from(batches))) for _ in range(3)]

    def replica(number: int) -> Ledger:
        # Made twice to leave behind what waits for something that was not chosen: it is not in the ledger.
        return merge_into(make_replica([]), make_replica(choices[number]))

    left = merge_into(merge_into(replica(0), replica(1)), replica(2))
    right = merge_into(replica(0), merge_into(replica(1), replica(2)))
    swapped = merge_into(merge_into(replica(2), replica(1)), replica(0))
    again = merge_into(merge_into(left, left), replica(1))
    assert list_entries(left) == list_entries(right) == list_entries(swapped) == list_entries(again)
    for ledger in (left, right, swapped, again):
        assert_folds_like_the_reference(ledger)


@settings(max_examples=100, deadline=None)
@given(history=steps, data=st.data())
def test_the_order_of_arrival_does_not_matter(history: list[Step], data: st.DataObject) -> None:
    batches = write_history(history)
    replica = make_replica(data.draw(st.permutations(batches + batches)))
    assert set(list_entries(replica)) == {entry_id for batch in batches for entry_id in batch.ids}
    assert replica.list_wanted() == ()
    assert_folds_like_the_reference(replica)


# --- The machine -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Replica:
    """An honest peer: its ledger, its disk (own batches marked) and its clock."""

    identity: Identity
    ledger: Ledger
    wall_ms: int = START_MS
    disk: list[tuple[Batch, bool]] = field(default_factory=list)

    def receive(self, raw: bytes) -> None:
        self.disk.extend((batch, False) for batch in self.ledger.accept(decode_batch_untrusted(raw)).accepted)

    def restart(self, forgotten: int) -> None:
        """Lose up to so many of the batches that were not stored with full durability."""
        while forgotten and self.disk and not self.disk[-1][1]:
            self.disk.pop()
            forgotten -= 1
        self.ledger = Ledger(identity=self.identity, rules=RULES)
        self.ledger.restore(batch for batch, _ in self.disk)


class SwarmMachine(RuleBasedStateMachine):
    """Two to four honest replicas, one liar without a replica, and a network that is a bag of undelivered batches."""

    @initialize(count=st.integers(2, 4))
    def start(self, count: int) -> None:
        self.replicas = [
            Replica(identity=identity, ledger=Ledger(identity=identity, rules=RULES)) for identity in IDENTITIES[:count]
        ]
        self.network: list[tuple[int, bytes]] = []
        self.sent: list[bytes] = []
        self.lies: list[Batch] = []
        self.impossible: set[EntryId] = set()

    def pick(self, data: st.DataObject) -> Replica:
        return self.replicas[data.draw(st.integers(0, len(self.replicas) - 1))]

    def publish(self, batch: Batch) -> None:
        raw = encode_batch(batch)
        self.sent.append(raw)
        self.network.extend((number, raw) for number in range(len(self.replicas)))

    def hand_over(self, replica: Replica, raw: bytes) -> None:
        try:
            replica.receive(raw)
        except ProtocolError:
            assert self.impossible & set(decode_batch_untrusted(raw).ids), "an honest batch was refused"

    def draw_drafts(self, data: st.DataObject, replica: Replica) -> list[Draft]:
        kinds = peers_drafts
        if replica.identity.peer == OWNER:
            kinds = kinds | owners_drafts
        tags = [entry_id for entry_id, entry in list_entries(replica.ledger).items() if entry.kind == Kind.TAG]
        if tags:
            removes = st.lists(st.sampled_from(tags), min_size=1, max_size=3).map(tuple)
            bodies = st.builds(TagBody, name=st.just(""), value=st.just(b""), removes=removes)
            kinds = kinds | st.builds(Draft, kind=st.just(Kind.TAG), body=bodies)
        return data.draw(st.lists(kinds, min_size=1, max_size=3))

    @rule(data=st.data(), crash=st.sampled_from(["no", "no", "no", "before storing", "after storing"]))
    def write(self, data: st.DataObject, crash: str) -> None:
        replica = self.pick(data)
        batch = replica.ledger.write(self.draw_drafts(data, replica), replica.wall_ms)
        if crash == "before storing":
            replica.restart(0)
            return
        replica.disk.append((batch, True))
        if crash == "after storing":
            replica.restart(0)
            return
        assert batch in replica.ledger.accept(batch).accepted
        self.publish(batch)

    @precondition(lambda self: self.network)
    @rule(data=st.data(), fate=st.sampled_from(["deliver", "deliver", "deliver", "double", "drop"]))
    def deliver(self, data: st.DataObject, fate: str) -> None:
        index = data.draw(st.integers(0, len(self.network) - 1))
        number, raw = self.network[index]
        if fate != "drop":
            self.hand_over(self.replicas[number], raw)
        if fate != "double":
            del self.network[index]

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        self.hand_over(self.pick(data), data.draw(st.sampled_from(self.sent)))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), position=st.integers(0, 10**6), change=st.integers(1, 255))
    def forge(self, data: st.DataObject, position: int, change: int) -> None:
        forged = bytearray(data.draw(st.sampled_from(self.sent)))
        forged[position % len(forged)] ^= change
        replica = self.pick(data)
        before = list_entries(replica.ledger), replica.ledger.list_wanted()
        try:
            outcome = replica.ledger.accept(decode_batch_untrusted(forged))
        except ProtocolError:
            pass
        else:
            # The signature of what is known already is not looked at again.
            assert outcome.is_known
        assert before == (list_entries(replica.ledger), replica.ledger.list_wanted())

    @rule(
        data=st.data(),
        drafts=st.lists(peers_drafts, min_size=1, max_size=2),
        ahead_ms=st.sampled_from([0, 0, 2 * HOUR_MS]),
        twist=st.sampled_from(["none"] * 6 + ["number", "time"]),
    )
    def lie(self, data: st.DataObject, drafts: list[Draft], ahead_ms: int, twist: str) -> None:
        """Sign something after any entry that the liar signed before, naming what it likes, for one replica only."""
        start = ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
        if self.lies and data.draw(st.integers(0, 7)):
            batch = data.draw(st.sampled_from(self.lies))
            index = data.draw(st.integers(0, len(batch.ids) - 1))
            entry = batch.entries[index]
            start = ChainPosition(seq=entry.seq + 1, prev=batch.ids[index], hlc=entry.hlc)
        victim = data.draw(st.integers(0, len(self.replicas) - 1))
        known = list_entries(self.replicas[victim].ledger)
        deps = sorted(data.draw(st.sets(st.sampled_from(sorted(known)), max_size=3))) if known else []
        hlc = merge(start.hlc, max((known[dep].hlc for dep in deps), default=HLC_ZERO), START_MS + ahead_ms)
        if twist == "number" and start.seq:
            start = ChainPosition(seq=start.seq + 1, prev=start.prev, hlc=start.hlc)
        elif twist == "time" and (start.seq or deps):
            hlc = max([start.hlc, *(known[dep].hlc for dep in deps)])
        else:
            twist = "none"
        contents = [
            EntryContent(
                deps=tuple(deps) if index == 0 else (),
                hlc=Hlc(hlc + index),
                kind=draft.kind,
                body=encode_body(draft.body),
            )
            for index, draft in enumerate(drafts)
        ]
        batch = sign_batch(LIAR, RULES.swarm, start, contents)
        if twist != "none":
            self.impossible.update(batch.ids)
        self.lies.append(batch)
        self.sent.append(encode_batch(batch))
        self.network.append((victim, self.sent[-1]))

    @rule(data=st.data(), messages_max=st.integers(1, 8))
    def reconcile(self, data: st.DataObject, messages_max: int) -> None:
        one, other = self.pick(data), self.pick(data)
        if one is not other:
            before = [len(one.ledger), len(other.ledger)]
            synchronize(one.ledger, other.ledger, messages_max)
            assert len(one.ledger) >= before[0] and len(other.ledger) >= before[1]
            self.store_what_is_new(one)
            self.store_what_is_new(other)

    def store_what_is_new(self, replica: Replica) -> None:
        stored = {entry_id for batch, _ in replica.disk for entry_id in batch.ids}
        for entry_id in list_entries(replica.ledger):
            if entry_id not in stored:
                batch = replica.ledger.prove(entry_id)
                replica.disk.append((batch, False))
                stored.update(batch.ids)

    @rule(data=st.data(), forgotten=st.integers(0, 5))
    def crash(self, data: st.DataObject, forgotten: int) -> None:
        self.pick(data).restart(forgotten)

    @rule(data=st.data(), jump_ms=st.sampled_from([-HOUR_MS, -1, 1, 1000, HOUR_MS]))
    def jump(self, data: st.DataObject, jump_ms: int) -> None:
        self.pick(data).wall_ms += jump_ms

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        replica = self.pick(data)
        entries = list_entries(replica.ledger)
        state = replica.ledger.fold(replica.wall_ms)
        assert state.encode() == compute_reference_state(entries, replica.wall_ms).encode()

    @invariant()
    def no_honest_peer_is_accused(self) -> None:
        for replica in getattr(self, "replicas", []):
            assert set(replica.ledger.forks) <= {LIAR.peer}

    def teardown(self) -> None:
        """Heal: everybody talks to everybody until nothing changes; then all must be one."""
        if not hasattr(self, "replicas"):
            return
        ledgers = [replica.ledger for replica in self.replicas]
        promised = {entry_id for replica in self.replicas for batch, _ in replica.disk for entry_id in batch.ids}
        sizes: list[int] = []
        # What waits for another's entry at one replica reaches the next only once it is released: several passes.
        while sizes != [len(ledger) for ledger in ledgers]:
            sizes = [len(ledger) for ledger in ledgers]
            for one, other in combinations(ledgers, 2):
                synchronize(one, other, messages_max=100)
        entries = list_entries(ledgers[0])
        assert promised <= set(entries)
        assert not self.impossible & set(entries)
        for ledger in ledgers:
            assert list_entries(ledger) == entries
            assert_folds_like_the_reference(ledger)
            assert len({other.fold(END_MS).digest() for other in ledgers}) == 1
            evidence = ledger.list_evidence()
            assert [proof.author for proof in evidence] == list(ledger.forks)
            for proof in evidence:
                check_evidence(proof)


SwarmMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestSwarmMachine = SwarmMachine.TestCase
