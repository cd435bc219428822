"""A voter whose disk has forgotten what it signed, at a table of real round cores."""

import random
from dataclasses import replace
from typing import Any

import pytest

from shoal.protocol.abstention import ABSTAINING, FRESH_ATTEMPT, Abstention
from shoal.protocol.effects import AttemptFailed, Planned, Send
from shoal.protocol.errors import Failure
from shoal.protocol.messages import (
    Certificate,
    Certified,
    Plan,
    Prepare,
    Promise,
    Proposal,
    Result,
    Vote,
    digest_record,
    sign_message,
)
from shoal.protocol.quorum import QuorumRule, proposer_order
from tests.unit.protocol.round_table import Seat, Table, Travelling, nothing
from tests.unit.protocol.samples import IDENTITIES, PEERS, RULES, SWARM, make_head, make_presence, make_sample_result

BALLOTS = (Vote, Promise, Plan, Proposal, Prepare)
SEEDS = 30
STORM = 205  # one in which a vote that is forgotten matters


class ForgetfulTable(Table):
    """Says in presences who abstains."""

    def announce(self, seat: Seat, **changes: object) -> None:
        if seat.core.abstention is not None:
            changes.setdefault("phase", ABSTAINING)
        super().announce(seat, **changes)

    def forget(self, seat: Seat, *, abstains: bool = True) -> None:
        """The peer comes back with the log and without its vote record; `abstains` when it knows."""
        seat.vote = None
        if abstains:
            self.forgetful.add(seat.number)
        self.restart(seat)
        self.forgetful.discard(seat.number)

    def catch_up(self, behind: Seat) -> None:
        """The peer gets the rounds that it lacks."""
        best = max(self.up(), key=lambda seat: seat.core.head.round)
        for certificate in best.committed[len(behind.committed) :]:
            for part in certificate.result.parts:
                self.hold(behind, part.digest)
            self.hear(behind, certificate)

    def go_on(self, number: int) -> None:
        """Certify this round, everybody becoming ready for it."""
        self.make_ready(*(seat for seat in self.up() if seat.ready is None and seat.core.round == number))
        self.run(number)


def ballots_of(seat: Seat) -> list[Any]:
    return [one for kind in BALLOTS for one in seat.said(kind)]


