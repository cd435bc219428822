"""A random machine of replicas, at the end of which all honest ones must be one.

Honest replicas and as many that lie, a network that loses, doubles, delays, reorders and replays and is cut in two,
crashes that forget what the disk had not been told to keep, disks put back from a backup, clocks that jump, eras that
end at different times. At any time each replica's state is compared with a model (`ledger_model.py`); when the network
has healed, all hold the same entries and fold them to the same bytes. SHOAL_NIGHTLY=1 runs many times the examples.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.crdt.certified import ChainBase
from shoal.crdt.clock import HLC_ZERO, Hlc, merge
from shoal.crdt.entries import (
    NO_ENTRY,
    Batch,
    ChainPosition,
    EntryContent,
    decode_batch_untrusted,
    encode_batch,
    sign_batch,
)
from shoal.crdt.eras import era_of_round, last_settled_round, oldest_kept
from shoal.crdt.evidence import check_evidence
from shoal.crdt.kinds import (
    BanBody,
    EntryId,
    Kind,
    ReadmissionBody,
    RegisterBody,
    RoundBody,
    TagBody,
    encode_body,
)
from shoal.crdt.ledger import Draft, Ledger
from shoal.crdt.reconciliation import answer, begin
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity
from tests.properties.ledger_drafts import (
    END_MS,
    ERA_LAST,
    HOUR_MS,
    NIGHTLY,
    SALT,
    START_MS,
    assert_folds_like_the_model_at_any_time,
    draft_certificate,
    forge_certificate,
    owners_drafts,
    peers_drafts,
    synchronize,
)
from tests.properties.ledger_model import (
    HONEST,
    LIARS,
    LOG,
    OWNER,
    ROUNDS_PER_ERA,
    RULES,
    assert_folds_like_the_model,
    list_entries,
    sum_up,
)


@dataclass(slots=True)
class Replica:
    """An honest peer: its ledger, its clock, its disk (what is durable is marked) and where the disk's base stands."""

    identity: Identity
    ledger: Ledger
    wall_ms: int = START_MS
    disk: list[tuple[Batch, bool]] = field(default_factory=list)
    base: ChainBase | None = None

    def receive(self, raw: bytes) -> None:
        self.keep(self.ledger.accept(decode_batch_untrusted(raw)).accepted)

    def keep(self, batches: Iterable[Batch]) -> None:
        self.disk.extend((batch, batch.author == self.identity.peer) for batch in batches)

    def truncate(self) -> None:
        before = self.ledger.fold(self.wall_ms).encode()
        done = self.ledger.truncate()
        assert self.ledger.fold(self.wall_ms).encode() == before, "it has dropped something that counts"
        if done is not None:
            young = [batch for batch, _ in self.disk if batch.era == 0 or batch.era >= done.oldest_era]
            self.disk = [(batch, True) for batch in (*young, *done.evidence)]
            self.base = done.base

    def settle(self, rounds: int) -> None:
        """Learn from its own log that so many rounds are certified."""
        if rounds > self.ledger.base.round:
            self.ledger.settle(sum_up(rounds))
            self.base = self.ledger.base
            self.disk = [(batch, True) for batch, _ in self.disk]

    def restart(self, forgotten: int) -> None:
        """Lose up to so many of the batches that were not stored with full durability."""
        while forgotten and self.disk and not self.disk[-1][1]:
            self.disk.pop()
            forgotten -= 1
        self.ledger = Ledger(identity=self.identity, rules=RULES)
        self.ledger.restore((batch for batch, _ in self.disk), self.base)


