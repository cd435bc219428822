import itertools
from collections.abc import Iterable

import pytest
from blake3 import blake3

from shoal.crdt import certified
from shoal.crdt.certified import (
    CREDIT_PEERS_MAX,
    CertifiedChain,
    ChainBase,
    Credit,
    CreditRecord,
    decode_base_untrusted,
    extend_base,
)
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.messages import Certificate, Vote, digest_record, verify_message
from shoal.protocol.quorum import QuorumRule
from shoal.protocol.wire import encode_record
from tests.unit.crdt.certificates import certify, make_authority, make_log, make_result, reroot

SWARM = b"s" * 32
OWNER, ANNA, BEN, CARL, EVE = (Identity(name * 32) for name in (b"o", b"a", b"b", b"c", b"e"))
VOTERS = [ANNA, BEN, CARL]
PEERS = [one.peer for one in VOTERS]
GENESIS = ChainBase(round=0, digest=SWARM, voters=tuple(PEERS))


def make_chain(rule: QuorumRule = QuorumRule.MAJORITY, base: ChainBase = GENESIS) -> CertifiedChain:
    return CertifiedChain(authority=make_authority(SWARM, OWNER.peer, rule), base=base, rounds_per_era=4)


def fill(certificates: Iterable[Certificate]) -> CertifiedChain:
    chain = make_chain()
    for certificate in certificates:
        chain.add(certificate.result.round, encode_record(certificate), 1)
    return chain


def list_digests(chain: CertifiedChain) -> list[int]:
    return sorted(chain.list_certificates(0))


def test_rounds_count_whatever_the_order_they_come_in() -> None:
    log = make_log(SWARM, VOTERS, 4)
    for order in itertools.permutations(log):
        chain = fill([*order, order[0]])
        assert list_digests(chain) == [1, 2, 3, 4]
        assert (chain.head.round, chain.head.digest) == (4, digest_record(log[3].result))
        assert chain.credit == {peer: Credit(tokens=40, rounds=4) for peer in PEERS}


def test_nothing_counts_behind_a_round_that_is_missing() -> None:
    log = make_log(SWARM, VOTERS, 4)
    chain = fill([log[0], log[2], log[3]])
    assert list_digests(chain) == [1]
    assert (chain.head.round, chain.newest_round) == (1, 1)
    chain.add(2, encode_record(log[1]), 1)
    assert list_digests(chain) == [1, 2, 3, 4]


def test_made_up_voters_displace_nobody() -> None:
    """What is signed by whom it names is not enough: the round before must name them."""
    true = make_log(SWARM, VOTERS, 2)
    invented = [
        certify(SWARM, make_result(1, SWARM, PEERS, {EVE.peer: 10**9}, nonce=nonce), [EVE]) for nonce in range(20)
    ]
    for order in ([*invented, *true], [*true, *invented]):
        chain = fill(order)
        assert list_digests(chain) == [1, 2]
        assert EVE.peer not in chain.credit


@pytest.mark.parametrize("fault", ["few", "doubled", "stranger", "signature", "previous", "round", "parts", "voters"])
def test_a_certificate_that_its_voters_did_not_decide_does_not_count(fault: str) -> None:
    result = make_result(1, SWARM, PEERS, {ANNA.peer: 5})
    good = certify(SWARM, result, [ANNA, BEN])
    assert list_digests(fill([good])) == [1]
    bad = {
        "few": certify(SWARM, result, [ANNA]),
        "doubled": Certificate(result=result, attempt=0, votes=(good.votes[0], good.votes[0])),
        "stranger": certify(SWARM, result, [ANNA, EVE]),
        "signature": Certificate(
            result=result,
            attempt=0,
            votes=(good.votes[0], Vote(voter=BEN.peer, round=1, attempt=0, result_digest=digest_record(result))),
        ),
        "previous": certify(SWARM, make_result(1, b"x" * 32, PEERS, {ANNA.peer: 5}), VOTERS),
        "round": certify(SWARM, make_result(2, SWARM, PEERS, {ANNA.peer: 5}), VOTERS),
        "parts": certify(SWARM, make_result(1, SWARM, PEERS, {}), VOTERS),
        "voters": certify(SWARM, make_result(1, SWARM, [EVE.peer], {ANNA.peer: 5}), VOTERS),
    }[fault]
    assert list_digests(fill([bad])) == []