@pytest.mark.parametrize("quorum", ["majority", "two_thirds"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_it_signs_nothing_for_two_rounds_after_the_open_one_and_then_votes_again(quorum: str, place: int) -> None:
    table = ForgetfulTable(rules=replace(RULES, quorum=quorum))
    table.beats = True
    table.go_on(1)
    seat = table.order()[place]
    table.forget(seat)
    assert seat.core.abstention is not None
    assert seat.core.abstention.until_round() == 4
    table.advance(RULES.presence_timeout_s)
    for number in (2, 3):
        table.go_on(number)
        assert [one for one in ballots_of(seat) if one.round < 4] == []
        assert not seat.did(Planned)
    assert seat.core.abstention is None
    for number in range(4, 10):
        table.go_on(number)
    assert seat.said(Vote)
    assert table.refusals == []


def test_nobody_waits_for_a_proposer_that_says_that_it_abstains() -> None:
    table = ForgetfulTable()
    table.beats = True
    table.go_on(1)
    head = table.seats[0].core.head
    lead, *others = (table.seat(peer) for peer in proposer_order(head.digest, head.voters))
    table.forget(lead)
    table.advance(RULES.presence_period_s)
    table.go_on(2)
    assert table.attempts(2) == {1}
    failed = [one for seat in others for one in seat.did(AttemptFailed)]
    assert {(one.reason, one.peer) for one in failed if one.round == 2} == {(Failure.PROPOSER_ABSTAINS, lead.peer)}


def split_history(*, abstains: bool) -> ForgetfulTable:
    """Two of three voters certify round 1; one of them dies with the certificate, the other one forgets."""
    table = ForgetfulTable(3)
    lead, second, third = table.order()
    table.make_ready()
    table.blocked = lambda effect, source, target: (
        isinstance(effect, Send)
        and (isinstance(effect.message, Certified) or (isinstance(effect.message, Proposal) and target is third))
    )
    table.settle()
    assert len(lead.committed) == 1
    table.kill(lead)
    table.blocked = nothing
    table.forget(second, abstains=abstains)
    third.ready = None
    table.beats = True
    table.restart(third)  # what it has heard of round 1 is gone, too, and it is ready with something else
    table.make_ready(second, third, label="other")
    table.advance(120)
    return table


def test_without_abstaining_there_would_be_two_results_of_a_round() -> None:
    table = split_history(abstains=False)
    lead, second, third = table.order()
    assert second.committed[0].result == third.committed[0].result != lead.committed[0].result


def test_abstaining_waits_for_whoever_may_know_more() -> None:
    table = split_history(abstains=True)
    lead, second, third = table.order()
    assert second.committed == third.committed == []
    table.restart(lead)
    for behind in (second, third):
        table.catch_up(behind)
    assert {seat.committed[0].result for seat in table.seats} == {lead.committed[0].result}


def test_of_two_voters_the_forgetful_one_goes_on_in_attempts_that_are_new_to_it() -> None:
    table = ForgetfulTable(2)
    table.beats = True
    table.go_on(1)
    first, _ = table.order()
    table.forget(first)
    table.advance(RULES.presence_timeout_s - 0.1)
    assert ballots_of(first) == []
    table.go_on(2)
    assert table.attempts(2) <= {FRESH_ATTEMPT, FRESH_ATTEMPT + 1, FRESH_ATTEMPT + 2}
    for number in (3, 4, 5, 6):
        table.go_on(number)
    assert first.core.abstention is None
    assert table.attempts(6) == {0}
    assert table.refusals == []


def test_of_two_voters_that_both_forgot_neither_goes_on() -> None:
    table = ForgetfulTable(2)
    table.beats = True
    table.go_on(1)
    for seat in table.seats:
        table.forget(seat)
    table.make_ready()
    table.advance(300)
    # The first that forgot is skipped by the other one, which is to forget yet.
    assert [one for seat in table.seats for one in ballots_of(seat) if not isinstance(one, Prepare)] == []
    assert [seat.core.head.round for seat in table.seats] == [1, 1]


def test_a_voter_that_is_alone_waits_for_the_owner() -> None:
    table = ForgetfulTable(2, voters=1)
    table.beats = True
    founder = table.order()[0]
    table.forget(founder)
    table.make_ready()
    table.advance(300)
    assert ballots_of(founder) == []
    assert founder.core.head.round == 0


def test_a_certificate_with_an_own_vote_that_the_record_lacks_gives_the_loss_away() -> None:
    table = ForgetfulTable()
    table.beats = True
    table.go_on(1)
    backups = [(seat.vote, seat.core.head) for seat in table.seats]
    table.go_on(2)
    certificate = table.seats[0].committed[1]
    seat = table.seat(certificate.votes[0].voter)
    vote, head = backups[seat.number]
    assert vote != seat.vote
    table.kill(seat)
    seat.up, seat.vote = True, vote
    seat.core = table.make_core(seat.number, head, vote)
    assert not seat.core.has_forgotten(seat.committed[0]), "its record is of that round or later"
    assert seat.core.has_forgotten(certificate)
    table.meet()
    table.hear(seat, certificate)
    assert seat.core.head.round == 2
    assert seat.core.abstention is not None


def test_a_peer_that_comes_back_with_its_record_votes_at_once() -> None:
    table = ForgetfulTable()
    table.beats = True
    for number in (1, 2, 3, 4):
        table.go_on(number)
        for seat in table.seats:
            table.restart(seat)
            assert not any(seat.core.has_forgotten(one) for one in seat.committed)
    assert all(seat.core.abstention is None for seat in table.seats)


class Storm:
    """Kinds of messages that do not arrive, a peer that hears of no proposal, changing from step to step."""

    def __init__(self, table: ForgetfulTable, source: random.Random) -> None:
        self._source = source
        rates = {kind: source.choice([0.0, 0.0, 0.5, 1.0]) for kind in (Certified, Vote, Promise)}
        rates[Certified] = source.choice([0.0, 1.0, 1.0])
        deaf = source.choice([None, *table.seats])

        def lose(effect: Travelling, sender: Seat, target: Seat) -> bool:
            message = getattr(effect, "message", None)
            if isinstance(message, Proposal) and target is deaf:
                return True
            return source.random() < rates.get(type(message), 0.0)

        table.blocked = lose


def weather_storms(seed: int, *, abstains: bool) -> dict[int, set[Result]]:
    """The results of each round that anybody certified, while peers die and come back and one of them forgets."""
    source = random.Random(seed)
    table = ForgetfulTable(source.choice([2, 3, 3, 3, 4, 5]))
    table.beats = True
    forgetful = source.choice(table.seats)
    for step in range(20):
        Storm(table, source)
        if not table.up():
            table.restart(source.choice(table.seats))
        for seat in table.up():
            if seat.ready is None:
                table.make_ready(seat, label=f"/{seed}/{step}/{seat.number}")
        table.advance(source.uniform(0, 8))
        for seat in table.seats:
            if seat is forgetful and source.random() < 0.3:
                if seat.up:
                    table.kill(seat)
                table.forget(seat, abstains=abstains)
            elif seat.up and source.random() < 0.15:
                table.kill(seat)
            elif not seat.up and source.random() < 0.3:
                table.restart(seat)
        # Whoever missed a round gets it as catch-up gives it.
        if source.random() < 0.5:
            for behind in table.up():
                table.catch_up(behind)
    results: dict[int, set[Result]] = {}
    for seat in table.seats:
        for certificate in seat.committed:
            results.setdefault(certificate.result.round, set()).add(certificate.result)
    return results


@pytest.mark.parametrize("seed", range(SEEDS))
def test_one_forgetful_voter_never_makes_two_results(seed: int) -> None:
    assert all(len(results) == 1 for results in weather_storms(seed, abstains=True).values())


def test_the_storms_would_make_two_results_without_abstaining() -> None:
    assert max(len(results) for results in weather_storms(STORM, abstains=False).values()) > 1
    assert all(len(results) == 1 for results in weather_storms(STORM, abstains=True).values())


def test_a_peer_whose_key_somebody_else_uses_abstains_for_good() -> None:
    table = ForgetfulTable()
    table.beats = True
    seat = table.order()[0]
    seat.core.abstain(table.now, for_good=True)
    assert seat.core.abstention is not None and seat.core.abstention.until_round() is None
    for number in range(1, 9):
        table.advance(RULES.presence_timeout_s)
        table.go_on(number)
    assert ballots_of(seat) == []
    pair = ForgetfulTable(2)
    pair.beats = True
    pair.seats[0].core.abstain(0.0, for_good=True)
    pair.make_ready()
    pair.advance(60)
    assert pair.seats[1].core.head.round == 0


def test_what_is_gossiped_late_does_not_count_as_news() -> None:
    abstention = Abstention(PEERS[0], 100.0, 7.0)
    abstention.observe(make_presence(1, 1, head_round=3), 101.0)
    abstention.observe(make_presence(1, 2, head_round=9), 106.0)
    assert abstention.until_round() == 12
    abstention.observe(make_presence(1, 3, head_round=11), 108.0)
    assert abstention.until_round() == 12


@pytest.mark.parametrize(
    ("signers", "head", "over"),
    [
        ((1, 2, 3), 3, True),
        ((1, 2, 3), 4, False),
        ((0, 1, 2), 3, False),
        ((0, 1, 2, 3), 3, True),
        ((1, 2, 4), 3, False),
    ],
)
def test_whose_word_ends_it(signers: tuple[int, ...], head: int, over: bool) -> None:
    abstention = Abstention(PEERS[0], 0.0, 7.0)
    for number in (1, 2, 3):
        abstention.observe(make_presence(number, 1, head_round=head), 1.0)
    result = make_sample_result(make_head(5, 4))
    digest = digest_record(result)
    votes = [Vote(voter=PEERS[number], round=5, attempt=2, result_digest=digest) for number in signers]
    signed = tuple(sign_message(IDENTITIES[number], SWARM, vote) for number, vote in zip(signers, votes, strict=True))
    certificate = Certificate(result=result, attempt=2, votes=signed)
    assert abstention.is_over(certificate, PEERS[:5], QuorumRule.MAJORITY) is over
    abstention.observe(make_presence(1, 2, head_round=head, phase=ABSTAINING), 2.0)
    assert not abstention.is_over(certificate, PEERS[:5], QuorumRule.MAJORITY)


# -- so many that the others are no quorum ----------------------------------------------------------------------------

TIMER_S = 60.0


def test_voters_who_abstain_for_as_long_as_the_timer_are_gone_on_without() -> None:
    table = ForgetfulTable(5, rules=replace(RULES, reroot_after_s=TIMER_S, peers_min=3))
    for seat in table.seats[3:]:
        table.kill(seat)
    forgetful = table.seats[2]
    table.forget(forgetful)
    table.make_ready()
    table.advance(TIMER_S - 1.0)
    assert all(seat.committed == [] and seat.said(Proposal) == [] for seat in table.up())
    table.advance(2.0 + 2 * RULES.commit_timeout_s)
    result = table.result()
    assert set(result.voters) == set(PEERS[:2]) and result.parts == ()
    assert ballots_of(forgetful) == [], "it signs no declaration either"
    assert forgetful.core.head.round == 1, "and follows the others"
    for number in (2, 3):
        table.make_ready()
        table.run(number)
    assert PEERS[2] in table.result(3).voters, "it contributes, and so votes again"
    assert forgetful.core.abstention is None


def test_one_who_abstains_among_enough_who_sign_starts_no_timer() -> None:
    table = ForgetfulTable(5, rules=replace(RULES, reroot_after_s=TIMER_S, peers_min=5))
    table.forget(table.seats[2])
    table.advance(10 * TIMER_S)  # nobody is ready, so nothing is certified
    assert all(seat.committed == [] and seat.said(Proposal) == [] for seat in table.up())


def test_an_abstention_that_ends_in_time_stops_the_timer() -> None:
    table = ForgetfulTable(5, rules=replace(RULES, reroot_after_s=TIMER_S))
    for seat in table.seats[3:]:
        table.kill(seat)
    table.forget(table.seats[2])
    table.advance(TIMER_S - 2.0)
    table.seats[2].vote = None
    table.restart(table.seats[2])  # with a core that does not abstain
    table.advance(3.0)
    assert all(seat.committed == [] and seat.said(Proposal) == [] for seat in table.up())