class SwarmMachine(RuleBasedStateMachine):
    """Two or three honest replicas, as many liars, and a network that is a bag of undelivered batches."""

    @initialize(count=st.integers(2, 3))
    def start(self, count: int) -> None:
        self.replicas = [
            Replica(identity=identity, ledger=Ledger(identity=identity, rules=RULES)) for identity in HONEST[:count]
        ]
        self.liars = LIARS[:count]
        self.network: list[tuple[int, bytes]] = []
        self.sent: list[bytes] = []
        self.lies: list[Batch] = []
        self.impossible: set[EntryId] = set()
        self.is_cut = False

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
        tags = [entry_id for entry_id, entry in list_entries(replica.ledger).items() if entry.kind == Kind.TAG]
        if tags:
            removes = st.lists(st.sampled_from(tags), min_size=1, max_size=3).map(tuple)
            bodies = st.builds(TagBody, name=st.just(""), value=st.just(b""), removes=removes)
            kinds = kinds | st.builds(Draft, kind=st.just(Kind.TAG), body=bodies)
        return data.draw(st.lists(kinds, min_size=1, max_size=3))

    def draw_decree(self, data: st.DataObject, owner: Replica) -> Draft:
        entries = list_entries(owner.ledger)
        kinds = owners_drafts
        bans = [entry_id for entry_id, entry in entries.items() if entry.kind == Kind.BAN]
        if bans:
            bodies = st.builds(
                BanBody, peer=st.just(b""), reason=st.just(""), removes=st.sampled_from(bans).map(lambda one: (one,))
            )
            kinds = kinds | st.builds(Draft, kind=st.just(Kind.BAN), body=bodies)
        lies = [entry_id for entry_id, entry in entries.items() if entry.author in owner.ledger.forks]
        if lies:
            words = st.sampled_from(sorted(lies)).map(
                lambda stands: ReadmissionBody(author=entries[stands].author, era=entries[stands].era, stands=stands)
            )
            kinds = st.one_of(kinds, *[st.builds(Draft, kind=st.just(Kind.READMISSION), body=words)] * 3)
        return data.draw(kinds)

    def write_batch(self, replica: Replica, drafts: list[Draft], crash: str) -> None:
        batch = replica.ledger.write(drafts, replica.wall_ms)
        if crash == "before storing":
            replica.restart(0)
            return
        replica.disk.append((batch, True))
        if crash == "after storing":
            replica.restart(0)
            return
        assert batch in replica.ledger.accept(batch).accepted
        self.publish(batch)

    @rule(data=st.data(), crash=st.sampled_from(["no", "no", "no", "before storing", "after storing"]))
    def write(self, data: st.DataObject, crash: str) -> None:
        replica = self.pick(data)
        self.write_batch(replica, self.draw_drafts(data, replica), crash)

    @rule(data=st.data(), crash=st.sampled_from(["no", "no", "before storing", "after storing"]))
    def decree(self, data: st.DataObject, crash: str) -> None:
        owner = self.replicas[0]
        assert owner.identity.peer == OWNER
        self.write_batch(owner, [self.draw_decree(data, owner)], crash)

    @rule(data=st.data(), count=st.integers(1, 3), signers=st.integers(2, 3))
    def certify(self, data: st.DataObject, count: int, signers: int) -> None:
        """Enter the next rounds of the log."""
        replica = self.pick(data)
        for _ in range(count):
            number = replica.ledger.fold(replica.wall_ms).verdicts.head.round + 1
            if number <= len(LOG):
                self.write_batch(replica, [draft_certificate(number, signers)], "no")

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        self.pick(data).truncate()

    @rule(data=st.data(), ahead=st.integers(0, 2))
    def catch_up(self, data: st.DataObject, ahead: int) -> None:
        """A peer's own log is ahead of its ledger by some eras."""
        replica = self.pick(data)
        era = min(replica.ledger.era + ahead, ERA_LAST)
        replica.settle(last_settled_round(era, ROUNDS_PER_ERA))

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
            outcome = replica.ledger.accept(decode_batch_untrusted(bytes(forged)))
        except ProtocolError:
            pass
        else:
            # The signature of what is known already, or too far ahead, is not looked at.
            assert outcome.is_known or outcome.is_early
        assert before == (list_entries(replica.ledger), replica.ledger.list_wanted())

    def choose_start(self, data: st.DataObject, liar: Identity) -> ChainPosition:
        """After any entry that the liar signed before, or at the beginning of any era."""
        own = [batch for batch in self.lies if batch.author == liar.peer]
        if own and data.draw(st.integers(0, 3)) > 0:
            batch = own[data.draw(st.integers(0, len(own) - 1))]
            index = data.draw(st.integers(0, len(batch.ids) - 1))
            entry = batch.entries[index]
            return ChainPosition(era=entry.era, seq=entry.seq + 1, prev=batch.ids[index], hlc=entry.hlc)
        eras = {1, *(one.ledger.era + ahead for one in self.replicas for ahead in (-1, 0, 1, 2)), 10**6} - {0}
        era = data.draw(st.sampled_from(sorted(eras)))
        return ChainPosition(era=era, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)

    @rule(
        data=st.data(),
        drafts=st.lists(
            peers_drafts
            | st.integers(1, len(LOG)).map(forge_certificate)
            | st.integers(1, len(LOG)).map(draft_certificate),
            min_size=1,
            max_size=2,
        ),
        ahead_ms=st.sampled_from([0, 0, 2 * HOUR_MS]),
        twist=st.sampled_from(["none"] * 6 + ["number", "time"]),
    )
    def lie(self, data: st.DataObject, drafts: list[Draft], ahead_ms: int, twist: str) -> None:
        """Sign something anywhere, naming what it likes, for one replica only."""
        liar = data.draw(st.sampled_from(self.liars))
        start = self.choose_start(data, liar)
        victim = data.draw(st.integers(0, len(self.replicas) - 1))
        known = list_entries(self.replicas[victim].ledger)
        is_foreign = data.draw(st.integers(0, 9)) == 0
        names = sorted(one for one, entry in known.items() if is_foreign or entry.era == start.era)
        deps = sorted(data.draw(st.sets(st.sampled_from(names), max_size=3))) if names else []
        hlc = merge(start.hlc, max((known[dep].hlc for dep in deps), default=HLC_ZERO), START_MS + ahead_ms)
        is_impossible = start.prev in self.impossible or any(known[dep].era != start.era for dep in deps)
        is_impossible = is_impossible or any(
            isinstance(draft.body, RoundBody)
            and draft.kind is Kind.CERTIFICATE
            and era_of_round(draft.body.round, ROUNDS_PER_ERA) > start.era
            for draft in drafts
        )
        if twist == "number" and start.seq:
            start = ChainPosition(era=start.era, seq=start.seq + 1, prev=start.prev, hlc=start.hlc)
            is_impossible = True
        elif twist == "time" and (start.seq or deps):
            hlc = max([start.hlc, *(known[dep].hlc for dep in deps)])
            is_impossible = True
        contents = [
            EntryContent(
                deps=tuple(deps) if index == 0 else (),
                hlc=Hlc(hlc + index),
                kind=draft.kind,
                body=encode_body(draft.body),
            )
            for index, draft in enumerate(drafts)
        ]
        batch = sign_batch(liar, RULES.swarm, start, contents)
        if is_impossible:
            self.impossible.update(batch.ids)
        self.lies.append(batch)
        self.sent.append(encode_batch(batch))
        self.network.append((victim, self.sent[-1]))

    @rule(data=st.data(), ahead=st.integers(0, 1))
    def make_up_a_round(self, data: st.DataObject, ahead: int) -> None:
        """A certificate by voters that nobody named, for a round near the newest one that a replica knows."""
        liar, victim = data.draw(st.sampled_from(self.liars)), self.pick(data)
        number = min(len(LOG), victim.ledger.fold(victim.wall_ms).verdicts.head.round + ahead or 1)
        era = max(victim.ledger.era, era_of_round(number, ROUNDS_PER_ERA))
        own = [batch for batch in self.lies if (batch.author, batch.era) == (liar.peer, era)]
        start = ChainPosition(era=era, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
        if own:
            last = own[-1]
            start = ChainPosition(era=era, seq=last.entries[-1].seq + 1, prev=last.tip, hlc=last.entries[-1].hlc)
        draft = forge_certificate(number)
        hlc = merge(start.hlc, HLC_ZERO, START_MS)
        content = EntryContent(deps=(), hlc=hlc, kind=draft.kind, body=encode_body(draft.body))
        batch = sign_batch(liar, RULES.swarm, start, [content])
        if start.prev in self.impossible:
            self.impossible.update(batch.ids)
        self.lies.append(batch)
        self.sent.append(encode_batch(batch))
        self.hand_over(victim, self.sent[-1])

    @rule(data=st.data(), ahead=st.integers(-1, 1), again=st.booleans())
    def equivocate(self, data: st.DataObject, ahead: int, again: bool) -> None:
        """Sign two things for one slot, each shown to some replica."""
        liar = data.draw(st.sampled_from(self.liars))
        era = max(1, self.pick(data).ledger.era + ahead)
        start = ChainPosition(era=era, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
        own = [batch for batch in self.lies if (batch.author, batch.era) == (liar.peer, era)]
        if own and again:
            last = data.draw(st.sampled_from(own))
            start = ChainPosition(era=era, seq=last.entries[-1].seq + 1, prev=last.tip, hlc=last.entries[-1].hlc)
        for side in range(2):
            body = encode_body(RegisterBody(value=bytes([side]) + data.draw(st.binary(max_size=1))))
            hlc = merge(start.hlc, HLC_ZERO, START_MS)
            contents = [EntryContent(deps=(), hlc=Hlc(hlc + index), kind=Kind.LEASE, body=body) for index in range(2)]
            batch = sign_batch(liar, RULES.swarm, start, contents)
            if start.prev in self.impossible:
                self.impossible.update(batch.ids)
            self.lies.append(batch)
            self.sent.append(encode_batch(batch))
            self.hand_over(self.pick(data), self.sent[-1])

    @rule(data=st.data(), position=st.integers(0, 10**6), change=st.integers(0, 255))
    def lie_in_a_comparison(self, data: st.DataObject, position: int, change: int) -> None:
        replica = self.pick(data)
        before = list_entries(replica.ledger)
        message = bytearray(begin(self.pick(data).ledger, SALT))
        message[position % len(message)] ^= change
        try:
            answer(replica.ledger, bytes(message))
        except ProtocolError:
            assert change
        assert list_entries(replica.ledger) == before

    @rule(data=st.data(), messages_max=st.integers(1, 8))
    def reconcile(self, data: st.DataObject, messages_max: int) -> None:
        one, other = self.pick(data), self.pick(data)
        if one is not other and not self.is_cut:
            synchronize(one.ledger, other.ledger, messages_max)
            self.store_what_is_new(one)
            self.store_what_is_new(other)

    @rule()
    def cut(self) -> None:
        """From now on nothing goes between honest replicas but what is on its way, or nothing stops it any more."""
        self.is_cut = not self.is_cut

    def store_what_is_new(self, replica: Replica) -> None:
        stored = {entry_id for batch, _ in replica.disk for entry_id in batch.ids}
        for entry_id in list_entries(replica.ledger):
            if entry_id not in stored:
                batch = replica.ledger.prove(entry_id)
                replica.keep([batch])
                stored.update(batch.ids)

    @rule(data=st.data(), forgotten=st.integers(0, 5))
    def crash(self, data: st.DataObject, forgotten: int) -> None:
        self.pick(data).restart(forgotten)

    @precondition(lambda self: not self.is_cut)
    @rule(data=st.data(), kept=st.integers(0, 10))
    def put_back_a_backup(self, data: st.DataObject, kept: int) -> None:
        """A disk that is older than what the peer has sent: before it writes, it fetches its own chain from the others.
        What nobody else holds cannot come back; the machine does not lose that."""
        replica = self.pick(data)
        others = [one for one in self.replicas if one is not replica]
        held = set[EntryId]().union(*(list_entries(one.ledger) for one in others))
        lost = replica.disk[kept:]
        if replica.base is not None or any(own and not held.issuperset(batch.ids) for batch, own in lost):
            return
        replica.disk = replica.disk[:kept]
        replica.restart(0)
        for one in others:
            replica.settle(last_settled_round(one.ledger.era, ROUNDS_PER_ERA))
        for _ in others:
            for one in others:
                synchronize(replica.ledger, one.ledger, messages_max=100)
                self.store_what_is_new(one)
        self.store_what_is_new(replica)

    @rule(data=st.data(), jump_ms=st.sampled_from([-HOUR_MS, -1, 1, 1000, HOUR_MS]))
    def jump(self, data: st.DataObject, jump_ms: int) -> None:
        self.pick(data).wall_ms += jump_ms

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        replica = self.pick(data)
        assert_folds_like_the_model(replica.ledger, replica.wall_ms)

    @invariant()
    def no_honest_peer_is_accused(self) -> None:
        for replica in getattr(self, "replicas", []):
            assert set(replica.ledger.forks) <= {one.peer for one in self.liars}

    def teardown(self) -> None:
        """Heal: everybody talks to everybody until nothing changes; then all must be one."""
        if not hasattr(self, "replicas"):
            return
        ledgers = [replica.ledger for replica in self.replicas]
        promised = {
            entry_id: batch.era for replica in self.replicas for batch, _ in replica.disk for entry_id in batch.ids
        }
        marks: list[tuple[int, int]] = []
        # What waits for another's entry at one replica reaches the next only once it is released: several passes.
        while marks != (now := [(ledger.era, len(ledger)) for ledger in ledgers]):
            marks = now
            newest = max(ledger.era for ledger in ledgers)
            for replica in self.replicas:
                if replica.ledger.era < newest:
                    replica.settle(last_settled_round(newest, ROUNDS_PER_ERA))
                replica.truncate()
            for one, other in combinations(ledgers, 2):
                synchronize(one, other, messages_max=100)
        entries = list_entries(ledgers[0])
        kept = {entry_id for entry_id, entry in entries.items() if entry.era == 0 or entry.era >= oldest_kept(newest)}
        assert {one for one, era in promised.items() if era == 0 or era >= oldest_kept(newest)} <= kept
        assert not self.impossible & kept
        for ledger in ledgers:
            assert list_entries(ledger) == entries
            assert_folds_like_the_model_at_any_time(ledger)
            assert len({other.fold(END_MS).digest() for other in ledgers}) == 1
            evidence = ledger.list_evidence()
            assert [proof.author for proof in evidence] == sorted(ledger.forks)
            for proof in evidence:
                check_evidence(proof)


SwarmMachine.TestCase.settings = settings(
    max_examples=3000 if NIGHTLY else 80,
    stateful_step_count=80 if NIGHTLY else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestSwarmMachine = SwarmMachine.TestCase
