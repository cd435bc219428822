"""The newest round that counted this peer, by the certificates on its disk."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from shoal.node import own_rounds
from shoal.node.ledger_store import LedgerStore, StoredCertificate
from shoal.node.own_rounds import OwnRounds
from shoal.protocol.attendance import NO_ATTENDANCE, Counted
from shoal.protocol.identity import Identity
from shoal.protocol.messages import Result, digest_record
from shoal.protocol.quorum import Head
from shoal.protocol.wire import encode_record
from tests.unit.crdt.certificates import certify, make_result

SWARM = b"s" * 32
ANNA, BEN = Identity(b"a" * 32), Identity(b"b" * 32)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LedgerStore]:
    opened = LedgerStore.open(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def make_log(with_ben: Iterable[int], rounds: int, nonce: int = 0) -> list[Result]:
    """Rounds that all have Anna in them, and Ben where it is said; in round 2 he is a member that no part counts."""
    log: list[Result] = []
    counted = set(with_ben)
    for number in range(1, rounds + 1):
        previous = digest_record(log[-1]) if log else SWARM
        tokens = {ANNA.peer: 10} | ({BEN.peer: 10} if number in counted or number == 2 else {})
        included = frozenset(range(len(tokens))) if number in counted else frozenset({0})
        log.append(make_result(number, previous, [ANNA.peer], tokens, included=included, nonce=nonce))
    return log


def put(store: LedgerStore, log: Iterable[Result]) -> None:
    for result in log:
        body = encode_record(certify(SWARM, result, [ANNA]))
        store.put_certificate(StoredCertificate(round=result.round, result_digest=digest_record(result), body=body))


def head_of(log: list[Result]) -> Head:
    last = log[-1]
    return Head(round=last.round, digest=digest_record(last), state_root=bytes(32), voters=last.voters)


def counted_in(number: int) -> Counted:
    return Counted(round=number, attendance=NO_ATTENDANCE)


def test_the_newest_round_that_counts_it_is_found_also_after_a_restart(store: LedgerStore) -> None:
    log = make_log([1, 5, 9], 12)
    put(store, log)
    again = OwnRounds(store, BEN.peer)
    found = [again.find(head_of(log[:count])) for count in range(1, 13)]
    expected = [counted_in(number) for number in (1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9)]
    assert found == expected
    assert [OwnRounds(store, BEN.peer).find(head_of(log[:count])) for count in range(1, 13)] == expected
    assert OwnRounds(store, ANNA.peer).find(head_of(log)) == counted_in(12)
    assert OwnRounds(store, Identity(b"c" * 32).peer).find(head_of(log)) is None
    assert OwnRounds(store, BEN.peer).find(Head(round=0, digest=SWARM, state_root=bytes(32), voters=())) is None


def test_behind_a_gap_nothing_is_believed(store: LedgerStore) -> None:
    log = make_log([1, 5], 12)
    put(store, [one for one in log if one.round != 7])
    assert OwnRounds(store, BEN.peer).find(head_of(log)) is None
    own = OwnRounds(store, BEN.peer)
    assert own.find(head_of(log[:6])) == counted_in(5)
    assert own.find(head_of(log)) is None, "what was found before the gap counts no more"
    longer = make_log([1, 5, 13], 13)
    put(store, longer[12:])
    assert own.find(head_of(longer)) == counted_in(13)


def test_another_log_is_searched_anew(store: LedgerStore) -> None:
    log, other = make_log([1, 5, 8], 8), make_log([1, 3], 8, nonce=1)
    put(store, log)
    own = OwnRounds(store, BEN.peer)
    assert own.find(head_of(log)) == counted_in(8)
    store.abandon_certificates(1)
    put(store, other)
    assert own.find(head_of(other)) == counted_in(3)


def test_a_search_has_an_end(store: LedgerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_rounds, "SEARCHED_ROUNDS_MAX", 4)
    log = make_log([5], 12)
    put(store, log)
    assert OwnRounds(store, BEN.peer).find(head_of(log[:8])) == counted_in(5)
    assert OwnRounds(store, BEN.peer).find(head_of(log[:9])) is None
    own = OwnRounds(store, BEN.peer)
    for count in range(4, 13):
        own.find(head_of(log[:count]))
    assert own.find(head_of(log)) == counted_in(5), "who was there all the time remembers it"
