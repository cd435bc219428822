"""Two logs that part: where, whether that is lawful, and which one stays."""

from dataclasses import replace

import pytest

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.lineage import Weight, check_stretch, find_parting, is_lawful, weigh
from shoal.protocol.messages import Certificate, digest_record
from shoal.protocol.proposer import make_voters_result
from shoal.protocol.quorum import REROOT_ATTEMPT, Head
from tests.unit.protocol.samples import IDENTITIES, PEERS, SWARM, certify, make_authority, make_sample_result, make_vote

GENESIS = Head(round=0, digest=SWARM, state_root=b"r" * 32, voters=PEERS[:4])


def grow(count: int, label: str, head: Head = GENESIS, members: int = 3) -> list[Certificate]:
    """Consecutive certified rounds after `head`."""
    log = []
    for _ in range(count):
        certificate = certify(make_sample_result(head, members=members, label=label))
        log.append(certificate)
        head = after(certificate)
    return log


def after(certificate: Certificate) -> Head:
    result = certificate.result
    return Head(round=result.round, digest=digest_record(result), state_root=b"r" * 32, voters=result.voters)


def reroot(head: Head, voters: int) -> Certificate:
    """The owner names new voters after `head`."""
    result = make_voters_result(head, "int8", PEERS[:voters])
    return Certificate(result=result, attempt=REROOT_ATTEMPT, votes=(make_vote(IDENTITIES[0], result, REROOT_ATTEMPT),))


COMMON = grow(2, "common")
ONE = [*COMMON, *grow(2, "one", after(COMMON[1]))]
OTHER = [*COMMON, reroot(after(COMMON[1]), 2)]


def test_logs_part_at_the_first_round_with_two_results() -> None:
    assert find_parting(ONE, OTHER) == find_parting(OTHER, ONE) == 3
    assert find_parting(ONE, ONE) is None
    assert find_parting(ONE, COMMON) is None, "one is only longer"
    assert find_parting([], ONE) is None
    again = [replace(COMMON[0], votes=COMMON[0].votes[::-1]), *COMMON[1:]]
    assert find_parting(COMMON, again) is None, "two quorums for one result are no parting"


def test_logs_part_lawfully_by_a_reroot_only() -> None:
    assert is_lawful(ONE[2], OTHER[2]) and is_lawful(OTHER[2], ONE[2])
    lie = certify(make_sample_result(after(COMMON[1]), label="lie"))
    assert not is_lawful(ONE[2], lie), "a quorum has lied"


def test_a_log_weighs_the_tokens_that_are_in_it() -> None:
    assert weigh(ONE[2:]).tokens == 2 * 3 * 1000
    assert weigh(OTHER[2:]) == Weight(tokens=0, rounds=1, last_digest=digest_record(OTHER[2].result))
    assert weigh([]) == Weight(tokens=0, rounds=0, last_digest=b"")
    result = ONE[2].result
    parts = tuple(replace(part, contributors=b"\x01") for part in result.parts[1:])
    partly = replace(result, parts=(replace(result.parts[0], contributors=b"\x03"), *parts))
    assert weigh([certify(partly)]).tokens == 2 * 1000, "who is in any part counts once, who is in none does not"


def test_the_heavier_log_stays_and_there_is_always_one() -> None:
    many_tokens, many_rounds = grow(1, "a", members=4), [reroot(GENESIS, 2), reroot(GENESIS, 3)]
    assert weigh(many_tokens) > weigh(many_rounds), "tokens first"
    assert weigh([reroot(GENESIS, 2), reroot(GENESIS, 2)]) > weigh([reroot(GENESIS, 3)]), "then rounds"
    alike = [weigh([reroot(GENESIS, voters)]) for voters in (1, 2, 3)]
    assert len({one.last_digest for one in alike}) == len(set(alike)) == 3
    assert alike.index(max(alike)) == max(range(3), key=lambda place: alike[place].last_digest), "then the digest"


def test_a_stretch_is_checked_link_by_link_with_the_voters_that_it_names() -> None:
    authority = make_authority()
    check_stretch(SWARM, GENESIS.voters, ONE, authority)
    check_stretch(SWARM, GENESIS.voters, OTHER, authority)
    by_two = certify(make_sample_result(after(OTHER[2]), members=2), voters=2)
    check_stretch(SWARM, GENESIS.voters, [*OTHER, by_two], authority)
    few = [*COMMON, certify(ONE[2].result, voters=2)]
    for log, refusal in (
        (ONE[1:], Refusal.OTHER_LOG),
        ([COMMON[0], ONE[2]], Refusal.OTHER_LOG),
        (few, Refusal.NO_QUORUM),
        ([replace(COMMON[0], votes=OTHER[2].votes), *COMMON[1:]], Refusal.WRONG_ATTEMPT),
    ):
        with pytest.raises(ProtocolError) as caught:
            check_stretch(SWARM, GENESIS.voters, log, authority)
        assert caught.value.refusal is refusal
