"""The gate of a swarm that is not open: who waits before it, what they may do there, and how they get in."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from blake3 import blake3

from shoal.crdt.entries import Batch, encode_batch
from shoal.crdt.kinds import AdmissionBody, BanBody, Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger
from shoal.node import gate
from shoal.node.control import PeerUnreachable, RequestRefused
from shoal.node.decree_exchange import DECREES_PER_ANSWER, ask_decrees
from shoal.node.gate import ASKING_SHOWN_S, GRACE_S, PERIOD_S, WAITING_MAX
from shoal.node.intake import STRANGER_BURST
from shoal.node.ledger_sync import make_rules
from shoal.node.link_port import LinkLost
from shoal.node.reminders import REMIND_S
from shoal.protocol.admission import AdmissionProof, GetDecrees, issue_ticket, prove_admission
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import FrameHeader, FrameKind
from shoal.protocol.identity import PeerId, format_peer_id
from shoal.protocol.messages import (
    Evidence,
    GetManifest,
    GetPeers,
    LedgerEntries,
    ManifestAnswer,
    PeersAnswer,
    Plan,
    Prepare,
    Presence,
    Proposal,
    Reconcile,
    Refused,
    RosterEntry,
    decode_message_untrusted,
    encode_message,
)
from tests.unit.node.exposition import count_refused, read
from tests.unit.node.node_samples import Peer, Swarm, make_samples, open_peer, wait_until
from tests.unit.node.planes import MakeControl, in_memory, over_libp2p
from tests.unit.node.puppet import Puppet, open_puppet
from tests.unit.protocol.samples import IDENTITIES, PEERS, make_head, make_ready, make_sample_result

OWNER = IDENTITIES[0]
JOINER, OTHER = 3, 4


@asynccontextmanager
async def open_gate(
    folder: Path, rule: str, founders: int = 1, make_control: MakeControl = in_memory
) -> AsyncIterator[tuple[Peer, Puppet]]:
    """A founder, and a stranger who has connected to it."""
    swarm = make_samples(founders=founders, admission=rule)
    async with (
        open_peer(swarm, 0, folder, trains=True, make_control=make_control) as peer,
        open_puppet(swarm, JOINER, peer, make_control=make_control) as puppet,
    ):
        await wait_until(lambda: is_connected(peer, puppet))
        yield peer, puppet


def is_connected(peer: Peer, puppet: Puppet) -> bool:
    return puppet.me in {one.peer for one in peer.control.peers()}


def invite(swarm: Swarm, number: int, days: float = 1.0) -> AdmissionProof:
    ticket = issue_ticket(OWNER, swarm.id, b"t" * 32, int(time.time() + 86_400 * days))
    return prove_admission(ticket, swarm.id, PEERS[number])


def decree(swarm: Swarm, *bodies: AdmissionBody | BanBody) -> list[Batch]:
    """The owner's words, from its first on."""
    owner = Ledger(identity=OWNER, rules=make_rules(swarm.manifest, swarm.id))
    batches = []
    for body in bodies:
        kind = Kind.BAN if isinstance(body, BanBody) else Kind.ADMISSION
        batches.append(owner.write([Draft(kind=kind, body=body)], time.time_ns() // 1_000_000))
        owner.accept(batches[-1])
    return batches


def admit(peer: Peer, *numbers: int) -> None:
    """The owner's word reaches this peer's ledger."""
    body = AdmissionBody(peers=tuple(sorted(PEERS[number] for number in numbers)))
    for batch in decree(peer.swarm, body):
        peer.ledger.ledger.accept(batch)


def pass_grace(peer: Peer) -> None:
    peer.now_s = lambda: time.monotonic() + GRACE_S
    peer.gate.look()


async def show(peer: Peer, puppet: Puppet, proof: AdmissionProof | None) -> None:
    await puppet.tell(peer, puppet.make_presence(peer, admission=proof))


# -- who waits -------------------------------------------------------------------------------------------------------


async def test_a_gate_that_looks_when_the_intake_is_closed_tells_nobody_anything(tmp_path: Path) -> None:
    """The daemon ends its tasks a while after it has closed the intake."""
    async with open_gate(tmp_path, "listed") as (peer, puppet):
        await wait_until(lambda: peer.gate._waiting)
        peer.intake.close()
        pass_grace(peer)
        assert is_connected(peer, puppet) and not puppet.heard(Refused)


@pytest.mark.parametrize("rule", ["listed", "invited"])
async def test_of_a_stranger_nothing_is_taken_and_little_is_answered(tmp_path: Path, rule: str) -> None:
    async with open_gate(tmp_path, rule) as (peer, puppet):
        assert peer.intake.why_refused(puppet.me) is Refusal.NOT_ADMITTED
        raw = await puppet.control.request(peer.me, puppet.encode(GetManifest()))
        answer = decode_message_untrusted(peer.swarm.id, raw)
        assert isinstance(answer, ManifestAnswer) and answer.signed_manifest == peer.swarm.signed
        raw = await puppet.control.request(peer.me, puppet.encode(GetDecrees(first=0)))
        assert decode_message_untrusted(peer.swarm.id, raw) == LedgerEntries(payload=b"", batches=())
        for question in (GetPeers(), Reconcile(payload=b"")):
            with pytest.raises(RequestRefused) as caught:
                await puppet.control.request(peer.me, puppet.encode(question))
            assert caught.value.refusal is Refusal.NOT_ADMITTED
        await puppet.tell(peer, Prepare(round=1, attempt=0), LedgerEntries(payload=b"", batches=(b"x",)))
        await show(peer, puppet, None)
        await puppet.control.publish(puppet.encode(puppet.make_presence(peer)))
        await wait_until(lambda: count_refused(peer, "not_admitted", "control") == 6)
        header = FrameHeader(kind=FrameKind.CONTRIBUTION, round=1, part=0, nbytes=4, digest=blake3(bytes(4)).digest())
        with suppress(LinkLost):
            await puppet.push(peer, header, bytes(4))
        await wait_until(lambda: (puppet.me, Refusal.NOT_ADMITTED) in peer.tensor_refusals)
        assert puppet.me not in peer.membership.table.live() and peer.seen == []
        assert peer.conduct.refusal(puppet.me, peer.now_s()) is None, "it may mean well"
        assert is_connected(peer, puppet), "it may still show an invitation"


@pytest.mark.parametrize("make_control", [in_memory, over_libp2p], ids=["memory", "libp2p"])
async def test_a_stranger_that_has_waited_is_told_why_and_hung_up_on(tmp_path: Path, make_control: MakeControl) -> None:
    async with open_gate(tmp_path, "listed", make_control=make_control) as (peer, puppet):
        peer.gate.look()
        assert not puppet.heard(Refused)
        await show(peer, puppet, None)
        await wait_until(lambda: list(peer.gate.warnings()))
        pass_grace(peer)
        await wait_until(lambda: not is_connected(peer, puppet))
        assert [one.refusal for one in puppet.heard(Refused)] == ["not_admitted"]
        assert read(peer, "hang_ups_total", reason="not_admitted") == 1
        told = f"`shoal swarm admit {format_peer_id(puppet.me)}`"
        assert any(one.startswith("not_admitted") and told in one for one in peer.reporter.build_status().warnings)
        peer.now_s = lambda: time.monotonic() + GRACE_S + ASKING_SHOWN_S
        assert list(peer.gate.warnings()) == []


async def test_who_was_dialled_by_this_peer_or_is_its_bootstrap_stays_connected(tmp_path: Path) -> None:
    async with open_gate(tmp_path, "listed") as (peer, puppet), open_puppet(peer.swarm, OTHER) as other:
        peer.gate._bootstraps = frozenset((puppet.me,))
        await peer.control.connect(other.control.addresses())
        await wait_until(lambda: is_connected(peer, other))
        await wait_until(lambda: len(peer.gate._waiting) == 2)
        pass_grace(peer)
        await wait_until(lambda: puppet.heard(Refused) and other.heard(Refused))
        assert is_connected(peer, puppet) and is_connected(peer, other)
        assert peer.intake.refuses(puppet.me) and peer.intake.refuses(other.me)
        peer.gate.look()
        admit(peer, JOINER)
        peer.gate.look()
        await wait_until(lambda: puppet.me in {known.peer for known in peer.membership.book.ranked()})
        assert len(puppet.heard(Refused)) == 1 and peer.intake.refuses(other.me)


async def test_so_many_wait_and_the_oldest_goes_for_the_newest(tmp_path: Path) -> None:
    async with open_gate(tmp_path, "listed") as (peer, puppet):
        await wait_until(lambda: puppet.me in peer.gate._waiting)  # or it comes last, and goes when its time is over
        for number in range(WAITING_MAX):
            peer.gate.greet(PeerId(number.to_bytes(32, "big")))
        assert len(peer.gate._waiting) == WAITING_MAX and puppet.me not in peer.gate._waiting
        await wait_until(lambda: not is_connected(peer, puppet))


async def test_a_stranger_may_ask_a_few_times_and_then_slowly(tmp_path: Path) -> None:
    async with open_gate(tmp_path, "listed") as (peer, puppet):
        question = puppet.encode(GetManifest())
        for _ in range(STRANGER_BURST):
            await puppet.control.request(peer.me, question)
        with pytest.raises(PeerUnreachable, match="no answer within"):
            await puppet.control.request(peer.me, question, timeout_s=0.05)


# -- who is let in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_control", [in_memory, over_libp2p], ids=["memory", "libp2p"])
async def test_an_invitation_lets_its_peer_in_at_once(tmp_path: Path, make_control: MakeControl) -> None:
    async with open_gate(tmp_path, "invited", make_control=make_control) as (peer, puppet):
        await show(peer, puppet, invite(peer.swarm, JOINER))
        await wait_until(lambda: puppet.me in peer.membership.table.live())
        assert peer.intake.why_refused(puppet.me) is None
        pass_grace(peer)
        raw = await puppet.control.request(peer.me, puppet.encode(GetPeers()))
        answer = decode_message_untrusted(peer.swarm.id, raw)
        assert isinstance(answer, PeersAnswer) and puppet.me in {one.peer for one in answer.presences}
        assert not puppet.heard(Refused) and is_connected(peer, puppet)


async def test_an_invitation_of_somebody_else_or_of_another_swarm_does_not(tmp_path: Path) -> None:
    async with open_gate(tmp_path, "invited") as (peer, puppet):
        foreign = issue_ticket(OWNER, b"o" * 32, b"t" * 32, 2**40)
        for proof in (invite(peer.swarm, OTHER), prove_admission(foreign, b"o" * 32, puppet.me)):
            await show(peer, puppet, proof)
        await wait_until(lambda: count_refused(peer, "bad_signature", "control") == 2)
        await show(peer, puppet, invite(peer.swarm, JOINER, days=-1))
        await wait_until(lambda: count_refused(peer, "not_admitted", "control") == 3)
        assert peer.intake.refuses(puppet.me) and peer.membership.table.live() == {}


async def test_the_owners_word_lets_in_who_waits(tmp_path: Path) -> None:
    async with open_gate(tmp_path, "listed") as (peer, puppet):
        asked = []

        async def answer(asker: PeerId, raw: bytes) -> bytes:
            asked.append(decode_message_untrusted(peer.swarm.id, raw))
            raise ProtocolError(Refusal.NOT_READY, "a puppet")

        puppet.answer = answer
        admit(peer, JOINER)
        peer.gate.look()
        await wait_until(lambda: GetPeers() in asked)
        puppet.show(peer)
        assert puppet.me in peer.membership.table.live()


async def test_who_is_admitted_no_more_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PERIOD_S", PERIOD_S / 100)
    async with open_gate(tmp_path, "invited") as (peer, puppet):
        await show(peer, puppet, invite(peer.swarm, JOINER, days=1.0))
        await wait_until(lambda: puppet.me in peer.membership.table.live())
        peer.wall_s = lambda: time.time() + 2 * 86_400
        await wait_until(lambda: not is_connected(peer, puppet))
        await wait_until(lambda: puppet.me not in peer.membership.table.live())
        assert [one.refusal for one in puppet.heard(Refused)] == ["not_admitted"]


async def test_a_ban_beats_an_admission_and_an_invitation(tmp_path: Path) -> None:
    async with open_gate(tmp_path, "invited") as (peer, puppet):
        words = (AdmissionBody(peers=(puppet.me,)), BanBody(peer=puppet.me, reason="", removes=()))
        for batch in decree(peer.swarm, *words):
            peer.ledger.ledger.accept(batch)
        await show(peer, puppet, invite(peer.swarm, JOINER))
        await wait_until(lambda: count_refused(peer, "banned", "control") == 1)
        assert peer.intake.why_refused(puppet.me) is Refusal.BANNED


async def test_a_stranger_speaks_for_itself_alone(tmp_path: Path) -> None:
    async with open_gate(tmp_path, "invited", founders=2) as (peer, puppet), open_puppet(peer.swarm, 1) as founder:
        theirs = puppet.encode(founder.make_presence(peer))
        await puppet.control.send(peer.me, theirs)
        await wait_until(lambda: count_refused(peer, "not_admitted", "control") == 1)
        assert peer.membership.table.live() == {}
        peer.membership.take_presence(theirs, founder.me)
        assert set(peer.membership.table.live()) == {founder.me}


async def test_two_invited_peers_that_know_the_founder_alone_let_each_other_in(tmp_path: Path) -> None:
    swarm = make_samples(founders=1, admission="invited")
    swarm.proofs = {PEERS[number]: invite(swarm, number) for number in (JOINER, OTHER)}
    async with open_peer(swarm, JOINER, tmp_path) as ann, open_peer(swarm, OTHER, tmp_path) as bob:
        assert ann.intake.refuses(bob.me) and bob.intake.refuses(ann.me)
        await ann.connect(bob)
        await wait_until(lambda: bob.me in ann.membership.table.live() and ann.me in bob.membership.table.live())
        assert next(iter(ann.gate.warnings())).startswith("this peer's invitation ends in 24 h")


async def test_who_was_away_learns_from_a_stranger_that_it_is_none(tmp_path: Path) -> None:
    swarm = make_samples(founders=2, admission="listed")
    async with open_peer(swarm, 1, tmp_path) as founder, open_peer(swarm, JOINER, tmp_path) as joiner:
        admit(joiner, JOINER)
        assert founder.intake.refuses(joiner.me)
        await joiner.connect(founder)
        await wait_until(lambda: joiner.me in founder.membership.table.live())
        assert founder.ledger.ledger.standing.admitted == {joiner.me}


async def test_all_decrees_come_in_pages_and_nothing_else_does(tmp_path: Path) -> None:
    swarm = make_samples(founders=1, admission="listed")
    numbers = range(DECREES_PER_ANSWER + 3)
    bodies = [AdmissionBody(peers=(PeerId(number.to_bytes(32, "big")),)) for number in numbers]
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, JOINER, peer) as puppet:
        words = decree(swarm, *bodies)
        for batch in words:
            peer.ledger.ledger.accept(batch)
        async with open_peer(swarm, OTHER, tmp_path) as away:
            await away.connect(peer)
            await wait_until(lambda: len(away.ledger.ledger.standing.admitted) == len(bodies))

            async def answer(asker: PeerId, raw: bytes) -> bytes:
                own = Ledger(identity=IDENTITIES[JOINER], rules=make_rules(swarm.manifest, swarm.id))
                lease = own.write([Draft(kind=Kind.LEASE, body=RegisterBody(value=b"x"))], 1)
                return encode_message(swarm.id, LedgerEntries(payload=b"", batches=(encode_batch(lease),)))

            puppet.answer = answer
            await away.control.connect(puppet.control.addresses())
            with pytest.raises(ProtocolError) as caught:
                await ask_decrees(away.control, swarm.id, OWNER.peer, away.ledger, puppet.me)
            assert caught.value.refusal is Refusal.UNKNOWN_TYPE
            assert puppet.me not in away.ledger.state().leases


# -- who is refused --------------------------------------------------------------------------------------------------


async def test_who_is_refused_says_so_with_the_next_step_and_not_too_often(tmp_path: Path) -> None:
    swarm = make_samples(founders=1, admission="invited")
    async with open_peer(swarm, JOINER, tmp_path) as joiner, open_puppet(swarm, 0, joiner) as founder:
        refused = Refused(refusal="not_admitted", detail="ask the swarm's owner")
        await founder.tell(joiner, refused, refused)
        step = f"`shoal swarm admit {format_peer_id(joiner.me)}` or for an invitation"
        await wait_until(lambda: any("refuses this peer" in one.text for one in joiner.reporter.feed.recent))
        assert any(one.startswith("not_admitted: ") and step in one for one in joiner.reporter.build_status().warnings)
        joiner.now_s = lambda: time.monotonic() + REMIND_S
        await founder.tell(joiner, refused)
        await wait_until(lambda: sum(step in one.text for one in joiner.reporter.feed.recent) == 2)
        assert [one.text for one in joiner.reporter.feed.recent if "times more" in one.text], "it says what it left out"
        admit(joiner, JOINER)
        assert not any("not_admitted" in one for one in joiner.reporter.build_status().warnings)


# -- plans -----------------------------------------------------------------------------------------------------------


def make_plan(peer: Peer, *numbers: int) -> Plan:
    """Nobody has signed it: who looks at it closely finds something else to object to."""
    roster = tuple(RosterEntry(signed=make_ready(number, make_head()), weight=1.0) for number in numbers)
    head = peer.core.head
    return Plan(
        round=1,
        attempt=0,
        revision=0,
        previous=head.digest,
        base_root=head.state_root,
        codec="int8",
        roster=roster,
        owners=(0,) * peer.swarm.manifest.parts,
    )


async def test_a_plan_with_a_stranger_in_it_is_not_followed(tmp_path: Path) -> None:
    async with open_gate(tmp_path, "listed", founders=4) as (peer, puppet):
        objections = ("bad_signature", "wrong_proposer")
        await puppet.tell(peer, make_plan(peer, 0, JOINER))
        await wait_until(lambda: sum(count_refused(peer, one, "control") for one in objections) == 1)
        await puppet.tell(peer, make_plan(peer, 0, JOINER, OTHER))
        await wait_until(lambda: count_refused(peer, "not_admitted", "control") == 1)
        assert sum(count_refused(peer, one, "control") for one in objections) == 1, "it got no further"
        for batch in decree(peer.swarm, BanBody(peer=PEERS[1], reason="", removes=())):
            peer.ledger.ledger.accept(batch)
        await puppet.tell(peer, make_plan(peer, 1, JOINER))
        await wait_until(lambda: count_refused(peer, "banned", "control") == 1)


async def test_the_plan_behind_a_proposal_is_judged_and_a_lock_is_not(tmp_path: Path) -> None:
    async with open_gate(tmp_path, "listed") as (peer, _):
        result = make_sample_result(make_head())
        plan = make_plan(peer, 0, JOINER)
        for evidence, refused in (
            (Evidence(plan=plan, done=(), lock=None), [PEERS[JOINER]]),
            (Evidence(plan=None, done=(), lock=None), []),  # a lock of a quorum stands there
            (None, []),
        ):
            assert peer.gate.find_refused(Proposal(attempt=0, result=result, evidence=evidence)) == refused
        admit(peer, JOINER)
        assert peer.gate.find_refused(plan) == []


async def test_a_plan_is_followed_when_its_proposer_shows_who_the_stranger_is(tmp_path: Path) -> None:
    async with (
        open_gate(tmp_path, "invited", founders=4) as (peer, puppet),
        open_puppet(peer.swarm, OTHER) as stranger,
    ):
        shown = stranger.make_presence(peer, admission=invite(peer.swarm, OTHER))

        async def answer(asker: PeerId, raw: bytes) -> bytes:
            if isinstance(decode_message_untrusted(peer.swarm.id, raw), GetPeers):
                return puppet.encode(PeersAnswer(presences=(shown,)))
            raise ProtocolError(Refusal.UNKNOWN_TYPE, "a puppet")

        assert isinstance(shown, Presence)
        puppet.answer = answer
        await puppet.tell(peer, make_plan(peer, 0, JOINER, OTHER))
        objections = ("bad_signature", "wrong_proposer")
        await wait_until(lambda: sum(count_refused(peer, one, "control") for one in objections) == 1)
        assert count_refused(peer, "not_admitted", "control") == 0
        assert not peer.intake.refuses(stranger.me)