def test_bytes_that_are_no_certificate_of_the_round_do_not_count() -> None:
    (certificate,) = make_log(SWARM, VOTERS, 1)
    chain = make_chain()
    for number, value in ((1, b""), (1, encode_record(certificate)[:-1]), (2, encode_record(certificate))):
        chain.add(number, value, 1)
    assert chain.head.round == 0


def test_two_thirds_must_sign_where_members_may_lie() -> None:
    result = make_result(1, SWARM, PEERS, {ANNA.peer: 5})
    chain = make_chain(QuorumRule.TWO_THIRDS)
    chain.add(1, encode_record(certify(SWARM, result, [ANNA, BEN])), 1)
    assert chain.head.round == 0
    chain.add(1, encode_record(certify(SWARM, result, VOTERS)), 1)
    assert chain.head.round == 1


def test_the_voters_that_a_round_names_decide_the_next_one() -> None:
    first = certify(SWARM, make_result(1, SWARM, [BEN.peer], {BEN.peer: 5}), VOTERS)
    alone = certify(SWARM, make_result(2, digest_record(first.result), [BEN.peer], {BEN.peer: 5}), [BEN])
    others = certify(SWARM, make_result(2, digest_record(first.result), PEERS, {ANNA.peer: 5}), [ANNA, CARL])
    assert list_digests(fill([others, first])) == [1]
    assert list_digests(fill([others, alone, first])) == [1, 2]


def test_of_one_results_certificates_the_one_with_the_lowest_hash_stands() -> None:
    result = make_result(1, SWARM, PEERS, {ANNA.peer: 5})
    pair = [certify(SWARM, result, signers) for signers in ([ANNA, BEN], [BEN, CARL], VOTERS)]
    values = {fill(order).list_certificates(0)[1] for order in itertools.permutations(pair)}
    assert len(values) == 1


def test_a_signature_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[PeerId] = []

    def count(peer: PeerId, swarm: bytes, vote: Vote) -> None:
        checked.append(peer)
        verify_message(peer, swarm, vote)

    monkeypatch.setattr(certified, "verify_message", count)
    result = make_result(1, SWARM, PEERS, {ANNA.peer: 5})
    pair = [certify(SWARM, result, signers) for signers in ([ANNA, BEN], [BEN, CARL], VOTERS)]
    fill(pair + pair)
    assert sorted(checked) == sorted(set(checked))


def test_credit_is_that_of_the_members_whose_work_is_in_a_part() -> None:
    tokens = {ANNA.peer: 7, BEN.peer: 9, EVE.peer: 11}
    result = make_result(1, SWARM, PEERS, tokens, included=frozenset({0, 2}))
    assert fill([certify(SWARM, result, VOTERS)]).credit == {
        ANNA.peer: Credit(tokens=7, rounds=1),
        EVE.peer: Credit(tokens=11, rounds=1),
    }


def test_of_two_logs_after_a_reroot_the_one_with_more_tokens_stands() -> None:
    common = make_log(SWARM, VOTERS, 1)
    parting = digest_record(common[0].result)
    old = make_log(SWARM, VOTERS, 2, previous=parting, first=2, tokens=10)
    new_voters = reroot(SWARM, 2, parting, [EVE], OWNER)
    new = make_log(SWARM, [EVE], 1, previous=digest_record(new_voters.result), first=3, tokens=1000)
    light = make_log(SWARM, [EVE], 1, previous=digest_record(new_voters.result), first=3, tokens=1)
    for order in itertools.permutations([*common, *old, new_voters, *new]):
        chain = fill(order)
        assert chain.head.digest == digest_record(new[-1].result)
        assert chain.credit[EVE.peer] == Credit(tokens=1000, rounds=1)
        assert chain.credit[ANNA.peer] == Credit(tokens=10, rounds=1)
    for order in itertools.permutations([*common, *old, new_voters, *light]):
        assert fill(order).head.digest == digest_record(old[-1].result)


def test_two_results_of_one_round_without_a_reroot_are_no_choice() -> None:
    common = make_log(SWARM, VOTERS, 1)
    parting = digest_record(common[0].result)
    sides = [certify(SWARM, make_result(2, parting, PEERS, {ANNA.peer: 5}, nonce=nonce), VOTERS) for nonce in range(2)]
    for order in itertools.permutations([*common, *sides]):
        chain = fill(order)
        assert (chain.head.round, chain.contradiction, chain.newest_round) == (1, 2, 2)


def test_a_truncated_chain_says_the_same_and_goes_on() -> None:
    log = make_log(SWARM, VOTERS, 9)
    whole, cut = fill(log[:6]), fill(log[:6])
    cut.truncate(4, 2)
    assert (cut.base.round, cut.base.digest) == (4, digest_record(log[3].result))
    assert cut.base.credit == tuple(CreditRecord(peer=one, credit=Credit(tokens=40, rounds=4)) for one in sorted(PEERS))
    for certificate in log:
        for chain in (whole, cut):
            chain.add(certificate.result.round, encode_record(certificate), 2)
    assert whole.head == cut.head and whole.head.round == 9
    assert whole.credit == cut.credit
    assert whole.list_certificates(4) == cut.list_certificates(4)
    assert extend_base(GENESIS, log[:4], 4) == cut.base
    assert decode_base_untrusted(cut.base.encode()) == cut.base


def test_what_waits_is_forgotten_with_its_era() -> None:
    log = make_log(SWARM, VOTERS, 8)
    chain = fill(log[:4])
    chain.add(7, encode_record(log[6]), 1)
    chain.add(8, encode_record(log[7]), 2)
    chain.truncate(4, 2)
    for number in (5, 6):
        chain.add(number, encode_record(log[number - 1]), 2)
    assert chain.head.round == 6
    chain.add(7, encode_record(log[6]), 2)
    assert chain.head.round == 8


def test_rounds_that_do_not_count_are_not_summed_up() -> None:
    chain = fill(make_log(SWARM, VOTERS, 3))
    chain.truncate(4, 2)
    assert (chain.base, chain.head.round) == (GENESIS, 3)


def test_credit_is_bounded_at_the_end_of_an_era() -> None:
    crowd = tuple(
        CreditRecord(peer=PeerId(number.to_bytes(32, "big")), credit=Credit(tokens=number, rounds=1))
        for number in range(1, CREDIT_PEERS_MAX + 1)
    )
    base = ChainBase(round=3, digest=b"d" * 32, voters=tuple(PEERS), credit=crowd)
    log = make_log(SWARM, VOTERS, 1, previous=b"d" * 32, first=4)
    after = extend_base(base, log, 4)
    assert len(after.credit) == CREDIT_PEERS_MAX
    assert {one.peer for one in crowd} - {one.peer for one in after.credit} == {one.peer for one in crowd[:3]} - set(
        PEERS
    )
    assert decode_base_untrusted(after.encode()) == after
    with pytest.raises(ProtocolError):
        decode_base_untrusted(after.encode()[:-1])


def test_only_signatures_are_taken_on_trust() -> None:
    result = make_result(1, SWARM, PEERS, {ANNA.peer: 5})
    unsigned = [
        Certificate(
            result=result,
            attempt=0,
            votes=tuple(Vote(voter=one, round=1, attempt=0, result_digest=digest_record(result)) for one in voters),
        )
        for voters in (PEERS, PEERS[:1])
    ]
    values = [encode_record(one) for one in unsigned]
    for trusted, head in ((values[:1], 1), (values[1:], 0), ([], 0)):
        chain = make_chain()
        chain.trusted = {blake3(value).digest() for value in trusted}
        for value in values:
            chain.add(1, value, 1)
        assert chain.head.round == head
